"""Autocast made visible: what it would cast is cast by nodes, and the graph then runs with autocast off.

Under autocast a captured graph holds `linear(float32, float32) -> bfloat16`: the casts happen below, in the
dispatcher, where no rule sees them and where a fused op would be handed uncast values. Which casts an op gets
is not looked up in a table but observed: it runs on its fake inputs with autocast on and off, and the extra
casts are its autocast. An op that casts other things than its arguments (einsum: views) keeps autocast.

Casts of parameters are shared within one autocast region, as autocast's weight cache shares them; casts of
activations are not: sharing one would sum its gradients in the low precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fusekit.passes import _compat
from fusekit.passes.canonicalise import call_checkpoint
from fusekit.passes.region import Region

aten = torch.ops.aten


def materialise_autocast(region: Region) -> None:
    """Insert aten.to.dtype where autocast casts, around the call and inside the model, and drop its nodes."""
    ambient: dict[str, torch.dtype] = region.module.meta.get("autocast", {})
    walk = _Walk([_State(device, dtype, True, True) for device, dtype in ambient.items()])
    walk.visit(region.module)
    region.module.meta["autocast_off"] = tuple(ambient)


@dataclass(frozen=True)
class _State:
    """One `torch.autocast(device, dtype, enabled, cache_enabled)`."""

    device: str
    dtype: torch.dtype
    enabled: bool
    cache: bool


@dataclass
class _Walk:
    """A traversal in execution order, carrying the autocast and grad modes that hold at each node."""

    states: list[_State]
    decisions: dict[Any, _Casts | None] = field(default_factory=dict)
    grad_enabled: bool = True
    outermost: int = 0  # numbers the autocast regions: leaving the outermost one empties autocast's cache
    shared: dict[Any, fx.Node] = field(default_factory=dict)

    def visit(self, module: fx.GraphModule) -> None:
        markers: list[fx.Node] = []
        self.shared, shared = {}, self.shared
        for node in list(module.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in (_compat.enter_autocast, _compat.exit_autocast):
                self._mark(node)
                markers.append(node)
            elif node.target is _compat.set_grad_enabled:
                self.grad_enabled = node.args[0]
            elif node.target is call_checkpoint:
                self.visit(getattr(module, node.args[0].target))
            else:
                self._visit_call(node)
        for node in reversed(markers):
            module.graph.erase_node(node)
        self.shared = shared
        module.recompile()

    def _mark(self, node: fx.Node) -> None:
        if node.target is _compat.exit_autocast:
            self.states.pop()
            self.outermost += not self.states
        else:
            self.states.append(_State(*node.args))  # type: ignore[arg-type]

    def _visit_call(self, node: fx.Node) -> None:
        state = self._state_for(node)
        if state is None:
            return
        if not state.enabled:
            node.meta["full_precision"] = True  # the user wrote autocast(enabled=False) around it
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            if isinstance(node.target, _compat.HigherOrderOperator):
                node.target = UnderAutocast(node.target, state)
            return
        key = _signature(node, state)
        if key not in self.decisions:
            self.decisions[key] = observe(node, state)
        casts = self.decisions[key]
        if casts is None:
            node.target = UnderAutocast(node.target, state)
        else:
            self._insert(node, casts, state)

    def _state_for(self, node: fx.Node) -> _State | None:
        """The innermost autocast for the node's device."""
        devices = {
            v.device.type for v in tree_leaves(_values((node.args, node.kwargs))) if isinstance(v, Tensor)
        }
        opaque = isinstance(node.target, _compat.HigherOrderOperator)
        for state in reversed(self.states):
            if state.device in devices or opaque:
                return state
        return None

    def _insert(self, node: fx.Node, casts: _Casts, state: _State) -> None:
        leaves, spec = tree_flatten((node.args, node.kwargs))
        for position, dtype in casts.arguments:
            leaves[position] = self._cast(node, leaves[position], dtype, state)
        node.args, node.kwargs = tree_unflatten(leaves, spec)
        if casts.dtype is not None:
            node.kwargs = {**node.kwargs, "dtype": casts.dtype}

    def _cast(self, user: fx.Node, source: fx.Node, dtype: torch.dtype, state: _State) -> fx.Node:
        cacheable = state.cache and dtype == state.dtype and source.op == "placeholder"
        key = (source, dtype, self.outermost, self.grad_enabled)
        if cacheable and source.meta.get("parameter") and key in self.shared:
            return self.shared[key]
        with user.graph.inserting_before(user):
            cast = user.graph.call_function(aten.to.dtype, (source, dtype))
        cast.meta = {k: v for k, v in user.meta.items() if k in ("stack_trace", "nn_module_stack")}
        with _fake_mode(source.meta["val"]):
            cast.meta["val"] = source.meta["val"].to(dtype)
        self.shared[key] = cast
        return cast


class UnderAutocast:
    """A graph node's target that must run with autocast on, because its casts happen inside it."""

    def __init__(self, target: Callable[..., Any], state: _State) -> None:
        self._target, self._state = target, state
        self.__name__ = f"autocast_{getattr(target, '__name__', 'call')}".replace(".", "_")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self._state
        with torch.amp.autocast(state.device, dtype=state.dtype, cache_enabled=state.cache):
            return self._target(*args, **kwargs)


@dataclass(frozen=True)
class _Casts:
    """Positions among an op's flattened arguments, the dtype each is cast to, and the op's own dtype=."""

    arguments: tuple[tuple[int, torch.dtype], ...] = ()
    dtype: torch.dtype | None = None


def observe(node: fx.Node, state: _State) -> _Casts | None:
    """What autocast does to this op, as casts of its arguments; None where it cannot be put that way."""
    target: Any = node.target
    unpredictable = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(target.tags)
    if target._schema.is_mutable or unpredictable:
        return None if _compat.has_autocast_kernel(target, state.device) else _Casts()
    if target.namespace not in ("aten", "prims", "fusekit") and not _compat.has_autocast_kernel(
        target, state.device
    ):
        return None  # a custom op's body may autocast what it calls
    args, kwargs = _values((node.args, node.kwargs))
    results, seen = _run(target, args, kwargs, state, enabled=True)
    if target.overloadpacket in _CONVERSIONS:
        return _Casts()
    runs_without = not seen or _one_float_dtype((args, kwargs))
    if runs_without and (results, seen) == _run(target, args, kwargs, state, enabled=False):
        return _Casts()  # no casts, or those that the op makes by itself
    if any(position is None for position, _ in seen):
        return None
    return _reproduce(target, args, kwargs, state, tuple(seen), results)


def _reproduce(target: Any, args: Any, kwargs: Any, state: _State, casts: Any, results: Any) -> _Casts | None:
    """Casts that, made beforehand, give the op the results it has under autocast without any cast inside."""
    leaves, spec = tree_flatten((args, kwargs))
    with _fake_mode(*leaves):
        for position, dtype in casts:
            leaves[position] = leaves[position].to(dtype)
    args, kwargs = tree_unflatten(leaves, spec)
    if _run(target, args, kwargs, state, enabled=False) == (results, []):
        return _Casts(casts)
    if "dtype" in {argument.name for argument in target._schema.arguments} and not kwargs.get("dtype"):
        kwargs = {**kwargs, "dtype": torch.float32}  # what autocast gives softmax and sum in place of a cast
        if _run(target, args, kwargs, state, enabled=False) == (results, []):
            return _Casts(casts, torch.float32)
    return None


_CONVERSIONS = {aten.to, aten._to_copy, aten.type_as}


def _one_float_dtype(values: Any) -> bool:
    return len({v.dtype for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()}) <= 1


class _CastSpy(_compat.TorchDispatchMode):
    """Notes every dtype conversion that happens below, by the position of the argument converted."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        super().__init__()
        self._positions = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self.casts: list[tuple[Any, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and kwargs.get("dtype") not in (None, args[0].dtype):
            self.casts.append((self._positions.get(id(args[0])), kwargs["dtype"]))
        return func(*args, **kwargs)


def _run(target: Any, args: Any, kwargs: Any, state: _State, *, enabled: bool) -> tuple[Any, list[Any]]:
    """The dtypes of an op's results on fakes, and the casts seen on the way."""
    leaves = tree_leaves((args, kwargs))
    spy = _CastSpy(leaves)
    before = torch.is_autocast_enabled(state.device), torch.get_autocast_dtype(state.device)
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_enabled(state.device, enabled)
        torch.set_autocast_dtype(state.device, state.dtype)
        torch.set_autocast_cache_enabled(False)  # a cached cast is a cast not seen
        with _fake_mode(*leaves), spy, torch.no_grad():
            result = target(*args, **kwargs)
    finally:
        torch.set_autocast_enabled(state.device, before[0])
        torch.set_autocast_dtype(state.device, before[1])
        torch.set_autocast_cache_enabled(cached)
    return [v.dtype if isinstance(v, Tensor) else None for v in tree_leaves(result)], spy.casts


def _fake_mode(*values: Any) -> Any:
    return next(v.fake_mode for v in values if isinstance(v, _compat.FakeTensor))


def _values(nodes: Any) -> Any:
    return tree_map(lambda a: a.meta.get("val") if isinstance(a, fx.Node) else a, nodes)


def _signature(node: fx.Node, state: _State) -> Any:
    """What the decision depends on: dtypes and devices, the op's own dtype argument; never sizes."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.device.type, value.dim()
        return value if isinstance(value, torch.dtype | str | bool | None) else type(value)

    leaves, spec = tree_flatten(_values((node.args, node.kwargs)))
    return node.target, state, tuple(map(describe, leaves)), str(spec)
