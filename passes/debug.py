"""FUSEKIT_DEBUG: what the pipeline says on stderr.

1   a line per fusion and per refusal
2   and time, nodes and forward bytes after each pass
3   and the graph as Python after each pass
4   and for each refusal the rule that came nearest
"""

from __future__ import annotations

import logging
import sys

from fusekit.passes.canonicalise import bodies
from fusekit.passes.cost import node_cost
from fusekit.passes.region import Region

logger = logging.getLogger("fusekit")


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is now: notebooks and test runners replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def listen() -> None:
    """Send fusekit's lines to stderr, where the user has set up no logging for them."""
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("fusekit: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)


def after_pass(region: Region, name: str, seconds: float) -> None:
    """Levels 2 and 3."""
    if region.config.debug >= 2:
        nodes = [node for body in bodies(region.module) for node in body.graph.nodes]
        megabytes = sum(node_cost(node).bytes for node in nodes) / 1e6
        cost = f"{seconds * 1e3:.0f} ms, {len(nodes)} nodes, {megabytes:.1f} MB"
        logger.info("graph %d, %s: %s", region.index, name, cost)
    if region.config.debug >= 3 and name != "emit":
        logger.info("graph %d after %s:\n%s", region.index, name, program(region))


def after_pipeline(region: Region) -> None:
    """Levels 1 and 4."""
    if not region.config.debug:
        return
    for fusion in region.fusions:
        logger.info("graph %d: %s at %s (%s)", region.index, fusion.site, fusion.location, fusion.rule)
    for refusal in region.refusals:
        nearest = f" (nearest: {refusal.rule})" if region.config.debug >= 4 and refusal.rule else ""
        where = refusal.location or "an unknown line"
        logger.info("graph %d: no %s at %s: %s%s", region.index, refusal.op, where, refusal.reason, nearest)


def program(region: Region) -> str:
    """The region's graphs as Python: its own, then the bodies of its checkpoints."""
    return "\n".join(body.print_readable(print_output=False) for body in bodies(region.module))
