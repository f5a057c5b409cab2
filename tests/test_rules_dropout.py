"""Active dropout in attention: one seed per graph, drawn where the report says, an offset per site.

On fake CUDA tensors: a CPU refuses these sites, and what is tested here is the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusekit.passes.config import Config
from fusekit.passes.fuse import fuse
from fusekit.passes.normalise import normalise
from fusekit.passes.region import Region, Settings


def _two_sites(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    noise = F.dropout(q, 0.3)
    called = F.scaled_dot_product_attention(noise, k, v, dropout_p=0.1, is_causal=True)
    written = F.dropout(torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1), 0.2) @ v
    return (called + written).transpose(1, 2).reshape(2, 5, -1)


def _region(disabled: frozenset[str] = frozenset()) -> Region:
    with FakeTensorMode():
        tensors = [torch.empty(2, 3, 5, 8, device="cuda") for _ in range(3)]
        module = make_fx(_two_sites, pre_dispatch=True, tracing_mode="fake")(*tensors)
    region = Region(module=module, settings=Settings(), config=Config(), disabled_sites=disabled)
    normalise(region)
    fuse(region)
    return region


def test_one_seed_in_front_of_its_first_use_and_an_offset_per_site() -> None:
    region = _region()
    names = [str(n.target) for n in region.module.graph.nodes if n.op == "call_function"]
    assert names[:2] == ["aten.dropout.default", "aten.randint.default"], "earlier draws keep their place"
    assert names.count("aten.randint.default") == 1
    sites = [n for n in region.module.graph.nodes if "fusion" in n.meta]
    assert sorted((n.args[6], n.args[8]) for n in sites) == [(0.1, 1), (0.2, 0)]
    assert len({n.args[7] for n in sites}) == 1


def test_no_seed_is_drawn_for_sites_that_stay_eager() -> None:
    region = _region(frozenset({"attention_0", "attention_1"}))
    names = [str(n.target) for n in region.module.graph.nodes if n.op == "call_function"]
    assert not region.fusions and "aten.randint.default" not in names
    assert names.count("aten.dropout.default") == 2
