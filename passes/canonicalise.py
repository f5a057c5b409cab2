"""Dynamo's graph to pre-dispatch ATen: one spelling per op, still differentiable, nothing functionalised.

The result computes what the user's Python computed, bit for bit: the same random numbers in the same order,
in-place ops in place, buffers updated, autograd recorded anew by every run. Every node has meta["val"]
(a FakeTensor, a number, or a tuple of them); placeholders also have

    meta["source"]         where Dynamo got the input, "L['self']._modules['fc']._parameters['weight']"
    meta["parameter"]      it is an nn.Parameter
    meta["requires_grad"]  as it was when captured; of a checkpoint's body too

and the graph has meta["autocast"], the autocast around the call.

Higher-order operators are never traced through: that drops a user's autograd.Function.backward, and runs
activation checkpoints without checkpointing (torch 2.11) or with wrong random numbers (2.13).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fusekit.passes import _compat
from fusekit.passes.gradient import needs_gradient


def canonicalise(module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Rewrite a graph from Dynamo; call it inside a Dynamo backend.

    Args:
        module: torch-level graph as Dynamo gives it to a backend; left as it was.
        example_inputs: the backend's second argument. Not kept.

    Raises:
        Whatever the trace raises: the caller decides what to fall back to.
    """
    grad_enabled = torch.is_grad_enabled()
    interpreter = _Canonicaliser(module, torch.is_autocast_cache_enabled())
    try:
        inputs = _compat.backend_inputs(example_inputs)
        graph = _compat.make_pre_dispatch_graph(interpreter.run, inputs, _compat.tracing_fake_mode())
    finally:
        torch.set_grad_enabled(grad_enabled)  # grad-mode regions really ran during the trace
    _describe_placeholders(module, graph, example_inputs)
    complete_meta(graph, _compat.tracing_fake_mode())
    _describe_bodies(graph)
    graph.meta["autocast"] = ambient_autocast()
    return graph


def ambient_autocast() -> dict[str, torch.dtype]:
    """The device types under autocast where the frame was called, with the dtype each lowers to."""
    return {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}


def call_checkpoint(body: Any, *args: Any, **kwargs: Any) -> Any:
    """What a checkpoint node runs: a real non-reentrant checkpoint, which replays random numbers."""
    options, body_kwargs = _compat.divide_checkpoint_kwargs(kwargs)
    options["use_reentrant"] = False
    context_fn = body.meta.get("_checkpoint_context_fn")
    if context_fn is not None:
        options["context_fn"] = context_fn  # the user's selective checkpointing policy
    return checkpoint(body, *args, **options, **body_kwargs)


def require_gradient(x: Tensor) -> Tensor:
    """What x.requires_grad_() runs as in a graph; what reads x from there on reads the result."""
    return x.requires_grad_()


def bodies(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph and the bodies of its checkpoints, outermost first: what a pass loops over."""
    found = [module]
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is call_checkpoint:
            found += bodies(getattr(module, node.args[0].target))
    return found


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph and checkpoint bodies can be changed; tensors and other submodules are shared."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, values))
    (old,), (new,) = module.graph.find_nodes(op="output"), graph.find_nodes(op="output")
    new.meta = dict(old.meta)
    copied = fx.GraphModule(module, graph)
    copied.meta.update(module.meta)
    for node in graph.find_nodes(op="call_function", target=call_checkpoint):
        setattr(copied, node.args[0].target, copy_graph(getattr(module, node.args[0].target)))
    return copied


# How Dynamo names the model that it was given: L['self'], L['args'][0], L['fn'].__self__, L__self__.
_ROOT = re.compile(r"^((L\[[^\]]*\](\[\d+\])*|L?__self__|self)(\.|$))+|^L__self___")


def location(node: fx.Node) -> str:
    """The user's line that made this node, "model.py:42"; else the module, "layers.0 (Linear)"; else "".

    Lines of torch itself are passed over, because a layer's call is more useful to a user than its inside.
    """
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    lines = [line.strip() for line in trace.splitlines() if line.lstrip().startswith("File ")]
    for line in reversed(lines):
        path, number = line.removeprefix("File ").split(", line ", 1)
        path = path.strip('"').replace("\\", "/")
        if "/torch/" not in path:
            return f"{path.rsplit('/', 1)[-1]}:{number.split(',')[0]}"
    for path, kind in reversed((node.meta.get("nn_module_stack") or {}).values()):
        return f"{_ROOT.sub('', str(path))} ({getattr(kind, '__name__', kind)})"
    return ""


class _Canonicaliser(fx.Interpreter):
    """Runs Dynamo's graph under the tracer: what is entered, what is recorded whole, what is traced."""

    def __init__(self, module: fx.GraphModule, cache_autocast: bool) -> None:
        super().__init__(module)
        self._cache_autocast = cache_autocast
        self._autocasts: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        with fx.traceback.set_current_meta(n):  # new nodes inherit the user's stack trace
            try:
                return super().run_node(n)
            except Exception as error:
                if not hasattr(error, "fusekit_node"):
                    error.fusekit_node = n  # type: ignore[attr-defined]  # so that a warning can name the line
                raise

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _compat.enter_autocast:
            return self._enter_autocast(*args)
        if target is _compat.exit_autocast:
            return self._autocasts.pop().__exit__(None, None, None)
        if target is _compat.tag_activation_checkpoint:
            return self._checkpoint(args[0], args[1:], kwargs)
        if isinstance(target, _compat.HigherOrderOperator):
            return _compat.record_call(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "requires_grad_" and (args[1:] or (True,))[0]:
            return _compat.record_call(require_gradient, args[:1], {}, args[0])
        return super().call_method(target, args, kwargs)

    def _enter_autocast(self, device: str, dtype: Any, enabled: bool, cache: bool | None) -> Any:
        # Entering records the node as well; a node recorded without entering leaves wrong dtypes after it.
        cache = self._cache_autocast if cache is None else cache  # the tracer turns the cache off for itself
        self._autocasts.append(torch.amp.autocast(device, dtype, enabled, cache))
        return self._autocasts[-1].__enter__()

    def _checkpoint(self, body: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def run(*inputs: Any) -> Any:
            return _Canonicaliser(body, self._cache_autocast).run(*inputs)

        canonical, outputs = _compat.trace_body(run, args)
        context_fn = body.meta.get("_checkpoint_context_fn")
        if context_fn is not None:
            canonical.meta["_checkpoint_context_fn"] = context_fn
        return _compat.record_call(call_checkpoint, (canonical, *args), kwargs, outputs)


def _describe_placeholders(dynamo: fx.GraphModule, graph: fx.GraphModule, values: Sequence[Any]) -> None:
    originals, nodes = (g.graph.find_nodes(op="placeholder") for g in (dynamo, graph))
    for original, node, value in zip(originals, nodes, values, strict=True):
        node._rename(original.name)
        node.target = node.name
        node.meta["source"] = _compat.source_name(original)
        node.meta["parameter"] = isinstance(value, torch.nn.Parameter)
        node.meta["requires_grad"] = isinstance(value, Tensor) and value.requires_grad
    graph.recompile()


def _describe_bodies(graph: fx.GraphModule) -> None:
    """Of a checkpoint's inputs nothing else tells whether a gradient is wanted: tables made under no_grad are
    no learned ones."""
    for module in bodies(graph):
        for call in module.graph.find_nodes(op="call_function", target=call_checkpoint):
            inputs = getattr(module, call.args[0].target).graph.find_nodes(op="placeholder")
            for outside, own in zip(call.args[1:], inputs, strict=False):
                own.meta["requires_grad"] = isinstance(outside, fx.Node) and needs_gradient(outside)


def complete_meta(graph: fx.GraphModule, mode: Any) -> None:
    """Give constants their meta["val"]: the tracer records none for tensors that the graph itself holds."""
    for body in bodies(graph):
        for node in body.graph.find_nodes(op="get_attr"):
            value = _attribute(body, node.target)
            if isinstance(value, Tensor) and "val" not in node.meta:
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
            for key, default in (("source", ""), ("parameter", False), ("requires_grad", False)):
                node.meta.setdefault(key, default)


def _attribute(module: torch.nn.Module, path: Any) -> Any:
    value: Any = module
    for name in str(path).split("."):
        value = getattr(value, name)
    return value
