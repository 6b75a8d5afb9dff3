"""Primitives of attention: reading another layer's keys, values, softmax map or input, grouping key/value heads, tying heads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import one_of
from ..builder import KV_SLOTS, PlanBuilder
from ..plan import ATTENTION, K_PROJ, Q_PROJ, V_PROJ, LayerPlan
from ..shape import divisors
from .row import OWN, Primitive, field_of, refuse, source_layer


def _apply_kv(builder: PlanBuilder, j: Any) -> None:
    own = builder.index
    j = source_layer(builder, "kv", j, builder.shape.num_hidden_layers - 1)
    layer = builder.current
    if layer.k == j == layer.v:
        return
    _require_reader(builder, "kv", j)
    if j < own and (builder.layers[j].k != j or builder.layers[j].v != j):
        k, source = builder.layers[j].k, builder.layers[j].v
        if source is None or k != source:
            raise refuse("kv", f"layer {j} does not own both its keys and its values", "use a layer that owns both")
        raise refuse("kv", f"layer {j} reads layer {source}'s KV and owns none", f"use {source}")
    if j > own and layer.window is not None:
        raise refuse("kv", f"a layer that reads layer {j}, above it, sees all earlier tokens", "leave the window out")
    builder.set_owners(KV_SLOTS, None)
    builder.change(k=j, v=j, k_heads=0, v_heads=0)
    builder.check_reading("kv")


def _require_reader(builder: PlanBuilder, name: str, j: int) -> None:
    """Raise UserError if the current layer can neither read layer j's keys or values nor, if j is itself, make its own."""
    layer = builder.current
    if not layer.has_attention:
        raise refuse(name, f"layer {builder.index} has no attention", "leave it out")
    if layer.attn_map is not None:
        raise refuse(name, f"layer {builder.index} reuses layer {layer.attn_map}'s softmax map", "leave either out")
    if j == builder.index:
        raise refuse(
            name,
            f"layer {j} is tied to a layer that has no k and v projections, so it cannot make its own KV",
            f"leave {name} out (it reads layer {layer.v}'s) or tie to a layer that owns its KV",
        )


def _one_side(side: str, slot: str, paper: str, meaning: str) -> Primitive:
    """`k_from` or `v_from`."""
    name, what = f"{side}_from", {"k": "keys", "v": "values"}[side]

    def apply(builder: PlanBuilder, j: Any) -> None:
        j = source_layer(builder, name, j)
        if getattr(builder.current, side) == j:
            return
        _require_reader(builder, name, j)
        if builder.current.reads_later_layer(builder.index):
            raise refuse(name, "this layer reads a layer above it", "leave either out")
        source = getattr(builder.layers[j], side)
        if source != j:
            hint = "leave it out" if source is None or source > j else f"use {source}"
            raise refuse(name, f"layer {j} owns no {what}", hint)
        builder.set_owners((slot,), None)
        builder.change(**{side: j, f"{side}_heads": 0})
        builder.check_reading(name)

    return Primitive(
        name,
        meaning,
        paper,
        apply,
        lambda layer, builder: j if (j := getattr(layer, side)) != builder.index else None,
        PlanBuilder.owns_kv,
        sources=True,
        resolve_source=lambda builder, j: getattr(builder.layers[j], side),
        writes=f"{side}_source factors -{side} -{side}_heads",
        short=f"{side}from",
    )


def _apply_attn_map(builder: PlanBuilder, j: Any) -> None:
    j = source_layer(builder, "attn_map", j)
    if j == builder.index:
        return
    root = builder.layers[j].attn_map
    root = j if root is None else root
    theirs, mine = builder.layers[root], builder.current
    if mine.attn_map == root:
        return
    if not theirs.has_attention or theirs.reads_later_layer(root):
        lacks = "has no attention" if not theirs.has_attention else "reads a layer above it"
        raise refuse("attn_map", f"layer {root} {lacks}, so it has no map to share", "use another layer")
    if mine.v != builder.index or (mine.attn_map is None and mine.k != builder.index):
        raise refuse("attn_map", "a layer that reuses a softmax map makes its own values and reads no keys", "leave kv out")
    if mine.heads:
        raise refuse("attn_map", f"layer {builder.index} ties single heads", "leave either out")
    if mine.attn_map is None and mine.window is not None:
        raise refuse("attn_map", f"the window is that of layer {root}'s map", "leave the window out")
    builder.set_owners((Q_PROJ, K_PROJ), None)
    builder.change(k=None, k_heads=0, attn_map=root, window=theirs.window)


def _apply_kv_input(builder: PlanBuilder, j: Any) -> None:
    j = source_layer(builder, "kv_input", j, builder.index - 1)
    j = _last_run(builder, j)
    wanted = None if j == _last_run(builder, builder.index - 1) else j
    if wanted == builder.current.kv_input:
        return
    if builder.index not in (builder.current.k, builder.current.v):
        raise refuse("kv_input", f"layer {builder.index} makes no keys or values", "leave it out")
    builder.change(kv_input=wanted)


def _last_run(builder: PlanBuilder, j: int) -> int:
    """The last layer up to j that computes something: its output is layer j's output."""
    while (
        j > 0
        and not builder.model_options.outside.step_embedding
        and not (builder.layers[j].has_attention or builder.layers[j].has_ffn)
    ):
        j -= 1
    return j


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


def _count_row(side: str, slot: str, meaning: str) -> Primitive:
    """`k_heads` or `v_heads`."""
    return Primitive(
        f"{side}_heads",
        meaning,
        "2406.06567",
        _one_count(f"{side}_heads", side, slot),
        field_of(f"{side}_heads"),
        lambda builder: getattr(builder.current, side) == builder.index and builder.owns(slot),
        options=lambda shape: [OWN, *divisors(shape.num_key_value_heads)[::-1]],
        writes=f"{side}_heads",
        short=f"{side}h{{}}",
    )


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


# fmt: off
ROWS: tuple[Primitive, ...] = (
    Primitive("kv", "reads layer j's rotated keys and its values; owns no k, v projection and no cache", "2405.12981", _apply_kv,
              lambda layer, builder: layer.v if layer.k == layer.v != builder.index else None,
              lambda builder: builder.current.has_attention, sources=True,
              resolve_source=lambda builder, j: builder.layers[j].v if j < builder.index else j,
              writes="k_source v_source factors -k -v -k_heads -v_heads"),
    _one_side("k", K_PROJ, "2405.12981", "reads layer j's rotated keys, and makes its own values"),
    _one_side("v", V_PROJ, "2410.17897", "reads layer j's values, and makes its own keys"),
    Primitive("attn_map", "reuses layer j's softmax map; has no q and k projections", "1906.11024", _apply_attn_map,
              lambda layer, builder: layer.attn_map, PlanBuilder.owns_kv, sources=True,
              writes="attn_map window factors -q -k -k_heads -k_source", short="map"),
    Primitive("kv_input", "keys and values are projected from layer j's output", "2410.03960", _apply_kv_input,
              lambda layer, builder: layer.kv_input,
              lambda builder: builder.index in (builder.current.k, builder.current.v), sources=True,
              writes="kv_input", short="kvin"),
    Primitive("kv_heads", "g key/value heads, each read by an equal group of query heads", "2305.13245", _apply_kv_heads,
              lambda layer, builder: layer.k_heads or None if layer.k_heads == layer.v_heads else None,
              lambda builder: builder.owns_kv() and builder.owns(*KV_SLOTS),
              options=lambda shape: divisors(shape.num_key_value_heads)[::-1], writes="k_heads v_heads", short="gqa{}"),
    _count_row("k", K_PROJ, "g key heads"),
    _count_row("v", V_PROJ, "g value heads"),
    Primitive("heads", "single query heads, with their slices of q, k, v and o, are heads of earlier layers", "2402.11819",
              _apply_heads, _read_heads,
              lambda builder: builder.index > 0 and _separate_heads(builder, builder.current, builder.index),
              options=lambda shape: [OWN, " ".join(f"{h}=0.{h}" for h in range(max(shape.num_attention_heads // 2, 1)))],
              writes="heads", short="heads"),
)
