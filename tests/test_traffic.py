"""Bytes and launches: the counting counts, fusekit's are as recorded, norms near the least possible."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import __main__ as bench
from benchmarks.results_file import KERNEL_SCHEMA, read_results
from benchmarks.static.specialisations import forward_and_backward
from benchmarks.traffic import command, norms
from benchmarks.traffic.counting import Counter, Counts, Traffic, as_on_gpu, count_saved, launches, moved
from benchmarks.traffic.eager_gpu import gpu_autocast
from benchmarks.traffic.models import count_model
from benchmarks.traffic.ops import count_op, count_ops
from benchmarks.traffic.pointers import named_arguments, roles
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels import OPS
from fusekit.kernels._triton import HAS_TRITON
from fusekit.kernels.launch import record

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def counted(fn, *shapes, dtype=torch.float32):
    """Traffic of `fn` on fake tensors of these shapes."""
    traffic = Traffic()
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with as_on_gpu() as started, Counter(traffic, started):
            fn(*tensors)
    return traffic.bytes, traffic.launches


def test_each_kernel_reads_its_inputs_and_writes_its_outputs_once():
    assert counted(torch.add, (8, 4), (8, 4)) == (3 * 128, 1)
    assert counted(lambda x: x + x, (8, 4)) == (2 * 128, 1)
    assert counted(lambda x, b: x + b.expand(8, 4), (8, 4), (1, 4)) == (2 * 128 + 16, 1)
    assert counted(lambda x: x.t().reshape(32)[1:].detach(), (8, 4)) == (2 * 128, 1)  # the copy
    assert counted(lambda x: x.view(32).unsqueeze(0), (8, 4)) == (0, 0)
    assert counted(lambda x: torch.zeros_like(x), (8, 4)) == (128, 1)
    assert counted(lambda x, y: x.copy_(y), (8, 4), (8, 4)) == (2 * 128, 1)
    assert counted(lambda x, y: x.add_(y), (8, 4), (8, 4)) == (3 * 128, 1)
    assert counted(lambda x: torch._foreach_copy_([x], [x.clone()]), (8, 4)) == (4 * 128, 2)


def test_gathers_read_what_they_return():
    def loss(x):
        return nn.functional.nll_loss(x, torch.zeros(8, dtype=torch.int64))

    assert counted(lambda w: w[torch.zeros(3, dtype=torch.int64)], (100, 4)) == (3 * 8 + 24 + 2 * 48, 2)
    assert counted(loss, (8, 1000))[0] < 8 * 1000


def test_autocast_is_a_gpus():
    """Layer norm in float32 and a cast for the linear after it; the CPU's stays in bfloat16."""
    names = []

    class Names(Counter):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append((func.overloadpacket.__name__, getattr((*args, None)[0], "dtype", None)))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        with as_on_gpu() as started, gpu_autocast(torch.bfloat16), Names(Traffic(), started):
            assert model(torch.empty(2, 4)).dtype == torch.bfloat16
    assert ("native_layer_norm", torch.float32) in names
    assert [dtype for name, dtype in names if name == "addmm"] == [torch.bfloat16] * 2


@pytest.mark.parametrize("name", OPS)
def test_every_pointer_of_every_kernel_is_understood(name):
    with FakeTensorMode(), record() as started:
        for sample in OPS[name].samples("cpu", torch.bfloat16):
            forward_and_backward(OPS[name], sample.args)
    given, used = set(), set()  # a pointer may be passed and left alone, but not in every launch
    for start in filter(lambda start: all(start.grid), started):
        found, kernel = roles(start), start.kernel.fn.__name__
        pointers = {k for k, v in named_arguments(start).items() if isinstance(v, torch.Tensor) and v.numel()}
        if not pointers:  # an empty batch
            continue
        assert found.written & pointers and not (found.read & found.written & pointers)
        given |= {(kernel, pointer) for pointer in pointers}
        used |= {(kernel, pointer) for pointer in found.read | found.written}
    assert given and given <= used


@pytest.mark.parametrize("name", norms.PARAMETERS)
def test_arguments_say_what_the_interpreter_counts(name):
    """The exact count of the norms, at a size where rows and columns fill their blocks."""
    M, N = 8192, 512
    recorded = read_results(command.RESULTS, "traffic")["norms"]
    with FakeTensorMode():
        x, residual = (torch.empty(M, N, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weights = [
            torch.empty(N, dtype=torch.bfloat16, requires_grad=True) for _ in range(norms.PARAMETERS[name])
        ]
        counts = count_op(OPS[name].fused, (x, residual, *weights, 1e-5))
    for direction in ("forward", "backward"):
        exact = recorded[f"{name} {direction}"]["counted"]
        assert getattr(counts, direction).bytes == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "shapes", "kernels"),
    [
        ("linear_act", ((4096, 4096), (4096,)), ["persistent_kernel"] * 2 + ["sum_kernel"]),
        ("qkv_linear", ((1024, 4096),) * 3 + ((1024,),) * 3,
         ["persistent_sum_kernel"] + ["persistent_kernel", "sum_kernel"] * 3),
    ],
)  # fmt: skip
def test_bias_gradients_ride_on_products(name, shapes, kernels):
    """No pass over the output's gradient of their own, only the sum of partial results."""
    with FakeTensorMode(), record() as started:
        x, *rest = (torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in ((4096, 4096), *shapes))
        outputs = OPS[name].fused(x, *rest)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        before = len(started)
        torch.autograd.grad(outputs, (x, *rest), [torch.empty_like(y) for y in outputs])
    assert [start.kernel.fn.__name__ for start in started[before:]] == kernels


def test_saved_bytes_leave_parameters_out_and_count_a_storage_once():
    counts = Counts()
    with FakeTensorMode():
        layer, x = nn.Linear(4, 8), torch.empty(2, 4, requires_grad=True)
        with count_saved(counts, layer.parameters()):
            layer(x).tanh() * x.sum()
    assert counts.saved_bytes == 4 * (8 + 16 + 1)  # x, the tanh's result, the sum


def test_ops_move_no_more_than_recorded():
    found = {"ops": list(count_ops()), "models": []}
    more, _ = command.compare(read_results(command.RESULTS, "traffic"), found)
    assert not more, "\n".join(more)
    recorded = {row["op"] for row in read_results(command.RESULTS, "traffic")["ops"]}
    assert recorded == set(OPS), "python -m benchmarks.traffic --record"


def test_a_model_is_counted_and_more_than_recorded_is_named(tmp_path):
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    sizes = GPTConfig(layers=1, width=64, heads=2, vocab=128, context=32)
    row = count_model("tiny", GPT(sizes), {"tokens": tokens, "targets": tokens})
    eager, low, ours = (row[name] for name in ("eager float32", "eager bf16", "fusekit bf16"))
    assert launches(ours) < launches(low) and moved(ours) < moved(low)
    assert 0 < ours["saved_bytes"] < low["saved_bytes"] < eager["saved_bytes"]
    worse = json.loads(json.dumps(row))
    worse["fusekit bf16"]["backward"]["launches"] += 1
    more, less = command.compare({"ops": [], "models": [row]}, {"ops": [], "models": [worse]})
    assert len(more) == 1 and "tiny: backward launches" in more[0] and not less


def test_counter_counts_each_byte_once_and_only_active_lanes():
    counter = norms.Counter()
    counter.starts = [1000, 5000]
    counter.read, counter.written = ([np.zeros(64, bool), np.zeros(64, bool)] for _ in range(2))
    addresses = np.array([5000, 5002, 5002, 5004])
    counter.mark(counter.read, addresses, np.array([True, True, True, False]), 2)
    assert counter.bytes == 4
    counter.mark(counter.read, addresses, np.array([True, True, True, False]), 2)  # again: from the cache
    assert counter.bytes == 4
    counter.mark(counter.written, np.array([1000]), np.array([True]), 4)
    assert counter.bytes == 8


def test_counted_bytes_of_small_norms_are_what_the_kernels_say():
    """One block of rows to a program, so that every byte beyond the minimum can be named."""
    M, N = 48, 96
    for name, r in norms.measure(M, N).items():
        assert r["minimum"] == norms.minimum(name.split()[0], M, N, 2)[name.split()[1]]
        extra = r["counted"] - r["minimum"]
        statistics = (8 if "layer" in name else 4) * M
        if name.endswith("forward"):
            assert extra in (0, statistics)
        else:  # partial rows of float32, written and read, besides statistics
            row = (2 if "layer" in name else 1) * N * 4 * 2
            assert extra >= row and (extra % row in (0, statistics % row))


def test_recorded_norms_are_within_five_percent():
    recorded = read_results(command.RESULTS, "traffic")["norms"]
    assert len(recorded) == 4
    for name, r in recorded.items():
        assert 1.0 <= r["ratio"] <= norms.LIMIT, name
        assert r["counted"] == pytest.approx(r["ratio"] * r["minimum"], rel=1e-4)


def test_bench_compares_traffic_and_refuses_files_of_two_suites(tmp_path, capsys):
    found = read_results(command.RESULTS, "traffic")
    (tmp_path / "old.json").write_text(json.dumps(found))
    found["models"][0]["fusekit bf16"]["saved_bytes"] += 1
    (tmp_path / "new.json").write_text(json.dumps(found))
    (tmp_path / "kernels.json").write_text(json.dumps({"kind": "kernels", "schema": KERNEL_SCHEMA}))
    (tmp_path / "norms.json").write_text(json.dumps(found["norms"]))
    old, new, kernels, norms_only = (str(tmp_path / f"{n}.json") for n in ("old", "new", "kernels", "norms"))
    assert bench.main(["--compare", old, new]) == 1
    assert "1 figures are more, 0 less" in capsys.readouterr().out
    assert bench.main(["--compare", new, old]) == 0
    assert bench.main(["--compare", kernels, new]) == 2
    assert "compare two files of one suite" in capsys.readouterr().err
    assert bench.main(["--compare", norms_only, new]) == 2
    assert "not a results file" in capsys.readouterr().err
