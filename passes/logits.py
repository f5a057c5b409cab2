"""keep_logits=False: a model's logits leave its result, so that head and loss may become one op.

Every Hugging Face model returns its logits beside the loss, and what is returned has to exist. The caller's
promise to read only the loss takes them out of the graph's outputs, where a cross entropy of the same graph
reads the same head; in their place comes an `UnreadLogits`, which answers any use with a sentence. A graph
without a loss keeps its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import fx

from fusekit.passes.region import Region
from fusekit.passes.spelling import spell

_HEADS = ("linear", "addmm", "matmul")
_PASSED_ON = ("to", "reshape", "contiguous", "alias", "clone")


class UnreadLogits:
    """Stands for logits that were never computed; any use raises ValueError."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            "fusekit: these logits were not kept: optimize(keep_logits=False) promised that only the loss is "
            "read. Call fusekit.optimize with keep_logits=True, or the model without labels"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and others probe for these
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls()._refuse()

    __getitem__ = __len__ = __iter__ = __bool__ = __float__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __neg__ = (
        _refuse
    )

    def __repr__(self) -> str:
        return "<logits not kept: optimize(keep_logits=False)>"


def drop_logits(region: Region) -> None:
    """Take logits that a loss of the same graph reads out of the graph's outputs, as promised."""
    if region.settings.keep_logits:
        return
    graph = region.module.graph
    heads = {_head(n.args[0]) for n in graph.nodes if spell(n).name == "cross_entropy_loss"} - {None}
    output = graph.output_node()
    results: Any = output.args[0]
    if not heads or not isinstance(results, (tuple, list)):
        return
    region.unread = tuple(i for i, result in enumerate(results) if _head(result) in heads)
    output.args = (tuple(None if i in region.unread else r for i, r in enumerate(results)),)
    for i in region.unread:
        node = results[i]
        while not node.users and spell(node).name in _PASSED_ON:
            node, erased = node.args[0], node
            graph.erase_node(erased)
    graph.lint()
    region.module.recompile()


def mark_unread(results: Any, unread: Sequence[int]) -> Any:
    """A graph's results with an UnreadLogits in each of the places."""
    if not unread:
        return results
    return [UnreadLogits() if i in unread else result for i, result in enumerate(results)]


def _head(node: Any) -> fx.Node | None:
    """The product whose result this is, if nothing but casts and shapes lies between."""
    while isinstance(node, fx.Node) and spell(node).name in _PASSED_ON:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and spell(node).name in _HEADS else None
