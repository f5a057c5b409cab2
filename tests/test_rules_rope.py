"""Rules of rope and rms_norm_rope: spellings of models and hand-written ones, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_checks import check, reasons, sites
from torch import Tensor, nn

from fusekit.kernels.rope import tables

B, T, H, D = 2, 6, 3, 8


class Rotated(nn.Module):
    """A projection into heads, rotated by `rotation(x, cos, sin)`; x (B, H, T, D) or (B, T, H, D)."""

    def __init__(self, rotation: Callable[..., Any], cos: Tensor, sin: Tensor, by_head: bool = True) -> None:
        super().__init__()
        self.rotation, self.by_head = rotation, by_head
        self.linear = nn.Linear(16, H * D)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.linear(hidden).view(B, T, H, D)
        x = x.transpose(1, 2) if self.by_head else x
        return self.rotation(x, self.cos, self.sin) * 2.0


def rotated(
    rotation: Callable[..., Any], columns: int = D, repeat: str = "none", by_head: bool = True
) -> Any:
    torch.manual_seed(0)
    cos, sin = tables("cpu", torch.float32, T, columns, repeat)
    if not by_head:
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return check(Rotated(rotation, cos, sin, by_head), torch.randn(B, T, 16))


def arguments(regions: list[Any], name: str) -> list[tuple[Any, ...]]:
    nodes = (n for r in regions for n in r.module.graph.nodes if "fusion" in n.meta)
    return [n.args for n in nodes if n.meta["fusion"].op == name]


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (rotate_half(x) * sin)


def chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return cos * x + sin * torch.cat((-b, a), dim=3)


def gpt_oss(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def nanochat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d = x.shape[3] // 2
    a, b = x[..., :d], x[..., d:]
    return torch.cat([a * cos + b * sin, a * (-sin) + b * cos], 3).to(x.dtype)


def every_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def torchtune(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    out = torch.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], -1
    )
    return out.flatten(3).type_as(x)


def unbound(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angles = torch.view_as_complex(torch.stack((cos, sin), -1))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles).flatten(3).type_as(x)


def neox(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    part, rest = x[..., :rotary], x[..., rotary:]
    return torch.cat([part * cos + rotate_half(part) * sin, rest], -1)


SPELLINGS: dict[str, tuple[Callable[..., Any], int, str, bool, dict[str, Any]]] = {
    "llama": (llama, D, "halves", True, {}),
    "llama, positions before heads": (llama, D, "halves", False, {}),
    "chunk": (chunked, D, "halves", True, {}),
    "gpt-oss": (gpt_oss, D // 2, "none", True, {}),
    "split": (split, D // 2, "none", False, {}),
    "nanochat": (nanochat, D // 2, "none", False, {}),
    "rotate_every_two": (every_two, D, "pairs", False, {"interleaved": True}),
    "neighbours": (neighbours, D // 2, "none", True, {"interleaved": True}),
    "torchtune": (torchtune, D // 2, "none", False, {"interleaved": True}),
    "unbind": (unbound, D // 2, "none", True, {"interleaved": True}),
    "complex": (complex_numbers, D // 2, "none", False, {"interleaved": True}),
    "partial": (neox, 4, "halves", True, {"rotary": 4}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    rotation, columns, repeat, by_head, expected = SPELLINGS[name]
    regions = rotated(rotation, columns, repeat, by_head)
    assert sites(regions) == {"rope": 1}, reasons(regions)
    ((x, _, _, interleaved, rotary),) = arguments(regions, "rope")
    assert x.meta["val"].shape[-1] == D, "a partial rotation takes the whole head"
    assert (interleaved, rotary) == (expected.get("interleaved", False), expected.get("rotary", D))
