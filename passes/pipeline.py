"""The list of passes, and the loop that runs them over one captured region."""

from __future__ import annotations

import time
from collections.abc import Callable

from fusekit.passes import debug
from fusekit.passes.autocast import materialise_autocast
from fusekit.passes.emit import emit
from fusekit.passes.fuse import fuse
from fusekit.passes.invariants import Snapshot
from fusekit.passes.lengths import equate_lengths
from fusekit.passes.logits import drop_logits
from fusekit.passes.normalise import normalise
from fusekit.passes.precision import place_casts
from fusekit.passes.price import price
from fusekit.passes.projections import decline_projections
from fusekit.passes.quantise import quantise_once
from fusekit.passes.region import Region

PIPELINE: list[tuple[str, Callable[[Region], None]]] = [
    ("autocast", materialise_autocast),  # what autocast would cast becomes nodes, which the rules can see
    ("normalise", normalise),            # one spelling per meaning
    ("logits", drop_logits),             # out of the results, where the caller promised not to read them
    ("lengths", equate_lengths),         # sizes that attention takes for granted, as guards
    ("fuse", fuse),                      # RULES, most nodes first
    ("projections", decline_projections),  # undo those of qkv_linear that do not pay
    ("precision", place_casts),          # after fusing: fused ops keep float32 inside
    ("price", price),                    # undo what does not pay
    ("quantise", quantise_once),         # each FP8 operand once, and delayed scales
    ("emit", emit),                      # a callable, eager or compiled
]  # fmt: skip


def run_pipeline(region: Region) -> None:
    """Run every pass over `region`, in place.

    Raises:
        InvariantError: config.verify is on and a pass broke an invariant; the message names the pass.
    """
    if region.config.debug:
        debug.listen()
    for name, run in PIPELINE:
        before = Snapshot(region) if region.config.verify else None
        started = time.perf_counter()
        run(region)
        seconds = time.perf_counter() - started
        if before is not None:
            before.check(region, after=name)
        debug.after_pass(region, name, seconds)
    debug.after_pipeline(region)
