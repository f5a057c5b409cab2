"""A layer as LoRA adapts it, for tests of what surrounds such layers."""

from torch import Tensor, nn


class Adapted(nn.Module):
    """A frozen layer with a low-rank update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 2.0
