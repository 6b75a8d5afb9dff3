"""Whose keys, values and softmax maps a layer reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..builder import KV_SLOTS, Draft
from ..plan import K_PROJ, Q_PROJ, V_PROJ, LayerPlan
from .row import Primitive, above, refuse, source_layer


def _apply_kv(draft: Draft, j: Any) -> None:
    own = draft.index
    j = source_layer(draft, "kv", j, draft.shape.num_hidden_layers - 1)
    layer = draft.current
    if layer.k == j == layer.v:
        return
    _require_reader(draft, "kv", j)
    if j == own:
        return
    if j < own and (draft.layers[j].k != j or draft.layers[j].v != j):
        k, source = draft.layers[j].k, draft.layers[j].v
        if source is None or k != source:
            raise refuse("kv", f"layer {j} does not own both its keys and its values", "use a layer that owns both")
        raise refuse("kv", f"layer {j} reads layer {source}'s KV and owns none", f"use {source}")
    if j > own and layer.window is not None:
        raise refuse("kv", f"a layer that reads layer {j}, above it, sees all earlier tokens", "leave the window out")
    draft.set_owners(KV_SLOTS, None)
    draft.change(k=j, v=j, k_heads=0, v_heads=0)
    draft.check_reading("kv")


def _require_reader(draft: Draft, name: str, j: int) -> None:
    """Raise UserError if the current layer cannot read layer j's keys or values, or make its own if j is itself."""
    layer = draft.current
    if not layer.attends:
        raise refuse(name, f"layer {draft.index} has no attention", "leave it out")
    if layer.attn_map is not None:
        raise refuse(name, f"layer {draft.index} reuses layer {layer.attn_map}'s softmax map", "leave either out")
    if j == draft.index:
        raise refuse(
            name,
            f"layer {j} is tied to a layer that has no k and v projections, so it cannot make its own KV",
            f"leave {name} out (it reads layer {layer.v}'s) or tie to a layer that owns its KV",
        )


def _one_side(side: str, slot: str) -> Callable[[Draft, Any], None]:
    """How `k_from` or `v_from` is applied."""
    name, what = f"{side}_from", {"k": "keys", "v": "values"}[side]

    def apply(draft: Draft, j: Any) -> None:
        j = source_layer(draft, name, j)
        if getattr(draft.current, side) == j:
            return
        _require_reader(draft, name, j)
        if draft.current.cyclic(draft.index):
            raise refuse(name, "this layer reads a layer above it", "leave either out")
        source = getattr(draft.layers[j], side)
        if source != j:
            remedy = "leave it out" if source is None or source > j else f"use {source}"
            raise refuse(name, f"layer {j} owns no {what}", remedy)
        draft.set_owners((slot,), None)
        draft.change(**{side: j, f"{side}_heads": 0})
        draft.check_reading(name)

    return apply


def _apply_attn_map(draft: Draft, j: Any) -> None:
    j = source_layer(draft, "attn_map", j)
    if j == draft.index:
        return
    root = draft.layers[j].attn_map
    root = j if root is None else root
    theirs, mine = draft.layers[root], draft.current
    if mine.attn_map == root:
        return
    if not theirs.attends or theirs.cyclic(root):
        lacks = "has no attention" if not theirs.attends else "reads a layer above it"
        raise refuse("attn_map", f"layer {root} {lacks}, so it has no map to lend", "use another layer")
    if mine.v != draft.index or (mine.attn_map is None and mine.k != draft.index):
        raise refuse("attn_map", "a layer that reuses a softmax map makes its own values and reads no keys", "leave kv out")
    if mine.heads:
        raise refuse("attn_map", f"layer {draft.index} ties single heads", "leave either out")
    if mine.attn_map is None and mine.window is not None:
        raise refuse("attn_map", f"the window is that of layer {root}'s map", "leave the window out")
    draft.set_owners((Q_PROJ, K_PROJ), None)
    draft.change(k=None, k_heads=0, attn_map=root, window=theirs.window)


def _apply_kv_input(draft: Draft, j: Any) -> None:
    j = source_layer(draft, "kv_input", j, draft.index - 1)
    j = _last_run(draft, j)
    wanted = None if j == _last_run(draft, draft.index - 1) else j
    if wanted == draft.current.kv_input:
        return
    if draft.index not in (draft.current.k, draft.current.v):
        raise refuse("kv_input", f"layer {draft.index} makes no keys or values", "leave it out")
    draft.change(kv_input=wanted)


def _last_run(draft: Draft, j: int) -> int:
    """The layer whose output is layer j's: an earlier one where layer j runs nothing."""
    while j > 0 and not draft.whole.outside.step_embedding and not (draft.layers[j].attends or draft.layers[j].feeds):
        j -= 1
    return j


def _read_kv(layer: LayerPlan, draft: Draft) -> int | None:
    return layer.v if layer.k == layer.v != draft.index else None


ROWS: tuple[Primitive, ...] = (
    Primitive(
        "kv",
        "reads layer j's rotated keys and its values; owns no k, v projection and no cache",
        "2405.12981",
        _apply_kv,
        _read_kv,
        lambda draft: above(draft) and draft.current.attends,
        sources=True,
        root=lambda draft, j: draft.layers[j].v if j < draft.index else j,
        changes="k_source v_source factors -k -v -k_heads -v_heads",
    ),
    Primitive(
        "k_from",
        "reads layer j's rotated keys, and makes its own values",
        "2405.12981",
        _one_side("k", K_PROJ),
        lambda layer, draft: layer.k if layer.k != draft.index else None,
        lambda draft: above(draft) and draft.own_kv(),
        sources=True,
        root=lambda draft, j: draft.layers[j].k,
        changes="k_source factors -k -k_heads",
    ),
    Primitive(
        "v_from",
        "reads layer j's values, and makes its own keys",
        "2410.17897",
        _one_side("v", V_PROJ),
        lambda layer, draft: layer.v if layer.v != draft.index else None,
        lambda draft: above(draft) and draft.own_kv(),
        sources=True,
        root=lambda draft, j: draft.layers[j].v,
        changes="v_source factors -v -v_heads",
    ),
    Primitive(
        "attn_map",
        "reuses layer j's softmax map; has no q and k projections",
        "1906.11024",
        _apply_attn_map,
        lambda layer, draft: layer.attn_map,
        lambda draft: above(draft) and draft.own_kv(),
        sources=True,
        changes="attn_map window factors -q -k -k_heads -k_source",
    ),
    Primitive(
        "kv_input",
        "keys and values are projected from layer j's output",
        "2410.03960",
        _apply_kv_input,
        lambda layer, draft: layer.kv_input,
        lambda draft: above(draft) and draft.index in (draft.current.k, draft.current.v),
        sources=True,
        changes="kv_input",
    ),
)
