"""Windows beside global tokens read off masks: every spelling against the dense mask; and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import _is_consistent, _mask, _traced
from torch import Tensor
from transformers import masking_utils

from fusekit.passes.masks import Mask, recover, recover_additive, recover_forbidden

T = 9
Build = Callable[[Tensor], Tensor]
FLAGS = torch.tensor([[True] + [False] * 8, [False] * 5 + [True, False, True, False]])


def _ours() -> Tensor:
    return torch.arange(T)[:, None]


def _theirs() -> Tensor:
    return torch.arange(T)[None, :]


def _near(width: int = 2) -> Tensor:
    return (_ours() - _theirs()).abs() <= width


def _causal() -> Tensor:
    return _theirs() <= _ours()


def _behind(width: int) -> Tensor:
    return _ours() - _theirs() < width


def _both(flags: Tensor) -> Tensor:
    """The usual way: of batch elements."""
    return flags[:, None, :, None] | flags[:, None, None, :]


def _hugging_face(flags: Tensor, near: Any) -> Tensor:
    def is_global(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return flags[b, q] | flags[b, k]

    batch, i = torch.arange(2)[:, None, None, None], torch.arange(T)
    indices = batch, torch.zeros(1, 1, 1, 1, dtype=torch.long), i[None, None, :, None], i[None, None, None, :]
    return masking_utils.or_masks(near, is_global)(*indices)


def _forbidden(flags: Tensor) -> Tensor:
    far = (_ours() - _theirs()).abs() > 2
    return far & ~flags[:, None, :, None] & ~flags[:, None, None, :]


AROUND, BEHIND = (True, 5, 2), (True, 3, 0)
# name: (mask of the flags, causal, window, offset, whether of queries, of keys, ahead)
WHOLE: dict[str, tuple[Build, tuple[bool, int | None, int], tuple[bool, bool, bool]]] = {
    "of batch elements": (lambda x: _near() | _both(x), AROUND, (True, True, True)),
    "of one line": (lambda x: _near() | x[0][:, None] | x[0][None, :], AROUND, (True, True, True)),
    "logical_or": (lambda x: torch.logical_or(_both(x), _near()), AROUND, (True, True, True)),
    "keys only": (lambda x: _near() | x[:, None, None, :], AROUND, (False, True, True)),
    "queries only": (lambda x: x[:, None, :, None] | _near(), AROUND, (True, False, True)),
    "within causal": (lambda x: (_behind(3) | _both(x)) & _causal(), BEHIND, (True, True, False)),
    "causal first": (lambda x: _causal() & (_both(x) | _behind(3)), BEHIND, (True, True, False)),
    "around within causal": (lambda x: _causal() & (_both(x) | _near()), BEHIND, (True, True, False)),
    "beyond causal": (lambda x: (_behind(3) & _causal()) | _both(x), BEHIND, (True, True, True)),
    "prefix": (lambda x: _causal() | x[:, None, None, :], (True, None, 0), (False, True, True)),
    "first keys": (lambda x: _near() | (_theirs() < 2), AROUND, (False, True, True)),
    "first and last": (
        lambda x: _near() | (_theirs() < 2) | (_theirs() >= T - 2) | (_ours() == 0),
        AROUND,
        (True, True, True),
    ),
    "numbers": (lambda x: _near() | (x.long()[:, None, None, :] > 0), AROUND, (False, True, True)),
    "not local": (lambda x: _near() | ~x[:, None, None, :], AROUND, (False, True, True)),
    "not forbidden": (lambda x: ~_forbidden(x), AROUND, (True, True, True)),
    "repeated": (lambda x: (_near() | _both(x)).expand(2, 1, T, T), AROUND, (True, True, True)),
    "transformers": (
        lambda x: _hugging_face(x, masking_utils.sliding_window_bidirectional_mask_function(2)),
        AROUND,
        (True, True, True),
    ),
    "transformers, causal": (
        lambda x: _hugging_face(x, masking_utils.sliding_window_causal_mask_function(3)),
        BEHIND,
        (True, True, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_global_tokens_are_recognised_whole(name: str) -> None:
    build, band, (queries, keys, ahead) = WHOLE[name]
    found = _is_consistent(build, T, T, FLAGS)
    assert found._replace(globals=None) == Mask(band[0], None, *band[1:]) and found.globals is not None
    assert (found.globals.queries is not None, found.globals.keys is not None) == (queries, keys)
    assert found.globals.ahead == ahead


@pytest.mark.parametrize("name", ["of batch elements", "within causal", "not forbidden"])
def test_padding_and_documents_beside_global_tokens(name: str) -> None:
    build = WHOLE[name][0]
    padding = torch.arange(T) < torch.tensor([T, 6])[:, None]

    def padded(x: Tensor, padding: Tensor) -> Tensor:
        return build(x) & padding[:, None, None, :]

    def packed(x: Tensor, padding: Tensor) -> Tensor:
        ids = padding.long()
        return padding[:, None, None, :] & (ids[:, None, :, None] == ids[:, None, None, :]) & build(x)

    found = _is_consistent(padded, T, T, FLAGS, padding)
    assert found.globals is not None and found.rest.meta["val"].shape == (2, 1, 1, T)
    found = _is_consistent(packed, T, T, FLAGS, padding)
    assert found.globals is not None and found.rest is not None and found.documents is not None


def test_what_is_forbidden_says_the_same() -> None:
    padding = torch.arange(T) < torch.tensor([T, 6])[:, None]

    def build(x: Tensor, padding: Tensor) -> Tensor:
        return ~(_forbidden(x) | ~padding[:, None, None, :])

    _, node = _traced(build, FLAGS, padding)
    found = recover_forbidden(node.args[0])
    assert found is not None and found.globals is not None and found == recover(node)
    assert _is_consistent(build, T, T, FLAGS, padding).globals is not None


def test_an_added_mask_beside_global_tokens() -> None:
    lowest = torch.finfo(torch.float32).min
    for build in (
        lambda x: torch.where(_near() | _both(x), 0.0, lowest),
        lambda x: torch.zeros(2, 1, T, T).masked_fill(_forbidden(x), lowest),
    ):
        _, node = _traced(build, FLAGS)
        found = recover_additive(node, -3e4)
        assert found is not None and found.globals is not None and found.rest is None


def _ahead(x: Tensor) -> Tensor:
    """The bound around all is another than the window's."""
    return (_near(2) | _both(x)) & (_theirs() <= _ours() + 3)


# What looks alike, and is none of the op's: it must stay a tensor, or be taken in part.
NO_GLOBALS: dict[str, Build] = {
    "a width that is data": lambda x: (_both(x) | ((_ours() - _theirs()).abs() <= x.long().sum())),
    "a width of each query": lambda x: _both(x) | ((_ours() - _theirs()).abs() <= x[0].long()[:, None]),
    "of squares": lambda x: _both(x) | ((_ours() - _theirs()) ** 2 <= 4),
    "of every second key": lambda x: _both(x) | ((_ours() - 2 * _theirs()).abs() <= 2),
    "of blocks": lambda x: _both(x) | ((_ours() // 3 - _theirs() // 3).abs() <= 1),
    "of floats": lambda x: _both(x) | ((_ours() - _theirs()).float().abs() <= 2.5),
    "two bands": lambda x: _both(x) | _near(1) | (_ours() - _theirs() == 4),
    "one or the other": lambda x: _near() ^ _both(x),
    "a sum": lambda x: (_near().int() + _both(x).int()) > 0,
    "both global": lambda x: _near() | (x[:, None, :, None] & x[:, None, None, :]),
    "a flag of each score": lambda x: _near() | (x[:, None, :, None] == x[:, None, None, :]),
    "a flag of each head": lambda x: _near() | x[:, :2].reshape(1, 4, 1, 1)[:, :1],
    "padding inside": lambda x: (_near() & x[:, None, None, :]) | x[:, None, :, None],
    "a bound from below": lambda x: (_behind(2) | _both(x)) & (_theirs() >= _ours() - 4),
    "a further bound": _ahead,
    "no window": _both,
    "outside of the window": lambda x: ~_near() | _both(x),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_GLOBALS)
def test_what_is_no_global_token_stays_a_tensor(name: str) -> None:
    found = _is_consistent(NO_GLOBALS[name], T, T, FLAGS)
    assert found.globals is None and found.rest is not None


def test_flags_written_to_are_not_read() -> None:
    def build(x: Tensor) -> Tensor:
        flags = torch.zeros(T, dtype=torch.bool)
        return _near() | (flags | x[0])[None, :]

    _, node = _traced(build, FLAGS)
    assert recover(node).globals is not None
    for used in node.graph.nodes:
        used.meta["written"] = used.op == "call_function" and used is not node
    assert recover(node) == Mask(False, node)


def test_off_by_one_shows() -> None:
    def strict(x: Tensor) -> Tensor:
        return ((_ours() - _theirs()).abs() < width) | _both(x)

    def loose(x: Tensor) -> Tensor:
        return ((_ours() - _theirs()).abs() <= width) | _both(x)

    for width in range(1, 4):
        for build, reach in ((strict, width - 1), (loose, width)):
            found = _is_consistent(build, T, T, FLAGS)
            assert found.globals is not None and (found.window, found.offset) == (2 * reach + 1, reach)


@st.composite
def _flags(draw: Any, rows: int, columns: int) -> Build:
    """A boolean of the query or of the key, as data or index arithmetic, or nearly that."""
    query, style, number = draw(st.booleans()), draw(st.integers(0, 5)), draw(st.integers(0, 3))
    size, shift = rows if query else columns, draw(st.sampled_from([0, 0, 1]))

    def build(pad: Tensor) -> Tensor:
        line = torch.cat((pad, ~pad), 1)[:, shift : shift + size]
        if style == 1:
            line = line[number % 2]
        if style == 2:
            line = torch.arange(size) < number
        if style == 3:
            line = torch.arange(size) == number
        if style == 4:
            batch = torch.arange(2)[:, None, None, None]
            at = torch.arange(size)[None, None, :, None] if query else torch.arange(size)[None, None, None, :]
            return torch.cat((pad, ~pad), 1)[batch, at + shift]
        if style == 5:
            line = line.long() * number > 0
        if line.dim() == 1:
            return line[:, None] if query else line[None, :]
        return line[:, None, :, None] if query else line[:, None, None, :]

    return build


@st.composite
def _tree(draw: Any, rows: int, columns: int, depth: int) -> Build:
    """Windows, flags and any other mask, joined in any way; most often by `or`."""
    kind = draw(st.sampled_from(["window", "flags", "flags", "other", "or", "or", "or", "and", "not"]))
    if depth == 0 or kind in ("window", "flags", "other"):
        if kind == "other":
            return draw(_mask(rows, columns))
        if kind != "window":
            return draw(_flags(rows, columns))
        width, style = draw(st.integers(0, 3)), draw(st.integers(0, 4))

        def window(pad: Tensor) -> Tensor:
            k, q = torch.arange(columns)[None, :], torch.arange(rows)[:, None]
            if style == 0:
                return (q - k).abs() <= width
            if style == 1:
                return ~(torch.abs(k - q) > width)
            if style == 2:
                return (k >= q - width) & (q >= k - width)
            if style == 3:
                return ~((k < q - width) | (k > q))
            return k <= q + width - 1

        return window
    inner = draw(_tree(rows, columns, depth - 1))
    if kind == "not":
        return lambda pad: ~inner(pad)
    other = draw(_tree(rows, columns, depth - 1))
    if kind == "and":
        return lambda pad: inner(pad) & other(pad)
    style = draw(st.integers(0, 2))
    joins = [lambda a, b: a | b, torch.logical_or, lambda a, b: ~(~a & ~b)]
    return lambda pad: joins[style](inner(pad), other(pad))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data())
def test_what_is_recovered_is_the_mask(data: Any) -> None:
    rows, columns = data.draw(st.sampled_from([(5, 5), (4, 6), (6, 4)]))
    build = data.draw(_tree(rows, columns, 3))
    pad = torch.rand(2, columns, generator=torch.Generator().manual_seed(0)) > 0.4

    def whole(pad: Tensor) -> Tensor:
        return build(pad).expand(2, 1, rows, columns)

    _is_consistent(whole, rows, columns, pad)
    _is_consistent(lambda pad: ~whole(pad), rows, columns, pad)
