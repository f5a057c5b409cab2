"""Who computes attention on a GPU: what libraries may take, their trial, what was measured, what is said."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from library_checks import (
    Attend,
    exact,
    form,
    heads,
    library,
    nothing_known,
    offer,
    take_the_gpus_way,
)
from rich.console import Console
from torch import Tensor

import fusekit
from benchmarks import tune_attention
from fusekit.kernels import (
    attention,
    attention_adapter,
    attention_choice,
    attention_launch,
    attention_libraries,
    attention_packages,
    attention_times,
    attention_trial,
    cpu_library,
    times_file,
)
from fusekit.kernels.attention import OP
from fusekit.kernels.attention_choice import OWN, choose
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_libraries import LIBRARIES
from fusekit.kernels.attention_tiles import LOG2E
from fusekit.kernels.launch import record
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen


def in_log2(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = exact(*args)
    return out, lse * LOG2E


def last_key_aligned(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    return exact(q, k, v, form._replace(offset=form.offset + 1))


def heads_in_another_order(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    return exact(q, k.flip(1), v.flip(1), form)


JITTER = itertools.cycle((0.0, 1e-5))  # within the criterion, and never the same twice


def jittery(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = exact(*args)
    return out, lse + next(JITTER)


def failing(*args: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no engine for this graph")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    with nothing_known(tmp_path, monkeypatch):
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    take_the_gpus_way(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_librarys_output_with_our_gradient_is_exact(on_gpu, monkeypatch, dtype, kv_heads):
    ran = []
    offer(monkeypatch, library(lambda *args: ran.append(1) or exact(*args)))
    q, k, v = (heads(520, n, 32, dtype).requires_grad_() for n in (4, kv_heads, kv_heads))
    args = (q, k, v, None, True, 0.2)
    ours = results_and_grads(OP.fused, args)
    assert len(ran) > 1  # its trial, and this call
    truth, eager = results_and_grads(OP.reference, widen(args)), results_and_grads(OP.reference, args)
    verdicts = check(ours, eager, truth, dtype=dtype, terms=longest_sum(args), inherent=True)
    assert all(verdict.ok for verdict in verdicts), verdicts
    assert ours["output"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "run, reason",
    [
        (in_log2, "grad 0 is wrong"),
        (last_key_aligned, "output is wrong"),
        (heads_in_another_order, "output is wrong"),
        (jittery, "two runs of it differ"),
        (failing, "RuntimeError: no engine for this graph"),
    ],
)
def test_a_library_that_breaks_its_word_computes_nothing(on_gpu, monkeypatch, run, reason):
    offer(monkeypatch, library(run))
    q, k, v = heads(520, 4), heads(520, 2), heads(520, 2)
    args = (q, k, v, form(q, k, v, causal=True))
    assert choose(*args).name == "cuDNN"  # as documented
    ours = attention_choice.forward(*args)
    assert torch.equal(ours[0], attention_launch.forward(*args)[0])
    assert choose(*args).name == OWN and reason in choose(*args).reason
    assert attention_choice.describe(*args).startswith("CPU")  # tensors of a CPU are never a library's


def test_a_trial_does_not_depend_on_the_callers_modes(on_gpu, monkeypatch):
    offer(monkeypatch, library())
    q, k, v = heads(520), heads(520), heads(520)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        attention_choice.forward(q, k, v, form(q, k, v))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(attention_trial._outcomes.values()) == [None]


def test_no_trial_while_a_cuda_graph_is_captured(on_gpu, monkeypatch):
    offer(monkeypatch, library(failing))
    monkeypatch.setattr(attention_choice.trial, "is_capturing", lambda: True)
    q, k, v = heads(520), heads(520), heads(520)
    args = (q, k, v, form(q, k, v))
    assert torch.equal(attention_choice.forward(*args)[0], attention_launch.forward(*args)[0])
    assert not attention_trial._outcomes


UNIT = torch.ones(1, 1, 600, 600)
SEED = torch.tensor([3])


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"mask": UNIT.bool()}, "boolean mask"),
        ({"mask": UNIT}, "additive mask"),
        ({"dropout": 0.5, "seed": SEED}, "dropout"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"causal": True, "window": 100}, "window"),
        ({"causal": True, "offset": 7}, "causal with an offset"),
        ({"softcap": 30.0}, "capped scores"),
    ],
)
def test_the_own_kernel_keeps_what_torchs_libraries_do_not_compute(monkeypatch, settings, reason):
    offer(
        monkeypatch,
        *(x._replace(absent=lambda: None) for x in LIBRARIES if not x.name.startswith("flash-attn")),
    )
    q, k, v = heads(600), heads(600), heads(600)
    assert choose(q, k, v, form(q, k, v, **settings)) == (OWN, reason)


def test_the_own_kernel_keeps_other_dtypes_widths_and_lengths(monkeypatch):
    offer(monkeypatch, *(x._replace(absent=lambda: None) for x in LIBRARIES))
    for q, k, v, settings, reason in (
        (*(heads(600, dtype=torch.float32) for _ in range(3)), {}, "float32"),
        (heads(600), heads(600), heads(600, features=32), {}, "values of another width"),
        (*(heads(600, features=60) for _ in range(3)), {}, "heads of 60 features"),
        (heads(600), heads(700), heads(700), {"causal": True}, "causal over lengths that differ"),
        (heads(600), heads(600), heads(600).transpose(-1, -2).contiguous().transpose(-1, -2), {}, "strides"),
    ):
        assert choose(q, k, v, form(q, k, v, **settings)) == (OWN, reason)


def test_a_field_that_nobody_here_knows_stays_with_the_own_kernel(monkeypatch):
    offer(monkeypatch, library())
    q, k, v = heads(520), heads(520), heads(520)
    known = form(q, k, v)
    assert choose(q, k, v, known).name == "cuDNN"
    monkeypatch.setattr(attention_choice, "KNOWN", attention_choice.KNOWN - {"scale"})
    attention_choice._plans.held.clear()
    assert choose(q, k, v, known) == (OWN, "scale")
    one = heads(1)
    assert choose(one, k, v, form(one, k, v)) == (OWN, "scale")  # nor with the decoding kernels


def test_what_flash_attn_takes(monkeypatch):
    unfit = attention_packages.unfit
    q, k, longer = heads(40), heads(40), heads(90)

    def why(k: Tensor, **settings: Any) -> str | None:
        return unfit(q, k, k, form(q, k, k, **settings))

    assert why(k) is why(k, causal=True) is why(k, causal=True, window=9) is why(longer) is None
    assert why(longer, causal=True, offset=50, softcap=2.0) is None  # the cache's corner is flash-attn's own
    assert why(longer, causal=True) == "causal over lengths that differ"
    assert why(longer, causal=True, offset=3) == "an offset that is not the cache's"
    assert why(k, window=9, offset=4) == "a window around its queries"
    assert why(heads(30), causal=True, offset=-10) == "queries before the first key"


def test_defaults_by_architecture_and_length(monkeypatch):
    offer(monkeypatch, library(), library(name="SDPA flash"))
    q, k, v = heads(600), heads(600), heads(600)
    assert choose(q, k, v, form(q, k, v)) == ("cuDNN", "static default on sm_90")
    short = heads(500)
    assert choose(short, short, short, form(short, short, short)).name == OWN
    monkeypatch.setattr(attention_choice, "capability", lambda q: (8, 0))
    attention_choice._plans.held.clear()
    choice = choose(q, k, v, form(q, k, v))
    assert choice.name == OWN and "not measured against cuDNN, SDPA flash" in choice.reason


def test_a_library_that_is_absent_or_switched_off_is_named(monkeypatch):
    q, k, v = heads(600), heads(600), heads(600)
    offer(monkeypatch, library()._replace(absent=lambda: "switched off in torch.backends.cuda"))
    assert choose(q, k, v, form(q, k, v)) == (OWN, "cuDNN: switched off in torch.backends.cuda")
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert attention_libraries._cudnn_absent() is None
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        assert attention_libraries._cudnn_absent() == "switched off in torch.backends.cuda"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_fastest_of_what_was_measured_runs(on_gpu, monkeypatch):
    """Kept on disk by bucket: a neighbouring shape and another process profit, another PyTorch does not."""
    offer(monkeypatch, library(), library(failing, "broken"), library(name="SDPA flash"))
    clock = iter((3e-4, 2e-4, 1e-4))
    q, k, v = heads(600), heads(600), heads(600)
    args = (q, k, v, form(q, k, v))
    times = attention_choice.measure(*args, clock=lambda run: run() and next(clock))
    assert times == {OWN: 3e-4, "cuDNN": 2e-4, "SDPA flash": 1e-4}
    assert choose(*args) == ("SDPA flash", "measured 100 µs, own kernel 300, cuDNN 200")
    times_file.forget()
    attention_choice._plans.held.clear()
    neighbour = heads(700)
    assert choose(neighbour, neighbour, neighbour, args[3]).name == "SDPA flash"
    far = heads(1100)
    assert choose(far, far, far, args[3]).reason == "static default on sm_90"
    (file,) = times_file.cache_folder().glob("attention-*.json")
    held = json.loads(file.read_text())
    held["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(held))
    times_file.forget()
    attention_choice._plans.held.clear()
    assert choose(*args).reason == "static default on sm_90"


def test_the_own_kernel_runs_where_it_was_measured_the_fastest(on_gpu, monkeypatch):
    offer(monkeypatch, library())
    clock = iter((1e-4, 2e-4))
    q, k, v = heads(600), heads(600), heads(600)
    args = (q, k, v, form(q, k, v))
    attention_choice.measure(*args, clock=lambda run: next(clock))
    assert choose(*args) == (OWN, "measured 100 µs, cuDNN 200")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": 3}', '{"versions": {}, "seconds": {}}'])
def test_a_damaged_file_of_times_is_no_file(text):
    file = times_file._path("attention", times_file.device_name(torch.device("cpu")))
    file.write_text(text)
    assert attention_times.measured(torch.device("cpu"), "any") == {}


def test_tuning_measures_what_training_meets(on_gpu, monkeypatch):
    """`fusekit bench --tune` on tiny shapes: each dtype, causal and not, where there is a choice."""
    offer(monkeypatch, library())
    out = io.StringIO()
    found = tune_attention.run(
        torch.device("cpu"), Console(file=out), shapes=((1, 2, 1, 40, 16), (1, 2, 2, 40, 20)),
        clock=lambda run: 1e-4 if getattr(run, "func", None) is attention_adapter.forward else 2e-4,
    )  # fmt: skip
    assert [len(times) for times in found.values()] == 2 * [2, 2, 0, 0]  # 20 features are no multiple of 8
    assert not any("backward" in who for times in found.values() for who in times)  # it computes no gradients
    assert "float16 1x2/1x40x16 full: cuDNN 100 µs, own kernel 200 µs" in out.getvalue()
    q, k, v = heads(40, 2, 16), heads(40, 1, 16), heads(40, 1, 16)
    assert attention.runs_on(q, k, v, None, True) == "CPU C++ pass" or not cpu_library.multiplies()
    assert choose(q, k, v, form(q, k, v, causal=True)).name == "cuDNN"


def test_verify_measures_once_and_training_never(on_gpu, monkeypatch):
    offer(monkeypatch, library())
    measured = []
    monkeypatch.setattr(attention_choice, "measure", lambda *args: measured.append(args) or {})
    torch.manual_seed(0)
    layer = Attend()
    fusekit.optimize(layer)
    x = torch.randn(2, 600, 32, requires_grad=True)
    layer(x).sum().backward()
    assert not measured
    assert fusekit.verify(layer, x).ok
    assert len(measured) == 1 and measured[0][0].shape == (2, 2, 600, 16)
    (site,) = (f for f in fusekit.explain(layer).fused if f.op == "attention")
    assert site.implementation == "CPU flash"
    monkeypatch.setattr(attention_choice, "on_gpu", lambda x: True)  # as its sites would be described there
    assert [f.implementation for f in fusekit.explain(layer).fused if f.op == "attention"] == [
        "own kernel: float32"
    ]


def test_nothing_is_measured_where_there_is_no_choice(on_gpu, monkeypatch):
    offer(monkeypatch, library(failing))
    q, k, v = heads(600), heads(600), heads(600)

    def clock(run: Callable[[], object]) -> float:
        raise AssertionError("nobody asked")

    for settings in ({"mask": UNIT}, {}):  # only ours computes it; the library fails its trial
        assert attention_choice.measure(q, k, v, form(q, k, v, **settings), clock=clock) == {}
    one = heads(1)
    assert attention_choice.measure(one, k, v, form(one, k, v), clock=clock) == {}


def test_recorded_launches_are_our_own(monkeypatch):
    """What is compiled ahead of time is what ships, whatever library there is."""
    offer(monkeypatch, library())
    with torch._subclasses.fake_tensor.FakeTensorMode(), record() as launches:
        q, k, v = (torch.empty(1, 2, 600, 64, dtype=torch.bfloat16) for _ in range(3))
        torch.ops.fusekit.attention(q, k, v)
    assert len(launches) == 1


def test_a_cpus_paths_are_named():
    q, k, v = heads(30, dtype=torch.float32), heads(30, dtype=torch.float32), heads(30, dtype=torch.float32)
    described = attention_choice.describe
    assert described(q, k, v, form(q, k, v)) == "CPU flash"
    assert described(q, k, v, form(q, k, v, causal=True, window=4)) == "CPU blocks: window"
    assert described(q, k, v, form(q, k, v, causal=True, offset=4)) == "CPU blocks: causal with an offset"
    assert described(q, k, v, form(q, k, v, softcap=4.0)) == "CPU blocks: capped scores"
    assert described(q, k, v, form(q, k, v, slopes=torch.ones(q.shape[1]))) == "CPU blocks: ALiBi"
    documents = torch.zeros(1, q.shape[2], dtype=torch.int64)
    key_documents = torch.zeros(1, k.shape[2], dtype=torch.int64)
    packed = form(q, k, v, documents=documents, key_documents=key_documents)
    assert described(q, k, v, packed) == "CPU blocks: documents"
    assert described(q, k, v, form(q, k, v, dropout=0.1, seed=SEED)) == "CPU matmuls: dropout"
