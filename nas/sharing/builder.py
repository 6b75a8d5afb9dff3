"""A plan in the making: layer after layer, each decided primitive by primitive.

Owns `PlanBuilder` and what must hold of every finished layer. What a primitive changes in it is `nas.primitives`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    Factor,
    LayerPlan,
    Plan,
)
from .shape import ModelShape


@dataclass(frozen=True)
class ModelOptions:
    """What is decided once for the whole model: whether tied layers share norms too, and what is outside the layers."""

    norms: str
    outside: EmbeddingPlan


@dataclass
class PlanBuilder:
    """The layers below are finished, `current` is the one being decided."""

    shape: ModelShape
    whole: ModelOptions = field(default=None)  # type: ignore[assignment]
    layers: list[LayerPlan] = field(default_factory=list)
    current: LayerPlan = field(init=False)

    def __post_init__(self) -> None:
        if self.whole is None:
            self.whole = ModelOptions("private", EmbeddingPlan(self.shape.tie_word_embeddings))
        self.start()

    @property
    def index(self) -> int:
        """The layer being decided."""
        return len(self.layers)

    @staticmethod
    def after(shape: ModelShape, whole: ModelOptions, layers: Sequence[LayerPlan]) -> PlanBuilder:
        """A builder whose first layers are finished."""
        return PlanBuilder(shape, whole, list(layers))

    def start(self) -> None:
        """Begin the next layer, as one that owns everything."""
        self.current = self.owning()

    def owning(self) -> LayerPlan:
        """The current layer's plan if it owns everything."""
        return _owning(self.shape, self.index)

    def finish(self) -> None:
        """Put the current layer down and begin the next. Raises UserError if a layer below relies on what it has not."""
        self._check_readers()
        self.layers.append(self.settled())
        self.start()

    def settled(self) -> LayerPlan:
        """The current layer's plan with its norms: where they are tied, a layer whose whole attention (or FFN) is another's uses
        that one's norm too."""
        if self.whole.norms == "private":
            return self.current
        owners = dict(zip(SLOTS, self.current.owners, strict=True))
        for norm, slots in ((ATTENTION_NORM, ATTENTION), (FFN_NORM, FFN)):
            lender = self.current.lender(slots)
            owners[norm] = owners[norm] if lender is None else lender
        return replace(self.current, owners=tuple(owners.values()))

    def plan(self) -> Plan:
        """The finished plan."""
        assert self.index == self.shape.num_hidden_layers
        return Plan(tuple(self.layers), self.whole.outside)

    def copy(self) -> PlanBuilder:
        """An independent builder; the finished layers are frozen and shared."""
        other = PlanBuilder(self.shape, self.whole, list(self.layers))
        other.current = self.current
        return other

    def change(self, **fields: Any) -> None:
        """Replace fields of the current layer's plan; as `dataclasses.replace`, which is too slow here: walks do little
        else."""
        plan = object.__new__(LayerPlan)
        vars(plan).update(vars(self.current), **fields)
        self.current = plan

    def set_owners(self, slots: Sequence[str], owner: int | None) -> None:
        """Who owns the weights that the current layer uses in some slots; their factors go."""
        owners, factors = list(self.current.owners), list(self.current.factors)
        for slot in slots:
            n = SLOTS.index(slot)
            owners[n] = owner
            if n < len(factors):
                factors[n] = None
        self.change(owners=tuple(owners), factors=tuple(factors))

    def take(self, j: int, slots: Sequence[str]) -> None:
        """The matrices that layer j uses in some slots, with their factors, for the current layer; its own, if it is j."""
        theirs, owners, factors = self.of(j), list(self.current.owners), list(self.current.factors)
        for slot in slots:
            n = SLOTS.index(slot)
            owners[n], factors[n] = theirs.owners[n], theirs.factors[n]
        self.change(owners=tuple(owners), factors=tuple(factors))

    def of(self, j: int) -> LayerPlan:
        """Layer j's plan: a finished one's, or what the current layer has by itself."""
        return self.layers[j] if j < self.index else self.owning()

    def own(self, *slots: str) -> bool:
        """Whether the current layer owns its weights in these slots."""
        return all(self.current.owner(slot) == self.index for slot in slots)

    def own_kv(self) -> bool:
        """Whether the current layer keeps its own keys and values."""
        return self.current.k == self.index == self.current.v

    def own_attention(self) -> bool:
        """Whether the current layer owns all projections of its attention."""
        return self.own(*ATTENTION)

    def own_ffn(self) -> bool:
        """Whether the current layer owns its FFN."""
        return self.own(*FFN)

    def factor(self, slot: str) -> Factor | None:
        """How the current layer's matrix in a slot is composed."""
        return self.current.factors[MATRICES.index(slot)]

    def _check_readers(self) -> None:
        readers = [i for i, layer in enumerate(self.layers) if self.index in (layer.k, layer.v)]
        if not readers:
            return
        message = f"layer {readers[0]} reads the keys and values of layer {self.index}"
        if not self.own_kv():
            hint = f"let layer {self.index} own them: no tie to a reader, kv, k_from, v_from, attn_map or drop there"
            raise UserError(f"{message}, which makes none", where="", hint=hint)
        if self.current.window is not None:
            raise UserError(f"{message}, which holds a window of them only", where="window", hint="leave the window out")

    def check_reading(self, name: str) -> None:
        """Raise UserError, naming a primitive, if the layer looks further back than what it reads is kept."""
        layer = self.current
        for j in {layer.k, layer.v} - {self.index, None}:
            held = self.layers[j].window if j is not None and j < self.index else None
            if held is not None and (layer.window is None or layer.window > held):
                reach = "all tokens" if layer.window is None else f"{layer.window} tokens"
                message = f"attends to {reach}, and layer {j}, whose keys or values it reads, keeps {held}"
                raise UserError(message, where=name, hint=f"use window: {held} or less here, or none at layer {j}")


@lru_cache
def _owning(shape: ModelShape, i: int) -> LayerPlan:
    heads = shape.num_key_value_heads
    return LayerPlan((*[i] * len(MATRICES), None, i, i), i, i, heads, heads, shape.intermediate_size)


KV_SLOTS = (K_PROJ, V_PROJ)
