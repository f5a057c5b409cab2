"""Every private torch function that capture needs, in one place, for torch 2.11 to 2.13.

`self_test` runs once, before the first capture: a torch that has moved one of these away is named then,
and not in the middle of a step.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import InternalTorchDynamoError, SkipFrame
from torch._dynamo.external_utils import wrap_inline
from torch._guards import TracingContext
from torch._higher_order_ops.utils import reenter_make_fx
from torch._higher_order_ops.wrap import TagActivationCheckpoint, tag_activation_checkpoint
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import (
    _temp_remove_pre_dispatch_torch_function_mode,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from fusekit.passes._dynamo_settings import dynamo_settings

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "InternalTorchDynamoError",
    "SkipFrame",
    "TorchDispatchMode",
    "active_ddp_group",
    "autocast_key",
    "backend_inputs",
    "compile_call",
    "divide_checkpoint_kwargs",
    "dynamo_settings",
    "ensure_callbacks",
    "enter_autocast",
    "exit_autocast",
    "has_autocast_kernel",
    "headline",
    "inductor",
    "is_traceable_wrapper_subclass",
    "make_pre_dispatch_graph",
    "never_trace",
    "record_call",
    "self_test",
    "set_grad_enabled",
    "source_name",
    "tag_activation_checkpoint",
    "take_graph_breaks",
    "trace_body",
    "tracing_fake_mode",
    "untraced",
]

Graph = fx.GraphModule

enter_autocast = _enter_autocast
exit_autocast = _exit_autocast
set_grad_enabled = torch._C._set_grad_enabled


def tracing_fake_mode() -> FakeTensorMode:
    """The fake mode of the frame that Dynamo is compiling; its shape environment holds the frame's guards."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise RuntimeError("no Dynamo frame is being compiled here")
    return context.fake_mode


def backend_inputs(example_inputs: Sequence[Any]) -> list[Any]:
    """The backend's example inputs as fakes of the tracing mode, with Dynamo's own size symbols.

    Dynamo's `example_value` fakes belong to another mode and must not be mixed in.
    """
    mode, context = tracing_fake_mode(), TracingContext.get()

    def fake(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return value if value.fake_mode is mode else mode.from_tensor(value)
        if not isinstance(value, Tensor):
            return value  # sizes stay symbolic
        symbols = context.tensor_to_context.get(value)
        if symbols is None:
            return mode.from_tensor(value, static_shapes=True, trace=True)
        return mode.from_tensor(value, symbolic_context=symbols, source=symbols.tensor_source, trace=False)

    return [fake(value) for value in example_inputs]


def make_pre_dispatch_graph(run: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode) -> Graph:
    """Trace `run` over fakes above autograd: whole ATen ops, in-place ops in place, grad mode as nodes."""
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with enable_python_dispatcher(), mode, fx.traceback.preserve_node_meta():
            return make_fx(
                run,
                tracing_mode="real",
                pre_dispatch=True,
                _allow_non_fake_inputs=True,
                _error_on_data_dependent_ops=False,
            )(*inputs)
    finally:
        mode.allow_non_fake_inputs = allowed


def trace_body(run: Callable[..., Any], args: Sequence[Any]) -> tuple[Graph, Any]:
    """A checkpointed body inside a trace: its own graph and its fake outputs."""
    with disable_proxy_modes_tracing(), _temp_remove_pre_dispatch_torch_function_mode():
        outputs = run(*args)
    return reenter_make_fx(run)(*args), outputs


def record_call(target: Callable[..., Any], args: tuple, kwargs: dict[str, Any], outputs: Any = None) -> Any:
    """Put one opaque call into the graph being traced; submodules among `args` are registered on its root.

    outputs: the fake results; computed by running `target` untraced when None. Where nothing is traced, as
    around the bodies of checkpoints that `trace_body` runs for their outputs, the results are all there is.
    """
    if outputs is None:
        with disable_proxy_modes_tracing(), _temp_remove_pre_dispatch_torch_function_mode():
            outputs = target(*args, **kwargs)
    mode: Any = get_proxy_mode()
    if mode is None:
        return outputs
    tracer = mode.tracer

    def proxy(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            if all(value is not known for known in tracer.root.modules()):
                tracer.root.register_module(tracer.get_fresh_qualname("body_"), value)
            return value
        return tracer.unwrap_proxy(value)

    recorded = torch.utils._pytree.tree_map(proxy, (args, kwargs))
    call = tracer.create_proxy("call_function", target, *recorded)
    return track_tensor_tree(outputs, call, constant=None, tracer=tracer)


def divide_checkpoint_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of a checkpoint node: those of torch.utils.checkpoint, those of the body."""
    return TagActivationCheckpoint.divide_kwargs(kwargs)


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo got an input from, as Python: L['self']._modules['fc']._parameters['weight']."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def autocast_key(device_type: str) -> str:
    return {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}.get(device_type, f"Autocast{device_type.upper()}")


@functools.cache
def has_autocast_kernel(target: Any, device_type: str) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), autocast_key(device_type))


def inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor; forward and backward, for the same inputs that Dynamo gave.

    Inductor keeps what it compiled on disk, by the graph alone: code of an older version of ours would call
    an op's inner parts with arguments that they no longer take.
    """
    from torch._inductor.compile_fx import compile_fx

    # A word for whoever loads exported code, and otherwise a part of the key alone: of the backward pass too,
    # which is compiled in its first call.
    patches = {"aot_inductor.metadata": {"fusekit": _signatures()}}
    return compile_fx(module, list(inputs), config_patches=patches)  # type: ignore[return-value]


@functools.cache
def _signatures() -> str:
    """All of our ops' signatures, as one word."""
    found = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("fusekit::"))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


RECOMPILE_LIMIT = 64  # the default of 8 counts over all instances of a class: a ninth MLP would stay eager
_WORN_OUT = (
    "it was captured as often as Dynamo allows, and calls with yet other sizes or arguments run eagerly: "
    "optimize(model, dynamic=True) captures once for all sizes"
)


class Skipped(NamedTuple):
    """A frame that Dynamo gave up: where its code begins, the line that stopped capture, and why."""

    code: tuple[str, int]
    line: str
    reason: str


def take_graph_breaks() -> tuple[list[str], list[Skipped]]:
    """What Dynamo noted since the last call: graph breaks as "file.py:7: reason", and frames given up."""
    breaks = [
        f"{_line(b.user_stack[-1].filename, b.user_stack[-1].lineno)}: {headline(b.reason)}"
        for b in _unseen(torch._dynamo.utils.graph_break_reasons)
    ]
    skipped = [
        Skipped(
            code=(m.co_filename, m.co_firstlineno),
            line=_line(
                m.fail_user_frame_filename or m.co_filename, m.fail_user_frame_lineno or m.co_firstlineno
            ),
            reason=_WORN_OUT if "limit exceeded" in headline(m.fail_reason) else headline(m.fail_reason),
        )
        for m in _unseen(torch._dynamo.utils.get_compilation_metrics())
        if m.fail_type not in (None, "SkipFrame", "BackendCompilerFailed")  # the backend tells of those
    ]
    return breaks, skipped


_seen: dict[int, Any] = {}


def _unseen(records: Sequence[Any]) -> list[Any]:
    new = [record for record in records if id(record) not in _seen]
    _seen.update({id(record): record for record in new})  # held, so that no id is used twice
    return new


def _line(path: str | None, number: int | None) -> str:
    return f"{(path or '').replace(chr(92), '/').rsplit('/', 1)[-1]}:{number}" if path else ""


def headline(reason: str | None) -> str:
    """Dynamo's reason in one line: its title and its explanation, without hints and links."""
    lines = [line.strip() for line in (reason or "no reason given").strip().splitlines() if line.strip()]
    explanation = next((line for line in lines if line.startswith("Explanation:")), "")
    return lines[0] + (f" ({explanation.removeprefix('Explanation:').strip()})" if explanation else "")


def ensure_callbacks(start: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Have `start` and `end` called around each Dynamo compilation; torch._dynamo.reset() forgets them."""
    if start not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)


def never_trace(function: Callable[..., Any]) -> None:
    """Have Dynamo run this Python function as it is, wherever it meets it."""
    torch._dynamo.eval_frame.skip_code(function.__code__)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a hook on optimizer steps: a compiled step breaks its graph there and runs it as it is. And for
    what is called from a function that `never_trace` names, which covers none of its callees."""
    return torch.compiler.disable(function)


def active_ddp_group() -> torch.distributed.ProcessGroup | None:
    """The processes of the DistributedDataParallel module whose forward pass is running, if one is."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    module = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return None if module is None else module.process_group


def compile_call(
    model: torch.nn.Module, backend: Callable[..., Any], dynamic: bool | None
) -> Callable[..., Any]:
    """torch.compile of a module's call, with a limit on recompilations that counts for this model alone.

    torch 2.11 has one limit for the process, read before any compile callback; there it is raised for good.
    """
    call = model._call_impl
    if torch._dynamo.trace_rules.check(model.forward):
        call = wrap_inline(call)  # Dynamo enters no frame of torch's own, such as nn.Sequential.forward
    options: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    if not options.keys() <= inspect.signature(torch.compile).parameters.keys():
        options = {}
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(call, backend=backend, dynamic=dynamic, **options)


class _FiveOps(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.linear(x) * 2.0 + x).sum()


@functools.cache
def self_test() -> str | None:
    """Capture a five-op module the way fusekit captures. None, or the sentence that says what broke."""
    seen: list[str] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs = backend_inputs(example_inputs)
        graph = make_pre_dispatch_graph(fx.Interpreter(module).run, inputs, tracing_fake_mode())
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        seen.extend(source_name(node) for node in module.graph.nodes if node.op == "placeholder")
        return graph.forward

    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            # The user's random numbers are not ours to draw, and the first call may ask for no gradients.
            module, x = _FiveOps(), torch.ones(1, 2, requires_grad=True)
            torch.compile(module, backend=backend, dynamic=False)(x).backward()
        wanted = ("aten.linear.default", "aten.gelu.default", "weight")
        lost = [name for name in wanted if not any(name in text for text in seen)]
        problem = f"the captured graph lacks {', '.join(lost)}" if lost else None
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if problem is None:
        return None
    supported = "fusekit captures with torch 2.11 to 2.13"
    return f"{supported}; torch {torch.__version__} failed the start-up test ({problem})"
