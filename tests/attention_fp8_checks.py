"""What is asked of attention_fp8 on any device, and models for its tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusekit import Recipe
from fusekit.fp8_check import check_attention_fp8
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.attention import reference as attention_reference
from fusekit.kernels.attention_fp8 import OP
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen

HEAD, BLOCK = Recipe(attention="head"), Recipe(attention="block")
NAMES = [argument.name for argument in OP.fused._schema.arguments]


def heads(device: str, B: int, T: int, H: int, D: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(B, H, T, D) in the memory of (B, T, H, D), as a model makes it."""
    generator = torch.Generator().manual_seed(seed + T)
    return torch.randn(B, T, H, D, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()


def unquantised(*args: Any) -> Tensor:
    """The same attention without FP8."""
    given = dict(zip(NAMES, args, strict=False))
    return attention_reference(**{name: value for name, value in given.items() if name != "scaling"})


def assert_parity(args: tuple[Any, ...], ties: bool = False, tf32: bool = False) -> dict[str, Tensor]:
    """As good as one rounding of the float64 result on the decoded codes, output and every gradient.

    ties: sums are kept in fewer bits than float32's, as Hopper's FP8 products keep them, so that some P
    fall to the other side of a tie: what `verify` asks is asked instead.
    tf32: gradients may be those of tf32 products.
    """
    fused = results_and_grads(OP.fused, args)
    if ties and fused["output"].numel():
        full = (*args, *(a.default_value for a in OP.fused._schema.arguments[len(args) :]))
        verdicts = check_attention_fp8(full, fused, results_and_grads(unquantised, widen(args)))
    else:
        truth = results_and_grads(OP.reference, widen(args))
        eager = results_and_grads(OP.reference, args)
        terms = longest_sum(args[:3])
        verdicts = check(fused, eager, truth, dtype=args[0].dtype, terms=terms, inherent=True, tf32=tf32)
    assert all(v.ok for v in verdicts), "\n".join(f"{v.name}: {v.reason}" for v in verdicts)
    return fused


def assert_no_keys_give_zeros(device: str) -> None:
    q, k, v = (heads(device, 2, T, 2, 16, torch.bfloat16) for T in (5, 0, 0))
    found = results_and_grads(OP.fused, (q, k, v))
    assert found["output"].shape == (2, 2, 5, 16) and not found["output"].any()
    assert not found["grad_0"].any() and found["grad_1"].shape == k.shape


def assert_non_finite_rows(device: str, scaling: str, dtype: torch.dtype) -> None:
    """A NaN or an infinity in q, k or v reaches the rows that see it, and of q and k a NaN no other.

    Of v it may reach more, as in every attention by blocks: 0 times NaN is NaN.
    """
    for which in range(3):
        for bad in (float("nan"), float("inf"), float("-inf")):
            tensors = [heads(device, 1, 150, 2, 32, dtype, seed=i).detach() for i in range(3)]
            tensors[which][0, 1, 130, 5] = bad
            found = OP.fused(*tensors, True, None, None, 0, None, None, scaling)
            rows = ~found.isfinite().all(-1)[0].cpu()
            seeing = torch.zeros(2, 150, dtype=torch.bool)
            seeing[1, 130 : 131 if which == 0 else 150] = True
            assert rows[seeing].all(), "a NaN disappeared"
            assert not rows[0].any() and (which == 2 or torch.equal(rows, seeing))
            if bad != bad and which < 2:
                # In 16 bits a CPU's matrix units may spread a NaN to the row beside it.
                plain = unquantised(*(x.cpu().float() for x in tensors), True)
                assert torch.equal(rows, ~plain.isfinite().all(-1)[0])


def gpt(**sizes: Any) -> GPT:
    return GPT(GPTConfig(**({"vocab": 64, "context": 32, "layers": 2, "heads": 2, "width": 32} | sizes)))


def tokens() -> Tensor:
    return torch.randint(64, (2, 32))
