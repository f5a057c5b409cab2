"""Documents read off masks: packed sequences, chunks, hand-written ones; and what is none."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import _is_consistent, _seen, _traced, _value
from torch import Tensor
from transformers.masking_utils import chunked_overlay, find_packed_sequence_indices

from fusekit.passes.masks import Mask, recover, recover_additive

T = 9
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [5, 6, 7, 8, 1, 2, 9, 10, 11]])
BATCH = torch.arange(2)[:, None, None, None]
QUERY, KEY = torch.arange(T)[None, None, :, None], torch.arange(T)[None, None, None, :]


def _causal() -> Tensor:
    return torch.arange(T) <= torch.arange(T)[:, None]


def _packed(positions: Tensor, window: int | None = None, ahead: int = 0) -> Tensor:
    """As transformers builds it: the causal function of positions, then the same-sequence function."""
    batch, q, k = (torch.arange(n) for n in (2, T, T))
    batch, q, k = batch[:, None, None, None], q[None, None, :, None], k[None, None, None, :]
    ids = find_packed_sequence_indices(positions)
    seen = positions[batch, k] <= positions[batch, q] + ahead
    if window is not None:
        seen = seen & (positions[batch, k] > positions[batch, q] - window)
    return q.new_ones((), dtype=torch.bool) & seen & (ids[batch, q] == ids[batch, k])


def _chunked(padding: Tensor) -> Tensor:
    batch, q, k = (torch.arange(n) for n in (2, T, T))
    batch, q, k = batch[:, None, None, None], q[None, None, :, None], k[None, None, None, :]
    return (k <= q) & chunked_overlay(4, padding)(batch, 0, q, k)


# name: (mask of the numbers, causal, window, offset)
WHOLE: dict[str, tuple[Callable[[Tensor], Tensor], bool, int | None, int]] = {
    "transformers, packed": (lambda x: _packed(x), True, None, 0),
    "transformers, packed, window": (lambda x: _packed(x, window=2), True, 2, 0),
    "transformers, chunks": (lambda x: _chunked(x[:, 0]), True, None, 0),
    "three dimensions": (
        lambda x: ((x[:, :, None] == x[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril())[:, None],
        True,
        None,
        0,
    ),
    "four dimensions": (lambda x: x[:, None, :, None] == x[:, None, None, :], False, None, 0),
    "of one batch element": (lambda x: (x[0] == x[0][:, None]) & _causal(), True, None, 0),
    "chunks by division": (
        lambda x: (torch.arange(T) // 4 == torch.arange(T)[:, None] // 4) & _causal(),
        True,
        None,
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_documents_are_recognised_whole(name: str) -> None:
    build, causal, window, offset = WHOLE[name]
    found = _is_consistent(build, T, T, POSITIONS)
    assert found.documents is not None and found.documents.own
    assert found._replace(documents=None) == Mask(causal, None, window, offset)


def _grid(x: Tensor, queries: bool) -> Tensor:
    return x[:, None, :, None] if queries else x[:, None, None, :]


def _equal(x: Tensor) -> Tensor:
    return _grid(x, True) == _grid(x, False)


# name: (mask of the numbers, causal, window)
SEVERAL: dict[str, tuple[Callable[[Tensor], Tensor], bool, int | None]] = {
    "chunks of packed sequences": (lambda x: _packed(x) & _equal(x // 2), True, None),
    "in another order": (lambda x: _equal(x // 2) & _packed(x, window=2), True, 2),
    "chunks of the index": (
        lambda x: _equal(x) & (torch.arange(T) // 4 == torch.arange(T)[:, None] // 4), False, None,
    ),
    "three": (lambda x: _equal(x % 2) & _equal(x // 3) & _equal(x % 5) & _causal(), True, None),
    "numbers of any size": (lambda x: _equal(x * 2**60) & _equal(x % 3 * 2**61 - 2**62), False, None),
    "of other numbers of the query": (
        lambda x: (_grid(x + 1, True) == _grid(x, False)) & _equal(x % 2), False, None,
    ),
    "booleans": (lambda x: _equal(x > 3) & _causal(), True, None),
    "booleans and numbers": (lambda x: _equal(x > 3) & _equal(x % 3), False, None),
    "not unequal": (lambda x: ~(_grid(x % 3, True) != _grid(x % 3, False)) & _equal(x > 3), False, None),
    "8 bits": (lambda x: _equal(x.to(torch.int8)) & _equal(x.to(torch.uint8) * 50), False, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_several_equalities_are_one(name: str) -> None:
    build, causal, window = SEVERAL[name]
    found = _is_consistent(build, T, T, POSITIONS)
    assert found.documents is not None
    assert found._replace(documents=None) == Mask(causal, None, window)


# What is said of the query alone and of the key alone: (mask, documents, rest)
LINES: dict[str, tuple[Callable[[Tensor], Tensor], bool, bool]] = {
    "both valid": (lambda x: _grid(x > 1, True) & _grid(x > 1, False), True, False),
    "both valid, causal": (lambda x: _grid(x > 1, True) & _causal() & _grid(x > 1, False), True, False),
    "neither forbidden": (lambda x: ~(_grid(x < 2, True) | _grid(x < 1, False)), True, False),
    "of documents": (lambda x: _equal(x % 3) & _grid(x > 1, True) & _grid(x > 1, False), True, True),
    "keys twice": (lambda x: _grid(x > 1, False) & _grid(x != 3, False) & _causal(), False, True),
    "keys twice, once of all": (lambda x: _grid(x > 1, False) & (torch.arange(T) % 3 > 0), False, True),
    "documents and keys twice": (
        lambda x: _grid(x > 1, False) & _equal(x % 3) & _grid(x != 3, False), True, True,
    ),
    "documents and a query twice": (
        lambda x: _grid(x > 1, True) & _equal(x % 3) & _grid(x != 3, True), True, False,
    ),
    "one query": (lambda x: _grid(x > 1, True) & _causal(), False, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_lines_of_queries_and_keys_are_joined(name: str) -> None:
    build, documents, rest = LINES[name]
    found = _is_consistent(build, T, T, POSITIONS)
    assert ((found.documents is not None), (found.rest is not None)) == (documents, rest)
    assert not rest or not _is_dense(build)


def _is_dense(build: Callable[[Tensor], Tensor]) -> bool:
    graph, node = _traced(build, POSITIONS)
    rest = recover(node).rest
    return tuple(_value(graph, rest, POSITIONS).shape[-2:]) == (T, T)


PARTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: _causal(),
    lambda x: torch.arange(T) > torch.arange(T)[:, None] - 4,
    lambda x: _equal(x % 3),
    lambda x: _equal(x // 4 - 1),
    lambda x: _equal(x > 3),
    lambda x: torch.arange(T) // 5 == torch.arange(T)[:, None] // 5,
    lambda x: _grid(x, True) == _grid(x.flip(-1), False),
    lambda x: _grid(x > 0, True),
    lambda x: _grid(x != 4, True),
    lambda x: _grid(x < 8, False),
    lambda x: ~_grid(x == 2, False),
    lambda x: torch.arange(T) != 3,
    lambda x: x[:, :, None].expand(2, T, T)[:, None] > x[:, None, None, :] - 2,
    lambda x: (_grid(x > 5, False) | _grid(x > 5, True)) | _causal(),
]


@given(
    chosen=st.lists(st.sampled_from(range(len(PARTS))), min_size=1, max_size=5),
    numbers=st.lists(st.integers(-9, 9), min_size=2 * T, max_size=2 * T),
    forbidden=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_conjunction_is_the_mask_it_was(chosen: list[int], numbers: list[int], forbidden: bool) -> None:
    def build(x: Tensor) -> Tensor:
        parts = [PARTS[i](x) for i in chosen]
        if forbidden:
            return ~functools.reduce(lambda a, b: a | b, [~part for part in parts])
        return functools.reduce(lambda a, b: a & b, parts)

    _is_consistent(build, T, T, torch.tensor(numbers).view(2, T))


def test_padding_stays_a_tensor_beside_documents() -> None:
    def build(x: Tensor) -> Tensor:
        return ((x[:, :, None] == x[:, None, :]) & (x > 0)[:, None, :])[:, None] & _causal()

    found = _is_consistent(build, T, T, POSITIONS)
    assert found.documents is not None and found.causal and found.rest is not None


# Positions compared with no proof that they grow by one within a document stay a tensor.
UNPROVED: dict[str, Callable[[Tensor], Tensor]] = {
    "other ids": lambda x: (
        (x[:, None, :, None] // 5 == x[:, None, None, :] // 5) & (x[:, None, None, :] <= x[:, None, :, None])
    ),
    "a jump of two": lambda x: _by_steps(x, 2),
    "of other positions": lambda x: _by_steps(x, 1, lambda x: x * 2),
    "reversed": lambda x: _by_steps(x, 1, lambda x: x.flip(-1)),
    "one key ahead of the other": lambda x: _by_steps(x, 1, lambda x: x, 1),
}


def _by_steps(
    x: Tensor, step: int, compared: Callable[[Tensor], Tensor] = lambda x: x, shift: int = 0
) -> Tensor:
    ids = (torch.diff(x, prepend=x[:, :1] - 1, dim=-1) != step).cumsum(-1)
    keys = torch.cat((ids[:, shift:], ids[:, :shift]), -1)
    x = compared(x)
    return (ids[:, None, :, None] == keys[:, None, None, :]) & (x[:, None, None, :] <= x[:, None, :, None])


@pytest.mark.parametrize("name", UNPROVED)
def test_positions_without_proof_stay_a_tensor(name: str) -> None:
    found = _is_consistent(UNPROVED[name], T, T, POSITIONS)
    assert found.documents is not None and found.rest is not None and not found.causal


NO_DOCUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unequal": lambda x: x[:, None, :, None] != x[:, None, None, :],
    "of floats": lambda x: x.float()[:, None, :, None] == x.float()[:, None, None, :],
    "a number of each head": lambda x: x[:, :T, None, None].expand(2, T, T, T)[:, :1] == x[:, None, None, :],
    "a key that knows the query": lambda x: x[:, None, :, None] == x[:, None, None, :] * x[:, None, :, None],
    "with a number": lambda x: (x[:, None, :, None] == 1).expand(2, 1, T, T),
    "or": lambda x: (x[:, None, :, None] == x[:, None, None, :]) | _causal(),
}


@pytest.mark.parametrize("name", NO_DOCUMENTS)
def test_what_is_no_document_stays_a_tensor(name: str) -> None:
    found = _is_consistent(NO_DOCUMENTS[name], T, T, POSITIONS)
    assert found.documents is None and found.rest is not None


def test_a_mask_written_to_is_not_read() -> None:
    def build(x: Tensor) -> Tensor:
        same = x[:, None, :, None] == x[:, None, None, :]
        same[..., 0] = True
        return same & _causal()

    _, node = _traced(build, POSITIONS)
    for used in node.all_input_nodes:
        used.meta["written"] = True
    assert recover(node) == Mask(False, node)


@pytest.mark.parametrize("style", ["where", "masked_fill"])
def test_an_added_mask_of_packed_sequences(style: str) -> None:
    lowest = torch.finfo(torch.float32).min

    def build(x: Tensor) -> Tensor:
        if style == "where":
            return torch.where(_packed(x), torch.zeros(()), lowest)
        return torch.zeros(2, 1, T, T).masked_fill(~_packed(x), lowest)

    graph, node = _traced(build, POSITIONS)
    found = recover_additive(node, -3e4)
    assert found is not None and found.causal and found.documents is not None
    assert torch.equal(_seen(graph, found, T, T, POSITIONS), build(POSITIONS) == 0)


def test_an_added_mask_whose_query_may_have_no_key_stays() -> None:
    def build(x: Tensor) -> Tensor:
        return torch.where((x // 2)[:, None, :, None] == x[:, None, None, :], 0.0, -1e9)

    assert recover_additive(_traced(build, POSITIONS)[1], -3e4) is None


def test_symbolic_sizes() -> None:
    def build(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return (x[:, None, :, None] == x[:, None, None, :]) & (places <= places[:, None])

    _, node = _traced(build, POSITIONS, mode="symbolic")
    found = recover(node)
    assert found.documents is not None and found.causal and found.rest is None
