"""Bisection: the guilty site is found among innocent ones, and the model is left as it was."""

import pytest
import torch

import fusekit
from fusekit.bisect import bisect_model, bisect_sites
from fusekit.gpt import GPT, GPTConfig
from fusekit.session import session

SITES = [f"site_{i}" for i in range(16)]


@pytest.mark.parametrize("guilty", [[], [0], [15], [3, 4], [0, 7, 8, 15], list(range(16))])
def test_sites_guilty_alone_are_found(guilty):
    culprits = {SITES[i] for i in guilty}
    assert bisect_sites(SITES, lambda enabled: bool(enabled & culprits)) == [SITES[i] for i in guilty]


def test_sites_guilty_only_together_are_kept_together():
    found = bisect_sites(SITES, lambda enabled: {"site_2", "site_13"} <= enabled)
    assert {"site_2", "site_13"} <= set(found)


def test_one_culprit_costs_few_runs():
    runs = []
    bisect_sites(SITES, lambda enabled: runs.append(1) or "site_5" in enabled)
    assert len(runs) <= 9


@pytest.fixture
def batch():
    return tuple(torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(s)) for s in (0, 1))


def small_gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=64, context=16, layers=2, heads=2, width=32, **changes))


def test_an_honest_model_has_no_guilty_site(batch):
    model = fusekit.optimize(small_gpt())
    result = bisect_model(model, *batch)
    assert result.guilty == () and result.sites == len(session(model).regions[0].region.fusions)
    assert "as close to float64 as eager" in str(result)


def test_a_sabotaged_site_is_found(batch, monkeypatch):
    model = fusekit.optimize(small_gpt())
    model(*batch)
    captured = session(model).regions[0]
    sites = [fusion.site for fusion in captured.region.fusions]
    assert sites, "nothing was fused, so nothing can be sabotaged"
    victim = sites[len(sites) // 2]
    rebuild = type(captured).rebuild

    def sabotage(self, disabled):
        rebuild(self, disabled)
        honest = self._run
        if victim not in disabled:
            self._run = lambda *args: tuple(
                o * 1.01 if isinstance(o, torch.Tensor) and o.is_floating_point() else o
                for o in honest(*args)
            )

    monkeypatch.setattr(type(captured), "rebuild", sabotage)
    result = bisect_model(model, *batch)
    assert [g.site for g in result.guilty] == [victim]
    assert result.guilty[0].error > 5e-3 > result.guilty[0].eager_error
    assert captured.disabled_sites == frozenset()


def test_dropout_is_refused_with_the_remedy(batch):
    model = fusekit.optimize(small_gpt(dropout=0.2))
    with pytest.raises(ValueError, match=r"draws random numbers.*model.eval"):
        bisect_model(model, *batch)


def test_a_model_that_is_not_optimised_is_refused(batch):
    with pytest.raises(ValueError, match="optimize"):
        bisect_model(small_gpt(), *batch)
