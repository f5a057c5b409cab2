"""One spelling per meaning."""

from __future__ import annotations

from fusekit.passes.region import Region


def normalise(region: Region) -> None:
    """Leaves the region as it is."""
