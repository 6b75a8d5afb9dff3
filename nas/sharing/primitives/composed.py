"""Primitives that say what a layer's own parts are made of: an FFN's width and experts, values mixed with the first layer's,
matrices composed from shared banks, and low-rank deltas.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ...errors import one_of
from ..builder import PlanBuilder
from ..plan import ATTENTION, FFN, MATRICES, ROUTER, Factor, LayerPlan, Shapes, corrected, short, slot_shape
from ..shape import ModelShape, divisors
from .row import OWN, Primitive, field_of, owner_of, refuse, source_layer, whole_number

# --- the FFN


def _require_own_ffn(builder: PlanBuilder, name: str) -> None:
    if not builder.owns(*FFN):
        what = "another layer's FFN" if builder.current.has_ffn else "no FFN"
        raise refuse(name, f"layer {builder.index} uses {what}", f"set {name} at the layer that owns it")


def _apply_intermediate(builder: PlanBuilder, n: Any) -> None:
    if whole_number("intermediate", n, 1) == builder.current.width:
        return
    _require_own_ffn(builder, "intermediate")
    builder.change(width=n)


def _apply_experts(builder: PlanBuilder, n: Any) -> None:
    if whole_number("experts", n, 2) == builder.current.experts:
        return
    _require_own_ffn(builder, "experts")
    if builder.current.width % n:
        message = f"{n} experts do not divide the FFN's width of {builder.current.width}"
        raise refuse("experts", message, f"use {one_of([d for d in divisors(builder.current.width) if 1 < d <= 16] or [1])}")
    builder.set_owners((ROUTER,), builder.index)
    builder.change(experts=n, active_experts=2)


def _apply_active_experts(builder: PlanBuilder, k: Any) -> None:
    if whole_number("active_experts", k, 1) == builder.current.active_experts:
        return
    _require_own_ffn(builder, "active_experts")
    if k > builder.current.experts:
        message = f"{k} of {builder.current.experts} experts cannot be run"
        raise refuse("active_experts", message, "set experts to as many or more")
    builder.change(active_experts=k)


def _apply_router(builder: PlanBuilder, j: Any) -> None:
    j = source_layer(builder, "router", j)
    mine, theirs = builder.current.experts, builder.current.experts if j == builder.index else builder.layers[j].experts
    if not mine or mine != theirs:
        message = f"layer {builder.index} chooses between {mine} experts and layer {j} between {theirs}"
        raise refuse("router", message, "share a router between FFNs of as many experts")
    builder.set_owners((ROUTER,), j if j == builder.index else builder.layers[j].owner(ROUTER))


def _routers(shape: ModelShape, i: int, n: Any) -> Shapes:
    """A router for the layer, and for each later layer, which may use its FFN with a router of its own."""
    for j in range(i, shape.num_hidden_layers):
        yield f"layers.{j}.{ROUTER}.weight", (n, shape.hidden_size)


def _width_parameters(shape: ModelShape, i: int, n: Any) -> Shapes:
    wide = replace(PlanBuilder(shape).owning(), width=n)
    for slot in FFN:
        yield f"layers.{i}.{slot}.weight", slot_shape(shape, wide, slot)


# --- values, matrices and deltas


def _apply_value_residual(builder: PlanBuilder, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise refuse("value_residual", f"{share!r} is not a share of the first layer's values", "use a number such as 0.5")
    layer, name = builder.current, "value_residual"
    if builder.index == 0 or layer.v != builder.index:
        lacks = "is the first" if builder.index == 0 else "makes no values of its own"
        raise refuse(name, f"layer {builder.index} {lacks}", "leave it out")
    first = builder.layers[0]
    if first.v != 0 or first.v_heads != layer.v_heads:
        message = f"layer 0 makes values of {first.v_heads} heads, and layer {builder.index} of {layer.v_heads}"
        raise refuse(name, message, "give both as many heads, and let layer 0 own its values")
    builder.change(value_residual=float(share))


_FACTOR = re.compile(r"(dictionary|basis) (\d+) at (\d+) for ([a-z ]+?)(?: using ([\d ]+))?")
_SHORT = {slot.rpartition(".")[2].removesuffix("_proj"): slot for slot in MATRICES}


@lru_cache
def _read_factor_text(text: str) -> list[tuple[Factor, str]]:
    """The factors in a text and the slots they are for. Raises UserError."""
    found: list[tuple[Factor, str]] = []
    for part in text.split(";"):
        match = _FACTOR.fullmatch(" ".join(part.split()))
        if not match or not match[4].split() or not all(word in _SHORT for word in match[4].split()):
            hint = 'write "dictionary 4 at 0 for q k v o", or "basis 16 at 0 for gate up"'
            raise refuse("factor", f"{text!r} does not say how matrices are composed", hint)
        kind, size, at = match[1], int(match[2]), int(match[3])
        used = tuple(sorted(set(map(int, match[5].split())))) if match[5] else tuple(range(size))
        if not size or (kind == "basis" and match[5]) or not all(n < size for n in used):
            message = f"{part.strip()!r} uses what is not there" if size else f"{part.strip()!r} is empty"
            raise refuse("factor", message, f"use atoms 0 to {size - 1} of a dictionary" if size else "use a size of 1 or more")
        factor = Factor(kind, at, size, used if kind == "dictionary" else ())
        found += [(factor, _SHORT[word]) for word in match[4].split()]
    if len({slot for _, slot in found}) < len(found):
        raise refuse("factor", f"{text!r} composes a matrix twice", "name each matrix once")
    return found


def _apply_factor(builder: PlanBuilder, text: Any) -> None:
    factors = list(builder.current.factors)
    for factor, slot in _read_factor_text(str(text)):
        n = MATRICES.index(slot)
        if factors[n] == factor:
            continue
        _check_factor(builder, factor, slot)
        factors[n] = factor
    builder.change(factors=tuple(factors))


def _check_factor(builder: PlanBuilder, factor: Factor, slot: str) -> None:
    """Raise UserError if the current layer's matrix in a slot cannot be composed so."""
    i, name = builder.index, slot.rpartition(".")[2]
    if not builder.owns(slot):
        what = "no" if builder.current.owner(slot) is None else "another layer's"
        raise refuse("factor", f"layer {i} uses {what} {name}", "compose only matrices that the layer owns")
    if slot in ATTENTION and builder.current.heads:
        raise refuse("factor", f"layer {i} ties single heads", "leave either out")
    size = slot_shape(builder.shape, builder.current, slot)
    if factor.kind == "basis" and factor.size > min(size):
        raise refuse("factor", f"rank {factor.size} is more than {name} of {size[0]} by {size[1]} has", f"use up to {min(size)}")
    source_layer(builder, "factor", factor.at)
    if factor.at < i:
        theirs = builder.layers[factor.at]
        kept = theirs.factors[MATRICES.index(slot)]
        if theirs.owner(slot) != factor.at or kept is None or replace(kept, used=()) != replace(factor, used=()):
            message = f"layer {factor.at} keeps no {factor.kind} of {factor.size} for {name}"
            raise refuse("factor", message, f"begin one at layer {factor.at}, or write at {i}")
        if slot_shape(builder.shape, theirs, slot) != size:
            raise refuse("factor", f"{name} has another shape at layer {factor.at}", "give both the same heads and width")


def _read_factor(layer: LayerPlan, builder: PlanBuilder) -> str | None:
    """The canonical text: matrices in the order of `MATRICES`, those composed alike together."""
    groups: dict[Factor, list[str]] = {}
    for name, (slot, factor) in zip(_SHORT, zip(MATRICES, layer.factors, strict=True), strict=True):
        if factor is not None and layer.owner(slot) == builder.index:
            groups.setdefault(factor, []).append(name)
    return "; ".join(_spell(factor, names) for factor, names in groups.items()) or None


def _spell(factor: Factor, names: list[str]) -> str:
    text = f"{factor.kind} {factor.size} at {factor.at} for {' '.join(names)}"
    some = factor.kind == "dictionary" and len(factor.used) < factor.size
    return text + (f" using {' '.join(map(str, factor.used))}" if some else "")


def _factor_parameters(shape: ModelShape, i: int, text: Any) -> Shapes:
    full = PlanBuilder(shape).owning()
    for factor, slot in _read_factor_text(str(text)):
        rows, columns = slot_shape(shape, full, slot)
        stem = short(slot)
        if factor.kind == "dictionary":
            yield f"layers.{factor.at}.{stem}_atoms.weight", (factor.size, rows, columns)
            yield f"layers.{i}.{stem}_mix.weight", (len(factor.used),)
        else:
            yield f"layers.{factor.at}.{stem}_basis.weight", (factor.size, columns)
            yield f"layers.{i}.{stem}_coef.weight", (rows, factor.size)


def _apply_delta(builder: PlanBuilder, r: Any) -> None:
    whole_number("delta", r, 1)
    builder.change(delta=r)
    if not corrected(builder.index, builder.current):
        raise refuse("delta", f"layer {builder.index} uses no other layer's matrix", "tie something, or leave delta out")


def _delta_parameters(shape: ModelShape, i: int, r: Any) -> Shapes:
    full = PlanBuilder(shape).owning()
    for slot in MATRICES:
        rows, columns = slot_shape(shape, full, slot)
        yield f"layers.{i}.{short(slot)}_delta_a.weight", (r, columns)
        yield f"layers.{i}.{short(slot)}_delta_b.weight", (rows, r)


# fmt: off
ROWS: tuple[Primitive, ...] = (
    Primitive("intermediate", "the width of an owned FFN", "2309.01826", _apply_intermediate,
              lambda layer, builder: layer.width or None, lambda builder: builder.owns(*FFN),
              options=lambda shape: [shape.intermediate_size // n for n in (1, 2, 4) if shape.intermediate_size >= n],
              supernet_parameters=_width_parameters, writes="width", short="w{}"),
    Primitive("experts", "an owned FFN is n equal experts, of which a router chooses", "2310.10837", _apply_experts,
              field_of("experts"), lambda builder: builder.owns(*FFN),
              options=lambda shape: [OWN, *(n for n in (2, 4, 8) if shape.intermediate_size % n == 0)],
              supernet_parameters=_routers, writes="router experts active_experts", short="moe{}"),
    Primitive("active_experts", "how many experts run for a token, 2 by default", "2310.10837", _apply_active_experts,
              field_of("active_experts"), lambda builder: builder.owns(*FFN) and builder.current.experts > 1,
              options=lambda shape: [2, 1], writes="active_experts", short="top{}"),
    Primitive("router", "the router is layer j's", "2405.16039", _apply_router, owner_of(ROUTER),
              lambda builder: builder.current.experts > 1, sources=True, writes="router"),
    Primitive("value_residual", "own values become a mix of them and the first layer's, this share of it", "2410.17897",
              _apply_value_residual, field_of("value_residual"),
              lambda builder: 0 < builder.index == builder.current.v, options=lambda shape: [OWN, 0.5],
              writes="value_residual", short="vres"),
    Primitive("factor",
              "matrices are composed from a bank of atoms or a basis that layers share, and coefficients of the layer's own",
              "2508.04581", _apply_factor, _read_factor, lambda builder: any(builder.owns(slot) for slot in MATRICES),
              options=lambda shape: [
                  OWN, "dictionary 2 at 0 for q k v o", f"basis {max(shape.hidden_size // 4, 1)} at 0 for gate up",
              ],
              supernet_parameters=_factor_parameters, writes="factors", short="factor"),
    Primitive("delta", "a correction of rank r, the layer's own, on every matrix that is another layer's", "2410.20672",
              _apply_delta, field_of("delta"),
              lambda builder: any(builder.current.owner(slot) not in (None, builder.index) for slot in MATRICES),
              options=lambda shape: [OWN, max(shape.hidden_size // 16, 1)], supernet_parameters=_delta_parameters, writes="delta",
              short="delta{}"),
)
