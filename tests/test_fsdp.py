"""Parameters sharded over two processes (FSDP2): gathered and freed around every block, never read stale."""

import json
from pathlib import Path

import pytest
from rank_checks import outputs_of

RANK = """
import json
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import fusekit
from fusekit.gpt import GPT, GPTConfig

where, precision = arguments
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))


def train(optimised):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=61, context=40, layers=2, width=64, heads=2))
    if optimised and where == "blocks":
        for block in model.blocks:
            fusekit.optimize(block, precision=precision)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    if optimised and where == "model":
        fusekit.optimize(model, precision=precision)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(6):
        generator = torch.Generator().manual_seed(2 * step + rank)
        tokens = torch.randint(61, (2, 39), generator=generator)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=not optimised and precision == "bf16")
        with autocast:
            loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = [p.full_tensor().sum().item() for p in model.parameters()]
    fused = len(fusekit.explain(model if where == "model" else model.blocks[0]).fused) if optimised else 0
    return losses, weights, fused


print(json.dumps([train(False), train(True)]))
"""


@pytest.mark.parametrize(
    ("where", "precision", "tolerance"),
    [("blocks", "keep", 1e-4), ("blocks", "bf16", 5e-3), ("model", "bf16", 5e-3)],
)
def test_sharded_training_is_eagers(where, precision, tolerance, tmp_path: Path):
    for output in outputs_of(RANK, tmp_path, where, precision):
        (eager, weights, _), (losses, ours, fused) = json.loads(output.splitlines()[-1])
        assert fused > 0
        assert losses == pytest.approx(eager, rel=tolerance)
        if precision == "keep":  # Adam makes steps of one size out of bfloat16's noise
            assert ours == pytest.approx(weights, rel=1e-2, abs=0.02)
