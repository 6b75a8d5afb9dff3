"""Primitives that group key/value heads, or tie single heads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import one_of
from ..builder import KV_SLOTS, PlanBuilder
from ..plan import ATTENTION, K_PROJ, Q_PROJ, V_PROJ, LayerPlan
from ..shape import divisors
from .row import OWN, Primitive, field_of, has_earlier, refuse


def _one_count(name: str, side: str, slot: str) -> Callable[[PlanBuilder, Any], None]:
    """`apply` of the number of key heads or of value heads."""
    heads, what = f"{side}_heads", {"k": "keys", "v": "values"}[side]

    def apply(builder: PlanBuilder, g: Any) -> None:
        full = builder.shape.num_key_value_heads
        if isinstance(g, bool) or not isinstance(g, int) or g < 1 or full % g:
            whole = f"num_attention_heads={builder.shape.num_attention_heads}"
            message = f"{g} does not divide " + (whole if whole.endswith(f"={full}") else f"num_key_value_heads={full}")
            raise refuse(name, message, f"use {one_of(divisors(full))}")
        reads = getattr(builder.current, side)
        count = getattr(builder.layers[reads] if reads is not None and reads < builder.index else builder.current, heads)
        if count == g:
            return
        if reads != builder.index or not builder.owns(slot) or builder.current.heads:
            source = what if reads != builder.index else "attention"
            message = f"layer {builder.index} uses another layer's {source}" + (f", of {count} heads" if count else "")
            raise refuse(name, message, f"set {name} at the layer that owns it")
        builder.change(**{heads: g})

    return apply


def _apply_kv_heads(builder: PlanBuilder, g: Any) -> None:
    _one_count("kv_heads", "k", K_PROJ)(builder, g)
    _one_count("kv_heads", "v", V_PROJ)(builder, g)


_HEAD = re.compile(r"(\d+)=(\d+)\.(\d+)")


def _apply_heads(builder: PlanBuilder, text: Any) -> None:
    count, i, layer = builder.shape.num_attention_heads, builder.index, builder.current
    words = str(text).split()
    found = [_HEAD.fullmatch(word) for word in words]
    if not words or not all(found) or not all(int(m[1]) < count and int(m[3]) < count for m in found if m):
        message = f"{text!r} does not tie heads of 0 to {count - 1}"
        raise refuse("heads", message, 'write "0=1.3" for head 0 to use layer 1\'s head 3, and more after spaces')
    wanted = {int(m[1]): _head_root(builder, int(m[2]), int(m[3])) for m in found if m}
    if len(wanted) < len(words):
        raise refuse("heads", "ties a head twice", "name each head once")
    tied = dict(zip(sorted(wanted), sorted(wanted.values()), strict=True))  # which of them takes which place changes nothing
    heads = tuple(tied.get(h, (i, h)) for h in range(count))
    if heads == layer.heads:
        return
    if not _separate_heads(builder, layer, i) or layer.heads:
        message = f"layer {i} does not own all of its q, k, v and o with a key and a value head for each query head"
        raise refuse("heads", message, "leave out what shares or groups them, or leave heads out")
    if all(at != i for at, _ in heads):
        raise refuse("heads", f"no head of layer {i} is left", f"write attn: {heads[0][0]}, or leave a head its own")
    builder.change(heads=heads)


def _separate_heads(builder: PlanBuilder, layer: LayerPlan, owner: int) -> bool:
    """Whether all of an attention's matrices are layer `owner`'s, with as many key and value heads as query heads."""
    owners = {layer.owner(slot) for slot in ATTENTION}
    plain = not any(layer.factors[: len(ATTENTION)])
    return owners == {owner} and plain and layer.k_heads == layer.v_heads == builder.shape.num_attention_heads


def _head_root(builder: PlanBuilder, j: int, head: int) -> tuple[int, int]:
    """The layer and head that own what layer j uses as a head."""
    if j >= builder.index:
        raise refuse("heads", f"layer {builder.index} cannot use a head of layer {j}", "use heads of earlier layers")
    theirs = builder.layers[j]
    root = theirs.owner(Q_PROJ)
    if root is None or not _separate_heads(builder, theirs, root):
        message = f"layer {j} does not use whole heads of one layer's q, k, v and o"
        raise refuse("heads", message, "use heads of a layer that owns its attention, a key and a value head for each query head")
    return theirs.heads[head] if theirs.heads else (root, head)


def _read_heads(layer: LayerPlan, builder: PlanBuilder) -> str | None:
    if layer.owner(Q_PROJ) != builder.index or not layer.heads:
        return None
    return " ".join(f"{h}={at}.{head}" for h, (at, head) in enumerate(layer.heads) if at != builder.index)


def _read_kv_heads(layer: LayerPlan, builder: PlanBuilder) -> int | None:
    return layer.k_heads or None if layer.k_heads == layer.v_heads else None


ROWS: tuple[Primitive, ...] = (
    Primitive(
        "kv_heads",
        "g key/value heads, each read by an equal group of query heads",
        "2305.13245",
        _apply_kv_heads,
        _read_kv_heads,
        lambda builder: builder.owns_kv() and builder.owns(*KV_SLOTS),
        options=lambda shape: divisors(shape.num_key_value_heads)[::-1],
        writes="k_heads v_heads",
    ),
    Primitive(
        "k_heads",
        "g key heads",
        "2406.06567",
        _one_count("k_heads", "k", K_PROJ),
        field_of("k_heads"),
        lambda builder: builder.current.k == builder.index and builder.owns(K_PROJ),
        options=lambda shape: [OWN, *divisors(shape.num_key_value_heads)[::-1]],
        writes="k_heads",
    ),
    Primitive(
        "v_heads",
        "g value heads",
        "2406.06567",
        _one_count("v_heads", "v", V_PROJ),
        field_of("v_heads"),
        lambda builder: builder.current.v == builder.index and builder.owns(V_PROJ),
        options=lambda shape: [OWN, *divisors(shape.num_key_value_heads)[::-1]],
        writes="v_heads",
    ),
    Primitive(
        "heads",
        "single query heads, with their slices of q, k, v and o, are heads of earlier layers",
        "2402.11819",
        _apply_heads,
        _read_heads,
        lambda builder: has_earlier(builder) and _separate_heads(builder, builder.current, builder.index),
        options=lambda shape: [OWN, " ".join(f"{h}=0.{h}" for h in range(max(shape.num_attention_heads // 2, 1)))],
        writes="heads",
    ),
)
