"""What fusekit knows about the GPU at hand: whether its kernels were built and checked for one like it."""

from __future__ import annotations

import torch

OLDEST = (8, 0)  # bfloat16 products and asynchronous copies begin here
CHECKED = {
    (8, 0): "A100",
    (9, 0): "H100, H200",
    (10, 0): "B200",
}  # the static lane builds every kernel for these


def remark(capability: tuple[int, int] | None = None, built: list[str] | None = None) -> str | None:
    """A sentence where this GPU is none of those that were checked; None where it is, or where there is none.

    Args:
        capability: compute capability; default: the current GPU's.
        built: what PyTorch has code for, as torch.cuda.get_arch_list() spells it.
    """
    if capability is None:
        if not torch.cuda.is_available():
            return None
        capability, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    name = ".".join(map(str, capability))
    if built and not _has_code(capability, built):
        return (
            f"compute capability {name}: this PyTorch {torch.__version__} has code for {', '.join(built)} "
            f"only; install a PyTorch build for this GPU"
        )
    if capability < OLDEST:
        return (
            f"compute capability {name}: fusekit's kernels need 8.0 or newer; here they may fail to compile, "
            f'and fusekit.optimize(model, fuse="none") leaves the model to PyTorch'
        )
    if capability in CHECKED:
        return None
    known = ", ".join(f"{major}.{minor} ({card})" for (major, minor), card in CHECKED.items())
    return (
        f"compute capability {name}: Triton compiles the kernels for it; they were checked for {known} only"
        f"; fusekit.verify tells whether they are right and fast here"
    )


def _has_code(capability: tuple[int, int], built: list[str]) -> bool:
    """Machine code of the same major version runs on later minor ones; PTX on everything later."""
    major, minor = capability
    for name in built:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        theirs = divmod(int(digits), 10)
        if (kind == "compute" and theirs <= capability) or (theirs[0] == major and theirs[1] <= minor):
            return True
    return False
