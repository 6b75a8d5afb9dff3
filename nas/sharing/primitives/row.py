"""`Primitive`, a row of the table of primitives, and helpers that several rows use.

Owns the entries of a layer's plan that a row may change (`ENTRIES`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ...errors import UserError
from ..builder import ModelOptions, PlanBuilder
from ..plan import GATE_PROJ, K_PROJ, O_PROJ, Q_PROJ, ROUTER, V_PROJ, LayerPlan, Shapes
from ..shape import ModelShape

OWN = "own"  # the option by which a layer keeps what it has by itself

ATTENTION_ENTRIES = "q k v o k_source v_source k_heads v_heads attn_map heads window factors"
FFN_ENTRIES = "ffn router width experts active_experts factors"
_SLOT_OF = {"q": Q_PROJ, "k": K_PROJ, "v": V_PROJ, "o": O_PROJ, "ffn": GATE_PROJ, "router": ROUTER}
_FIELD_OF = {f"{f.name}_source" if f.name in _SLOT_OF else f.name: f.name for f in fields(LayerPlan) if f.name != "owners"}
ENTRIES = (*_SLOT_OF, *_FIELD_OF)
"""The parts of a layer's plan, without norms, which follow from the rest: owners of weights, and the plan's other fields."""


def entry(layer: LayerPlan, name: str) -> Any:
    """One of `ENTRIES` of a plan."""
    return layer.owner(_SLOT_OF[name]) if name in _SLOT_OF else getattr(layer, _FIELD_OF[name])


@dataclass(frozen=True)
class Primitive:
    """One way to share: how a value is applied to a plan, read back from it, and searched.

    apply: `apply(builder, value)` changes the builder's current layer (or model options) or raises UserError. It changes nothing
        where the builder already has the value.
    from_plan: `from_plan(layer, builder)` is the value that a plan has for the builder's layer, None for none. Values that the
        rows before imply are dropped later.
    is_available: whether a search may decide it at the builder's current layer, which is not the first if the value is a layer.
    options: the default options of a search space.
    writes: the `ENTRIES` that the row may set, and after a minus those that it may only clear.
    sources: whether the value is a layer; `resolve_source(builder, j)` is then the layer that source j stands for.
    supernet_parameters: `(shape, i, value)` gives name and shape of the weights that a supernet needs beyond a dense model's.
    per_model: whether it is decided once for the model; `from_options` then reads its value.
    short: its word in a config's label, with `{}` where the value stands; by default its name, and the value if that is no layer.
    """

    name: str
    meaning: str
    paper: str
    apply: Callable[[PlanBuilder, Any], None]
    from_plan: Callable[[LayerPlan, PlanBuilder], Any] = lambda layer, builder: None
    is_available: Callable[[PlanBuilder], bool] = lambda builder: True
    options: Callable[[ModelShape], list[Any]] = lambda shape: []
    writes: str = ""
    sources: bool = False
    resolve_source: Callable[[PlanBuilder, int], int | None] = lambda builder, j: j
    supernet_parameters: Callable[[ModelShape, int, Any], Shapes] = lambda shape, i, value: iter(())
    per_model: bool = False
    from_options: Callable[[ModelOptions], Any] = lambda options: None
    short: str = ""


def refuse(name: str, message: str, hint: str) -> UserError:
    """The error of a primitive's value that cannot be applied."""
    return UserError(message, where=name, hint=hint)


def whole_number(name: str, value: Any, least: int) -> int:
    """The value, if it is a whole number of `least` or more. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refuse(name, f"{value!r} is not a number of {least} or more", f"use a whole number, such as {max(least, 4)}")
    return value


def source_layer(builder: PlanBuilder, name: str, j: Any, highest: int | None = None) -> int:
    """Layer j, if it may be a source: an earlier one, or the layer itself; up to `highest`, if given. Raises UserError."""
    if isinstance(j, bool) or not isinstance(j, int):
        raise refuse(name, f"{j!r} is not a layer", "give the number of an earlier layer")
    if not 0 <= j <= (builder.index if highest is None else highest):
        earlier = ("leave it out: layer 0 owns its parts", "use layer 0")
        hint = earlier[builder.index] if builder.index < 2 else f"use an earlier layer, 0 to {builder.index - 1}"
        raise refuse(name, f"layer {builder.index} cannot use layer {j}", hint)
    return j


def field_of(name: str) -> Callable[[LayerPlan, PlanBuilder], Any]:
    """`from_plan` of a value that is a field of the plan; zero means none."""
    return lambda layer, builder: getattr(layer, name) or None


def owner_of(slot: str) -> Callable[[LayerPlan, PlanBuilder], Any]:
    """`from_plan` of the owner of a slot's matrix."""
    return lambda layer, builder: layer.owner(slot)
