"""Documents read off masks: packed sequences, chunks, hand-written ones; and what is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_masks import _is_consistent, _seen, _traced
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
