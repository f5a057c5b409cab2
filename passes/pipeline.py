"""The list of passes, and the loop that runs them over one captured region."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fusekit.passes.autocast import materialise_autocast
from fusekit.passes.canonicalise import bodies
from fusekit.passes.emit import emit
from fusekit.passes.fuse import fuse
from fusekit.passes.invariants import Snapshot
from fusekit.passes.normalise import normalise
from fusekit.passes.precision import place_casts
from fusekit.passes.price import price
from fusekit.passes.region import Region

logger = logging.getLogger("fusekit")

PIPELINE: list[tuple[str, Callable[[Region], None]]] = [
    ("autocast", materialise_autocast),  # what autocast would cast becomes nodes, which the rules can see
    ("normalise", normalise),            # one spelling per meaning
    ("fuse", fuse),                      # RULES, most nodes first
    ("precision", place_casts),          # after fusing: fused ops keep float32 inside
    ("price", price),                    # undo what does not pay
    ("emit", emit),                      # a callable, eager or compiled
]  # fmt: skip


def run_pipeline(region: Region) -> None:
    """Run every pass over `region`, in place.

    Raises:
        InvariantError: config.verify is on and a pass broke an invariant; the message names the pass.
    """
    for name, run in PIPELINE:
        before = Snapshot(region) if region.config.verify else None
        started = time.perf_counter()
        run(region)
        seconds = time.perf_counter() - started
        if before is not None:
            before.check(region, after=name)
        if region.config.debug >= 2:
            nodes = sum(len(body.graph.nodes) for body in bodies(region.module))
            logger.info("graph %d, %s: %.0f ms, %d nodes left", region.index, name, seconds * 1e3, nodes)
        if region.config.debug >= 3 and name != "emit":
            logger.info("graph %d after %s:\n%s", region.index, name, program(region))


def program(region: Region) -> str:
    """The region's graphs as Python: its own, then the bodies of its checkpoints."""
    return "\n".join(body.print_readable(print_output=False) for body in bodies(region.module))
