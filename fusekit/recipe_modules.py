"""The modules of a model that a recipe keeps in high precision, as patterns of their names."""

from __future__ import annotations

import fnmatch

from torch import nn

from fusekit.kernels.recipe import Recipe


def kept_modules(model: nn.Module, recipe: Recipe) -> tuple[str, ...]:
    """`recipe.keep`, and the names of the first and last `recipe.edge_blocks` blocks.

    Raises:
        ValueError: a name that is no module of the model's, or edge blocks of a model without blocks.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in recipe.keep:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"Recipe: keep={pattern!r} names no module of this {type(model).__name__}; its modules are "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    return recipe.keep + _edge_blocks(model, recipe.edge_blocks)


def _edge_blocks(model: nn.Module, count: int) -> tuple[str, ...]:
    if not count:
        return ()
    for name, module in model.named_modules():
        blocks = list(module.children())
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if alike and isinstance(module, (nn.ModuleList, nn.Sequential)) and any(blocks[0].children()):
            prefix = f"{name}." if name else ""
            edges = sorted({*range(len(blocks))[:count], *range(len(blocks))[-count:]})
            return tuple(f"{prefix}{i}" for i in edges)
    raise ValueError(
        f"Recipe: edge_blocks={count}, but this {type(model).__name__} has no list of blocks of one kind; "
        f"name what stays with keep=(...)"
    )
