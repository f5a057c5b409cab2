"""`optimize` as a user meets it: in place, undone, repeated, copied, misused; models that resist capture."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from auto_checks import gpt, tokens
from torch import Tensor, nn

import fusekit
from fusekit.passes.canonicalise import location
from fusekit.passes.pipeline import PIPELINE
from fusekit.session import UnfusedError, session


@pytest.fixture(autouse=True)
def _check_invariants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEKIT_VERIFY", "1")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.down(F.gelu(self.up(x))), 0.1, self.training))


def _optimized(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return fusekit.optimize(Tiny() if model is None else model, fuse="none", remainder="eager", **options)


def test_in_place_same_object_same_state_dict_keys() -> None:
    model = Tiny()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert _optimized(model) is model
    model(torch.randn(2, 8))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert type(model) is Tiny


def test_new_values_of_parameters_are_seen_without_capturing_again() -> None:
    model, x = _optimized().eval(), torch.randn(2, 8)
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    plain = Tiny().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    model.load_state_dict(Tiny().state_dict())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    assert len(session(model).regions) == 1


def test_train_and_eval_are_two_graphs_kept_both() -> None:
    model, x = _optimized(), torch.randn(2, 8)
    for _ in range(2):
        model.train()
        model(x)
        model.eval()
        model(x)
    assert len(session(model).regions) == 2


def test_new_sizes_make_one_graph_that_serves_all() -> None:
    model = _optimized().eval()
    plain = copy.deepcopy(model)
    for rows in (2, 3, 5, 9, 17):
        x = torch.randn(rows, rows + 1, 8)
        assert torch.equal(model(x), plain(x))
    assert len(session(model).regions) <= 2  # at most a static one, then one with symbols


def test_no_grad_is_its_own_graph_and_records_no_gradient() -> None:
    model, x = _optimized().eval(), torch.randn(2, 8)
    with torch.no_grad():
        assert not model(x).requires_grad
    assert model(x).requires_grad
    assert [captured.region.training for captured in session(model).regions] == [False, True]


def test_deepcopy_and_pickle_are_plain_models_that_can_be_optimised() -> None:
    model, x = _optimized().eval(), torch.randn(2, 8)
    want = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        with pytest.raises(ValueError, match="not optimised"):
            session(twin)
        assert torch.equal(twin(x), want)
        assert torch.equal(_optimized(twin)(x), want)
        assert len(session(twin).regions) == 1
    assert len(session(model).regions) == 1


def test_second_optimize_starts_over_and_restore_undoes() -> None:
    model, x = _optimized().eval(), torch.randn(2, 8)
    want = model(x)
    first = session(model)
    _optimized(model)
    assert session(model) is not first and session(model).regions == []
    assert torch.equal(model(x), want) and len(session(model).regions) == 1
    assert fusekit.restore(model) is model
    assert torch.equal(model(x), want) and len(first.regions) == 1
    with pytest.raises(ValueError, match="not optimised"):
        session(model)
    assert fusekit.restore(model) is model


def test_restore_brings_back_the_users_own_compile() -> None:
    model = Tiny()
    model.compile(backend="eager")
    before = model._compiled_call_impl
    fusekit.restore(_optimized(_optimized(model)))
    assert model._compiled_call_impl is before


def test_sessions_do_not_keep_models_alive() -> None:
    import gc
    import weakref

    model = _optimized()
    model(torch.randn(2, 8))
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_example_inputs_capture_now_and_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    _optimized(model, example_inputs=((torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),), {}))
    assert len(session(model).regions) == 1
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class GivesUp(nn.Module):
    """A data-dependent branch inside a loop: Dynamo gives the whole frame up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.linear(x)
            if x.sum().item() > 0:  # this line
                x = x + 1
        return x


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        print("looking at", end="")  # this line
        return self.b(x)


def _line(cls: type) -> str:
    import inspect

    lines, start = inspect.getsourcelines(cls)
    offset = next(i for i, line in enumerate(lines) if "# this line" in line)
    return f"test_optimize.py:{start + offset}"


def test_model_that_dynamo_gives_up_runs_and_warns_once_with_the_line() -> None:
    eager, x = GivesUp(), torch.randn(2, 8)
    for _ in range(2):  # the second time Dynamo itself says nothing any more
        model = _optimized(copy.deepcopy(eager))
        with pytest.warns(UserWarning, match="item") as caught:
            assert torch.equal(model(x), eager(x))
        assert len(caught) == 1 and _line(GivesUp) in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
        assert [failure.location for failure in session(model).failures] == [_line(GivesUp)]


def test_graph_breaks_are_listed_with_line_and_cause() -> None:
    eager, x = Breaks(), torch.randn(2, 8)
    model = _optimized(copy.deepcopy(eager))
    assert torch.equal(model(x), eager(x))
    assert len(session(model).regions) == 2
    (text,) = session(model).graph_breaks
    assert text.startswith(_line(Breaks)) and "print" in text


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm, self.out = nn.LSTM(8, 16, batch_first=True), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.out(self.norm(self.lstm(x)[0])))


def test_an_lstm_does_not_keep_its_frame_eager() -> None:
    plain = Recurrent()
    model = fusekit.optimize(copy.deepcopy(plain))
    for length in (5, 7, 3):
        x = torch.randn(2, length, 8)
        for m in (model, plain):
            optimizer = torch.optim.SGD(m.parameters(), 0.1)
            m(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not fusekit.explain(model).notes
    assert {f.op for f in fusekit.explain(model).fused} == {"add_layer_norm", "linear_act"}
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)


def test_sizes_beyond_dynamos_limit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusekit.passes._compat.RECOMPILE_LIMIT", 2)
    model = _optimized(dynamic=False).eval()
    model(torch.randn(2, 8))
    model(torch.randn(3, 8))
    assert not session(model).failures
    with pytest.warns(UserWarning, match="as often as Dynamo allows.*dynamic=True"):
        model(torch.randn(4, 8))
    assert "dynamic=True" in str(fusekit.explain(model))


def test_failing_pass_leaves_the_frame_eager_and_names_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(region: Any) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr("fusekit.passes.pipeline.PIPELINE", [("broken", broken)])
    eager, x = Tiny(), torch.randn(2, 8)
    model = _optimized(copy.deepcopy(eager))
    with pytest.warns(UserWarning, match=r"test_optimize\.py:\d+ unoptimised: KeyError"):
        got = model.eval()(x)
    assert torch.equal(got, eager.eval()(x))
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and session(model).regions == []


def test_bug_of_dynamos_own_does_not_stop_the_model() -> None:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("ModuleNotFoundError: No module named 'x'")

    eager, x = Tiny().eval(), torch.randn(2, 8)
    model = _optimized(copy.deepcopy(eager))
    model._compiled_call_impl._compiled = raises
    with pytest.warns(UserWarning, match="No module named"):
        assert torch.equal(model(x), eager(x))
    assert torch.equal(model(x), eager(x)) and len(session(model).failures) == 1


def test_strict_raises_where_capture_fails() -> None:
    model = _optimized(GivesUp(), strict=True)
    with pytest.warns(UserWarning), pytest.raises(UnfusedError, match="not captured"):
        model(torch.randn(2, 8))


def test_tensor_subclass_inputs_are_left_to_eager() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model, x = _optimized().eval(), torch.randn(2, 8)
    with pytest.warns(UserWarning, match="TwoTensor"):
        y = model(TwoTensor(x, x))
    assert isinstance(y, TwoTensor)


def test_dynamos_settings_are_ours_only_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config

    before = config.specialize_float, config.recompile_limit, set(config.ignore_logging_functions)
    during: list[bool] = []

    def note(region: Any) -> None:
        during.append(config.specialize_float)

    monkeypatch.setattr("fusekit.passes.pipeline.PIPELINE", [("note", note), *PIPELINE])
    _optimized()(torch.randn(2, 8))
    assert during == [True]
    assert (config.specialize_float, config.recompile_limit, set(config.ignore_logging_functions)) == before


def test_python_float_attributes_stay_literals_when_sizes_vary() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.125

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = _optimized(Scaled())
    for rows in (2, 3, 4):
        model(torch.randn(rows, 8))
    for captured in session(model).regions:
        (mul,) = captured.region.module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
        assert mul.args[1] == 0.125


def test_nodes_know_the_users_line() -> None:
    model = _optimized().eval()
    model(torch.randn(2, 8))
    graph = session(model).regions[0].region.module.graph
    (gelu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    assert location(gelu).startswith("test_optimize.py:")


def test_after_call_hooks_run_after_every_call() -> None:
    model, x = _optimized(), torch.randn(2, 8)
    calls: list[Any] = []
    session(model).after_call.append(lambda s, args, kwargs: calls.append((s, args, kwargs)))
    model(x)
    model(x=x)
    assert [len(args) for _, args, _ in calls] == [1, 0] and calls[0][0] is session(model)


@pytest.mark.parametrize(("verify", "expected"), [("first", [0]), (2, [0, 2])])
def test_verify_certifies_calls_that_train(
    monkeypatch: pytest.MonkeyPatch, verify: str | int, expected: list[int]
) -> None:
    certified: list[int] = []

    def certify(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        certified.append(len(kwargs["x"]) - 2)

    monkeypatch.setattr("fusekit.verification.certify", certify)
    model = _optimized(verify=verify)
    for call in range(4):
        x = torch.randn(call + 2, 8)
        model(x=x)
        with torch.no_grad():
            model(x)
    assert certified == expected


def test_own_autograd_function_is_captured_in_low_precision() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Tensor:
            return grad_output * 7

    class Model(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Double.apply(self.norm(x)))

    model = fusekit.optimize(Model(), precision="bf16", remainder="eager")
    x = torch.randn(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert session(model).failures == [] and len(session(model).regions) == 1
    assert x.grad is not None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "bfloat16"}, "did you mean 'bf16'"),
        ({"precision": torch.float16}, "did you mean 'fp16'"),
        ({"precision": 16}, "precision is one of"),
        ({"fuse": ["atention"]}, "an op in fuse is one of"),
        ({"fuse": 3}, "names of ops"),
        ({"remainder": "inductr"}, "did you mean 'inductor'"),
        ({"verify": 0}, "positive number of calls"),
        ({"verify": True}, "positive number of calls"),
        ({"example_inputs": torch.ones(1)}, r"a pair \(args, kwargs\)"),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fusekit.optimize(Tiny(), **options)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (Tiny, {}, "make an instance first"),
        (lambda x: x, {}, r"torch\.nn\.Module, and got a function"),
        (nn.Linear(2, 2, device="meta"), {}, "meta device"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), {}, "meta device"),
        (nn.Linear(2, 2).bfloat16(), {"precision": "bf16"}, r"model\.float\(\)"),
    ],
    ids=["class", "function", "meta", "part meta", "low precision"],
)
def test_models_that_cannot_be_optimised_are_refused(
    model: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        fusekit.optimize(model, **options)


@pytest.mark.parametrize("precision", ["bf16", "fp8-delayed"])
def test_a_torch_compile_around_the_model_changes_no_bit(precision: str) -> None:
    """Dynamo meets our bookkeeping then, and would trace it."""
    found = []
    for around in (False, True):
        torch._dynamo.reset()
        model, x = gpt(), tokens()
        fusekit.optimize(model, precision=precision)
        call = torch.compile(model, backend="eager") if around else model
        call(x, x)[1].backward()
        assert fusekit.explain(model).fused
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))
