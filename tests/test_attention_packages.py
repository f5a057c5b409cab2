"""flash-attn 2, 3 and 4, by stubs of their signatures: how they are found, called, and turned down."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from library_checks import exact, form, heads, nothing_known, offer, take_the_gpus_way
from torch import Tensor

from fusekit.kernels import attention_choice, attention_packages, times_file
from fusekit.kernels.attention import OP
from fusekit.kernels.attention_choice import OWN
from fusekit.kernels.attention_libraries import LIBRARIES, Library
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen

# The packages' own arguments, in their order.
STUB_2 = """
from flash_stub import attend

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
    out, lse = attend(q, k, v, softmax_scale, causal, window_size, -1, softcap)
    return (out, lse, None) if return_attn_probs else out
"""
STUB_3 = """
from flash_stub import attend

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
    out, lse = attend(q, k, v, softmax_scale, causal, window_size, -1, softcap)
    return (out, lse) if return_attn_probs else out
"""
STUB_4 = """
from flash_stub import attend

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
                    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None,
                    full_block_cnt=None, full_block_idx=None, mask_block_cnt=None, mask_block_idx=None,
                    block_size=None, return_lse=False):
    out, lse = attend(q, k, v, softmax_scale, causal, window_size, None, softcap)
    return out, lse if return_lse else None
"""
FILES = {
    "flash-attn": ("flash_attn/__init__.py", STUB_2),
    "flash-attn 3": ("flash_attn_interface.py", STUB_3),
    "flash-attn 4": ("flash_attn/cute/__init__.py", STUB_4),
}
STUB = """
def attend(*args):
    return attend.runs(*args)
"""


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[Any, Any], none: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the documentation has it, on (B, T, H, D): the last query stands at the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    left, right = window
    hidden = distance > 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden if left == none else hidden | (distance < -left)
    hidden = hidden if right == none else hidden | (distance > right)
    scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


def named(name: str) -> Library:
    return next(x for x in LIBRARIES if x.name == name)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with nothing_known(tmp_path, monkeypatch):
        yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface", "flash_stub"):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path):
    """Write a package's stub."""

    def write(name: str, text: str | None = None, runs: Any = attend) -> Library:
        place, stub = FILES[name]
        for file, content in (("flash_stub.py", STUB), (place, text or stub)):
            path: Path = tmp_path / "site" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        importlib.invalidate_caches()
        import flash_stub

        flash_stub.attend.runs = runs
        return named(name)._replace(absent=lambda: None)

    return write


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": True},
        {"causal": True, "window": 30},
        {"causal": True, "offset": 40, "keys": 200},
        {"causal": True, "offset": 40, "window": 30, "keys": 200, "softcap": 3.0},
    ],
)
def test_called_as_documented_each_is_the_op(install, name, settings):
    library, settings = install(name), dict(settings)
    keys = settings.pop("keys", 160)
    q, k, v = heads(160, 4, 32), heads(keys, 2, 32), heads(keys, 2, 32)
    given = form(q, k, v, **settings)
    assert library.unfit(q, k, v, given) is None
    out, lse = library.run(q, k, v, given)
    assert (out - OP.fused(q, k, v, **settings)).abs().max() < 0.02
    assert lse.shape == q.shape[:-1] and lse.dtype == torch.float32


@pytest.mark.parametrize("name", FILES)
def test_each_computes_where_it_was_measured_the_fastest(install, monkeypatch, name):
    take_the_gpus_way(monkeypatch)
    offer(monkeypatch, install(name))
    q, k, v = (heads(520, n, 32).requires_grad_() for n in (4, 2, 2))
    args = (q, k, v, None, True, 0.2)
    clock = iter((3e-4, 2e-4))
    given = form(q, k, v, causal=True, scale=0.2)
    attention_choice.measure(q, k, v, given, lambda run: run() and next(clock))
    assert attention_choice.choose(q, k, v, given).name == name
    ours, truth = results_and_grads(OP.fused, args), results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(OP.reference, args)
    verdicts = check(ours, eager, truth, dtype=q.dtype, terms=longest_sum(args), inherent=True)
    assert all(verdict.ok for verdict in verdicts), verdicts


def first_key_aligned(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *rest: Any) -> Any:
    out, lse = attend(q, k, v, scale, causal, *rest)
    return out.roll(1, 1), lse


def in_log2(*args: Any) -> Any:
    out, lse = attend(*args)
    return out, lse * 1.4427


def laid_out_as_heads(*args: Any) -> Any:
    out, lse = attend(*args)
    return out, lse.transpose(1, 2)


OLD_3 = STUB_3.replace(", return_attn_probs=False", "").replace(" if return_attn_probs else out", "")
WITHOUT_SUMS = STUB_4.replace("lse if return_lse else None", "None")
NOT_4 = STUB_4.replace("def flash_attn_func", "def another")


@pytest.mark.parametrize(
    "name, text, runs, reason",
    [
        ("flash-attn 3", None, first_key_aligned, "output is wrong"),
        ("flash-attn 3", None, in_log2, "grad 0 is wrong"),
        ("flash-attn 4", None, in_log2, "grad 0 is wrong"),
        ("flash-attn 4", None, laid_out_as_heads, "is wrong"),
        ("flash-attn 3", OLD_3, attend, "unexpected keyword argument 'return_attn_probs'"),
        ("flash-attn 4", WITHOUT_SUMS, attend, "fails: AttributeError"),
        ("flash-attn 4", NOT_4, attend, "fails: ImportError"),
    ],
)
def test_a_package_that_is_not_as_assumed_computes_nothing(install, monkeypatch, name, text, runs, reason):
    take_the_gpus_way(monkeypatch)
    offer(monkeypatch, install(name, text, runs))
    monkeypatch.setattr(attention_choice, "DEFAULTS", {"sm_90": (name,)})
    q, k, v = heads(520, 4), heads(520, 2), heads(520, 2)
    given = form(q, k, v, causal=True)
    out, *_ = attention_choice.forward(q, k, v, given)
    assert (out - exact(q, k, v, given)[0]).abs().max() < 0.05
    told = attention_choice.choose(q, k, v, given)
    assert told.name == OWN and told.reason.startswith(f"{name}: on a small call") and reason in told.reason


def test_found_without_being_imported(install, monkeypatch):
    """4 alone is a folder flash_attn that holds nothing of 2."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    absent = {
        "flash-attn": attention_packages.absent_2.__wrapped__,
        "flash-attn 3": attention_packages.absent_3.__wrapped__,
        "flash-attn 4": attention_packages.absent_4.__wrapped__,
    }
    found: list[str] = []
    for name in ("flash-attn 3", "flash-attn 4", "flash-attn"):
        assert absent[name]() == f"{name} is not installed"
        install(name, "raise RuntimeError('imported')")
        found.append(name)
        assert [x for x in absent if absent[x]() is None] == [x for x in absent if x in found]
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert {run() for run in absent.values()} == {"this PyTorch has no CUDA"}


def test_flash_attn_4_keeps_to_its_head_sizes():
    q = heads(40, 2, 192)
    assert named("flash-attn 4").unfit(q, q, q, form(q, q, q)) == "heads of 192 features"
    assert named("flash-attn 3").unfit(q, q, q, form(q, q, q)) is None


def test_times_of_another_version_do_not_count():
    assert {"flash-attn-3", "flash-attn-4"} <= times_file._versions().keys()
