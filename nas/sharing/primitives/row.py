"""What a row of the table is (`Primitive`), and what the rules of several rows say alike.

Owns the parts of a layer's plan that a row may change (`ENTRIES`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ..builder import ModelOptions, PlanBuilder
from ..plan import GATE_PROJ, K_PROJ, O_PROJ, Q_PROJ, ROUTER, V_PROJ, LayerPlan, Shapes
from ..shape import ModelShape

OWN = "own"
"""The option by which a layer keeps what it has by itself."""


ATTENTION_ENTRIES = "q k v o k_source v_source k_heads v_heads attn_map heads window factors"
FFN_ENTRIES = "ffn router width experts active_experts factors"
_SLOT_OF = {"q": Q_PROJ, "k": K_PROJ, "v": V_PROJ, "o": O_PROJ, "ffn": GATE_PROJ, "router": ROUTER}
ENTRIES = (*dict.fromkeys(f"{ATTENTION_ENTRIES} {FFN_ENTRIES}".split()), "kv_input", "value_residual", "delta")
"""What a layer's plan is made of, apart from norms, which follow from it."""


def entry(layer: LayerPlan, name: str) -> Any:
    """One of `ENTRIES` of a plan: a slot's owner, the source of keys or values, or a field by its own name."""
    if name in _SLOT_OF:
        return layer.owner(_SLOT_OF[name])
    return getattr(layer, name.removesuffix("_source"))


def _no_weights(shape: ModelShape, i: int, value: Any) -> Shapes:
    return iter(())


@dataclass(frozen=True)
class Primitive:
    """One row of the zoo: how a choice is read, applied, recognised and searched.

    `apply(builder, value)` changes the builder or raises UserError, and changes nothing where the builder already is so.
    `read(layer, builder)` is the value that a plan shows for the builder's layer, None for nothing; where the rows before already
    say it, it is not said again. `is_available(builder)` says whether a search may ask for it at the builder's layer, and
    `options(shape)` from what by default. `sources` tells a choice between layers, and `root(builder, j)` is the layer that
    source j stands for. `changes` names what of a layer's plan the row may set (see `entry`), after a minus what it may only
    clear. `bank(shape, i, value)` are the weights that a supernet keeps for a value, beyond a dense model's. A `whole` row
    is decided once for the model, and `from_options` reads it.
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
    supernet_parameters: Callable[[ModelShape, int, Any], Shapes] = _no_weights
    per_model: bool = False
    from_options: Callable[[ModelOptions], Any] = lambda whole: None


def refuse(name: str, message: str, hint: str) -> UserError:
    """The error of a choice called `name` that cannot be made."""
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
    """How a value is read that a plan has as a field of its own: zero is nothing."""
    return lambda layer, builder: getattr(layer, name) or None


def owner_of(slot: str) -> Callable[[LayerPlan, PlanBuilder], Any]:
    """How it is read whose matrix is in a slot."""
    return lambda layer, builder: layer.owner(slot)


def above(builder: PlanBuilder) -> bool:
    """Whether there are layers before the builder's."""
    return builder.index > 0
