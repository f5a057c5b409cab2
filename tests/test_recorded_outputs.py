"""transformers' recorded outputs, router logits and hidden states: hooks that the first call installs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusekit
from fusekit.session import session

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "use_cache": False,
}  # fmt: skip
TOKENS = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """The loss has a part that reads the routers' logits of every layer."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
        self.model = transformers.MixtralForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        result = self.model(input_ids=tokens, labels=tokens)
        return result.loss + result.aux_loss


class ValueHead(nn.Module):
    """As in PPO: a head on the last of the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        self.value = nn.Linear(32, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        result = self.model(input_ids=tokens, output_hidden_states=True)
        assert len(result.hidden_states) == 3
        return self.value(result.hidden_states[-1]).mean() + result.logits.square().mean()


@pytest.mark.parametrize("kind", [Experts, ValueHead])
def test_one_graph_from_the_first_call_on(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    eager = kind().train()
    model = fusekit.optimize(copy.deepcopy(eager))
    for _ in range(2):
        found = []
        for each in (eager, model):
            each.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="fusekit")
                loss = each(TOKENS)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
        for want, got in zip(*found, strict=True):
            assert (got - want).norm() <= 2e-5 * want.norm() + 1e-7
    assert len(session(model).regions) == 1 and not session(model).failures
