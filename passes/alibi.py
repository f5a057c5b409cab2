"""ALiBi in a bias: a number of each head times the distance of key and query, or times the key's place.

Softmax is the same whatever is added to a whole row, so of `slope * distance` only what grows with the key
counts: slope * key, slope * (key - query) and slope * (key + 1 - length) are all the op's ALiBi, unless
sinks take part. |key - query| is query - key where the band shows no key behind its query. A place that is
data (the running count of a padding mask, in Bloom) becomes the op's `places`. Casts of the bias or of the
distance to the model's own precision are seen through: they round what the op computes in float32. A coarser
rounding is the model's own doing, as Falcon's bias in bfloat16 beside scores in float32: of 32 heads of 64
features and 2048 keys it moves scores by up to 0.9 and outputs by 12 %, so that bias stays a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.passes.affine import KEY, QUERY, ZERO, Affine, Index, Reading, variables
from fusekit.passes.floating_index import whole_number
from fusekit.passes.gradient import in_no_grad, needs_gradient
from fusekit.passes.index_arithmetic import EXACT, aligned, is_written, reshaped, sliced, unwrapped
from fusekit.passes.pattern import New
from fusekit.passes.spelling import spell, value_of

aten = torch.ops.aten
BATCH, HEAD, OURS, THEIRS = variables(4)


class Alibi(NamedTuple):
    """The op's `slopes` and `places`, nodes or such to be made; places None are those of indices."""

    slopes: Any
    places: Any = None


class Distance(NamedTuple):
    """What slopes are multiplied by: `form`, its absolute value, or a number of each key."""

    form: Affine | None
    absolute: bool = False
    places: Any = None
    sign: int = 1


def alibi_of(
    bias: Any, furthest: int | None, precision: torch.dtype, index: Index | None = None
) -> Alibi | None:
    """A bias that is added to the scores as ALiBi, None where it is not proved to be that.

    Args:
        bias: what is added; its dimensions are the last of (batch, head, query, key), unless `index` says.
        furthest: no key is seen for which key - query is larger; None where keys may be anywhere.
        precision: the dtype of queries and keys.
    """
    if not isinstance(bias, fx.Node) or not _is_constant(bias):
        return None
    index = aligned(bias, variables(4)[4 - value_of(bias).dim() :]) if index is None else index
    product, scale, index = _scaled(bias, index)
    if is_written(product) or spell(product).name != "mul":
        return None
    factors = spell(product).args
    for slopes, distance in (factors, factors[::-1]):
        if isinstance(slopes, fx.Node) and isinstance(distance, fx.Node):
            found = _joined(slopes, distance, index, furthest, scale)
            if found is not None:
                return None if _is_coarser(bias, slopes, precision) else found
    return None


def _scaled(bias: fx.Node, index: Index) -> tuple[fx.Node, float, Index]:
    """What a bias is a view, a cast or a multiple of; how often, and the index there."""
    scale = 1.0
    while not is_written(bias):
        name, args = spell(bias)
        inner = _inner(bias, index)
        if name == "neg":
            inner, scale = (args[0], index), -scale
        elif name in ("mul", "div") and isinstance(args[1], (int, float)) and 0.0 < abs(args[1]) < math.inf:
            inner, scale = (args[0], index), scale * args[1] if name == "mul" else scale / args[1]
        if inner is None:
            break
        bias, index = inner
    return bias, scale, index


def _is_coarser(bias: fx.Node, slopes: fx.Node, precision: torch.dtype) -> bool:
    """Whether slopes times distance is rounded more coarsely on its way than `precision` would."""
    pending, seen = [bias], {slopes}
    while pending:
        node = pending.pop()
        value = value_of(node)
        if node in seen or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if torch.finfo(value.dtype).eps > torch.finfo(precision).eps:
            return True
        seen.add(node)
        pending += node.all_input_nodes
    return False


def heads_apart(bias: fx.Node, shape: Sequence[Any]) -> tuple[fx.Node, Index] | None:
    """What a (batch * heads, 1, keys) bias is made of, and the index there; shape is that of q."""
    B, H, *_ = shape
    while not is_written(bias) and spell(bias).name in ("to", "clone", "contiguous"):
        bias = spell(bias).args[0]
    if is_written(bias) or not _is_constant(bias) or value_of(bias).dim() != 3:
        return None
    name, args = spell(bias)
    if name not in ("repeat", "reshape") or value_of(args[0]).dim() != 3:
        return None
    source, (together, one, keys) = args[0], value_of(bias).shape
    if not _equal((together, one), (B * H, 1)):
        return None
    if name == "repeat" and _equal(value_of(source).shape, (H, 1, keys)):
        return source, (HEAD, ZERO, THEIRS)
    if name == "reshape" and _equal(value_of(source).shape, (B, H, keys)):
        return source, (BATCH, HEAD, THEIRS)
    return None


def _equal(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return all(statically_known_true(a == b) for a, b in zip(shape, wanted, strict=True))


def _is_constant(bias: fx.Node) -> bool:
    """Floating, and without a gradient, which slopes would not get."""
    value = value_of(bias)
    return isinstance(value, Tensor) and value.is_floating_point() and not needs_gradient(bias)


def _joined(
    slopes: fx.Node, distance: fx.Node, index: Index, furthest: int | None, scale: float
) -> Alibi | None:
    heads = aligned(slopes, index)
    if not value_of(slopes).is_floating_point() or [i for i in heads if i != ZERO] not in (
        [HEAD],
        [BATCH, HEAD],
    ):
        return None
    found = _distance(distance, aligned(distance, index))
    growth = None if found is None else _growth(found, furthest)
    if found is None or growth is None:
        return None
    ones = [dim for dim, i in enumerate(heads) if i == ZERO]
    taken: Any = New(aten.squeeze.dims, (slopes, ones)) if ones else slopes
    if in_no_grad(slopes.graph):  # a view of what is trained requires one even there
        taken = New(aten.detach.default, (taken,))
    scale *= growth
    if abs(scale) != 1.0:  # in float32, as the op computes with them
        taken = New(aten.mul.Scalar, (New(aten.to.dtype, (taken, torch.float32)), scale))
    elif scale < 0:
        taken = New(aten.neg.default, (taken,))
    return Alibi(taken, found.places)


def _growth(found: Distance, furthest: int | None) -> int | None:
    """1 or -1: the step from one key to the next wherever keys are seen; None where there is no one step."""
    if found.places is not None:
        return found.sign
    assert found.form is not None
    terms = {x: factor for x, factor in found.form.terms if not isinstance(x, Reading)}  # others: shifts
    step = terms.pop(KEY, 0)
    if abs(step) != 1 or not set(terms) <= {QUERY}:
        return None
    if not found.absolute:
        return found.sign * step
    # |key - query + c| falls from key to key up to the furthest, if that is no further than -c.
    if furthest is None or terms != {QUERY: -step} or furthest + step * found.form.constant > 0:
        return None
    return -found.sign


def _distance(node: fx.Node, index: Index) -> Distance | None:
    sign = 1
    while not is_written(node) and spell(node).name == "neg":
        node, sign = spell(node).args[0], -sign
    form = whole_number(node, index)
    if form is not None and not _reads_data(form):
        return Distance(form, False, None, sign)
    places = _places(node, index)
    return _absolute(node, index, sign) if places is None else Distance(None, False, places, sign)


def _absolute(node: fx.Node, index: Index, sign: int) -> Distance | None:
    while not is_written(node):
        name, args = spell(node)
        if name == "abs":
            form = whole_number(args[0], index)
            return None if form is None or form.reads() else Distance(form, True, None, sign)
        if name == "neg":
            node, sign = args[0], -sign
            continue
        cast = name == "to" and value_of(node).is_floating_point()
        inner = (args[0], index) if cast else unwrapped(node, index) or sliced(node, index)
        if inner is None:
            return None
        node, index = inner
    return None


def _reads_data(form: Affine) -> bool:
    return any(isinstance(x, Reading) and x.at for x, _ in form.terms)  # without an index: one number for all


def _places(node: fx.Node, index: Index) -> Any:
    """(length,) or (batch, length) numbers of each key."""
    if is_written(node) or value_of(node).dtype not in (*EXACT, torch.float32):
        return None
    if [i for i in index if i != ZERO] not in ([THEIRS], [BATCH, THEIRS]):
        return None
    ones = [dim for dim, i in enumerate(index) if i == ZERO]
    return New(aten.squeeze.dims, (node, ones)) if ones else node


def _inner(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """What a view, a copy or a cast between floating types is made of."""
    name, args = spell(node)
    if name == "to" and value_of(node).is_floating_point() and value_of(args[0]).is_floating_point():
        return args[0], index
    return unwrapped(node, index) or sliced(node, index) or _shifted(node, index) or _split(node, index)


def _split(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """A reshape of a reshape, casts between: of the first's source, if only dimensions of one come or go."""
    inner = node
    while spell(inner).name in ("reshape", "to", "clone", "contiguous") and not is_written(inner):
        inner = spell(inner).args[0]
        if not value_of(inner).is_floating_point():
            return None  # a cast to whole numbers, or from them
        if spell(node).name == "reshape" and (found := reshaped(node, inner, index)) is not None:
            return inner, found
    return None


def _shifted(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """A slice that starts at a symbolic size: which index that is matters to no distance's growth."""
    name, args = spell(node)
    if name != "slice" or args[3] != 1 or isinstance(args[2].at, int):
        return None
    dim = args[1] % len(index)
    start = Affine(0, frozenset({(Reading(("start", node.name), ()), 1)}))
    return args[0], (*index[:dim], index[dim].plus(start), *index[dim + 1 :])
