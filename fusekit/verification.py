"""`verify`: the certificate of an optimised model, on the user's own batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fusekit.certificate import Certificate, SiteCertificate
from fusekit.model_check import check_model
from fusekit.passes.canonicalise import call_checkpoint
from fusekit.passes.capture import CapturedRegion
from fusekit.passes.region import Fusion, Refusal
from fusekit.session import Session, session
from fusekit.site_check import SiteCall, bind, certify_site

SLOWER = 1.10  # a site that takes this much of eager's time is reverted; less is measurement noise


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Certificate:
    """Check every fused site of an optimised model on one batch: output, every gradient, and time.

    Each site is run on the values the batch gives it: fused, as the nodes it replaced, and as those nodes in
    float64. A site that fails, or takes over 1.1 times eager's time, is reverted to eager and stays listed.
    Then the whole model is compared with a float64 copy of itself, where it draws no random numbers.
    Parameters, gradients, buffers and random state are left as they were.

    Args:
        model: from `fusekit.optimize`.
        args, kwargs: one batch, as the model is called with.

    Raises:
        ValueError: the model is not optimised, or returns nothing that could be compared.
    """
    opened = session(model)
    certificate = certify(opened, args, kwargs)
    with _undisturbed(opened):
        checks, note = check_model(model, args, kwargs, opened.settings.precision)
    notes = (*certificate.notes, note) if note else certificate.notes
    return replace(certificate, model=checks, notes=notes)


def certify(opened: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Certificate:
    """Check the sites alone, revert those that fail or are slower, and warn of each failure."""
    with _undisturbed(opened), torch.enable_grad():
        opened.model(*args, **kwargs)  # captures, where this kind of batch is new
        with _watching(opened) as sites:
            opened.model(*args, **kwargs)
    judged: list[SiteCertificate] = []
    in_fp8: dict[str, str] = {}  # reason by layer that a plan has in FP8
    for captured in opened.regions:
        own = [site for (owner, _), site in sites.items() if owner is captured]
        bad = {site.site: _why_reverted(site) for site in own}
        bad = {name: why for name, why in bad.items() if why}
        if bad:
            in_fp8 |= {f.layer: bad[f.site] for f in captured.region.fusions
                       if f.site in bad and f.op == "linear_fp8" and f.layer}  # fmt: skip
            captured.rebuild(captured.disabled_sites | set(bad))
            captured.reverted |= {
                s.site: Refusal(
                    op=s.op, location=s.location, reason=f"reverted by verify: {bad[s.site]}", rule=s.rule
                )
                for s in own
                if s.site in bad
            }
        _record_gains(captured, own)
        judged += [replace(s, reverted=True, reason=bad[s.site]) if s.site in bad else s for s in own]
    if in_fp8 and opened.precision is not None:
        opened.precision.revert(in_fp8)
    for site in judged:
        if not site.ok:
            warnings.warn(
                f"fusekit reverted {site.site} ({site.location}) to eager: {site.reason}", stacklevel=3
            )
    notes = () if judged else ("no site was fused: there is nothing to certify; fusekit.explain says why",)
    return Certificate(sites=tuple(judged), notes=notes)


def _why_reverted(site: SiteCertificate) -> str:
    if not site.ok:
        return site.reason
    if site.gain is not None and site.gain * SLOWER < 1.0:
        return f"takes {1 / site.gain:.2f} times eager's time on this batch"
    return ""


def _record_gains(captured: CapturedRegion, sites: list[SiteCertificate]) -> None:
    gains = {site.site: site.gain for site in sites}
    for fusion in captured.region.fusions:
        fusion.measured_gain = gains.get(fusion.site, fusion.measured_gain)


@contextlib.contextmanager
def _undisturbed(opened: Session) -> Iterator[None]:
    """Random state, buffers and delayed scales as before, and no hook of the session fires."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in opened.model.buffers()]
    hooks, opened.after_call = opened.after_call, []
    try:
        with torch.random.fork_rng(), opened.own_calls():
            yield
    finally:
        opened.after_call = hooks
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


Sites = dict[tuple[CapturedRegion, str], SiteCertificate]


@contextlib.contextmanager
def _watching(opened: Session) -> Iterator[Sites]:
    """Certify sites as the model passes through them: nothing is stored beyond one site."""
    sites: Sites = {}
    for captured in opened.regions:
        captured.recorder = _recorder(captured, sites)
    try:
        yield sites
    finally:
        for captured in opened.regions:
            captured.recorder = None


def _recorder(captured: CapturedRegion, sites: Sites) -> Any:
    return lambda module: _Watch(module, captured, sites)


class _Watch(fx.Interpreter):
    """Runs a graph node by node, and certifies each fused node on the values it is called with."""

    def __init__(self, module: fx.GraphModule, captured: CapturedRegion, sites: Sites) -> None:
        super().__init__(module)
        self._captured, self._sites = captured, sites
        self._inputs: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            self._inputs[n.name] = value = super().run_node(n)
            return value
        if n.target is call_checkpoint:
            body, *args = self.fetch_args_kwargs_from_env(n)[0]
            return _Watch(body, self._captured, self._sites).run(*args)
        if "fusion" in n.meta:
            self._certify(n, n.meta["fusion"])
        return super().run_node(n)

    def _certify(self, n: fx.Node, fusion: Fusion) -> None:
        key = (self._captured, fusion.site)
        if key in self._sites and not self._sites[key].ok:
            return  # one failing call is enough
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        extra = {name: self._inputs[name] for name in fusion.inputs if name is not None}
        call = SiteCall(fusion=fusion, target=n.target, args=bind(n.target, args, kwargs), extra=extra)
        site = certify_site(call, timed=key not in self._sites)
        if key not in self._sites or not site.ok:
            self._sites[key] = site
