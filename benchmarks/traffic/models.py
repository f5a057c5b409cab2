"""Traffic of a model's training step, forward and backward: eager float32, eager bf16 autocast, fusekit bf16.

Without the optimizer, which all of them share. Fusekit's remainder runs eagerly here; on a GPU it is
Inductor's, which fuses more, so there fusekit moves less than what is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.traffic.counting import Counter, Counts, as_on_gpu, count_saved
from benchmarks.traffic.eager_gpu import gpu_autocast, gpu_norms
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.launch import Launch
from fusekit.optimize import optimize
from fusekit.session import SESSIONS

CONTENDERS = ("eager float32", "eager bf16", "fusekit bf16")
Batch = dict[str, Tensor]
Step = Callable[[], Tensor]


def _gpt() -> tuple[nn.Module, Batch]:
    tokens = torch.zeros(8, 256, dtype=torch.int64)
    return GPT(GPTConfig(tied=False)), {"tokens": tokens, "targets": tokens}


def _hugging_face(name: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, name.split("For")[0] + "Config")(**sizes)
    config.use_cache = False
    return getattr(transformers, name)(config)


def _llama() -> tuple[nn.Module, Batch]:
    model = _hugging_face(
        "LlamaForCausalLM", hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=8192, max_position_embeddings=512,
    )  # fmt: skip
    tokens = torch.zeros(4, 512, dtype=torch.int64)
    return model, {"input_ids": tokens, "labels": tokens}


def _bert() -> tuple[nn.Module, Batch]:
    model = _hugging_face(
        "BertForMaskedLM", hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tokens = torch.zeros(16, 128, dtype=torch.int64)
    return model, {"input_ids": tokens, "labels": tokens}


def _vit() -> tuple[nn.Module, Batch]:
    model = _hugging_face(
        "ViTForImageClassification", hidden_size=192, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=3, num_labels=100,
    )  # fmt: skip
    return model, {"pixel_values": torch.zeros(16, 3, 224, 224), "labels": torch.zeros(16, dtype=torch.int64)}


# Name, with the batch; how it is made.
MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "GPT, 8×256 tokens": _gpt,
    "Llama, 4×512 tokens": _llama,
    "BERT-mini, 16×128 tokens": _bert,
    "ViT-tiny, 16 images of 224²": _vit,
}


def count_models(names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each model."""
    for name in names or list(MODELS):
        yield count_model(name, *MODELS[name]())


def count_model(name: str, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Every contender's counts. The model's Parameters become fake; its values do not matter."""
    mode = FakeTensorMode()
    batch = {key: mode.from_tensor(value) for key, value in batch.items()}
    make_fake(model, mode)
    row: dict[str, Any] = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}

    def step() -> Tensor:
        return loss_of(model(**batch))

    with mode, as_on_gpu() as launches:
        row["eager float32"] = _eager(model, step, launches, gpu_norms).to_dict()
        row["eager bf16"] = _eager(model, step, launches, lambda: gpu_autocast(torch.bfloat16)).to_dict()
        row["fusekit bf16"] = _optimised(model, step, launches).to_dict()
    return row


def loss_of(returned: Any) -> Tensor:
    """Of a model that returns (logits, loss), or an object with a loss."""
    return returned[1] if isinstance(returned, tuple) else returned.loss


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace Parameters and buffers by fake ones, shared ones by the same."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = made.setdefault(id(tensor), mode.from_tensor(tensor))


def _eager(model: nn.Module, step: Step, launches: list[Launch], around: Callable[[], Any]) -> Counts:
    counts = Counts()
    with Counter(counts.forward, launches), count_saved(counts, model.parameters()), around():
        loss = step()
    return _backward(model, loss, counts, launches)


def _optimised(model: nn.Module, step: Step, launches: list[Launch]) -> Counts:
    """The captured graph's second run: Dynamo captures nothing while a dispatch mode is on, so it comes in
    between the compiled frame and the graph."""
    optimize(model, precision="bf16", remainder="eager")
    capture = SESSIONS[model].capture
    step()
    if len(capture.regions) != 1 or capture.failures:
        raise ValueError(
            f"{type(model).__name__} is captured in {len(capture.regions)} graphs, and only what is in a "
            f"single one can be counted"
        )
    counts, region = Counts(), capture.regions[0]
    run = region._run

    def counted(*args: Any) -> Any:
        with Counter(counts.forward, launches), count_saved(counts, model.parameters()):
            return run(*args)

    region._run = counted
    return _backward(model, step(), counts, launches)


def _backward(model: nn.Module, loss: Tensor, counts: Counts, launches: list[Launch]) -> Counts:
    with Counter(counts.backward, launches):
        loss.backward()
    model.zero_grad()
    return counts
