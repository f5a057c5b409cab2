"""The state behind one optimised model: its captured graphs, what went wrong, and the call that runs them."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from fusekit.passes import _compat
from fusekit.passes.capture import Capture, CapturedRegion, Failure
from fusekit.passes.config import Config
from fusekit.passes.region import Settings
from fusekit.precision_controller import PrecisionController

Hook = Callable[["Session", tuple[Any, ...], dict[str, Any]], None]


class Session:
    """One call of `optimize`.

    regions: captured graphs in the order they were captured; train and eval, and other guards, each make one.
    failures: frames that run eagerly, with the user's line and the reason.
    graph_breaks: what split the model into several graphs, as sentences with the user's line.
    after_call: hook(session, args, kwargs) for each, after every call of the model.
    precision: of precision="auto"; None for every other.
    """

    def __init__(self, model: nn.Module, settings: Settings, config: Config) -> None:
        self._model: ReferenceType[nn.Module] = ref(model)
        self.settings = settings
        self.config = config
        self.capture = Capture(settings=settings, config=config)
        self.graph_breaks: list[str] = []
        self.after_call: list[Hook] = []
        self.precision: PrecisionController | None = None
        self._own_calls = False
        self.unsettled = True  # a call that compiled, or the first one, has not been looked at yet
        self._listening = False
        self.replaced_call: Callable[..., Any] | None = None  # what `restore` puts back

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the optimised model of this session no longer exists")
        return model

    def parameter_ids(self) -> set[int]:
        """Of the model's parameters as they are now; none once the model is gone."""
        model = self._model()
        return set() if model is None else {id(parameter) for parameter in model.parameters()}

    @property
    def regions(self) -> list[CapturedRegion]:
        return self.capture.regions

    @property
    def failures(self) -> list[Failure]:
        return self.capture.failures

    @contextlib.contextmanager
    def own_calls(self) -> Iterator[None]:
        """The model is called by fusekit itself, not trained: nothing is sampled, decided or remembered."""
        before, self._own_calls = self._own_calls, True
        scales = self.settings.scales
        try:
            with contextlib.nullcontext() if scales is None else scales.pause():
                yield
        finally:
            self._own_calls = before

    @property
    def training_precision(self) -> PrecisionController | None:
        return None if self._own_calls else self.precision

    def listen(self) -> None:
        """Before a compilation of ours: what Dynamo noted until now belongs to others."""
        if not self._listening:
            _compat.take_graph_breaks()
        self._listening = self.unsettled = True

    def may_be_worn_out(self) -> bool:
        """Whether Dynamo may have met its limit of captures: of that it calls nobody back."""
        return len(self.regions) >= _compat.RECOMPILE_LIMIT

    def settle(self) -> None:
        """After a call that compiled: note graph breaks, warn about frames Dynamo gave up, apply `strict`."""
        heard = self._listening or self.may_be_worn_out()
        breaks, skipped = _compat.take_graph_breaks() if heard else ([], [])
        self._listening = self.unsettled = False
        self.graph_breaks += [text for text in breaks if text not in self.graph_breaks]
        forwards = {_forward(type(module)) for module in self.model.modules()}
        for frame in skipped:
            _given_up.update({forward: frame for forward in forwards if forward.called == frame.code})
        # What a whole graph has inlined is no frame, whatever became of it elsewhere.
        broken = self.graph_breaks or skipped or not self.regions or _forward(type(self.model)) in _given_up
        known = [_given_up[forward] for forward in forwards & _given_up.keys()] if broken else []
        for frame in [*skipped, *known]:
            self.capture.fail(frame.line, frame.reason)
        if self.settings.strict:
            self._insist()

    def _insist(self) -> None:
        problems = [f"{f.location}: not captured: {f.reason}" for f in self.failures]
        for captured in self.regions:
            refusals = [r for r in captured.region.refusals if r.op not in UNFUSED_BY_CHOICE]
            problems += [f"{r.location}: {r.op} left unfused: {r.reason}" for r in refusals]
        if problems:
            raise UnfusedError("strict=True, and fusekit left work unfused:\n  " + "\n  ".join(problems))


# What these are made of are bare products, which strict leaves to the library one by one as well.
UNFUSED_BY_CHOICE = frozenset({"qkv_linear", "linear_fp8", "attention_fp8"})


class _Forward(NamedTuple):
    """Where a forward is written: the code that is called, and the one inside its decorators.

    Classes with one decorator call one code: that Dynamo gave it up around one says nothing of another.
    """

    called: tuple[str, int]
    written: tuple[str, int]


# Dynamo gives a piece of code up once for the whole process and says nothing the next time.
_given_up: dict[_Forward, _compat.Skipped] = {}


def _forward(kind: type[nn.Module]) -> _Forward:
    return _Forward(_code(kind.forward), _code(inspect.unwrap(kind.forward)))


def _code(function: Any) -> tuple[str, int]:
    code = getattr(function, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)


class UnfusedError(RuntimeError):
    """strict=True, and a frame was not captured or a site not fused."""


SESSIONS: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


def session(model: nn.Module) -> Session:
    """The session of an optimised model.

    Raises:
        ValueError: the model was never optimised, or was restored, or is a copy of an optimised one.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"this takes a model that fusekit.optimize returned, and got a {type(model).__name__}"
        )
    found = SESSIONS.get(model)
    if found is None:
        raise ValueError(
            f"this {type(model).__name__} is not optimised (a copy of an optimised model is a plain model): "
            "call fusekit.optimize(model) first"
        )
    return found


def auto_precision(model: nn.Module) -> PrecisionController:
    """The controller of a model that `optimize` gave precision="auto" or a plan.

    Raises:
        ValueError: the model is not optimised, or has one precision for all.
    """
    opened = session(model)
    if opened.precision is None:
        raise ValueError(
            f"this model was optimised with precision={opened.settings.precision!r}, which decides nothing: "
            'use precision="auto", an AutoPrecision or a PrecisionPlan'
        )
    return opened.precision


class OptimisedCall:
    """Stands in a module's compiled-call slot: runs Dynamo's callable with this session current."""

    def __init__(self, session: Session, compiled: Callable[..., Any]) -> None:
        self._session, self._compiled = session, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        precision = self._enter()
        try:
            output = self._compiled(*args, **kwargs)
        except (
            _compat.InternalTorchDynamoError
        ) as error:  # Dynamo's own bug must not stop the user's training
            self._session.capture.fail("", _compat.headline(str(error)))
            self._compiled = self._session.model._call_impl
            output = self._compiled(*args, **kwargs)
        finally:
            _current.sessions.pop()
        self._leave(precision, args, kwargs)
        return output

    @_compat.untraced
    def _enter(self) -> PrecisionController | None:
        precision = self._session.training_precision
        if precision is not None:
            precision.before_call()
        _current.sessions.append(self._session)
        _compat.ensure_callbacks(_on_compile_start, _on_compile_end)
        return precision

    @_compat.untraced
    def _leave(
        self, precision: PrecisionController | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._session.unsettled or self._session.may_be_worn_out():
            self._session.settle()
        if precision is not None:
            precision.after_call()
        for hook in self._session.after_call:
            hook(self._session, args, kwargs)


# A torch.compile around the model, or a parent that was optimised too, must not trace our bookkeeping.
_compat.never_trace(OptimisedCall.__call__)


class _Current(threading.local):
    """The sessions whose models are running on this thread, innermost last."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.settings: list[contextlib.AbstractContextManager[None]] = []


_current = _Current()


def _on_compile_start(_: Any) -> None:
    if not _current.sessions:
        return  # somebody else's torch.compile
    _current.sessions[-1].listen()
    settings = _compat.dynamo_settings()
    settings.__enter__()
    _current.settings.append(settings)


def _on_compile_end(_: Any) -> None:
    if _current.settings:
        _current.settings.pop().__exit__(None, None, None)
