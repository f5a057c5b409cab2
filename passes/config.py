"""Switches from the environment. Four, all here; the README's table is the list."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """FUSEKIT_DEBUG, FUSEKIT_DISABLE, FUSEKIT_FUEL and FUSEKIT_VERIFY.

    debug: 1 a line per fusion and refusal, 2 time and bytes per pass, 3 graphs, 4 near-matches.
    disable: names of ops or rule sources that may not be applied.
    fuel: only the first n rewrites are made; None is no limit.
    verify: check the invariants between passes.
    """

    debug: int = 0
    disable: frozenset[str] = frozenset()
    fuel: int | None = None
    verify: bool = False

    @classmethod
    def from_environment(cls) -> Config:
        return cls(
            debug=_integer("FUSEKIT_DEBUG") or 0,
            disable=frozenset(name.strip() for name in os.environ.get("FUSEKIT_DISABLE", "").split(","))
            - {""},
            fuel=_integer("FUSEKIT_FUEL"),
            verify=bool(_integer("FUSEKIT_VERIFY")),
        )


def _integer(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"{name} is a whole number, got {text!r}")
    return int(text)
