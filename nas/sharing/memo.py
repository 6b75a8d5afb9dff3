"""`LayerMemo`: what a function of a builder's current layer gave, found again where it would give the same.

Owns the watch over what such a function reads of earlier layers, so that no primitive has to say it. Most layers of a config were
seen in other configs, with the same options and the same sources.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from types import FunctionType
from typing import Any, Generic, TypeVar

from .builder import PlanBuilder
from .plan import LayerPlan

T = TypeVar("T")
MOST = 1 << 16  # results, after which a memo begins anew


class LayerMemo(Generic[T]):
    """Results by a key, the layer's number, whether an earlier layer reads it, and what was read of earlier layers.

    A key has to name all else that the function depends on, such as the builder's shape and model options.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, _Read | T] = {}
        self._count = 0

    def __call__(self, builder: PlanBuilder, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` returns for the builder's next layer, which is not yet begun. The builder's layers stay as they are,
        also where it raises."""
        layers = builder.layers
        key = len(layers), builder.is_read_from_below(), key
        at = self._found.get(key)
        while type(at) is _Read:
            at = at.found.get(getattr(layers[at.layer], at.field))
        return self._compute(builder, key, compute) if at is None else at  # type: ignore[return-value]

    def _compute(self, builder: PlanBuilder, key: Hashable, compute: Callable[[], T]) -> T:
        if self._count == MOST:
            self._found, self._count = {}, 0
        layers, table = builder.layers, self._found
        watched = builder.layers = _Watched(layers)
        try:
            builder.start_layer()
            result = compute()
        finally:
            builder.layers = layers
        for layer, field in watched.read:
            read = table.setdefault(key, _Read(layer, field))
            assert type(read) is _Read
            table, key = read.found, getattr(layers[layer], field)
        table[key] = result
        self._count += 1
        return result


class _Read:
    """Where a result depends on a field of a layer: what is `found` next, by the field's values."""

    def __init__(self, layer: int, field: str) -> None:
        self.layer, self.field = layer, field
        self.found: dict[Hashable, Any] = {}


class _Seen:
    """A layer of which it is noted what is looked at, once; it cannot be compared as a whole."""

    __hash__ = __eq__ = None  # type: ignore[assignment]

    def __init__(self, number: int, layer: LayerPlan, read: dict[tuple[int, str], None]) -> None:
        self._layer = number, layer, read

    def __getattr__(self, name: str) -> Any:
        number, layer, read = self._layer
        read[number, name] = None
        value = vars(self)[name] = getattr(layer, name)
        return value


for _name, _function in vars(LayerPlan).items():
    if isinstance(_function, FunctionType | property) and not _name.startswith("__"):
        setattr(_Seen, _name, _function)  # which looks at fields through what notes them


class _Watched(list[Any]):
    """The layers before the current one; `read` are the fields that were looked at, in this order."""

    def __init__(self, layers: list[LayerPlan]) -> None:
        super().__init__(layers)
        self._known, self.read = len(layers), dict[tuple[int, str], None]()

    def __getitem__(self, j: Any) -> Any:
        if isinstance(j, slice):
            return [self[n] for n in range(len(self))[j]]
        layer, n = super().__getitem__(j), j % len(self)
        if n < self._known and type(layer) is LayerPlan:
            layer = self[n] = _Seen(n, layer, self.read)
        return layer

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])
