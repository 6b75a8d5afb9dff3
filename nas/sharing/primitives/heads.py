"""How many heads a layer has, and which are another's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import one_of
from ..builder import KV_SLOTS, Draft
from ..plan import ATTENTION, K_PROJ, Q_PROJ, V_PROJ, LayerPlan
from ..shape import divisors
from .row import OWN, Primitive, above, field_of, refuse


def _one_count(name: str, side: str, slot: str) -> Callable[[Draft, Any], None]:
    """How the number of key or of value heads is applied."""
    heads, what = f"{side}_heads", {"k": "keys", "v": "values"}[side]

    def apply(draft: Draft, g: Any) -> None:
        full = draft.shape.num_key_value_heads
        if isinstance(g, bool) or not isinstance(g, int) or g < 1 or full % g:
            whole = f"num_attention_heads={draft.shape.num_attention_heads}"
            rule = f"{g} does not divide " + (whole if whole.endswith(f"={full}") else f"num_key_value_heads={full}")
            raise refuse(name, rule, f"use {one_of(divisors(full))}")
        reads = getattr(draft.current, side)
        count = getattr(draft.layers[reads] if reads is not None and reads < draft.index else draft.current, heads)
        if count == g:
            return
        if reads != draft.index or not draft.own(slot) or draft.current.heads:
            source = what if reads != draft.index else "attention"
            rule = f"layer {draft.index} uses another layer's {source}" + (f", of {count} heads" if count else "")
            raise refuse(name, rule, f"set {name} at the layer that owns it")
        draft.change(**{heads: g})

    return apply


def _apply_kv_heads(draft: Draft, g: Any) -> None:
    _one_count("kv_heads", "k", K_PROJ)(draft, g)
    _one_count("kv_heads", "v", V_PROJ)(draft, g)


_HEAD = re.compile(r"(\d+)=(\d+)\.(\d+)")


def _apply_heads(draft: Draft, text: Any) -> None:
    count, i, layer = draft.shape.num_attention_heads, draft.index, draft.current
    words = str(text).split()
    found = [_HEAD.fullmatch(word) for word in words]
    if not words or not all(found) or not all(int(m[1]) < count and int(m[3]) < count for m in found if m):
        rule = f"{text!r} does not tie heads of 0 to {count - 1}"
        raise refuse("heads", rule, 'write "0=1.3" for head 0 to use layer 1\'s head 3, and more after spaces')
    wanted = {int(m[1]): _head_root(draft, int(m[2]), int(m[3])) for m in found if m}
    if len(wanted) < len(words):
        raise refuse("heads", "ties a head twice", "name each head once")
    tied = dict(zip(sorted(wanted), sorted(wanted.values()), strict=True))  # which of them takes which place changes nothing
    heads = tuple(tied.get(h, (i, h)) for h in range(count))
    if heads == layer.heads:
        return
    if not _separate_heads(draft, layer, i) or layer.heads:
        rule = f"layer {i} does not own all of its q, k, v and o with a key and a value head for each query head"
        raise refuse("heads", rule, "leave out what shares or groups them, or leave heads out")
    if all(at != i for at, _ in heads):
        raise refuse("heads", f"no head of layer {i} is left", f"write attn: {heads[0][0]}, or leave a head its own")
    draft.change(heads=heads)


def _separate_heads(draft: Draft, layer: LayerPlan, owner: int) -> bool:
    """Whether all of an attention's matrices are layer `owner`'s, with as many key and value heads as query heads."""
    owners = {layer.owner(slot) for slot in ATTENTION}
    plain = not any(layer.factors[: len(ATTENTION)])
    return owners == {owner} and plain and layer.k_heads == layer.v_heads == draft.shape.num_attention_heads


def _head_root(draft: Draft, j: int, head: int) -> tuple[int, int]:
    """The layer and head that own what layer j uses as a head."""
    if j >= draft.index:
        raise refuse("heads", f"layer {draft.index} cannot use a head of layer {j}", "use heads of earlier layers")
    theirs = draft.layers[j]
    root = theirs.owner(Q_PROJ)
    if root is None or not _separate_heads(draft, theirs, root):
        rule = f"layer {j} does not use whole heads of one layer's q, k, v and o"
        raise refuse("heads", rule, "use heads of a layer that owns its attention, a key and a value head for each query head")
    return theirs.heads[head] if theirs.heads else (root, head)


def _read_heads(layer: LayerPlan, draft: Draft) -> str | None:
    if layer.owner(Q_PROJ) != draft.index or not layer.heads:
        return None
    return " ".join(f"{h}={at}.{head}" for h, (at, head) in enumerate(layer.heads) if at != draft.index)


def _read_kv_heads(layer: LayerPlan, draft: Draft) -> int | None:
    return layer.k_heads or None if layer.k_heads == layer.v_heads else None


ROWS: tuple[Primitive, ...] = (
    Primitive(
        "kv_heads",
        "g key/value heads, each read by an equal group of query heads",
        "2305.13245",
        _apply_kv_heads,
        _read_kv_heads,
        lambda draft: draft.own_kv() and draft.own(*KV_SLOTS),
        options=lambda shape: divisors(shape.num_key_value_heads)[::-1],
        changes="k_heads v_heads",
    ),
    Primitive(
        "k_heads",
        "g key heads",
        "2406.06567",
        _one_count("k_heads", "k", K_PROJ),
        field_of("k_heads"),
        lambda draft: draft.current.k == draft.index and draft.own(K_PROJ),
        options=lambda shape: [OWN, *divisors(shape.num_key_value_heads)[::-1]],
        changes="k_heads",
    ),
    Primitive(
        "v_heads",
        "g value heads",
        "2406.06567",
        _one_count("v_heads", "v", V_PROJ),
        field_of("v_heads"),
        lambda draft: draft.current.v == draft.index and draft.own(V_PROJ),
        options=lambda shape: [OWN, *divisors(shape.num_key_value_heads)[::-1]],
        changes="v_heads",
    ),
    Primitive(
        "heads",
        "single query heads, with their slices of q, k, v and o, are heads of earlier layers",
        "2402.11819",
        _apply_heads,
        _read_heads,
        lambda draft: above(draft) and _separate_heads(draft, draft.current, draft.index),
        options=lambda shape: [OWN, " ".join(f"{h}=0.{h}" for h in range(max(shape.num_attention_heads // 2, 1)))],
        changes="heads",
    ),
)
