"""The weights of a model that may have delayed scales, by name, and the Parameters behind the names."""

from __future__ import annotations

from weakref import ReferenceType, ref

from torch import Tensor, nn


class NamedWeights:
    """The matrices among a model's Parameters; a weight is its place in `names`.

    A Parameter may be replaced, and FSDP2 has two of a name, one that layers run with and one that optimizers
    update: all that were met stay known while they live.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self.names = [name for name, p in model.named_parameters() if p.ndim == 2]
        self._met: dict[int, tuple[ReferenceType[Tensor], int]] = {}
        self.find()

    def find(self) -> None:
        """Look who has the names now."""
        model = self._model()
        named = {} if model is None else dict(model.named_parameters())
        alive = {key: known for key, known in self._met.items() if known[0]() is not None}
        self._met = alive | {
            id(named[name]): (ref(named[name]), i) for i, name in enumerate(self.names) if name in named
        }

    def index(self, weight: Tensor) -> int | None:
        known = self._met.get(id(weight))
        if known is None or known[0]() is not weight:
            self.find()
            known = self._met.get(id(weight))
        return None if known is None else known[1]

    def met(self) -> list[list[Tensor]]:
        """The Parameters that each name has or had."""
        found: list[list[Tensor]] = [[] for _ in self.names]
        for reference, i in self._met.values():
            if (weight := reference()) is not None:
                found[i].append(weight)
        return found
