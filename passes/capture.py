"""The Dynamo backend: one frame in, one callable out, and the record of both.

Dynamo owns what is hard about Python: guards, graph breaks, dynamic shapes, recompilation. Whatever goes
wrong here ends in SkipFrame: the frame then runs as the user wrote it, and one warning says where and why.
Returning Dynamo's own graph would differ: its activation checkpoints do not replay their random numbers.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels.trial import failure
from fusekit.passes import _compat
from fusekit.passes.canonicalise import canonicalise, copy_graph, location
from fusekit.passes.config import Config
from fusekit.passes.emit import graph_inputs, without_autocast
from fusekit.passes.invariants import InvariantError
from fusekit.passes.logits import mark_unread
from fusekit.passes.pipeline import run_pipeline
from fusekit.passes.region import Fusion, Levels, Refusal, Region, Settings

logger = logging.getLogger("fusekit")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A frame that runs eagerly because it could not be captured or rewritten."""

    location: str
    reason: str


class CapturedRegion:
    """One captured graph: what Dynamo calls, and what can be rebuilt with some sites switched off.

    region: as the pipeline left it; replaced by every `rebuild`.
    recorder: recorder(region.module) -> fx.Interpreter. While set, that interpreter runs the graph, not the
        compiled callable, so that each node's real inputs and outputs can be seen.
    reverted: by site, why `verify` put it back; outlives every `rebuild`.
    """

    region: Region

    def __init__(
        self, canonical: fx.GraphModule, settings: Settings, config: Config, *, index: int, training: bool
    ) -> None:
        self._canonical = canonical
        self._settings, self._config, self._index, self._training = settings, config, index, training
        self.recorder: Callable[[fx.GraphModule], fx.Interpreter] | None = None
        self.reverted: dict[str, Refusal] = {}
        self._build(frozenset(), in_frame=True)

    def __call__(self, *args: Any) -> Any:
        if self.recorder is None:
            results = self._run(*args)
        else:
            with without_autocast(self.region.module.meta.get("autocast_off", ())):
                results = self.recorder(self.region.module).run(*graph_inputs(self.region, args))
        return mark_unread(results, self.region.unread)

    @property
    def disabled_sites(self) -> frozenset[str]:
        return self.region.disabled_sites

    def rebuild(self, disabled_sites: frozenset[str]) -> None:
        """Run the pipeline again without these sites; the next call uses the new graph."""
        self._build(frozenset(disabled_sites), in_frame=False)

    def replan(self, settings: Settings) -> None:
        """Run the pipeline again with other levels. Sites that `verify` reverted stay so.

        They are found again by layer, or by op, rule, line and module: names count sites, which change.
        """
        old, self._settings = self._settings, settings
        if _same_levels(old.levels, settings.levels, self.region.layers):
            return
        reverted, marks = self.disabled_sites, {}
        if reverted:
            self._settings = old
            self._build(frozenset(), in_frame=False)
            marks = {m: self.reverted.get(f.site) for m, f in _marked(self.region) if f.site in reverted}
            self._settings = settings
        self._build(frozenset(), in_frame=False)
        again = {f.site: marks[mark] for mark, f in _marked(self.region) if mark in marks}
        self.reverted = {site: refusal for site, refusal in again.items() if refusal is not None}
        if again:
            self._build(frozenset(again), in_frame=False)

    def _build(self, disabled_sites: frozenset[str], *, in_frame: bool) -> None:
        region = Region(
            module=copy_graph(self._canonical),
            settings=self._settings,
            config=self._config,
            index=self._index,
            training=self._training,
            in_frame=in_frame,
            disabled_sites=disabled_sites,
        )
        run_pipeline(region)
        assert region.run is not None, "the pipeline ends with emit"
        self.region, self._run = region, region.run


def _same_levels(old: Levels | None, new: Levels | None, layers: Iterable[str]) -> bool:
    """Whether a graph with these layers is the same under both."""
    if old is None or new is None:
        return old is new
    return old.watched == new.watched and all(old.token(name) == new.token(name) for name in layers)


def _marked(region: Region) -> list[tuple[tuple[Any, ...], Fusion]]:
    """Each site with what tells it from others whatever they are: equal ones in a loop by their number."""
    seen: Counter[tuple[str, ...]] = Counter()
    found: list[tuple[tuple[Any, ...], Fusion]] = []
    for fusion in region.fusions:
        mark = (fusion.op, fusion.layer or fusion.rule, fusion.location, fusion.module)
        found.append(((*mark, seen[mark]), fusion))
        seen[mark] += 1
    return found


@dataclass(kw_only=True)
class Capture:
    """A Dynamo backend that remembers every frame it was given.

    recorder: of every region captured from now on, see CapturedRegion.
    """

    settings: Settings
    config: Config
    recorder: Callable[[fx.GraphModule], fx.Interpreter] | None = None
    regions: list[CapturedRegion] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def backend(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What torch.compile calls once per frame and set of guards.

        Raises:
            SkipFrame: the frame cannot be captured; Dynamo runs it eagerly.
        """
        try:
            reason = _unsupported(example_inputs)
            if reason:
                raise NotCapturable(reason)
            with _unseen_by_hooks():
                captured = CapturedRegion(
                    canonicalise(module, example_inputs),
                    self.settings,
                    self.config,
                    index=len(self.regions),
                    training=torch.is_grad_enabled() and any(map(_requires_grad, example_inputs)),
                )
        except InvariantError:
            raise  # somebody is looking for a bug of ours: do not hide it behind eager
        except Exception as error:
            if self.config.debug:
                logger.exception("capture of a frame failed")
            self.fail(error_location(error, module), _sentence(error))
            raise _compat.SkipFrame(f"fusekit: {error}") from error
        captured.recorder = self.recorder
        self.regions.append(captured)

        def run(*args: Any) -> Any:  # Dynamo wants a function; the object behind it can be rebuilt
            return captured(*args)

        return run

    def fail(self, where: str, reason: str) -> None:
        """Record that a frame runs eagerly, and warn the first time this line gives this reason."""
        failure = Failure(location=where, reason=reason)
        if failure in self.failures:
            return
        self.failures.append(failure)
        warnings.warn(f"fusekit left {where or 'a part of the model'} unoptimised: {reason}", stacklevel=2)


class NotCapturable(RuntimeError):
    """A frame that capture declines, as a sentence."""


def _unsupported(example_inputs: Sequence[Any]) -> str | None:
    for value in example_inputs:
        if isinstance(value, Tensor) and _compat.is_traceable_wrapper_subclass(value):
            return f"an input is a {type(value).__name__}, a tensor subclass for which fused ops have no rule"
    return None


def _unseen_by_hooks() -> contextlib.AbstractContextManager[Any]:
    """A checkpoint around the model counts what is saved, and tracing is no part of its forward pass."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def error_location(error: BaseException, module: fx.GraphModule) -> str:
    """The user's line: of the node that failed where canonicalising failed, else where the graph begins."""
    node = getattr(error, "fusekit_node", None)
    nodes = [node] if node is not None else list(module.graph.nodes)
    return next(filter(None, map(location, nodes)), "")


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, NotCapturable) else failure(error)
