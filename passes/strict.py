"""strict: what stays unfused is an error, so every site that may be fused has to be told."""

from __future__ import annotations

from fusekit.passes.canonicalise import bodies, location
from fusekit.passes.region import Region
from fusekit.passes.spelling import spell

_STRICT = {
    "scaled_dot_product_attention": "attention",
    "sdpa": "attention",
    "layer_norm": "add_layer_norm",
    "rms_norm": "add_rms_norm",
}


def refuse_leftovers(region: Region) -> None:
    """Every attention and norm that is left is a refusal, also where no rule came near."""
    known = {(r.op, r.location) for r in region.refusals}
    for module in bodies(region.module):
        for node in module.graph.nodes:
            op = _STRICT.get(spell(node).name)
            if op is not None and (op, location(node)) not in known:
                region.refuse(op, location(node), "no rule fits")
