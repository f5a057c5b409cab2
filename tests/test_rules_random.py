"""Random programs of spellings that rules know and of what may spoil them: eager's results and gradients.

A program is a list of steps on a (2, 6, 8) stream. Some are spellings of fused ops, the others are chosen to
spoil a match: another reader, a write in place, a detach, a cast, a broadcast, a view, a swapped dimension.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rule_checks import capture, sites
from torch import Tensor, nn

WIDTH, HEADS, LENGTH = 8, 2, 6
EXAMPLES = 10  # half a second each on an idle processor; raise it after work on the rules
EVERY_OP = ["linear, gelu", "sum, layer norm", "attention", "rms norm"]


class Program(nn.Module):
    """The steps in order; `self.seen` keeps every stage, for steps that read one again."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.steps = steps
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) * 0.5)
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH, generator=generator) * 0.5)
        self.g = nn.Parameter(torch.rand(WIDTH, generator=generator) + 0.5)
        self.b = nn.Parameter(torch.randn(WIDTH, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        h, self.seen = x * self.g, [x]
        for name in self.steps:
            self.seen = [*self.seen, h]
            h = STEPS[name](self, h)
        del self.seen
        return h

    def heads(self, h: Tensor) -> tuple[Tensor, ...]:
        parts = F.linear(h, self.qkv).view(2, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return parts.unbind(0)


def _joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(2, LENGTH, WIDTH)


def _written(change: Callable[[Tensor], Tensor], dim: int = -1) -> Callable[[Program, Tensor], Tensor]:
    def step(p: Program, h: Tensor) -> Tensor:
        q, k, v = p.heads(h)
        return _joined(torch.softmax(change((q @ k.transpose(-2, -1)) / 2.0), dim) @ v)

    return step


def _called(mask: Callable[[], Tensor], **options: bool) -> Callable[[Program, Tensor], Tensor]:
    def step(p: Program, h: Tensor) -> Tensor:
        return _joined(F.scaled_dot_product_attention(*p.heads(h), attn_mask=mask(), **options))

    return step


def _causal() -> Tensor:
    return torch.arange(LENGTH)[None, :] <= torch.arange(LENGTH)[:, None]


def _window() -> Tensor:
    return _causal() & (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :] < 3)


def _prefix() -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:, :3] = True
    return mask


def _rms(h: Tensor, dim: int = -1) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(dim, keepdim=True) + 1e-3)


def _in_place(p: Program, h: Tensor) -> Tensor:
    h = h * 1.0
    h.mul_(0.5)
    return h


def _written_view(p: Program, h: Tensor) -> Tensor:
    h = h.clone()
    h.view(-1)[:5] = 0.25
    return h


def _without_grad(p: Program, h: Tensor) -> Tensor:
    with torch.no_grad():
        return F.gelu(F.linear(h, p.w, p.b))


STEPS: dict[str, Callable[[Program, Tensor], Tensor]] = {
    "linear": lambda p, h: F.linear(h, p.w, p.b),
    "linear without bias": lambda p, h: F.linear(h, p.w),
    "matmul": lambda p, h: h @ p.w + p.b,
    "linear, gelu": lambda p, h: F.gelu(F.linear(h, p.w, p.b)),
    "linear, relu, sum": lambda p, h: F.relu(F.linear(h, p.w)) + h,
    "linear, sum": lambda p, h: h + F.linear(h, p.w, p.b),
    "linear, sum of itself": lambda p, h: (lambda y: F.silu(y) + y)(F.linear(h, p.w)),
    "sum, layer norm": lambda p, h: F.layer_norm(h + p.seen[-2], (WIDTH,), p.g, p.b),
    "gelu": lambda p, h: F.gelu(h),
    "gelu, tanh form": lambda p, h: 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * h**3))),
    "gelu, another constant": lambda p, h: 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.044715 * h**3))),
    "relu": lambda p, h: F.relu(h),
    "silu": lambda p, h: h * torch.sigmoid(h),
    "gate by the last stage": lambda p, h: h * torch.sigmoid(p.seen[-2]),
    "add the last stage": lambda p, h: h + p.seen[-2],
    "add the input": lambda p, h: p.seen[0] + h,
    "add twice": lambda p, h: torch.add(h, p.seen[-2], alpha=2),
    "add a row": lambda p, h: h + p.b,
    "add a broadcast stage": lambda p, h: h + p.seen[-2][:1],
    "layer norm": lambda p, h: F.layer_norm(h, (WIDTH,), p.g, p.b),
    "layer norm, large epsilon": lambda p, h: F.layer_norm(h, (WIDTH,), p.g, None, 0.3),
    "rms norm": lambda p, h: p.g * _rms(h),
    "rms norm, 1 + weight": lambda p, h: _rms(h) * (1.0 + p.g),
    "rms norm, 2 + weight": lambda p, h: _rms(h) * (2.0 + p.g),
    "rms norm over the tokens": lambda p, h: p.g * _rms(h, 1),
    "attention": _written(lambda s: s),
    "attention, causal": _written(lambda s: s.masked_fill(~_causal(), -math.inf)),
    "attention, -1e9": _written(lambda s: s.masked_fill(~_window(), -1e9)),
    "attention, added": _written(lambda s: s + torch.full((LENGTH, LENGTH), -1e9).triu(1)),
    "attention over the queries": _written(lambda s: s, dim=-2),
    "attention called": _called(lambda: None),  # type: ignore[arg-type, return-value]
    "attention called, causal": _called(lambda: None, is_causal=True),  # type: ignore[arg-type, return-value]
    "attention called, mask": _called(_causal),
    "attention called, window": _called(_window),
    "attention called, prefix": _called(_prefix),
    "attention called, number mask": _called(lambda: _causal().float()),
    "read again": lambda p, h: h + p.seen[-1].sum() * 0.1,
    "detach": lambda p, h: h.detach() + p.b,
    "cast": lambda p, h: h.double().float(),
    "times one": lambda p, h: h * 1.0,
    "swapped and back": lambda p, h: (h.transpose(0, 1) + p.b).transpose(0, 1),
    "reshaped": lambda p, h: h.reshape(LENGTH, 2, WIDTH).reshape(2, LENGTH, WIDTH),
    "tokens reversed": lambda p, h: h.flip(1),
    "written in place": _in_place,
    "written through a view": _written_view,
    "without gradients": lambda p, h: h + _without_grad(p, h),
}

fused: Counter[str] = Counter()


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@example(EVERY_OP)
@example(["linear, sum of itself", "attention called, prefix", "written through a view", "rms norm"])
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=6))
def _check_one(steps: list[str]) -> None:
    model = Program(steps)
    twin = copy.deepcopy(model)
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = model(inputs[0])
    result, regions = capture(twin, inputs[1])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert result.stride() == expected.stride()
    fused.update(sites(regions))
    direction = torch.linspace(-1.0, 1.0, expected.numel()).view(expected.shape)
    for output in (expected, result):
        if output.requires_grad:
            output.backward(direction)
    pairs = [
        (*inputs, "x"),
        *zip(model.parameters(), twin.parameters(), dict(model.named_parameters()), strict=True),
    ]
    for a, b, name in pairs:
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            scale = 1e-4 * (1.0 + a.grad.abs().max().item())
            torch.testing.assert_close(
                b.grad, a.grad, rtol=1e-3, atol=scale, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_random_programs_have_eagers_results_and_gradients() -> None:
    _check_one()
    assert min(fused[op] for op in ("linear_act", "attention", "add_layer_norm", "add_rms_norm")) > 0, fused
