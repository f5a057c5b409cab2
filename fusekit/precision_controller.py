"""The run of `precision="auto"`: when to sample, what to conclude, which levels the model runs at.

    optimize(model, precision="auto")
    controller = fusekit.auto_precision(model)
    loss.backward(); optimizer.step()
    controller.step(loss, gradient_norm)       # optional: feeds the guard
    controller.plan.save("plan.json")

A step ends when an optimizer of one of the model's parameters has stepped, or with `step`. The first call
with gradients of every `every`-th step is sampled; when the step has ended its statistics are read, the one
moment at which the host waits, and levels change. A change builds the affected graphs again from their
captured form; Dynamo is not asked. Decisions depend on the samples alone, so a run that is resumed from
`state_dict` takes the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusekit.auto_precision import AutoPrecision
from fusekit.kernels.precision_statistics import PRODUCTS, STATISTICS, WORST
from fusekit.kernels.recipe import Recipe
from fusekit.passes.region import Levels
from fusekit.passes.sampling import Key, Samples
from fusekit.precision_decisions import PrecisionDecisions, lacks_fp8
from fusekit.precision_levels import FINER, TENSOR, recipe_of
from fusekit.precision_plan import PrecisionPlan
from fusekit.update_watch import UpdateWatch

if TYPE_CHECKING:
    from fusekit.passes.capture import Capture, CapturedRegion
    from fusekit.session import Session

GUARD_READ = 10  # steps between reads of the guard's alarms
GUARDED_STEPS = 200
STATE = (
    "plan", "step", "sampled_at", "ended", "calibrating", "planned", "guard", "guard_fed", "alarms",
    "guarded_until", "changes",
)  # fmt: skip


class PrecisionController(PrecisionDecisions):
    """Made by `optimize`; `fusekit.auto_precision(model)` returns it."""

    def __init__(self, config: AutoPrecision, model: nn.Module) -> None:
        super().__init__(config, model)
        self._sampled_at = -max(config.every, config.calibration)
        self._watch = UpdateWatch(set)
        self._samples: Samples | None = None
        self._owner: Callable[[], Session | None] = lambda: None
        self._told: tuple[Any, ...] = ()
        self._stepped = False  # `step` ended this step
        self._all_step: bool | None = (
            None  # whether all ranks call `step`; none waits there before it is known
        )

    def attach(self, session: Session) -> None:
        """`optimize` says whose precision it is; the session owns the controller."""
        self._owner = ref(session)
        self._watch = UpdateWatch(session.parameter_ids)

    @property
    def _session(self) -> Session:
        session = self._owner()
        if session is None:
            raise ValueError("the model of this controller was restored or optimised again; ask for its own")
        return session

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._step + self._watch.updated

    @property
    def plan(self) -> PrecisionPlan:
        """The levels as they are now; the controller goes on without changing it."""
        self._conclude_alone()
        found = PrecisionPlan(
            model=self._model, layers=self._layers, fine=self.fine, steps=self.steps, guarded=self._guarded
        )
        return PrecisionPlan.from_dict(found.to_dict())

    def step(self, loss: Tensor | float | None = None, gradient_norm: Tensor | float | None = None) -> None:
        """End an optimizer step; its loss and gradient norm, not waited for, feed the guard."""
        if self.config.guard and not (loss is None and gradient_norm is None):
            self._guard.add((loss, gradient_norm))
        self._watch.updated = self._stepped = True
        if self._all_step or not self._joins_ranks:
            self._conclude()

    def revert(self, layers: Mapping[str, str]) -> None:
        """Take layers out of FP8 for good: `verify` found why."""
        for name, why in layers.items():
            self._revert(name, f"reverted by verify: {why}")
        self._apply()

    def before_call(self) -> None:
        session = self._session
        if not torch.is_grad_enabled():
            return
        if self._watch.updated:
            self._next_step()
        if self._is_due() and self._samples is None:
            self._samples = self._new_samples()
            for place in _places(session):
                if place.recorder is None:
                    place.recorder = self._samples.recorder

    def after_call(self) -> None:
        session = self._session
        samples = self._samples
        if samples is None or not samples.open:
            return
        samples.open = False
        if not samples.repeats:
            _release(session)
        self._meet_layers()
        self._sampled_at = self._step
        if not (samples.found or self._joins_ranks):
            self._samples = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint; call it between steps.

        One rank may call it alone. Samples that the ranks have yet to join are taken anew after a resume;
        where every rank calls `step` there are none.
        """
        self._conclude_alone()
        pending = self._samples is not None
        sampled_at = -max(self.config.every, self.config.calibration) if pending else self._sampled_at
        return {
            "plan": self.plan.to_dict(), "step": self._step, "sampled_at": sampled_at,
            "ended": self._watch.updated, "all_step": self._all_step,
            "calibrating": self._calibrating, "planned": self._planned,
            "guard": self._guard.state.tolist(), "guard_fed": self._guard.fed,
            "alarms": self._alarms,
            "guarded_until": self._guarded_until, "changes": [dict(change) for change in self.changes],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: the state is of another model, or no such state.
        """
        if not isinstance(state, Mapping) or not set(STATE) <= state.keys():
            raise ValueError('this is no state of precision="auto"; state_dict() of a controller gives one')
        plan = PrecisionPlan.from_dict(dict(state["plan"]), source="the checkpoint's precision state")
        plan.check(self._session.model)
        self._layers, self.fine = dict(plan.layers), plan.fine
        self._step, self._sampled_at = state["step"], state["sampled_at"]
        self._watch.updated, self._all_step = state["ended"], state.get("all_step")
        self._calibrating, self._planned = state["calibrating"], state["planned"]
        self._guard.state = torch.tensor(state["guard"], dtype=torch.float64)
        self._guard.fed = state["guard_fed"]
        self._alarms, self._guarded_until = state["alarms"], state["guarded_until"]
        self.changes = [dict(change) for change in state["changes"]]
        self._samples = None
        _release(self._session)  # a call that raised left its recorder behind
        self._apply(resumed=True)

    def _apply(self, *, resumed: bool = False) -> None:
        """Tell the model's graphs the levels, and build those again whose layers changed."""
        session, levels, self._told = self._session, self.levels(), self._tellable
        before, scales = session.settings.levels, session.settings.scales
        if scales is not None and before is not None and not resumed and _comes_to_tensor(before, levels):
            scales.restart()
        session.settings = session.capture.settings = replace(session.settings, levels=levels)
        for captured in session.regions:
            captured.replan(session.settings)

    def _emulated(self) -> bool:
        owner = self._owner()
        return self._starts_emulated if owner is None else lacks_fp8(owner.model)

    @property
    def _joins_ranks(self) -> bool:
        return self.config.across_ranks and dist.is_available() and dist.is_initialized()

    def _is_due(self) -> bool:
        if self._idle:
            return False
        interval = self.config.interval if self._calibrating else self.config.every
        return self._step - self._sampled_at >= interval

    def _new_samples(self) -> Samples:
        recipes = [recipe_of(level, self.fine) for level in (TENSOR, FINER)]
        return Samples(recipes, self._is_sampled, self.config.rows, offset=self._step)

    def _is_sampled(self, layer: str) -> bool:
        """A frozen plan need not look at what is in bf16: it stays."""
        if self.config.mode != "frozen" or not self.ready:
            return True
        return layer in self._layers and self._layers[layer].token(self.fine) is not None

    def _meet_layers(self) -> None:
        session = self._session
        for captured in session.regions:
            for name, shape in captured.region.layers.items():
                self._meet(name, shape)
        order = {name: i for i, name in enumerate(session.settings.modules.values())}
        self._layers = dict(sorted(self._layers.items(), key=lambda item: order.get(item[0], len(order))))

    def _next_step(self) -> None:
        self._conclude()
        _release(self._session)
        self._watch.updated = self._stepped = False
        self._step += 1
        if self._calibrating and self._step >= self.config.calibration:
            self._end_calibration()
        if self.config.guard and not self._idle and self._step % GUARD_READ == 0:
            self._read_guard()
        if self._told != self._tellable:
            self._apply()

    def _read_guard(self) -> None:
        device = next(self._session.model.parameters()).device if self._joins_ranks else None
        alarms = self._guard.alarms(joined_on=device)
        if alarms > self._alarms and self.live:
            self._guarded_until = self._step + GUARDED_STEPS
            self._note("", "", "", "bf16", "a burst of the loss or the gradient's norm: weight gradients "
                       f"in bf16 for {GUARDED_STEPS} steps")  # fmt: skip
        self._alarms = alarms

    def _conclude(self) -> None:
        """Read the samples of the step that has ended, if there are any, and move levels."""
        if self._samples is None or self._samples.open or not self._watch.updated:
            return
        found, self._samples = self._samples.found, None
        if self._joins_ranks:
            found = self._joined(found)
        if not found:
            return
        keys = sorted(found)
        stacked = torch.stack([found[key] for key in keys])
        runs = {(name, p): layer.runs(p) for name, layer in self._layers.items() for p in PRODUCTS}
        for key, vectors in zip(keys, stacked.tolist(), strict=True):
            self._judge(key, vectors, runs[key])

    def _conclude_alone(self) -> None:
        """For callers that may be one rank of many: what all have to join waits for their next step."""
        if not self._joins_ranks:
            self._conclude()

    def _joined(self, found: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """The worst of all ranks, which may have run different layers, as layer dropout does."""
        ranks: list[Any] = [None] * dist.get_world_size()
        seen = {key: self._layers[key[0]].shape for key in found}
        dist.all_gather_object(ranks, (seen, self._stepped))
        self._all_step = self._all_step is not False and all(stepped for _, stepped in ranks)
        shapes: dict[Key, tuple[int, int]] = {}
        for of_rank, _ in ranks:
            shapes |= of_rank
        if not shapes:
            return {}
        for (name, _), shape in shapes.items():
            self._meet(name, shape)
        device = next(self._session.model.parameters()).device
        nothing = torch.full((2, len(STATISTICS)), -WORST, device=device)
        keys = sorted(shapes)
        stacked = torch.stack([found.get(key, nothing) for key in keys])
        dist.all_reduce(stacked, op=dist.ReduceOp.MAX)
        return dict(zip(keys, stacked, strict=True))


def _comes_to_tensor(before: Levels, levels: Levels) -> bool:
    return any(_by_tensor(levels, name) and not _by_tensor(before, name) for name in levels.tokens)


def _by_tensor(levels: Levels, layer: str) -> bool:
    """Whether a layer has one scale a tensor, of which a history may be kept."""
    token = levels.token(layer)
    return token is not None and Recipe.parse(token).scaling == "tensor"


def _places(session: Session) -> list[Capture | CapturedRegion]:
    """What has a recorder: the regions, and the capture for those to come."""
    return [session.capture, *session.regions]


def _release(session: Session) -> None:
    """Take the recorders of samples off again, also one that an exception left behind."""
    for place in _places(session):
        if isinstance(getattr(place.recorder, "__self__", None), Samples):
            place.recorder = None
