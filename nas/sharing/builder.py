"""`PlanBuilder`: a plan under construction, decided layer by layer and primitive by primitive.

Owns what must hold of every committed layer. How a primitive changes a layer is defined in `nas.sharing.primitives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UserError
from .plan import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    K_PROJ,
    MATRICES,
    SLOTS,
    V_PROJ,
    EmbeddingPlan,
    LayerPlan,
    Plan,
)
from .shape import ModelShape

KV_SLOTS = (K_PROJ, V_PROJ)


@dataclass(frozen=True)
class ModelOptions:
    """What is decided once for the whole model: whether tied layers share their norms, and the embeddings."""

    norms: str
    outside: EmbeddingPlan


class PlanBuilder:
    """The committed `layers`, the plan of the layer being decided (`current`), and the options of the whole model."""

    def __init__(self, shape: ModelShape, model_options: ModelOptions | None = None, layers: Sequence[LayerPlan] = ()) -> None:
        self.shape = shape
        self.model_options = model_options or ModelOptions("private", EmbeddingPlan(shape.tie_word_embeddings))
        self.layers = list(layers)
        self._readers: dict[int, int] = {}
        self._scanned = 0
        self.start_layer()

    @property
    def index(self) -> int:
        return len(self.layers)

    def start_layer(self) -> None:
        """Reset the current layer to one that owns everything."""
        self.current = self.owning()

    def owning(self) -> LayerPlan:
        """The current layer's plan if it owns everything."""
        return _owning(self.shape, self.index)

    def commit_layer(self) -> None:
        """Append the current layer and start the next. Raises UserError if an earlier layer reads what this one has not."""
        self._check_readers()
        self.layers.append(self.with_norms())
        self.start_layer()

    def with_norms(self) -> LayerPlan:
        """The current layer's plan with the owners of its norms.

        With tied norms, a layer whose whole attention (or FFN) is another layer's uses that layer's norm too.
        """
        if self.model_options.norms == "private":
            return self.current
        owners = dict(zip(SLOTS, self.current.owners, strict=True))
        for norm, slots in ((ATTENTION_NORM, ATTENTION), (FFN_NORM, FFN)):
            source = self.current.source_of(slots)
            owners[norm] = owners[norm] if source is None else source
        return _changed(self.current, owners=tuple(owners.values()))

    def plan(self) -> Plan:
        assert self.index == self.shape.num_hidden_layers
        return Plan(tuple(self.layers), self.model_options.outside)

    def change(self, **fields: Any) -> None:
        """Replace fields of the current layer's plan."""
        self.current = _changed(self.current, **fields)

    def set_owners(self, slots: Sequence[str], owner: int | None) -> None:
        """Set the owner of the weights that the current layer uses in some slots; their factors are removed."""
        owners, factors = list(self.current.owners), list(self.current.factors)
        for slot in slots:
            n = SLOTS.index(slot)
            owners[n] = owner
            if n < len(factors):
                factors[n] = None
        self.change(owners=tuple(owners), factors=tuple(factors))

    def copy_from(self, j: int, slots: Sequence[str]) -> None:
        """Use the matrices that layer j uses in some slots, with their factors; the current layer's own if it is j."""
        theirs, owners, factors = self.plan_of(j), list(self.current.owners), list(self.current.factors)
        for slot in slots:
            n = SLOTS.index(slot)
            owners[n], factors[n] = theirs.owners[n], theirs.factors[n]
        self.change(owners=tuple(owners), factors=tuple(factors))

    def plan_of(self, j: int) -> LayerPlan:
        """Layer j's plan: a committed one, or the current layer as it starts."""
        return self.layers[j] if j < self.index else self.owning()

    def owns(self, *slots: str) -> bool:
        """Whether the current layer owns its weights in these slots."""
        owners, index = self.current.owners, len(self.layers)
        return all(owners[SLOTS.index(slot)] == index for slot in slots)

    def owns_kv(self) -> bool:
        return self.current.k == self.index == self.current.v

    def is_read_from_below(self) -> bool:
        """Whether an earlier layer reads the keys or values of the current one."""
        return self._reader() is not None

    def _reader(self) -> int | None:
        """The first layer that reads the keys or values of the current one from below."""
        count = len(self.layers)
        for i in range(self._scanned, count):
            layer = self.layers[i]
            for j in (layer.k, layer.v):
                if j is not None and j > i:
                    self._readers.setdefault(j, i)
        self._scanned = count
        return self._readers.get(count)

    def _check_readers(self) -> None:
        reader = self._reader()
        if reader is None:
            return
        message = f"layer {reader} reads the keys and values of layer {self.index}"
        if not self.owns_kv():
            hint = f"let layer {self.index} own them: no tie to a reader, kv, k_from, v_from, attn_map or drop there"
            raise UserError(f"{message}, which makes none", hint=hint)
        if self.current.window is not None:
            raise UserError(f"{message}, which holds a window of them only", where="window", hint="leave the window out")

    def check_reading(self, name: str) -> None:
        """Raise UserError, naming a primitive, if the layer attends further back than the layer it reads keeps keys or values."""
        layer = self.current
        for j in {layer.k, layer.v} - {self.index, None}:
            held = self.layers[j].window if j is not None and j < self.index else None
            if held is not None and (layer.window is None or layer.window > held):
                reach = "all tokens" if layer.window is None else f"{layer.window} tokens"
                message = f"attends to {reach}, and layer {j}, whose keys or values it reads, keeps {held}"
                raise UserError(message, where=name, hint=f"use window: {held} or less here, or none at layer {j}")


def _changed(layer: LayerPlan, **fields: Any) -> LayerPlan:
    """A plan with other fields. Searches spend most of their time here, and `dataclasses.replace` is too slow."""
    plan = object.__new__(LayerPlan)
    vars(plan).update(vars(layer), **fields)
    return plan


@lru_cache
def _owning(shape: ModelShape, i: int) -> LayerPlan:
    heads = shape.num_key_value_heads
    return LayerPlan((*[i] * len(MATRICES), None, i, i), i, i, heads, heads, shape.intermediate_size)
