"""precision="auto" on two processes: what one rank sees counts for all, and one may look alone."""

from __future__ import annotations

from pathlib import Path

from auto_checks import PLANTED
from rank_checks import outputs_of

RANK = """
import fusekit
from fusekit.passes import cost
from fusekit.precision_guard import Guard
from auto_checks import AutoPrecision, levels, planted, tokens
cost.EAGER_OVERHEAD = cost.FUSED_OVERHEAD = {"cpu": 0.0, "cuda": 0.0}
model = planted()
if rank == 0:  # the other rank alone sees outliers
    model.blocks[1].expand.factor.fill_(1.0)
fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=2))
for step in range(3):
    model(tokens(step), tokens(step))[1].backward()
    fusekit.auto_precision(model).step()
guard = Guard()
for value in [1.0] * 30 + [9.0 if rank else 1.0] * 3:
    guard.add((value, None))
print(levels(model), guard.alarms(joined_on=torch.device("cpu")))
"""


BRANCHES = """
from torch import nn
import fusekit

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x, branch):
        inner = self.a(x) if branch == 0 else self.b(x) if branch == 1 else self.b(self.a(x))
        return self.c(x + inner.sin())

torch.manual_seed(0)
model = Branches()
automatic = fusekit.AutoPrecision(mode="adaptive", every=2, calibration=2, emulate=True)
fusekit.optimize(model, precision=automatic)
controller = fusekit.auto_precision(model)
parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
optimizer = torch.optim.SGD(model.parameters(), 0.0)
for step in range(8):
    parallel(torch.randn(16, 32), rank * (1 + (step >= 4))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:  # as a rank does that alone saves and prints
        controller.plan, controller.state_dict(), str(fusekit.explain(model))
parallel(torch.randn(16, 32), 0)
for name, layer in controller._layers.items():
    print(name, [(unit.level, unit.samples) for unit in layer.units.values()])
"""


SOME = """
from torch import nn
import fusekit
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
automatic = fusekit.AutoPrecision(every=5, calibration=2, emulate=True)
fusekit.optimize(model, precision=automatic)
controller = fusekit.auto_precision(model)
optimizer = torch.optim.SGD(model.parameters(), 0.0)
for step in range(42):
    model(torch.randn(16, 32)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:  # as a loop does in which one rank alone knows the loss
        controller.step(50.0 if 30 <= step < 33 else 1.0)
    dist.all_reduce(torch.ones(1))  # the loop's own, as of a loss that it prints
print(controller.steps, controller.plan.guarded)
"""


def test_ranks_decide_together_on_the_worst_of_them(tmp_path: Path) -> None:
    first, second = outputs_of(RANK, tmp_path)
    assert first == second and f"'{PLANTED}': (1, " in first
    assert first.strip().endswith("} 1")  # an alarm of one is one of all


def test_ranks_that_run_other_layers_agree_and_one_may_look_alone(tmp_path: Path) -> None:
    first, second = outputs_of(BRANCHES, tmp_path)
    assert first == second and [line[0] for line in first.splitlines()] == list("ab")  # c is the head


def test_a_loss_that_one_rank_alone_tells_counts_for_all(tmp_path: Path) -> None:
    """The guard asks all ranks, whoever was told of a loss: none waits for another."""
    assert outputs_of(SOME, tmp_path) == ["42 True\n"] * 2
