"""The delayed scales of one optimised model: a slot triple for each of its weights, moved by optimizer steps.

A layer is known by its weight, so every graph of the model, and one captured after a resume, finds the same
state; a layer that is called twice gathers the larger amax of both. What moves a history, and what does not:

  - an optimizer's step moves the slots of the weights it updates, and of frozen ones; not those of another
    optimizer, whose backward pass may be still to come (optimizers inside the backward pass, two of them);
  - inside a backward pass frozen weights wait for the next forward pass: an activation checkpoint still reads
    their scales, and gathers what they show, after the first of several such steps;
  - FSDP2 runs a layer with one Parameter and gives the optimizer another, of the same name: both are known;
  - a step that a loss scaler skipped moves nothing: torch's fused optimizers carry the flag on the device,
    `fusekit.LossScaler` tells of the others;
  - forward passes without gradients, and those of `verify`, read scales and gather nothing;
  - micro-batches and the second forward pass of an activation checkpoint gather into the same maximum.

Within DistributedDataParallel the ranks agree on the largest amax, one reduction a step. Nothing here waits
for the device, and all state stays at its address.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fusekit.kernels.fp8_history import SLOTS, DelayedScales
from fusekit.kernels.recipe import Recipe
from fusekit.passes import _compat
from fusekit.passes.delayed_weights import NamedWeights

GRADIENT = 2  # of a triple: x, weight, gradient
_live: WeakSet[ModelScales] = WeakSet()


class ModelScales:
    """Scales and amax of all weights of a model.

    group: the processes that agree on amax; found where the model runs inside DistributedDataParallel, None:
        each process for itself.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._model, self._recipe = ref(model), recipe
        self._weights = NamedWeights(model)
        self.group: torch.distributed.ProcessGroup | None = None
        self._state: DelayedScales | None = None
        self._loaded: Mapping[str, Any] | None = None  # read before the device was known
        self._masks: WeakKeyDictionary[Optimizer, tuple[Any, bool, Tensor | None]] = WeakKeyDictionary()
        self._pauses = 0
        self._frozen: tuple[Tensor, Tensor] | None = None  # scale and amax while paused
        self._late = False  # slots of frozen weights are still to be moved
        _live.add(self)

    @property
    def names(self) -> list[str]:
        """The weights', in the order of their slots."""
        return self._weights.names

    @property
    def paused(self) -> bool:
        return self._pauses > 0

    def layer(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """scale and amax (3,) of the layer of this Parameter. What is written to amax counts only while
        gradients are recorded and nothing is paused. A weight that is not the model's has no history."""
        state, index = self._on(weight.device), self._weights.index(weight)
        if self._late and not _in_backward():
            self._move_late()
        if index is None:
            return self._nothing, self._scratch
        if self.paused:
            slots = slice(SLOTS * index, SLOTS * (index + 1))
            scale, amax = self._freeze(state)
            return scale[slots], amax[slots]
        if not torch.is_grad_enabled():
            return self._layers[index][0], self._scratch
        self.group = self.group or _compat.active_ddp_group()
        return self._layers[index]

    def restart(self) -> None:
        """Begin anew, with each tensor's own scale: where a layer comes to these scales its slots are of long
        ago, and those of its input may stand with another layer, which reads the same tensor."""
        if self._state is not None:
            for t in self._state.state_dict().values():
                t.data.zero_()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is gathered. Gradients have no scale: what `verify` sends back is not the loss's."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._frozen = None

    def _freeze(self, state: DelayedScales) -> tuple[Tensor, Tensor]:
        if self._frozen is None:
            with torch.inference_mode(False), torch.no_grad():
                scale = state.scale.clone()
                scale[GRADIENT::SLOTS] = 0
                self._frozen = scale, torch.zeros_like(scale)
        return self._frozen

    def update(self, taken: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Move the histories of the slots in `taken`, None: of all; only empty amax where `skip` is not 0."""
        if self._state is not None:
            if skip is not None:
                skip = skip.to(self._state.scale.device, torch.float32, non_blocking=True)
            with torch.no_grad():
                self._state.update(self.group, taken=taken, skip=skip)

    def stepped(self, optimizer: Optimizer, skip: Tensor | None = None) -> None:
        """This optimizer has made its step; or skipped it, where `skip` is not 0."""
        takes, taken = self._taken(optimizer)
        if takes:
            self.update(taken, skip)

    def _move_late(self) -> None:
        """Move the slots of frozen weights, as the steps inside the backward pass left it to do."""
        self._late = False
        frozen = tuple(_frozen(met) for met in self._weights.met())
        self.update(self._mask(frozen))

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the names of the weights they are of, in order."""
        if self._state is None:
            return dict(self._loaded) if self._loaded is not None else {"weights": list(self.names)}
        late = {"late": True} if self._late else {}  # to be moved by all ranks, not by one that saves
        tensors = {n: t.clone() for n, t in self._state.state_dict().items()}
        return {"weights": list(self.names)} | late | tensors

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: it is of a model with other weights, or of another length of history.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"delayed scales are a dict of names, and got a {type(state).__name__}")
        if list(state.get("weights", ())) != self.names:
            differing = sorted(set(self.names) ^ set(state.get("weights", ())))
            raise ValueError(
                f"these delayed scales are of a model with other weights"
                f"{': ' + ', '.join(differing[:3]) if differing else ''}; load them into the model that they "
                f"were saved from, optimised with the same precision"
            )
        if len(state) > 1:  # what does not fit raises here, and not in the first forward pass
            self._new("cpu").load_state_dict({k: v for k, v in state.items() if k != "weights"})
        self._loaded, self._late = dict(state), bool(state.get("late"))
        model = self._model()
        if self._state is not None:
            self._fill(self._state)
        elif model is not None and (first := next(model.parameters(), None)) is not None:
            self._on(first.device)  # now, as the first call may be an optimizer's

    def _new(self, device: torch.device | str) -> DelayedScales:
        recipe = self._recipe
        count = len(self.names)
        return DelayedScales([recipe] * count, length=recipe.history, margin=recipe.margin, device=device)

    def _fill(self, state: DelayedScales) -> None:
        if self._loaded is not None and len(self._loaded) > 1:
            with torch.no_grad():
                state.load_state_dict({k: v for k, v in self._loaded.items() if k != "weights"})
        elif self._loaded is not None:
            for t in state.state_dict().values():
                t.zero_()
        self._loaded = None

    def _on(self, device: torch.device) -> DelayedScales:
        if self._state is None or self._state.scale.device != device:
            with torch.inference_mode(False), torch.no_grad():  # used in training too
                if self._state is not None:  # the model has moved
                    self._loaded = self.state_dict()
                self._state = self._new(device)
                self._fill(self._state)
                self._nothing, self._scratch = (torch.zeros(SLOTS, device=device) for _ in range(2))
                self._layers = [self._state.layer(i) for i in range(len(self.names))]
                self._masks.clear()
            self._weights.find()
        return self._state

    def _taken(self, optimizer: Optimizer) -> tuple[bool, Tensor | None]:
        """Whether a step of this optimizer takes slots, and which; None: all."""
        model = self._model()
        if model is None or self._state is None:
            return False, None
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found, late = self._masks.get(optimizer), _in_backward()
        if found is not None and found[0][0] == len(own):
            related = found[1]
        else:
            self._weights.find()
            related = not own.isdisjoint(map(id, model.parameters()))
        met = self._weights.met()
        updated = [not ws or any(id(w) in own for w in ws) for ws in met]
        frozen = [_frozen(ws) for ws in met]
        takes = tuple(u or (f and not late) for u, f in zip(updated, frozen, strict=True))
        if found is None or found[0] != (len(own), takes):
            found = self._masks[optimizer] = ((len(own), takes), related, self._mask(takes))
        self._late |= late and related and any(frozen)
        return related and any(takes), found[2]

    def _mask(self, takes: tuple[bool, ...]) -> Tensor | None:
        """Of slots; None where all are taken."""
        assert self._state is not None
        if all(takes):
            return None
        mask = torch.tensor([t for t in takes for _ in range(SLOTS)], dtype=torch.int32)
        return mask.to(self._state.scale.device)


def _frozen(met: list[Tensor]) -> bool:
    """Whether no optimizer of its own tells of a weight; of one that was replaced, the old or the new one."""
    return any(not w.requires_grad for w in met)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def step_skipped(optimizer: Optimizer) -> None:
    """A loss scaler found an overflow on the host, and calls no `step`."""
    for scales in list(_live):
        scales.stepped(optimizer, torch.ones(()))


_within: WeakSet[Optimizer] = WeakSet()


@_compat.untraced
def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """ZeroRedundancyOptimizer steps another in itself, with other weights on every rank: its own step, of all
    of them, counts."""
    if isinstance(inner := getattr(optimizer, "optim", None), Optimizer):
        _within.add(inner)


@_compat.untraced
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if optimizer in _within:
        return
    for scales in list(_live):
        scales.stepped(optimizer, getattr(optimizer, "found_inf", None))


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
