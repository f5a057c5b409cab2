"""What `verify` returns: per site the errors of output and gradients, the times, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fusekit.kernels.parity import Verdict
from fusekit.report import format_ratio, format_shapes, render


@dataclass(frozen=True, kw_only=True)
class SiteCertificate:
    """One site, judged on the values the user's batch gave it.

    checks: the verdict of the output and of every gradient against float64 (design section 5).
    fused_seconds, eager_seconds: median forward plus backward of each; None where not timed.
    bytes_saved: memory traffic per forward pass that the fusion avoids, by the cost model.
    reverted: the site failed or was slower, and runs eagerly from now on.
    """

    site: str
    op: str
    rule: str
    location: str
    shapes: tuple[tuple[int | str, ...], ...]
    dtype: str
    checks: tuple[Verdict, ...]
    fused_seconds: float | None = None
    eager_seconds: float | None = None
    bytes_saved: int = 0
    reverted: bool = False
    reason: str = ""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def gain(self) -> float | None:
        """Eager time over fused time."""
        if not self.fused_seconds or self.eager_seconds is None:
            return None
        return self.eager_seconds / self.fused_seconds


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Parity of every site, and of the whole model where it draws no random numbers.

    ok: every site passed, and the whole model did.
    """

    sites: tuple[SiteCertificate, ...]
    model: tuple[ModelCheck, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(site.ok for site in self.sites) and all(check.ok for check in self.model)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON-ready values."""
        return {
            "ok": self.ok,
            "sites": [_site_to_dict(site) for site in self.sites],
            "model": [vars(check) for check in self.model],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        failed = sum(not site.ok for site in self.sites)
        slower = sum(site.reverted and site.ok for site in self.sites)
        head = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} checked against float64: " + (
            "all computed the same" if not failed else f"{failed} FAILED and run eagerly now"
        )
        if slower:
            head += f"; {slower} slower than eager, reverted"
        parts = [head]
        if self.sites:
            parts.append(render(_site_table(self.sites)))
        if self.model:
            parts.append(render(_model_table(self.model)))
        parts += [f"{site.site} ({site.location}): {site.reason}" for site in self.sites if site.reason]
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """The whole model against a float64 copy of it, beside eager's own error at the same precision."""

    name: str
    error: float
    eager_error: float
    limit: float
    ok: bool


def _site_to_dict(site: SiteCertificate) -> dict[str, Any]:
    return {
        "site": site.site,
        "op": site.op,
        "rule": site.rule,
        "location": site.location,
        "shapes": [list(shape) for shape in site.shapes],
        "dtype": site.dtype,
        "checks": [vars(check) for check in site.checks],
        "fused_seconds": site.fused_seconds,
        "eager_seconds": site.eager_seconds,
        "gain": site.gain,
        "bytes_saved": site.bytes_saved,
        "ok": site.ok,
        "reverted": site.reverted,
        "reason": site.reason,
    }


def _site_table(sites: tuple[SiteCertificate, ...]) -> Table:
    table = Table(
        title="Sites: error over the rounding floor of the dtype, worst of all", title_justify="left"
    )
    table.add_column("site", no_wrap=True)
    for header in ("where", "shapes"):
        table.add_column(header, overflow="fold")
    table.add_column("dtype", no_wrap=True)
    for header in ("output", "gradients", "eager", "speed"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for site in sites:
        outputs = [c for c in site.checks if not c.name.startswith("grad")]
        grads = [c for c in site.checks if c.name.startswith("grad")]
        verdict = "ok" if site.ok and not site.reverted else "slower" if site.ok else "FAILED"
        table.add_row(
            site.site, site.location, format_shapes(site.shapes), site.dtype, _worst(outputs), _worst(grads),
            _worst(site.checks, eager=True), format_ratio(site.gain), verdict,
        )  # fmt: skip
    return table


def _worst(checks: Any, eager: bool = False) -> str:
    """The largest error in units of the rounding floor of the output dtype."""
    ratios = [(c.eager_error if eager else c.error) / c.floor for c in checks if c.floor]
    return f"{max(ratios):.2f}" if ratios else "–"


def _model_table(checks: tuple[ModelCheck, ...]) -> Table:
    table = Table(title="Whole model against float64 (relative error)", title_justify="left")
    table.add_column("value", overflow="fold")
    for header in ("fused", "eager, same precision", "limit"):
        table.add_column(header, justify="right")
    table.add_column("verdict", no_wrap=True)
    for check in checks:
        numbers = (f"{value:.2e}" for value in (check.error, check.eager_error, check.limit))
        table.add_row(check.name, *numbers, "ok" if check.ok else "FAILED")
    return table
