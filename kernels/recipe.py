r"""FP8 recipes: which tensors of a linear layer are cast to eight bits, with which scales, and how sums are
kept.

A linear layer is three matrix products: output = x w^T, grad_input = g w, grad_weight = g^T x. A recipe
says for each whether its operands are FP8. Scales belong to groups of an operand seen as (rows,
contraction):

    tensor   one group                                    Micikevicius et al. 2022, arXiv:2209.05433
    row      a row each
    block    1 x 128 of activations and gradients, 128 x 128 of weights    DeepSeek-V3, arXiv:2412.19437
    mx       1 x 32, scales are e8m0                      OCP Microscaling formats 1.0

An operand that is contracted along its other dimension in another product is quantised anew from the
values, not from the codes. A recipe travels through an op's schema as a word: `recipe.token()`, read by
`Recipe.parse`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

SCALINGS = ("tensor", "row", "block", "mx")
ATTENTIONS = ("head", "block")
ACCUMULATIONS = ("exact", "fp32", "promote128", "fast")
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_HISTORY, _MARGIN = 1024, 0
_LETTERS = {"o": "output", "i": "grad_input", "w": "grad_weight"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a linear layer computes in FP8.

    forward: dtype of x and weight. gradient: dtype of the incoming gradient.
    scaling: "tensor", "row", "block" or "mx": the groups that share a scale.
    delayed: scales come from the amax of earlier steps; else from the tensor itself.
    output, grad_input, grad_weight: which of the three products are FP8. The others read x, weight and the
        gradient as they are.
    accumulation: "promote128" moves sums to float32 registers every 128 of the contraction; "fast" leaves
        those of `output` in the FP8 tensor core's own, narrower accumulator and promotes the gradients';
        "fp32" is plain float32; "exact" rounds the exact sum once, the same bits on any machine, for tests.
    power_of_two: scales are powers of two, so scaling rounds nothing.
    head: the layer whose result is the model's output or goes to the loss is cast as well.
    history, margin: of delayed scales: steps that are looked back on, 1 to 1024, and bits of headroom above
        the largest value among them, 0 to 8.
    edge_blocks: so many first and last blocks of the model stay in high precision.
    keep: modules that stay, by name or pattern ("blocks.*.attention").
    attention: None leaves attention in 16 bits; "head" and "block" cast q, k, v and P of its forward pass,
        with one scale a head or one for 128 tokens of it (attention_fp8.py), where the recipe keeps no
        module around it.
    constant_weights: promises that no weight is written through `.data`, as PEFT merges adapters, where that
        cannot be seen: codes of weights that take no gradient, and of all in inference, are then made once.
        These seven are about a model and are no part of the token.
    """

    forward: torch.dtype = torch.float8_e4m3fn
    gradient: torch.dtype = torch.float8_e5m2
    scaling: str = "tensor"
    delayed: bool = False
    output: bool = True
    grad_input: bool = True
    grad_weight: bool = True
    accumulation: str = "promote128"
    power_of_two: bool = True
    head: bool = False
    edge_blocks: int = 0
    keep: tuple[str, ...] = ()
    history: int = _HISTORY
    margin: int = _MARGIN
    attention: str | None = None
    constant_weights: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _names(self.keep))
        self._check_kinds()
        self._check_choices()
        if self.delayed and self.scaling != "tensor":
            raise ValueError(
                f"Recipe: delayed scales need one amax a tensor, and scaling={self.scaling!r} has one a "
                f"group; use scaling='tensor', or delayed=False"
            )
        if not self.delayed and (self.history, self.margin) != (_HISTORY, _MARGIN):
            raise ValueError(
                f"Recipe: history={self.history} and margin={self.margin} are about scales of earlier steps; "
                f"use delayed=True with them"
            )
        if self.scaling in ("block", "mx") and not self.power_of_two:
            raise ValueError(f"Recipe: scaling={self.scaling!r} is defined with power_of_two=True scales")
        if self.accumulation == "exact" and not self.power_of_two:
            raise ValueError(
                "Recipe: accumulation='exact' needs power_of_two=True: "
                "with other scales no format holds the sums"
            )
        if self.scaling == "mx" and self.gradient != torch.float8_e4m3fn:
            raise ValueError(
                "Recipe: with scaling='mx' gradients of e5m2 are known to diverge; "
                "use gradient=torch.float8_e4m3fn"
            )
        if not (self.output or self.grad_input or self.grad_weight):
            raise ValueError("Recipe: none of output, grad_input, grad_weight is FP8; use precision='bf16'")

    def _check_kinds(self) -> None:
        for name in ("delayed", *_LETTERS.values(), "power_of_two", "head", "constant_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Recipe: {name} is True or False, and got {getattr(self, name)!r}")
        for name in ("history", "margin", "edge_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"Recipe: {name} is a whole number, and got {value!r}")

    def _check_choices(self) -> None:
        for name in ("forward", "gradient"):
            if getattr(self, name) not in NAMES:
                raise ValueError(
                    f"Recipe: {name}={getattr(self, name)} is no FP8 dtype; "
                    f"torch.float8_e4m3fn and torch.float8_e5m2 are"
                )
        for name, known in (("scaling", SCALINGS), ("accumulation", ACCUMULATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Recipe: {name}={getattr(self, name)!r} is none of {', '.join(known)}")
        if self.attention is not None and self.attention not in ATTENTIONS:
            raise ValueError(f"Recipe: attention={self.attention!r} is none of None, {', '.join(ATTENTIONS)}")
        if not 1 <= self.history <= _HISTORY or not 0 <= self.margin <= 8:
            raise ValueError(
                f"Recipe: history is 1 to {_HISTORY} steps and margin 0 to 8 bits, "
                f"got {self.history} and {self.margin}"
            )
        if self.edge_blocks < 0:
            raise ValueError(f"Recipe: edge_blocks is not negative, got {self.edge_blocks}")

    def current(self) -> Recipe:
        """The same with scales of the tensor itself."""
        return replace(self, delayed=False, history=_HISTORY, margin=_MARGIN)

    def token(self) -> str:
        """The recipe as one word, for instance "e4m3-e5m2-tensor-current-oiw-promote128-p2"."""
        products = "".join(letter for letter, name in _LETTERS.items() if getattr(self, name))
        return "-".join((
            NAMES[self.forward], NAMES[self.gradient], self.scaling, "delayed" if self.delayed else "current",
            products, self.accumulation, "p2" if self.power_of_two else "any",
        ))  # fmt: skip

    @staticmethod
    @functools.cache
    def parse(token: str) -> Recipe:
        """The recipe of a token, or of a preset's name."""
        if token in PRESETS:
            return PRESETS[token]
        try:
            forward, gradient, scaling, history, products, accumulation, scales = token.split("-")
            if history not in ("delayed", "current") or scales not in ("p2", "any"):
                raise ValueError
            if not set(products) <= set(_LETTERS):
                raise ValueError
            dtypes = _DTYPES[forward], _DTYPES[gradient]
        except (ValueError, KeyError):
            raise ValueError(
                f"{token!r} is no FP8 recipe: give a preset ({', '.join(PRESETS)}) or a token such as "
                f"{Recipe().token()!r}"
            ) from None
        chosen: dict[str, Any] = {name: letter in products for letter, name in _LETTERS.items()}
        return Recipe(
            forward=dtypes[0], gradient=dtypes[1], scaling=scaling, delayed=history == "delayed",
            accumulation=accumulation, power_of_two=scales == "p2", **chosen,
        )  # fmt: skip


def _names(keep: Any) -> tuple[str, ...]:
    """A list will do for a tuple; one word would be taken for its letters."""
    if not isinstance(keep, (tuple, list)) or not all(isinstance(name, str) for name in keep):
        raise ValueError(f"Recipe: keep is a tuple of module names or patterns, got {keep!r}")
    return tuple(keep)


_E4M3 = torch.float8_e4m3fn

PRESETS: dict[str, Recipe] = {
    "fp8-tensorwise": Recipe(),
    "fp8-delayed": Recipe(delayed=True),
    "fp8-rowwise": Recipe(gradient=_E4M3, scaling="row"),
    "fp8-rowwise-bf16-wgrad": Recipe(gradient=_E4M3, scaling="row", grad_weight=False),
    "fp8-block": Recipe(gradient=_E4M3, scaling="block"),
    "mxfp8": Recipe(gradient=_E4M3, scaling="mx"),
}
