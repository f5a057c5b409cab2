"""What an op does on a GPU, kept on a tape: from the fourth call of a kind on the host repeats it.

On a GPU an op is Python that looks at dtypes, shapes, strides and alignments, allocates, makes views, calls
PyTorch's operators and starts kernels. For calls that are alike in all of these it does the same each time,
so it is watched once and then played: allocate, fill in addresses, start. A kind of call is everything that
the op, its plans and Triton's specialisation could see: of every tensor dtype, shape, strides, alignment and
device, all other arguments, and what the op says it depends on besides.

Only what is understood completely is played. An op that waits for a value, or calls what is not PyTorch's, is
run as it is written, each time, and so is every call of tensors that are not plain. Inputs are told apart by
their place, not by what they are: two that were the same tensor when the op was watched may be two when it is
played.

The first call of a kind is only noted: sizes that never come again are not worth a tape. The second is
watched. The third is computed both ways, and only a tape whose results are the same bits is played from the
fourth on: all ops sum in a fixed order. Of attention PATIENT calls are noted: a cache that grows makes a new
kind of every step, which comes once a layer. FUSEKIT_TAPES=0 runs every call as it is written.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusekit.kernels import launch, trial
from fusekit.kernels.tape_watch import Watch, tensors_in
from fusekit.kernels.tape_writer import Tape, tape_of

MOST_TAPES = 4096  # of an op; then all are dropped
PATIENT = 128  # calls: more than a model has layers
ENABLED = os.environ.get("FUSEKIT_TAPES", "1") != "0"
NEVER = object()  # what `depends` says of calls whose bits two runs need not share: they are not played
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VALUES = frozenset((int, float, bool, str, torch.dtype, type(None)))


def is_quiet() -> bool:
    """Whether nobody traces, transforms or watches what PyTorch runs on this thread."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def _describe(args: Any, key: list[Any], addresses: list[int]) -> bool:
    """Append what tells this call's kind, and its tensors' addresses; False where a tensor is not plain."""
    for x in args:
        kind = x.__class__
        if kind is Tensor or kind is Parameter:
            address = x.data_ptr()
            if x.is_neg() or not (address or x.numel() == 0):
                return False  # a negation, or zeros, that nobody has made yet
            addresses.append(address)
            key += (x.dtype, x.shape, x.stride(), address & 15, x.get_device())
        elif kind in _VALUES:
            key.append(x)
        elif kind is list or kind is tuple:
            key.append(len(x))
            if not _describe(x, key, addresses):
                return False
        else:
            return False
    return True


def _first_tensor(args: Any) -> Tensor | None:
    for x in args:
        if isinstance(x, Tensor):
            return x
        if isinstance(x, list | tuple) and (found := _first_tensor(x)) is not None:
            return found
    return None


def _apart(args: Any, tensors: list[Tensor]) -> list[Any]:
    """The same arguments, each tensor an object of its own, all of which go to `tensors`."""
    found: list[Any] = []
    for x in args:
        if isinstance(x, list | tuple):
            x = _apart(x, tensors)
        elif isinstance(x, Tensor):
            x = x.detach()
            tensors.append(x)
        found.append(x)
    return found


def same_bits(results: Any, others: Any) -> bool:
    """Whether two calls returned the same, NaN included; waits for the device."""
    pairs = list(zip(tensors_in([results]), tensors_in([others]), strict=True))
    return all((a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) for a, b in pairs) and all(
        torch.equal(*(x.view(_SAME_SIZE[x.element_size()]) for x in pair)) for pair in pairs
    )


def _fill(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Uncounted, as kernels write: a checkpoint may keep such a tensor among its inputs."""
    for x, value in zip(tensors, values, strict=True):
        x.data.copy_(value)


class Taped:
    """An op's function and its tapes.

    depends: what else decides what the function does, asked of its arguments at each call.
    writes: places of the arguments that it writes to. patience: calls of a kind before one is watched.
    unproved: what was watched, and not yet compared with another call.
    """

    def __init__(
        self, run: Callable[..., Any], depends: Callable[..., Hashable] | None = None, name: str = "an op",
        writes: tuple[int, ...] = (), patience: int = 1,
    ) -> None:  # fmt: skip
        self.run, self.depends, self.name, self.writes, self.patience = run, depends, name, writes, patience
        self.tapes: dict[tuple[Any, ...], Tape] = {}
        self.unproved: dict[tuple[Any, ...], Tape] = {}
        self.noted: dict[tuple[Any, ...], int | str] = {}  # how often a kind came, or why it is not played
        _every.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Play the call or run it, and watch it where it comes for the second time."""
        if self.tapes and not kwargs and (found := self.played(args)) is not None:
            return found
        first = _first_tensor(args)
        if first is None or not launch.on_gpu(first):
            return self.run(*args, **kwargs)
        if torch.cuda.device_count() > 1 and torch.cuda.current_device() != first.get_device():
            with torch.cuda.device(first.device):
                return self._call(args, kwargs)
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or not ENABLED or launch.observed() or not is_quiet():
            return self.run(*args, **kwargs)
        key, addresses = self._kind(args)
        if key is None or trial.is_capturing():
            return self.run(*args)
        tape, unproved = self.tapes.get(key), self.unproved.pop(key, None)  # of two threads one compares
        if tape is not None:
            device, stream = launch.current()
            return tape.play(addresses, stream, args) if device == tape.device else self.run(*args)
        if unproved is not None:
            return self._proved(key, unproved, addresses, args)
        return self._watched(key, args) if self._comes_again(key) else self.run(*args)

    def played(self, args: tuple[Any, ...]) -> Any:
        """The results from a tape, or None where there is none for this call."""
        if launch.observed() or not is_quiet():
            return None
        key, addresses = self._kind(args)
        tape = None if key is None else self.tapes.get(key)
        if tape is None:
            return None
        device, stream = launch.current()
        return tape.play(addresses, stream, args) if device == tape.device else None

    def _kind(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, list[int]]:
        key: list[Any] = [None if self.depends is None else self.depends(*args)]
        addresses: list[int] = []
        playable = key[0] is not NEVER and _describe(args, key, addresses)
        return (tuple(key) if playable else None), addresses

    def _comes_again(self, key: tuple[Any, ...]) -> bool:
        """Whether to watch: the kind came often enough, and nothing stood in the way when it was watched."""
        noted = self.noted.get(key, 0)
        if noted == 0 and len(self.noted) >= MOST_TAPES:
            self.forget()
        if isinstance(noted, int) and noted < self.patience:
            self.noted[key] = noted + 1
            return False
        return isinstance(noted, int)

    def _watched(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        tensors: list[Tensor] = []
        apart = _apart(args, tensors)
        watch = Watch(tensors)
        with launch.watch(watch.started), watch:
            returned = self.run(*apart)
        try:
            tape = tape_of(watch, returned)
        except Exception as error:  # of a call that is done: it must not be the user's
            tape, watch.obstacle = None, trial.failure(error)
        if tape is None:
            self.noted[key] = watch.obstacle
        else:
            self.unproved[key] = tape
        return returned

    def _proved(self, key: tuple[Any, ...], tape: Tape, addresses: list[int], args: tuple[Any, ...]) -> Any:
        """The call as it is written; its tape is kept if it does the same."""
        written = tensors_in([args[place] for place in self.writes if place < len(args)])
        before = [x.clone() for x in written]
        returned = self.run(*args)
        after = [x.clone() for x in written]
        try:
            _fill(written, before)
            played = tape.play(addresses, launch.current()[1], args)
            same = same_bits([returned, after], [played, written])
        except torch.OutOfMemoryError:
            self.noted[key] = "no room for its results twice"
            return returned
        except Exception as error:
            same, why = False, trial.failure(error)
        else:
            why = "it computed other bits"
        finally:
            _fill(written, after)
        if same:
            self.tapes[key] = tape
        else:
            self.noted[key] = f"played, {why}"
            warnings.warn(f"fusekit: {self.name}: {self.noted[key]}; it runs as it is written", stacklevel=2)
        return returned

    def forget(self) -> None:
        self.tapes.clear()
        self.unproved.clear()
        self.noted.clear()


_every: list[Taped] = []


def forget() -> None:
    """Drop all tapes: what ops choose by has changed, as by a measurement."""
    for taped in _every:
        taped.forget()
