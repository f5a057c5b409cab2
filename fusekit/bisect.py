"""Which fused site makes a model's loss or gradients worse than eager's: halving the set of enabled sites.

The truth is the model's own float64 copy. A choice of sites diverges where the loss or some gradient is
farther from it than twice eager's distance, by more than a few roundings; eager is the same graph with every
site off. k guilty sites of n cost about 2k log2(n) runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.passes.capture import CapturedRegion
from fusekit.session import session

ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8, "tf32": 2.0**-11, "fp8": 2.0**-4}  # "keep" is float32's
ROUNDINGS = 8  # by which a gradient may move without being called worse


@dataclass(frozen=True, kw_only=True)
class GuiltySite:
    """A site that alone diverges, or one of several that do so only together.

    tensor: "loss", or the parameter whose gradient moved most.
    error, eager_error: distances from float64, relative to its norm, with only this site fused and with none.
    """

    site: str
    op: str
    location: str
    tensor: str
    error: float
    eager_error: float


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """guilty: empty where the model as a whole does not diverge. sites, runs: searched, made."""

    guilty: tuple[GuiltySite, ...]
    sites: int
    runs: int

    def to_dict(self) -> dict[str, Any]:
        return {"guilty": [asdict(site) for site in self.guilty], "sites": self.sites, "runs": self.runs}

    def __str__(self) -> str:
        if not self.guilty:
            return f"{self.sites} sites: loss and gradients are as close to float64 as eager's"
        lines = [f"{len(self.guilty)} of {self.sites} sites diverge ({self.runs} runs):"]
        lines += [
            f"  {g.site} ({g.op} at {g.location}): {g.tensor} is {g.error:.2e} from float64, "
            f"eager {g.eager_error:.2e}"
            for g in self.guilty
        ]
        return "\n".join(lines)


def bisect_sites(sites: Sequence[str], diverges: Callable[[frozenset[str]], bool]) -> list[str]:
    """The sites that make `diverges` true.

    Args:
        diverges: of a set of enabled sites, all others being off.

    Returns:
        Sites guilty alone, in order; a set that diverges only as a whole is returned as a whole.
    """
    if not sites or not diverges(frozenset(sites)):
        return []
    if len(sites) == 1:
        return list(sites)
    middle = len(sites) // 2
    return bisect_sites(sites[:middle], diverges) + bisect_sites(sites[middle:], diverges) or list(sites)


def bisect_model(model: nn.Module, *args: Any, **kwargs: Any) -> Bisection:
    """Find the sites of an optimised model that diverge on this batch. The model is left as it was.

    Args:
        args, kwargs: the batch. The model returns its loss: a scalar, a scalar in a tuple, or `.loss`.

    Raises:
        ValueError: the model is not optimised, returns no loss, or draws random numbers (dropout).
    """
    search = _Search(model, args, kwargs)
    try:
        guilty = bisect_sites(search.sites, search.diverges)
        return Bisection(
            guilty=tuple(search.describe(site) for site in guilty), sites=len(search.sites), runs=search.runs
        )
    finally:
        search.restore()


class _Search:
    """Runs the model with some sites on and compares with float64."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs, self.runs = model, args, kwargs, 0
        current = session(model)
        self.measure()  # captures what has not been captured yet
        self.regions: list[CapturedRegion] = list(current.regions)
        self.before = [region.disabled_sites for region in self.regions]
        self.fusions = {
            f"{index}/{fusion.site}": fusion
            for index, captured in enumerate(self.regions)
            for fusion in captured.region.fusions
        }
        self.sites = list(self.fusions)
        self.roundoff = ROUNDOFF.get(current.settings.precision, 2.0**-24)
        self.truth = _loss_and_grads(copy.deepcopy(model).double(), *_double(args, kwargs))
        try:
            self.enable(frozenset())
            self.eager = self.measure()
            if not torch.equal(self.measure(seed=1)["loss"], self.eager["loss"]):
                raise ValueError(
                    "the model draws random numbers, fused and eager ones differ: set its dropout to 0 or "
                    "call model.eval() before bisecting"
                )
        except BaseException:
            self.restore()
            raise

    def measure(self, seed: int = 0) -> dict[str, Tensor]:
        self.runs += 1
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), session(self.model).scales_paused():
            torch.manual_seed(seed)
            return _loss_and_grads(self.model, self.args, self.kwargs)

    def enable(self, sites: frozenset[str]) -> None:
        for index, (captured, before) in enumerate(zip(self.regions, self.before, strict=True)):
            off = {s.split("/", 1)[1] for s in self.sites if s.startswith(f"{index}/") and s not in sites}
            captured.rebuild(before | off)

    def restore(self) -> None:
        for captured, before in zip(self.regions, self.before, strict=True):
            captured.rebuild(before)

    def diverges(self, sites: frozenset[str]) -> bool:
        self.enable(sites)
        self.latest = self.measure()
        return any(self._excess(name) > 0 for name in self.truth)

    def describe(self, site: str) -> GuiltySite:
        self.diverges(frozenset([site]))
        worst = max(self.truth, key=self._excess)
        fusion = self.fusions[site]
        return GuiltySite(
            site=fusion.site,
            op=fusion.op,
            location=fusion.location,
            tensor=worst,
            error=_distance(self.latest[worst], self.truth[worst]),
            eager_error=_distance(self.eager[worst], self.truth[worst]),
        )

    def _excess(self, name: str) -> float:
        """By how much a tensor is worse than it may be; positive is a divergence."""
        fused, eager = (_distance(results[name], self.truth[name]) for results in (self.latest, self.eager))
        if not math.isfinite(fused):
            return math.inf if math.isfinite(eager) else 0.0
        return fused - 2 * eager - ROUNDINGS * self.roundoff


def _loss_and_grads(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """ "loss" and the gradient of every parameter that has one; the parameters' own .grad is not touched."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = _loss(model(*args, **kwargs))
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"loss": loss.detach()} | {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def _loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if found is None:
        candidates = output if isinstance(output, (tuple, list)) else (output,)
        found = next((t for t in candidates if isinstance(t, Tensor) and t.ndim == 0), None)
    if found is None or not found.requires_grad:
        raise ValueError("bisect needs a loss: a model that returns a scalar, or an output with .loss")
    return found


def _double(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(widen, args)), {name: widen(value) for name, value in kwargs.items()}


def _distance(result: Tensor, truth: Tensor) -> float:
    norm = truth.double().norm().item()
    difference = (result.double() - truth.double()).norm().item()
    return difference / norm if norm else difference
