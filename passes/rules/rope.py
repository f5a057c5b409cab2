r"""Rotary position embedding: rows of rope and rms_norm_rope.

    y_a = a cos - b sin,   y_b = b cos + a sin

for one tensor: q and k are two sites. cos and sin are whatever broadcasts to x, so position ids, scaled
frequencies and the dimension at which the heads are unsqueezed need no rows of their own. `finish` takes a
partial rotation whole: where x is a slice and the result is put back in front of the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fusekit.passes.gradient import needs_gradient
from fusekit.passes.pattern import Match, New, Rule
from fusekit.passes.rules import norm
from fusekit.passes.spelling import Start, spell, value_of

aten = torch.ops.aten

FULL = {"x": "* 2*R", "cos": "any * 2*R", "sin": "any * 2*R"}
HALF = {"x": "* 2*R", "cos": "any * R", "sin": "any * R"}
COMPLEX = {"x": "* 2*R", "angles": "any complex * R"}
Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def reshaped(x: Tensor) -> tuple[Tensor, Tensor]:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = halves(x)
    return x * cos + torch.cat((-b, a), -1) * sin


def rotate_every_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = neighbours(x)
    return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin


def turned_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = halves(x)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By the negative angle, so sin is negated."""
    a, b = halves(x)
    return torch.cat((a * cos + b * sin, a * -sin + b * cos), -1)


def turned_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = neighbours(x)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def turned_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As turned_reshaped, every part taken out where it is used."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    y_a = pairs[..., 0] * cos - pairs[..., 1] * sin
    return torch.stack((y_a, pairs[..., 1] * cos + pairs[..., 0] * sin), -1).flatten(-2)


def turned_reshaped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = reshaped(x)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def complex_product(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.to(torch.float32).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


def in_float32(rotation: Rotation) -> Rotation:
    """x cast to float32, and the result back."""
    return lambda x, cos, sin: rotation(x.to(torch.float32), cos, sin).to(x.dtype)


def by_float32(rotation: Rotation) -> Rotation:
    """Tables in float32, by which products are, and the result cast back: eager under autocast."""
    return lambda x, cos, sin: rotation(x, cos, sin).to(x.dtype)


def finish(match: Match) -> str | None:
    """The rotary features, and a partial rotation taken whole."""
    x = match.arguments["x"]
    if any(needs_gradient(match.arguments[name]) for name in ("cos", "sin")):
        return "cos or sin needs a gradient, as learned frequencies do, and the op gives none"
    match.arguments["rotary"] = value_of(x).shape[-1]
    _take_the_rest(match)
    return None


def finish_back(match: Match) -> str | None:
    if reason := finish(match):
        return reason
    sin = match.arguments["sin"]
    match.arguments["sin"] = New(aten.neg.default, (sin,))
    match.stands_for[sin] = ("sin", New(aten.neg.default, (sin,)))
    return None


def finish_complex(match: Match) -> str | None:
    angles = match.arguments["angles"]
    if needs_gradient(angles):
        return "the complex angles need a gradient, as learned frequencies do, and the op gives none"
    match.arguments["cos"] = New(aten.real.default, (angles,))
    match.arguments["sin"] = New(aten.imag.default, (angles,))
    match.arguments["rotary"] = value_of(match.arguments["x"]).shape[-1]
    match.stands_for.pop(angles, None)
    _take_the_rest(match)
    return None


def finish_transposed(match: Match) -> str | None:
    """The norm ran before heads and positions changed places: the op reads x as it is afterwards."""
    if reason := finish(match):
        return reason
    x = match.arguments["x"]
    swap = New(aten.transpose.int, (x, -3, -2))
    match.arguments["x"] = swap
    match.stands_for[x] = ("x", swap)
    return None


def _take_the_rest(match: Match) -> None:
    """cat([turned, x[..., rotary:]]) with turned from x[..., :rotary]: x, whole, and the cat with it."""
    part, root = match.arguments["x"], match.root
    whole, start = _sliced(part)
    readers = list(root.users)
    if whole is None or start != 0 or len(readers) != 1 or spell(readers[0]).name != "cat":
        return
    (joined,) = readers
    tensors, dim = spell(joined).args
    if len(tensors) != 2 or tensors[0] is not root or dim != -1:
        return
    rest, rest_start = _sliced(tensors[1])
    rotary, features = value_of(part).shape[-1], value_of(whole).shape[-1]
    joins = rest is whole and rest_start == rotary and value_of(tensors[1]).shape[-1] == features - rotary
    if not joins or joined.meta.get("region") != root.meta.get("region"):
        return
    inside = {*match.nodes, joined}
    match.nodes = sorted(inside | {n for n in (part, tensors[1]) if inside.issuperset(n.users)})
    match.outputs = (joined,)
    match.arguments["x"] = whole
    match.stands_for.pop(part, None)
    match.stands_for[whole] = ("x", None)


def _sliced(node: fx.Node | New) -> tuple[fx.Node | None, int | None]:
    """(x, i) of x[..., i:j]."""
    if not isinstance(node, fx.Node) or spell(node).name != "slice":
        return None, None
    source, dim, start, step = spell(node).args
    known = isinstance(start, Start) and dim == -1 and step == 1 and isinstance(start.at, int)
    return (source, start.at) if known else (None, None)


def _rows(rotation: Rotation, source: str, shapes: dict[str, str]) -> list[Rule]:
    """The rotation in x's dtype, and in float32 for either reason."""
    interleaved = {"interleaved": rotation not in (rotate_half, turned_halves, turned_back)}
    end = finish_back if rotation is turned_back else finish
    wide = {**shapes, **{name: f"float32 {shapes[name]}" for name in ("cos", "sin")}}
    return [
        Rule("rope", rotation, source, shapes, interleaved, end),
        Rule("rope", in_float32(rotation), f"{source}, in float32", shapes, interleaved, end),
        Rule("rope", by_float32(rotation), f"{source}, tables in float32", wide, interleaved, end),
    ]


def _normed(normalise: Callable[..., Tensor], source: str, offset: float = 0.0) -> list[Rule]:
    """Norm and rotate-half, with heads and positions exchanged in between or before."""
    weight = {"weight": "2*R"} if "weight" in normalise.__code__.co_varnames[:2] else {}
    shapes = {"x": "B T H 2*R", **weight, "cos": "any B H T 2*R", "sin": "any B H T 2*R"}
    fixed = {"offset": offset, **({} if weight else {"weight": None})}

    def transposed(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return rotate_half(normalise(x, weight, eps).transpose(1, 2), cos, sin)

    def straight(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return rotate_half(normalise(x, weight, eps), cos, sin)

    def transposed_bare(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return rotate_half(normalise(x, eps).transpose(1, 2), cos, sin)

    def straight_bare(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return rotate_half(normalise(x, eps), cos, sin)

    patterns = (transposed, straight) if weight else (transposed_bare, straight_bare)
    same = {**shapes, "cos": "any B T H 2*R", "sin": "any B T H 2*R"}
    return [
        Rule(
            "rms_norm_rope",
            patterns[0],
            f"{source}, transposed, rotate_half",
            shapes,
            fixed,
            finish_transposed,
        ),
        Rule("rms_norm_rope", patterns[1], f"{source}, rotate_half", same, fixed, finish),
    ]


RULES = [
    *_normed(norm.llama, "transformers Qwen3RMSNorm"),
    *_normed(norm.rms_norm, "torch.nn.RMSNorm of heads"),
    *_normed(norm.gemma, "transformers Gemma3RMSNorm", offset=1.0),
    *_normed(norm.weight_in_float32, "weight in float32"),
    *_normed(norm.weightless, "weightless RMSNorm"),
    *_rows(rotate_half, "transformers rotate_half", FULL),
    *_rows(rotate_every_two, "transformers rotate_every_two", FULL),
    *_rows(turned_halves, "transformers GptOss", HALF),
    *_rows(turned_back, "nanochat", HALF),
    *_rows(turned_neighbours, "x[..., ::2] and x[..., 1::2]", HALF),
    *_rows(turned_reshaped, "pairs by reshape", HALF),
    *_rows(turned_parts, "torchtune", HALF),
    Rule("rope", complex_product, "view_as_complex", COMPLEX, {"interleaved": True}, finish_complex),
]
