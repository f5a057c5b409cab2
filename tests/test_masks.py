"""The mask reader against the mask itself: causal and rest, put together, are the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusekit.kernels.attention_form import band, rows_of
from fusekit.passes.global_tokens import Globals
from fusekit.passes.masks import Mask, recover, recover_additive, recover_forbidden, split_additive
from fusekit.passes.normalise import normalise_graph
from fusekit.passes.pattern import New

INF = float("inf")


def _traced(
    build: Callable[..., Tensor], *inputs: Tensor, mode: str = "fake"
) -> tuple[fx.GraphModule, fx.Node]:
    graph = make_fx(build, pre_dispatch=True, tracing_mode=mode)(*inputs)
    normalise_graph(graph)
    return graph, graph.graph.output_node().args[0]


def _run(graph: fx.GraphModule, node: fx.Node, *inputs: Tensor) -> Tensor:
    """The value of an inner node."""
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for original in graph.graph.nodes:
        if original.op != "output":
            values[original] = copy.node_copy(original, values.__getitem__)
    copy.output(values[node])
    return fx.GraphModule(graph, copy)(*inputs)


def _value(graph: fx.GraphModule, found: Any, *inputs: Tensor) -> Tensor:
    """The value of an inner node, or of one to be made of it."""
    if isinstance(found, New):
        return found.target(*(_value(graph, x, *inputs) for x in found.args))
    if isinstance(found, list):
        return [_value(graph, x, *inputs) for x in found]
    return _run(graph, found, *inputs) if isinstance(found, fx.Node) else found


def _seen(graph: fx.GraphModule, found: Mask, rows: int, columns: int, *inputs: Tensor) -> Tensor:
    """The band, global tokens and documents as a dense mask, without the rest."""
    low, high = band(found.causal, found.window, found.offset)
    seen = torch.ones(rows, columns, dtype=torch.bool).tril(high).triu(low)
    if found.globals is not None:
        seen = seen | _global(graph, found.globals, rows, columns, high, *inputs)
    if found.documents is None:
        return seen
    ours, theirs = (rows_of(_value(graph, x, *inputs)) for x in found.documents[:2])
    assert ours.shape in ((1, rows), (2, rows)) and theirs.shape in ((1, columns), (2, columns))
    return seen & (ours[:, None, :, None] == theirs[:, None, None, :])


def _global(
    graph: fx.GraphModule, found: Globals, rows: int, columns: int, high: int, *inputs: Tensor
) -> Tensor:
    """What global tokens see and are seen by, (1 or 2, 1, rows, columns)."""
    seen = torch.zeros(1, 1, rows, columns, dtype=torch.bool)
    for flags, size, dim in ((found.queries, rows, -1), (found.keys, columns, -2)):
        if flags is not None:
            value = rows_of(_value(graph, flags, *inputs))
            assert value.dtype == torch.bool and value.shape in ((1, size), (2, size))
            seen = seen | value[:, None].unsqueeze(dim)
    return seen if found.ahead else seen & torch.ones(rows, columns, dtype=torch.bool).tril(high)


def _is_consistent(build: Callable[..., Tensor], rows: int, columns: int, *inputs: Tensor) -> Mask:
    """That what is recovered is the dense mask, and what was said of rows without keys; returns the mask."""
    dense = build(*inputs).expand(2, 1, rows, columns)
    graph, node = _traced(build, *inputs)
    found = recover(node)
    again = _seen(graph, found, rows, columns, *inputs)
    if found.rest is not None:
        again = again & _value(graph, found.rest, *inputs)
    torch.testing.assert_close(again.expand_as(dense), dense, rtol=0, atol=0)
    assert not found.leaves_a_key(node.meta["val"].shape) or dense.any(-1).all()
    return found


@st.composite
def _positions(draw: Any, length: int, query: bool) -> Callable[[Tensor], Tensor]:
    """Positions along one axis, as arithmetic that models write, and as arithmetic that is nearly that."""
    start = draw(st.sampled_from([0, 0, 0, 1, 3]))
    step = draw(st.sampled_from([1, 1, 1, 2]))
    shift = draw(st.sampled_from([0, 0, 0, -1, 1]))
    cut = draw(st.sampled_from([0, 0, 2]))
    single = query and draw(st.integers(0, 9)) == 0
    gather = draw(st.booleans())

    def build(_: Tensor) -> Tensor:
        line = torch.arange(start - cut * step, start + length * step, step)[cut:] + shift
        if gather:
            line = line.expand(2, -1)[torch.arange(2)[:, None], torch.arange(length)[None]][:1]
        line = line.reshape(length)
        line = line[1:2] if single else line
        return line[:, None] if query else line[None, :]

    return build


@st.composite
def _mask(draw: Any, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """A random boolean mask of (2, 1, rows, columns) or something that broadcasts to it."""
    kinds = ["compare", "compare", "sign", "triangle", "padding", "and", "and", "not", "window", "equal"]
    kind = draw(st.sampled_from([*kinds, "documents", "packed"]))
    if kind == "documents":
        return draw(_documents(rows, columns))
    if kind == "packed":
        return draw(_packed(rows, columns))
    if kind == "compare":
        q, k = draw(_positions(rows, True)), draw(_positions(columns, False))
        compare = draw(st.sampled_from([torch.le, torch.lt, torch.ge, torch.gt]))
        flip = draw(st.booleans())
        return lambda pad: compare(q(pad), k(pad)) if flip else compare(k(pad), q(pad))
    if kind == "triangle":
        triangle = draw(st.sampled_from([torch.tril, torch.triu]))
        diagonal = draw(st.integers(-2, 2))
        start = draw(st.integers(0, 2))
        transposed = draw(st.booleans())

        def build(pad: Tensor) -> Tensor:
            sizes = (columns + 2, rows + 2) if transposed else (rows + 2, columns + 2)
            whole = triangle(torch.ones(sizes), diagonal=diagonal)
            whole = whole.t() if transposed else whole
            return whole[start : start + rows, start : start + columns] != 0

        return build
    if kind == "sign":  # transformers says `query >= 0` for "all"
        shift = draw(st.integers(-1, 1))
        return lambda pad: torch.arange(rows)[:, None] + shift >= 0
    if kind == "padding":
        return lambda pad: pad[:, None, None, :]
    if kind == "window":
        width, style = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        reach = [torch.le, torch.lt][draw(st.integers(0, 1))]

        def window(pad: Tensor) -> Tensor:
            k, q = torch.arange(columns)[None, :], torch.arange(rows)[:, None]
            if style == 0:
                return k > q - width
            if style == 1:
                return reach((q - k).abs(), width)
            if style == 2:
                return width > torch.abs(k - q + 1)
            return (k > q - width) & (k <= q + 1) & pad[:, None, None, :]

        return window
    if kind == "equal":
        number = draw(st.integers(0, 2))
        return lambda pad: torch.arange(columns)[None, :] - torch.arange(rows)[:, None] == number
    inner = draw(_mask(rows, columns))
    if kind == "not":
        style = draw(st.sampled_from([torch.logical_not, lambda m: ~m, lambda m: m.int() == 0]))
        return lambda pad: style(inner(pad))
    other = draw(_mask(rows, columns))
    joins = [torch.logical_and, torch.logical_or, lambda a, b: a & b, lambda a, b: a ^ b]
    shapes = [lambda m: m, lambda m: m.new_ones((), dtype=torch.bool) & m, lambda m: m.clone()]
    join, shaped = draw(st.sampled_from(joins)), draw(st.sampled_from(shapes))
    return lambda pad: shaped(join(inner(pad), other(pad)))


def _data(pad: Tensor) -> Tensor:
    """(2, twice the columns) of whole numbers that never fall, from the one input there is."""
    return torch.cat((pad, ~pad), 1).long().cumsum(-1)


@st.composite
def _documents(draw: Any, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """Equal ids of query and key in many spellings, some of which are not of the op's kind."""
    make = draw(
        st.sampled_from(
            [
                _data,
                lambda pad: _data(pad) % 2,  # in no order
                lambda pad: _data(pad).int(),
                lambda pad: _data(pad).float(),
                lambda pad: (torch.arange(2 * columns) // 3).expand(2, -1),
                lambda pad: (torch.arange(2 * columns) - _data(pad)[:, :1]) // 2,
            ]
        )
    )
    style, shift = draw(st.integers(0, 6)), draw(st.sampled_from([0, 0, 1]))

    def build(pad: Tensor) -> Tensor:
        ids = make(pad)
        q, k = ids[:, :rows], ids[:, shift : shift + columns]
        if style == 0:
            return q[:, None, :, None] == k[:, None, None, :]
        if style == 1:
            return (k[:, None, :] == q[:, :, None])[:, None]
        if style == 2:  # one element's numbers for all; the head in the place of the batch
            return q[0][:, None] == k[:1][:, None, None]
        if style == 3:
            return q[:, :, None].eq(k.unsqueeze(1)).unsqueeze(1).expand(2, 1, rows, columns)
        if style == 4:
            return (q[:, None, :, None] != k[:, None, None, :]).logical_not()
        if style == 5:
            batch, i, j = torch.arange(2)[:, None, None, None], torch.arange(rows), torch.arange(columns)
            return ids[batch, i[None, None, :, None]] == ids[batch, (j + shift)[None, None, None, :]]
        return (q[:, :, None] == k[:, None, :] + q[:, :1, None])[:, None]

    return build


@st.composite
def _packed(draw: Any, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """Positions that start again in each document, compared within it, and what is nearly that."""
    growth, ahead = draw(st.sampled_from([1, 1, 1, 2])), draw(st.sampled_from([0, 0, 1]))
    fronts, width = draw(st.sampled_from([1, 1, 1, 2])), draw(st.sampled_from([None, None, 2]))
    other, alone, early = (draw(st.integers(0, 7)) == 0 for _ in range(3))

    def build(pad: Tensor) -> Tensor:
        line = torch.arange(max(rows, columns)) - _data(pad)[:, : max(rows, columns)] * 2
        front = line[:, :1].expand(2, fronts) - 1
        ids = (torch.diff(line, prepend=front, dim=-1) != growth).cumsum(-1)
        ids = ids[:, :-1] if fronts == 2 and early else ids[:, fronts - 1 :]
        line = line + _data(pad)[:, : max(rows, columns)] if other else line
        batch = torch.arange(2)[:, None, None, None]
        q, k = torch.arange(rows)[None, None, :, None], torch.arange(columns)[None, None, None, :]
        seen = line[batch, k] <= line[batch, q] + ahead
        if width is not None:
            seen = seen & (line[batch, k] > line[batch, q] - width)
        return seen if alone else (ids[batch, q] == ids[batch, k]) & seen

    return build


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_what_is_recovered_is_the_mask(data: Any) -> None:
    rows, columns = data.draw(st.sampled_from([(5, 5), (4, 6), (6, 4)]))
    build = data.draw(_mask(rows, columns))
    pad = torch.rand(2, columns, generator=torch.Generator().manual_seed(0)) > 0.4
    _is_consistent(build, rows, columns, pad)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_an_added_mask_taken_apart_gives_the_same_softmax(data: Any) -> None:
    """Also of rows that see no key: eager shares those out evenly."""
    rows, columns = data.draw(st.sampled_from([(5, 5), (4, 6), (6, 4)]))
    allowed, style = data.draw(_mask(rows, columns)), data.draw(st.integers(0, 3))
    pad = torch.rand(2, columns, generator=torch.Generator().manual_seed(0)) > 0.4
    bias = torch.randn(1, 2, rows, columns, generator=torch.Generator().manual_seed(1))
    lowest = torch.finfo(torch.float32).min

    def build(pad: Tensor, bias: Tensor) -> Tensor:
        seen = allowed(pad)
        if style == 0:
            return torch.where(seen, 0.0, lowest)
        if style == 1:
            return bias + torch.where(seen, 0.0, -1e9)
        if style == 2:
            return torch.where(seen, bias, lowest).contiguous()
        return torch.zeros(rows, columns).masked_fill(~seen, -INF) + bias

    graph, node = _traced(build, pad, bias)
    found = split_additive(node, -3e4)
    if found is None:
        return
    seen = _seen(graph, found, rows, columns, pad, bias)
    rest = torch.zeros(()) if found.rest is None else _value(graph, found.rest, pad, bias)
    scores = torch.randn(2, 2, rows, columns, generator=torch.Generator().manual_seed(2))
    ours = (scores + rest).masked_fill(~seen, -INF).softmax(-1)
    torch.testing.assert_close(ours, (scores + build(pad, bias)).softmax(-1), equal_nan=False)


def _hugging_face(pad: Tensor) -> Tensor:
    """What transformers builds when it may not look at data: gathers, a packing test, `new_ones &`."""
    positions = torch.arange(5).unsqueeze(0).expand(2, -1)
    first = positions[:, :1] - 1
    packed = (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(2)[:, None, None, None]
    q, k = torch.arange(5)[None, None, :, None], torch.arange(5)[None, None, None, :]
    same = packed[batch, q] == packed[batch, k]
    return q.new_ones((), dtype=torch.bool) & same & (positions[batch, k] <= positions[batch, q])


CAUSAL_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda pad: torch.arange(5)[None, :] <= torch.arange(5)[:, None],
    "tril": lambda pad: torch.ones(5, 5).tril() != 0,
    "tril of bool": lambda pad: torch.tril(torch.ones(5, 5, dtype=torch.bool)),
    "not triu": lambda pad: ~torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1),
    "sliced buffer": lambda pad: torch.ones(9, 9).tril().view(1, 1, 9, 9)[:, :, :5, :5] != 0,
    "Hugging Face": _hugging_face,
    "query >= key": lambda pad: torch.arange(5).view(-1, 1) >= torch.arange(5).view(1, -1),
    "smaller than the next": lambda pad: torch.arange(5)[None, :] < torch.arange(1, 6)[:, None],
}


@pytest.mark.parametrize("name", CAUSAL_MASKS)
def test_causal_masks_are_recognised_whole(name: str) -> None:
    _, node = _traced(CAUSAL_MASKS[name], torch.ones(2, 5, dtype=torch.bool))
    assert recover(node) == Mask(True, None)


@pytest.mark.parametrize("name", CAUSAL_MASKS)
def test_padding_stays_a_tensor_beside_causal(name: str) -> None:
    pad = torch.tensor([[True] * 5, [False, True, True, True, True]])

    def build(pad: Tensor) -> Tensor:
        return CAUSAL_MASKS[name](pad) & pad[:, None, None, :]

    assert _is_consistent(build, 5, 5, pad)
    _, node = _traced(build, pad)
    rest = recover(node).rest
    assert rest is not None and rest.meta["val"].shape == (2, 1, 1, 5)


def _window(q: Tensor, k: Tensor, width: int) -> Tensor:
    return (k > q - width) & (k <= q)


BANDS: dict[str, tuple[Callable[[Tensor], Tensor], Mask]] = {
    "strictly before": (lambda pad: _columns() < _rows(), Mask(True, None, None, -1)),
    "one ahead": (lambda pad: torch.ones(5, 5).tril(1) != 0, Mask(True, None, None, 1)),
    "bottom right": (lambda pad: torch.ones(5, 7).tril(2) != 0, Mask(True, None, None, 2)),
    "past keys": (lambda pad: _columns() <= _rows() + 2, Mask(True, None, None, 2)),
    "anticausal": (lambda pad: _columns() >= _rows(), Mask(False, None, 1)),
    "window": (lambda pad: _window(_rows(), _columns(), 3), Mask(True, None, 3)),
    "window with a cache": (lambda pad: _window(_rows() + 2, _columns(), 3), Mask(True, None, 3, 2)),
    "both ways": (lambda pad: (_rows() - _columns()).abs() <= 2, Mask(True, None, 5, 2)),
    "repeated": (lambda pad: _window(_rows(), _columns(), 3).expand(2, 1, 5, 7), Mask(True, None, 3)),
    "tril and triu": (
        lambda pad: torch.ones(5, 7, dtype=torch.bool).tril(1).triu(-1),
        Mask(True, None, 3, 1),
    ),
}


def _rows() -> Tensor:
    return torch.arange(5)[:, None]


def _columns() -> Tensor:
    return torch.arange(7)[None, :]


@pytest.mark.parametrize("name", BANDS)
def test_bands_are_recognised_whole(name: str) -> None:
    build, expected = BANDS[name]
    pad = torch.ones(2, 7, dtype=torch.bool)
    columns = build(pad).shape[-1]
    assert _is_consistent(build, 5, columns, pad[:, :columns]) == expected


NEARLY: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": lambda pad: torch.arange(0, 10, 2)[None, :] <= torch.arange(5)[:, None],
    "one query position for all": lambda pad: (torch.arange(5) <= torch.arange(5)[3:4, None]).expand(5, 5),
    "flipped": lambda pad: (torch.arange(5)[None, :] <= torch.arange(5)[:, None]).flip(-1),
    "positions from data": lambda pad: pad.cumsum(-1)[:, None, None, :] <= pad.cumsum(-1)[:, None, :, None],
    "nothing": lambda pad: (torch.arange(5)[None, :] > torch.arange(5)[:, None] + 1).logical_and(
        torch.arange(5)[None, :] <= torch.arange(5)[:, None]
    ),
    "this or that": lambda pad: (
        _window(torch.arange(5)[:, None], torch.arange(5)[None, :], 2)
        | (torch.arange(5)[None, :] == torch.arange(5)[:, None] + 3)
    ),
    "outside a window": lambda pad: ~_window(torch.arange(5)[:, None], torch.arange(5)[None, :], 2),
    "of floats": lambda pad: torch.arange(5.0)[None, :] * 0.5 <= torch.arange(5.0)[:, None],
    "of a type that wraps around": lambda pad: (
        (torch.arange(5, dtype=torch.int8)[None, :] + 126) - 126 <= torch.arange(5)[:, None]
    ),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_causal_keeps_its_tensor(name: str) -> None:
    _, node = _traced(NEARLY[name], torch.ones(2, 5, dtype=torch.bool))
    whole = (Mask(False, node), Mask(False, node.args[0]))  # of what is repeated, the source
    assert recover(node) in whole


def test_symbolic_sizes() -> None:
    def build(x: Tensor) -> Tensor:
        return torch.arange(x.shape[1])[None, :] <= torch.arange(x.shape[1])[:, None]

    _, node = _traced(build, torch.ones(2, 5), mode="symbolic")
    assert isinstance(node.meta["val"].shape[0], torch.SymInt)
    assert recover(node) == Mask(True, None)


ADDITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda pad: torch.where(CAUSAL_MASKS["arange"](pad), torch.zeros([]), -INF),
    "finfo.min": lambda pad: torch.where(CAUSAL_MASKS["arange"](pad), 0.0, torch.finfo(torch.float32).min),
    "masked_fill": lambda pad: torch.zeros(5, 5).masked_fill(~CAUSAL_MASKS["arange"](pad), -INF),
    "generate_square_subsequent_mask": lambda pad: torch.triu(torch.full((5, 5), -INF), diagonal=1),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_added_causal_masks(name: str) -> None:
    pad = torch.ones(2, 5, dtype=torch.bool)
    _, node = _traced(ADDITIVE[name], pad)
    assert recover_additive(node, -3e4) == Mask(True, None)


NOT_ADDITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "with padding": lambda pad: torch.where(
        CAUSAL_MASKS["arange"](pad) & pad[:, None, None, :], torch.zeros([]), -INF
    ),
    "mild": lambda pad: torch.triu(torch.full((5, 5), -100.0), diagonal=1),
    "ones": lambda pad: torch.where(CAUSAL_MASKS["arange"](pad), 1.0, -INF),
    "ALiBi": lambda pad: -(torch.arange(5)[:, None] - torch.arange(5)[None, :]).abs().float(),
    "wrong way": lambda pad: torch.where(CAUSAL_MASKS["arange"](pad), -INF, torch.zeros([])),
    "strict": lambda pad: torch.triu(torch.full((5, 5), -INF), diagonal=0),
}


@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_other_added_masks_stay_as_they_are(name: str) -> None:
    _, node = _traced(NOT_ADDITIVE[name], torch.ones(2, 5, dtype=torch.bool))
    assert recover_additive(node, -3e4) is None


# What is below a number is forbidden: (mask that is chosen from 0 and a low number, the number, whether read)
BELOW = {
    "Falcon": (lambda allowed: torch.where(allowed, torch.zeros(()), -3e38), -1, True),
    "zero": (lambda allowed: torch.where(allowed, torch.zeros(()), -3e38), 0, True),
    "cast": (lambda allowed: torch.where(allowed, torch.zeros(()), -3e38).bfloat16(), -1, True),
    "not low enough": (lambda allowed: torch.where(allowed, torch.zeros(()), -1.001).bfloat16(), -1, False),
    "above zero": (lambda allowed: torch.where(allowed, torch.zeros(()), -3e38), 1, False),
}


@pytest.mark.parametrize("name", BELOW)
def test_what_is_below_a_number_is_forbidden(name: str) -> None:
    choose, number, is_read = BELOW[name]

    def build(x: Tensor) -> Tensor:
        return choose(torch.arange(6) <= torch.arange(6)[:, None]) < number

    graph, node = _traced(build, torch.zeros(2, 6, dtype=torch.int64))
    found = recover_forbidden(node)
    assert (found is not None) == is_read
    if found is not None:
        assert torch.equal(_seen(graph, found, 6, 6), ~build(torch.zeros(())))
