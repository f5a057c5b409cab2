"""RULES to fusekit ops."""

from __future__ import annotations

from fusekit.passes.region import Region


def fuse(region: Region) -> None:
    """Leaves the region as it is."""
