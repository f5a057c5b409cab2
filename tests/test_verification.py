"""verify and explain on toy models, with planted faults: a certificate that cannot fail proves nothing."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusekit
from fusekit.session import session


class Block(nn.Module):
    """A pre-norm MLP block: one add + norm, one linear + GELU."""

    def __init__(self, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = x + residual
        return self.drop(h + self.contract(F.gelu(self.expand(self.norm(h)))))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 33, 64), torch.randn(4, 33, 64)


@pytest.fixture(autouse=True)
def _never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy sizes never pay; these tests are about being right."""
    monkeypatch.setattr("fusekit.verification.SLOWER", 0.0)


@pytest.mark.parametrize("precision", ["keep", "bf16", "fp16"])
def test_a_sound_model_gets_a_certificate(batch: tuple[Tensor, Tensor], precision: str) -> None:
    model = fusekit.optimize(Block(), precision=precision)
    certificate = fusekit.verify(model, *batch)
    assert certificate.ok, str(certificate)
    assert {site.op for site in certificate.sites} >= {"add_layer_norm", "mlp"}
    names = {check.name for site in certificate.sites for check in site.checks}
    assert any(name.startswith("grad") for name in names), "gradients are part of the certificate"
    assert certificate.model, "a model without random numbers is compared as a whole"
    assert json.loads(json.dumps(certificate.to_dict()))["ok"] is True
    assert "float64" in str(certificate)


class OneForAll(nn.Module):
    """Queries, keys and values are one tensor; a tensor is added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).unflatten(-1, (2, 8)).transpose(1, 2)
        h = F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)
        return self.norm(h + h)


def test_a_tensor_that_is_several_arguments_has_one_gradient() -> None:
    model = fusekit.optimize(OneForAll())
    certificate = fusekit.verify(model, torch.randn(2, 6, 16))
    assert certificate.ok, str(certificate)
    assert {site.op for site in certificate.sites} == {"attention", "add_layer_norm"}


class Cancels(nn.Module):
    """Its outputs, combined at random as verify differentiates them, are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.block(x, residual)
        w = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        return y - w * (y * w).sum().detach() / w.square().sum()


def test_outputs_are_compared_themselves_and_not_their_sum(batch: tuple[Tensor, Tensor]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = fusekit.optimize(Cancels(), precision="bf16")
        found = fusekit.verify(model, *batch).model[0]
        assert found.ok and 0.0 < found.eager_error < 0.1, found  # of their sum: more than 1


def test_verify_leaves_the_model_as_it_was(batch: tuple[Tensor, Tensor]) -> None:
    model = fusekit.optimize(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.1)))
    model(batch[0][0]).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    certificate = fusekit.verify(model, batch[0][0])
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(
        torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True) if p.grad is not None
    )
    assert any("random numbers" in note for note in certificate.notes)


class _Wrong:
    """mlp with its backward pass or its output off by one percent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        sound = torch.ops.fusekit.mlp.default

        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):  # type: ignore[no-untyped-def]
                ctx.args = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
                with torch.enable_grad():
                    ctx.y = sound(*ctx.args)
                return ctx.y.detach() * (1.01 if where == "output" else 1.0)

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                tensors = [a for a in ctx.args if isinstance(a, Tensor)]
                grads = iter(torch.autograd.grad(ctx.y, tensors, grad))
                scale = 1.01 if where == "gradient" else 1.0
                return tuple(next(grads) * scale if isinstance(a, Tensor) else None for a in ctx.args)

        monkeypatch.setattr(
            "fusekit.site_check.call_target", lambda target: Broken.apply if target is sound else target
        )


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_a_wrong_site_is_named_and_reverted(
    batch: tuple[Tensor, Tensor], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fusekit.optimize(Block())
    _Wrong(monkeypatch, where)
    with pytest.warns(UserWarning, match=r"reverted mlp_\d+ .*test_verification.py:\d+"):
        certificate = fusekit.verify(model, *batch)
    failed = [site for site in certificate.sites if not site.ok]
    assert not certificate.ok and {site.op for site in failed} == {"mlp"}
    assert all(site.reverted and site.reason for site in failed)
    assert "mlp" not in {f.op for f in fusekit.explain(model).fused}
    assert "FAILED" in str(certificate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fusekit.verify(model, *batch).ok, "what is left is sound"


def test_a_rule_that_misreads_the_model_is_caught(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is right, the rewrite is not: erf GELU fused as tanh GELU. The op's own reference would
    agree."""
    model = fusekit.optimize(Block())
    model(*batch)
    captured = session(model).regions[0]
    for node in captured.region.module.graph.nodes:
        if node.target is torch.ops.fusekit.mlp.default and "gelu" in node.args:
            node.args = tuple("gelu_tanh" if a == "gelu" else a for a in node.args)
    with pytest.warns(UserWarning, match="reverted mlp"):
        assert not fusekit.verify(model, *batch).ok


def test_a_slower_site_is_reverted_and_stays_listed(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusekit.verification.SLOWER", 1.1)
    monkeypatch.setattr("fusekit.site_check._times", lambda fused, eager: (2.0, 1.0))
    model = fusekit.optimize(Block())
    certificate = fusekit.verify(model, *batch)
    assert certificate.ok and all(site.reverted for site in certificate.sites)
    assert "2.00 times eager's time" in str(certificate)
    report = fusekit.explain(model)
    assert not report.fused
    assert sorted(r.op for r in report.refused) == sorted(site.op for site in certificate.sites)
    assert all("reverted by verify: takes 2.00 times" in r.reason for r in report.refused)


def test_verify_first_certifies_on_the_users_own_batch(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fusekit.optimize(Block(), verify="first")
    _Wrong(monkeypatch, "output")
    with pytest.warns(UserWarning, match="reverted mlp"):
        model(*batch).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*batch).sum().backward()


def test_explain_lists_sites_with_places_and_reasons(batch: tuple[Tensor, Tensor]) -> None:
    model = fusekit.optimize(Block(), fuse=["linear_act"])
    assert "Nothing captured yet" in str(fusekit.explain(model))
    model(*batch)
    report = fusekit.explain(model)
    assert {f.op for f in report.fused} == {"linear_act"}
    assert all("test_verification.py:" in f.location for f in report.fused)
    assert 0.0 < report.flops_covered <= 1.0 and 0.0 <= report.bytes_covered <= 1.0
    assert json.loads(json.dumps(report.to_dict()))["graphs"] == 1
    assert "linear_act" in str(report)


@pytest.mark.parametrize("call", [fusekit.explain, fusekit.verify])
def test_a_model_that_was_never_optimised_gets_a_sentence(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"call fusekit.optimize\(model\) first"):
        call(Block())


@pytest.mark.parametrize("call", [fusekit.explain, fusekit.verify, fusekit.restore])
def test_what_is_no_model_gets_a_sentence(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="got a str"):
        call("model")
