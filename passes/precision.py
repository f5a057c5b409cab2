"""A recipe to casts."""

from __future__ import annotations

from fusekit.passes.region import Region


def place_casts(region: Region) -> None:
    """Leaves the region as it is."""
