"""Primitives of the FFN: width, experts, and the router."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import one_of
from ..builder import PlanBuilder
from ..plan import FFN, ROUTER, Shapes, slot_shape
from ..shape import ModelShape, divisors
from .row import OWN, Primitive, field_of, has_earlier, owner_of, refuse, source_layer, whole_number


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
              lambda builder: has_earlier(builder) and builder.current.experts > 1, sources=True, writes="router"),
)
