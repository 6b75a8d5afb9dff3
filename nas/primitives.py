"""The primitives of sharing: the one table in which each is defined.

Owns `PRIMITIVES`: what a primitive means, how it changes a draft, how it is read off a finished plan, where a search may choose
it and from what, and which weights a supernet keeps for it. Bytes, the forward, pictures and exports follow from the plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .draft import KV_SLOTS, Draft, Whole
from .errors import UserError, one_of
from .plan import (
    ATTENTION,
    ATTENTION_NORM,
    FFN,
    FFN_NORM,
    GATE_PROJ,
    K_PROJ,
    MATRICES,
    O_PROJ,
    Q_PROJ,
    ROUTER,
    V_PROJ,
    Factor,
    LayerPlan,
    Shapes,
    corrected,
    outside_shapes,
    short,
    slot_shape,
)
from .shape import ModelShape, divisors

NORMS = ("private", "tied")
OWN = "own"
"""The option by which a layer keeps what it has by itself."""


_ATTENTION = "q k v o k_source v_source k_heads v_heads attn_map heads window factors"
_FFN = "ffn router width experts active_experts factors"
_SLOT_OF = {"q": Q_PROJ, "k": K_PROJ, "v": V_PROJ, "o": O_PROJ, "ffn": GATE_PROJ, "router": ROUTER}
ENTRIES = (*dict.fromkeys(f"{_ATTENTION} {_FFN}".split()), "kv_input", "value_residual", "delta")
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

    `apply(draft, value)` changes the draft or raises UserError, and changes nothing where the draft already is so.
    `read(layer, draft)` is the value that a plan shows for the draft's layer, None for nothing; where the rows before already
    say it, it is not said again. `is_open(draft)` says whether a search may ask for it at the draft's layer, and
    `options(shape)` from what by default. `sources` tells a choice between layers, and `root(draft, j)` is the layer that source
    j stands for. `changes` names what of a layer's plan the row may set (see `entry`), after a minus what it may only clear.
    `bank(shape, i, value)` are the weights that a supernet keeps for a value, beyond a dense model's. A `whole` row
    is decided once for the model, and `read_whole` reads it.
    """

    name: str
    meaning: str
    paper: str
    apply: Callable[[Draft, Any], None]
    read: Callable[[LayerPlan, Draft], Any] = lambda layer, draft: None
    is_open: Callable[[Draft], bool] = lambda draft: True
    options: Callable[[ModelShape], list[Any]] = lambda shape: []
    changes: str = ""
    sources: bool = False
    root: Callable[[Draft, int], int | None] = lambda draft, j: j
    bank: Callable[[ModelShape, int, Any], Shapes] = _no_weights
    whole: bool = False
    read_whole: Callable[[Whole], Any] = lambda whole: None


def _refuse(name: str, rule: str, remedy: str) -> UserError:
    return UserError(rule, where=name, remedy=remedy)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refuse(name, f"{value!r} is not a number of {least} or more", f"use a whole number, such as {max(least, 4)}")
    return value


def _source(draft: Draft, name: str, j: Any, highest: int | None = None) -> int:
    """Layer j, if it may be a source: an earlier one, or the layer itself; up to `highest`, if given."""
    if isinstance(j, bool) or not isinstance(j, int):
        raise _refuse(name, f"{j!r} is not a layer", "give the number of an earlier layer")
    if not 0 <= j <= (draft.index if highest is None else highest):
        earlier = ("leave it out: layer 0 owns its parts", "use layer 0")
        remedy = earlier[draft.index] if draft.index < 2 else f"use an earlier layer, 0 to {draft.index - 1}"
        raise _refuse(name, f"layer {draft.index} cannot use layer {j}", remedy)
    return j


# What a layer attends to: `window` comes first, so that whatever reads another layer's keys can be held to it.


def _apply_window(draft: Draft, w: Any) -> None:
    longest = draft.shape.max_position_embeddings
    if _integer("window", w, 1) >= longest:
        raise _refuse("window", f"{w} is not shorter than max_position_embeddings={longest}", "leave it out: attention is full")
    if w != draft.current.window:
        draft.change(window=w)


def _apply_attn(draft: Draft, j: Any, name: str = "attn") -> None:
    j = _source(draft, name, j)
    theirs, own = draft.of(j), draft.index
    if own in (theirs.k, theirs.v) and j != own:
        rule = f"layer {j} reads the keys and values of layer {own}, which would read itself"
        raise _refuse(name, rule, f"let layer {own} own its attention")
    if draft.current.window is not None and (theirs.attn_map is not None or theirs.cyclic(j) or not theirs.attends):
        raise _refuse(name, f"layer {j} has no softmax map of its own to put a window on", "leave the window out")
    draft.take(j, ATTENTION)
    draft.change(
        k=theirs.k if theirs.k != j else own,
        v=theirs.v if theirs.v != j else own,
        k_heads=theirs.k_heads,
        v_heads=theirs.v_heads,
        attn_map=theirs.attn_map,
        heads=theirs.heads,
        window=draft.current.window if theirs.attn_map is None else theirs.window,
    )
    draft.set_owners((ATTENTION_NORM,), own if theirs.attends else None)
    draft.check_reading(name)


def _apply_ffn(draft: Draft, j: Any, name: str = "ffn") -> None:
    j = _source(draft, name, j)
    theirs = draft.of(j)
    draft.take(j, FFN)
    draft.change(width=theirs.width, experts=theirs.experts, active_experts=theirs.active_experts)
    draft.set_owners((ROUTER,), draft.index if theirs.experts else None)
    draft.set_owners((FFN_NORM,), draft.index if theirs.feeds else None)


def _apply_tie(draft: Draft, j: Any) -> None:
    _apply_attn(draft, j, "tie")
    _apply_ffn(draft, j, "tie")


def _one_matrix(name: str, slot: str, heads: str) -> Callable[[Draft, Any], None]:
    """How `q`, `k`, `v` or `o` is applied; `heads` is the count that comes with it."""

    def apply(draft: Draft, j: Any) -> None:
        theirs, mine = draft.of(_source(draft, name, j)), draft.current
        if theirs.owner(slot) == mine.owner(slot) is not None:
            return
        for layer, plan in ((j, theirs), (draft.index, mine)):
            if plan.owner(slot) is None:
                raise _refuse(name, f"layer {layer} uses no {name} projection", "leave it out")
            if plan.heads:
                raise _refuse(name, f"layer {layer} ties single heads", f"tie the whole attention, attn: {j}")
        draft.take(j, (slot,))
        if heads:
            draft.change(**{heads: getattr(theirs, heads)})

    return apply


DROPS = {"attn": (True, False), "ffn": (False, True), "both": (True, True)}


def _apply_drop(draft: Draft, part: Any) -> None:
    if part not in DROPS:
        raise _refuse("drop", f"{part!r} is not a part of a layer", f"use {one_of(DROPS)}")
    attn, ffn = DROPS[part]
    if attn and draft.current.attends:
        if draft.current.window is not None:
            raise _refuse("drop", "a layer without attention has no window", "leave the window out")
        draft.set_owners((*ATTENTION, ATTENTION_NORM), None)
        draft.change(k=None, v=None, k_heads=0, v_heads=0, attn_map=None, window=None, heads=())
    if ffn and draft.current.feeds:
        draft.set_owners((*FFN, FFN_NORM, ROUTER), None)
        draft.change(width=0, experts=0, active_experts=0)


def _read_drop(layer: LayerPlan, draft: Draft) -> str | None:
    return next((part for part, lost in DROPS.items() if lost == (not layer.attends, not layer.feeds)), None)


# Whose keys, values and softmax maps a layer reads.


def _apply_kv(draft: Draft, j: Any) -> None:
    own = draft.index
    j = _source(draft, "kv", j, draft.shape.num_hidden_layers - 1)
    layer = draft.current
    if layer.k == j == layer.v:
        return
    _require_reader(draft, "kv", j)
    if j == own:
        return
    if j < own and (draft.layers[j].k != j or draft.layers[j].v != j):
        k, source = draft.layers[j].k, draft.layers[j].v
        if source is None or k != source:
            raise _refuse("kv", f"layer {j} does not own both its keys and its values", "use a layer that owns both")
        raise _refuse("kv", f"layer {j} reads layer {source}'s KV and owns none", f"use {source}")
    if j > own and layer.window is not None:
        raise _refuse("kv", f"a layer that reads layer {j}, above it, sees all earlier tokens", "leave the window out")
    draft.set_owners(KV_SLOTS, None)
    draft.change(k=j, v=j, k_heads=0, v_heads=0)
    draft.check_reading("kv")


def _require_reader(draft: Draft, name: str, j: int) -> None:
    """Raise UserError if the current layer cannot read layer j's keys or values, or make its own if j is itself."""
    layer = draft.current
    if not layer.attends:
        raise _refuse(name, f"layer {draft.index} has no attention", "leave it out")
    if layer.attn_map is not None:
        raise _refuse(name, f"layer {draft.index} reuses layer {layer.attn_map}'s softmax map", "leave either out")
    if j == draft.index:
        raise _refuse(
            name,
            f"layer {j} is tied to a layer that has no k and v projections, so it cannot make its own KV",
            f"leave {name} out (it reads layer {layer.v}'s) or tie to a layer that owns its KV",
        )


def _one_side(side: str, slot: str) -> Callable[[Draft, Any], None]:
    """How `k_from` or `v_from` is applied."""
    name, what = f"{side}_from", {"k": "keys", "v": "values"}[side]

    def apply(draft: Draft, j: Any) -> None:
        j = _source(draft, name, j)
        if getattr(draft.current, side) == j:
            return
        _require_reader(draft, name, j)
        if draft.current.cyclic(draft.index):
            raise _refuse(name, "this layer reads a layer above it", "leave either out")
        source = getattr(draft.layers[j], side)
        if source != j:
            remedy = "leave it out" if source is None or source > j else f"use {source}"
            raise _refuse(name, f"layer {j} owns no {what}", remedy)
        draft.set_owners((slot,), None)
        draft.change(**{side: j, f"{side}_heads": 0})
        draft.check_reading(name)

    return apply


def _apply_attn_map(draft: Draft, j: Any) -> None:
    j = _source(draft, "attn_map", j)
    if j == draft.index:
        return
    root = draft.layers[j].attn_map
    root = j if root is None else root
    theirs, mine = draft.layers[root], draft.current
    if mine.attn_map == root:
        return
    if not theirs.attends or theirs.cyclic(root):
        lacks = "has no attention" if not theirs.attends else "reads a layer above it"
        raise _refuse("attn_map", f"layer {root} {lacks}, so it has no map to lend", "use another layer")
    if mine.v != draft.index or (mine.attn_map is None and mine.k != draft.index):
        raise _refuse("attn_map", "a layer that reuses a softmax map makes its own values and reads no keys", "leave kv out")
    if mine.heads:
        raise _refuse("attn_map", f"layer {draft.index} ties single heads", "leave either out")
    if mine.attn_map is None and mine.window is not None:
        raise _refuse("attn_map", f"the window is that of layer {root}'s map", "leave the window out")
    draft.set_owners((Q_PROJ, K_PROJ), None)
    draft.change(k=None, k_heads=0, attn_map=root, window=theirs.window)


def _apply_kv_input(draft: Draft, j: Any) -> None:
    j = _source(draft, "kv_input", j, draft.index - 1)
    j = _last_run(draft, j)
    wanted = None if j == _last_run(draft, draft.index - 1) else j
    if wanted == draft.current.kv_input:
        return
    if draft.index not in (draft.current.k, draft.current.v):
        raise _refuse("kv_input", f"layer {draft.index} makes no keys or values", "leave it out")
    draft.change(kv_input=wanted)


def _last_run(draft: Draft, j: int) -> int:
    """The layer whose output is layer j's: an earlier one where layer j runs nothing."""
    while j > 0 and not draft.whole.outside.step_embedding and not (draft.layers[j].attends or draft.layers[j].feeds):
        j -= 1
    return j


# How many heads, and which.


def _one_count(name: str, side: str, slot: str) -> Callable[[Draft, Any], None]:
    """How the number of key or of value heads is applied."""
    heads, what = f"{side}_heads", {"k": "keys", "v": "values"}[side]

    def apply(draft: Draft, g: Any) -> None:
        full = draft.shape.num_key_value_heads
        if isinstance(g, bool) or not isinstance(g, int) or g < 1 or full % g:
            whole = f"num_attention_heads={draft.shape.num_attention_heads}"
            rule = f"{g} does not divide " + (whole if whole.endswith(f"={full}") else f"num_key_value_heads={full}")
            raise _refuse(name, rule, f"use {one_of(divisors(full))}")
        reads = getattr(draft.current, side)
        count = getattr(draft.layers[reads] if reads is not None and reads < draft.index else draft.current, heads)
        if count == g:
            return
        if reads != draft.index or not draft.own(slot) or draft.current.heads:
            source = what if reads != draft.index else "attention"
            rule = f"layer {draft.index} uses another layer's {source}" + (f", of {count} heads" if count else "")
            raise _refuse(name, rule, f"set {name} at the layer that owns it")
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
        raise _refuse("heads", rule, 'write "0=1.3" for head 0 to use layer 1\'s head 3, and more after spaces')
    wanted = {int(m[1]): _head_root(draft, int(m[2]), int(m[3])) for m in found if m}
    if len(wanted) < len(words):
        raise _refuse("heads", "ties a head twice", "name each head once")
    tied = dict(zip(sorted(wanted), sorted(wanted.values()), strict=True))  # which of them takes which place changes nothing
    heads = tuple(tied.get(h, (i, h)) for h in range(count))
    if heads == layer.heads:
        return
    if not _separate_heads(draft, layer, i) or layer.heads:
        rule = f"layer {i} does not own all of its q, k, v and o with a key and a value head for each query head"
        raise _refuse("heads", rule, "leave out what shares or groups them, or leave heads out")
    if all(at != i for at, _ in heads):
        raise _refuse("heads", f"no head of layer {i} is left", f"write attn: {heads[0][0]}, or leave a head its own")
    draft.change(heads=heads)


def _separate_heads(draft: Draft, layer: LayerPlan, owner: int) -> bool:
    """Whether all of an attention's matrices are layer `owner`'s, with as many key and value heads as query heads."""
    owners = {layer.owner(slot) for slot in ATTENTION}
    plain = not any(layer.factors[: len(ATTENTION)])
    return owners == {owner} and plain and layer.k_heads == layer.v_heads == draft.shape.num_attention_heads


def _head_root(draft: Draft, j: int, head: int) -> tuple[int, int]:
    """The layer and head that own what layer j uses as a head."""
    if j >= draft.index:
        raise _refuse("heads", f"layer {draft.index} cannot use a head of layer {j}", "use heads of earlier layers")
    theirs = draft.layers[j]
    root = theirs.owner(Q_PROJ)
    if root is None or not _separate_heads(draft, theirs, root):
        rule = f"layer {j} does not use whole heads of one layer's q, k, v and o"
        raise _refuse("heads", rule, "use heads of a layer that owns its attention, a key and a value head for each query head")
    return theirs.heads[head] if theirs.heads else (root, head)


def _read_heads(layer: LayerPlan, draft: Draft) -> str | None:
    if layer.owner(Q_PROJ) != draft.index or not layer.heads:
        return None
    return " ".join(f"{h}={at}.{head}" for h, (at, head) in enumerate(layer.heads) if at != draft.index)


# What an FFN is.


def _require_own_ffn(draft: Draft, name: str) -> None:
    if not draft.own_ffn():
        what = "another layer's FFN" if draft.current.feeds else "no FFN"
        raise _refuse(name, f"layer {draft.index} uses {what}", f"set {name} at the layer that owns it")


def _apply_intermediate(draft: Draft, n: Any) -> None:
    if _integer("intermediate", n, 1) == draft.current.width:
        return
    _require_own_ffn(draft, "intermediate")
    draft.change(width=n)


def _apply_experts(draft: Draft, n: Any) -> None:
    if _integer("experts", n, 2) == draft.current.experts:
        return
    _require_own_ffn(draft, "experts")
    if draft.current.width % n:
        rule = f"{n} experts do not divide the FFN's width of {draft.current.width}"
        raise _refuse("experts", rule, f"use {one_of([d for d in divisors(draft.current.width) if 1 < d <= 16] or [1])}")
    draft.set_owners((ROUTER,), draft.index)
    draft.change(experts=n, active_experts=2)


def _apply_active_experts(draft: Draft, k: Any) -> None:
    if _integer("active_experts", k, 1) == draft.current.active_experts:
        return
    _require_own_ffn(draft, "active_experts")
    if k > draft.current.experts:
        raise _refuse("active_experts", f"{k} of {draft.current.experts} experts cannot be run", "set experts to as many or more")
    draft.change(active_experts=k)


def _apply_router(draft: Draft, j: Any) -> None:
    j = _source(draft, "router", j)
    mine, theirs = draft.current.experts, draft.current.experts if j == draft.index else draft.layers[j].experts
    if not mine or mine != theirs:
        rule = f"layer {draft.index} chooses between {mine} experts and layer {j} between {theirs}"
        raise _refuse("router", rule, "share a router between FFNs of as many experts")
    draft.set_owners((ROUTER,), j if j == draft.index else draft.layers[j].owner(ROUTER))


# What a matrix is made of, and what is added to it.


def _apply_value_residual(draft: Draft, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise _refuse("value_residual", f"{share!r} is not a share of the first layer's values", "use a number such as 0.5")
    layer, name = draft.current, "value_residual"
    if draft.index == 0 or layer.v != draft.index:
        lacks = "is the first" if draft.index == 0 else "makes no values of its own"
        raise _refuse(name, f"layer {draft.index} {lacks}", "leave it out")
    first = draft.layers[0]
    if first.v != 0 or first.v_heads != layer.v_heads:
        rule = f"layer 0 makes values of {first.v_heads} heads, and layer {draft.index} of {layer.v_heads}"
        raise _refuse(name, rule, "give both as many heads, and let layer 0 own its values")
    draft.change(value_residual=float(share))


_FACTOR = re.compile(r"(dictionary|basis) (\d+) at (\d+) for ([a-z ]+?)(?: using ([\d ]+))?")
_SHORT = {slot.rpartition(".")[2].removesuffix("_proj"): slot for slot in MATRICES}


def _read_factor_text(text: Any) -> Iterator[tuple[Factor, str]]:
    """The factors in a text and the slots they are for. Raises UserError."""
    for part in str(text).split(";"):
        match = _FACTOR.fullmatch(" ".join(part.split()))
        if not match or not match[4].split() or not all(word in _SHORT for word in match[4].split()):
            remedy = 'write "dictionary 4 at 0 for q k v o", or "basis 16 at 0 for gate up"'
            raise _refuse("factor", f"{text!r} does not say how matrices are composed", remedy)
        kind, size, at = match[1], int(match[2]), int(match[3])
        used = tuple(sorted(set(map(int, match[5].split())))) if match[5] else tuple(range(size))
        if not size or (kind == "basis" and match[5]) or not all(n < size for n in used):
            rule = f"{part.strip()!r} uses what is not there" if size else f"{part.strip()!r} is empty"
            raise _refuse("factor", rule, f"use atoms 0 to {size - 1} of a dictionary" if size else "use a size of 1 or more")
        factor = Factor(kind, at, size, used if kind == "dictionary" else ())
        yield from ((factor, _SHORT[word]) for word in match[4].split())


def _apply_factor(draft: Draft, text: Any) -> None:
    factors = list(draft.current.factors)
    for factor, slot in _read_factor_text(text):
        n = MATRICES.index(slot)
        if factors[n] == factor:
            continue
        _check_factor(draft, factor, slot)
        factors[n] = factor
    draft.change(factors=tuple(factors))


def _check_factor(draft: Draft, factor: Factor, slot: str) -> None:
    """Raise UserError if the current layer's matrix in a slot cannot be composed so."""
    i, name = draft.index, slot.rpartition(".")[2]
    if not draft.own(slot):
        what = "no" if draft.current.owner(slot) is None else "another layer's"
        raise _refuse("factor", f"layer {i} uses {what} {name}", "compose only matrices that the layer owns")
    if draft.factor(slot) is not None:
        raise _refuse("factor", f"composes {name} twice", "name each matrix once")
    if slot in ATTENTION and draft.current.heads:
        raise _refuse("factor", f"layer {i} ties single heads", "leave either out")
    size = slot_shape(draft.shape, draft.current, slot)
    if factor.kind == "basis" and factor.size > min(size):
        raise _refuse("factor", f"rank {factor.size} is more than {name} of {size[0]} by {size[1]} has", f"use up to {min(size)}")
    _source(draft, "factor", factor.at)
    if factor.at < i:
        theirs = draft.layers[factor.at]
        kept = theirs.factors[MATRICES.index(slot)]
        if theirs.owner(slot) != factor.at or kept is None or replace(kept, used=()) != replace(factor, used=()):
            rule = f"layer {factor.at} keeps no {factor.kind} of {factor.size} for {name}"
            raise _refuse("factor", rule, f"begin one at layer {factor.at}, or write at {i}")
        if slot_shape(draft.shape, theirs, slot) != size:
            raise _refuse("factor", f"{name} has another shape at layer {factor.at}", "give both the same heads and width")


def _read_factor(layer: LayerPlan, draft: Draft) -> str | None:
    """The canonical text: matrices in the order of `MATRICES`, those composed alike together."""
    groups: dict[Factor, list[str]] = {}
    for name, (slot, factor) in zip(_SHORT, zip(MATRICES, layer.factors, strict=True), strict=True):
        if factor is not None and layer.owner(slot) == draft.index:
            groups.setdefault(factor, []).append(name)
    return "; ".join(_spell(factor, names) for factor, names in groups.items()) or None


def _spell(factor: Factor, names: list[str]) -> str:
    text = f"{factor.kind} {factor.size} at {factor.at} for {' '.join(names)}"
    some = factor.kind == "dictionary" and len(factor.used) < factor.size
    return text + (f" using {' '.join(map(str, factor.used))}" if some else "")


def _factor_bank(shape: ModelShape, i: int, text: Any) -> Shapes:
    full = Draft(shape).owning()
    for factor, slot in _read_factor_text(text):
        rows, columns = slot_shape(shape, full, slot)
        stem = short(slot)
        if factor.kind == "dictionary":
            yield f"layers.{factor.at}.{stem}_atoms.weight", (factor.size, rows, columns)
            yield f"layers.{i}.{stem}_mix.weight", (len(factor.used),)
        else:
            yield f"layers.{factor.at}.{stem}_basis.weight", (factor.size, columns)
            yield f"layers.{i}.{stem}_coef.weight", (rows, factor.size)


def _apply_delta(draft: Draft, r: Any) -> None:
    _integer("delta", r, 1)
    draft.change(delta=r)
    if not corrected(draft.index, draft.current):
        raise _refuse("delta", f"layer {draft.index} uses no other layer's matrix", "tie something, or leave delta out")


def _delta_bank(shape: ModelShape, i: int, r: Any) -> Shapes:
    full = Draft(shape).owning()
    for slot in MATRICES:
        rows, columns = slot_shape(shape, full, slot)
        yield f"layers.{i}.{short(slot)}_delta_a.weight", (r, columns)
        yield f"layers.{i}.{short(slot)}_delta_b.weight", (rows, r)


def _routers(shape: ModelShape, i: int, n: Any) -> Shapes:
    """A router for the layer and for each above it, which may use its FFN and has a router of its own then."""
    for j in range(i, shape.num_hidden_layers):
        yield f"layers.{j}.{ROUTER}.weight", (n, shape.hidden_size)


def _width_bank(shape: ModelShape, i: int, n: Any) -> Shapes:
    wide = replace(Draft(shape).owning(), width=n)
    for slot in FFN:
        yield f"layers.{i}.{slot}.weight", slot_shape(shape, wide, slot)


# The whole model.


def _apply_norms(draft: Draft, value: Any) -> None:
    if value not in NORMS:
        raise _refuse("norms", f"{value!r} is not a way to treat norms", f"use {one_of(NORMS)}")
    draft.whole = replace(draft.whole, norms=value)


def _apply_embedding_rank(draft: Draft, r: Any) -> None:
    if _integer("embedding_rank", r, 0) >= draft.shape.hidden_size:
        rule = f"{r} is not less than hidden_size={draft.shape.hidden_size}"
        raise _refuse("embedding_rank", rule, "leave it out: tokens are embedded at full width")
    draft.whole = replace(draft.whole, outside=replace(draft.whole.outside, embedding_rank=r))


def _outside_flag(name: str) -> Callable[[Draft, Any], None]:
    def apply(draft: Draft, value: Any) -> None:
        if not isinstance(value, bool):
            raise _refuse(name, f"{value!r} is neither true nor false", "use true or false")
        draft.whole = replace(draft.whole, outside=replace(draft.whole.outside, **{name: value}))

    return apply


def _outside_bank(name: str) -> Callable[[ModelShape, int, Any], Shapes]:
    """The weights outside the layers for one value; those of a factorised embedding are kept beside the full one's."""

    def bank(shape: ModelShape, i: int, value: Any) -> Shapes:
        outside = replace(Draft(shape).whole.outside, **{name: value})
        for weight, size in outside_shapes(shape, outside).items():
            yield (FACTORED if weight == "embed_tokens.weight" and outside.embedding_rank else weight), size

    return bank


FACTORED = "embed_factored.weight"
"""The supernet's name for the embedding of fewer columns."""


def _attr(name: str) -> Callable[[LayerPlan, Draft], Any]:
    return lambda layer, draft: getattr(layer, name) or None


def _owner(slot: str) -> Callable[[LayerPlan, Draft], Any]:
    return lambda layer, draft: layer.owner(slot)


def _read_attn(layer: LayerPlan, draft: Draft) -> int | None:
    return layer.lender(ATTENTION)


def _read_tie(layer: LayerPlan, draft: Draft) -> int | None:
    attn = layer.lender(ATTENTION)
    return attn if attn == layer.lender(FFN) else None


def _read_kv(layer: LayerPlan, draft: Draft) -> int | None:
    return layer.v if layer.k == layer.v != draft.index else None


def _read_kv_heads(layer: LayerPlan, draft: Draft) -> int | None:
    return layer.k_heads or None if layer.k_heads == layer.v_heads else None


def _above(draft: Draft) -> bool:
    return draft.index > 0


PRIMITIVES: dict[str, Primitive] = {
    row.name: row
    for row in (
        Primitive(
            "norms",
            "whether a layer whose whole attention, or FFN, is another's keeps its own norm there (private) or not (tied)",
            "1909.11942",
            _apply_norms,
            options=lambda shape: list(NORMS),
            whole=True,
            read_whole=lambda whole: whole.norms,
        ),
        Primitive(
            "embedding_rank",
            "tokens are embedded in r numbers and projected to the hidden size; 0 embeds them whole",
            "1909.11942",
            _apply_embedding_rank,
            options=lambda shape: [0, shape.hidden_size // 2, shape.hidden_size // 4],
            whole=True,
            read_whole=lambda whole: whole.outside.embedding_rank,
            bank=_outside_bank("embedding_rank"),
        ),
        Primitive(
            "tie_word_embeddings",
            "whether the output head is the embedding",
            "1608.05859",
            _outside_flag("tie_word_embeddings"),
            options=lambda shape: [shape.tie_word_embeddings, not shape.tie_word_embeddings],
            whole=True,
            read_whole=lambda whole: whole.outside.tie_word_embeddings,
            bank=_outside_bank("tie_word_embeddings"),
        ),
        Primitive(
            "step_embedding",
            "a learned vector is added before each layer, which tells a looped block which turn it is",
            "1807.03819",
            _outside_flag("step_embedding"),
            options=lambda shape: [False, True],
            whole=True,
            read_whole=lambda whole: whole.outside.step_embedding,
            bank=_outside_bank("step_embedding"),
        ),
        Primitive(
            "window",
            "attends to the w latest tokens",
            "2004.05150",
            _apply_window,
            lambda layer, draft: layer.window if layer.attn_map is None else None,
            options=lambda shape: [
                OWN,
                *(shape.max_position_embeddings // n for n in (4, 8) if shape.max_position_embeddings >= n),
            ],
            changes="window",
        ),
        Primitive(
            "tie",
            "attention and FFN are layer j's parameters; head counts and a KV source come with them",
            "1909.11942",
            _apply_tie,
            _read_tie,
            _above,
            sources=True,
            changes=f"{_ATTENTION} {_FFN}",
        ),
        Primitive(
            "attn",
            "the q, k, v and o projections are layer j's",
            "1909.11942",
            _apply_attn,
            _read_attn,
            lambda draft: _above(draft) and draft.own_attention(),
            sources=True,
            changes=_ATTENTION,
        ),
        *(
            Primitive(
                name,
                f"the {name} projection is layer j's",
                "",
                _one_matrix(name, slot, heads),
                _owner(slot),
                lambda draft, slot=slot: _above(draft) and draft.own(slot),  # type: ignore[misc]
                changes=f"{name} {heads} factors",
                sources=True,
            )
            for name, slot, heads in (("q", Q_PROJ, ""), ("k", K_PROJ, "k_heads"), ("v", V_PROJ, "v_heads"), ("o", O_PROJ, ""))
        ),
        Primitive(
            "ffn",
            "the FFN is layer j's; if it has experts, the router stays the layer's own",
            "2402.16840",
            _apply_ffn,
            lambda layer, draft: layer.lender(FFN),
            lambda draft: _above(draft) and draft.own_ffn(),
            sources=True,
            changes=_FFN,
        ),
        Primitive(
            "drop",
            "attention, FFN or both are not run",
            "2407.00928",
            _apply_drop,
            _read_drop,
            lambda draft: draft.own_attention() and draft.own_ffn(),
            options=lambda shape: [OWN, *DROPS],
            changes=" -".join(("factors", *_ATTENTION.split()[:-1], *_FFN.split()[:-1])),
        ),
        Primitive(
            "kv",
            "reads layer j's rotated keys and its values; owns no k, v projection and no cache",
            "2405.12981",
            _apply_kv,
            _read_kv,
            lambda draft: _above(draft) and draft.current.attends,
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
            lambda draft: _above(draft) and draft.own_kv(),
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
            lambda draft: _above(draft) and draft.own_kv(),
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
            lambda draft: _above(draft) and draft.own_kv(),
            sources=True,
            changes="attn_map window factors -q -k -k_heads -k_source",
        ),
        Primitive(
            "kv_input",
            "keys and values are projected from layer j's output",
            "2410.03960",
            _apply_kv_input,
            lambda layer, draft: layer.kv_input,
            lambda draft: _above(draft) and draft.index in (draft.current.k, draft.current.v),
            sources=True,
            changes="kv_input",
        ),
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
            _attr("k_heads"),
            lambda draft: draft.current.k == draft.index and draft.own(K_PROJ),
            options=lambda shape: [OWN, *divisors(shape.num_key_value_heads)[::-1]],
            changes="k_heads",
        ),
        Primitive(
            "v_heads",
            "g value heads",
            "2406.06567",
            _one_count("v_heads", "v", V_PROJ),
            _attr("v_heads"),
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
            lambda draft: _above(draft) and _separate_heads(draft, draft.current, draft.index),
            options=lambda shape: [OWN, " ".join(f"{h}=0.{h}" for h in range(max(shape.num_attention_heads // 2, 1)))],
            changes="heads",
        ),
        Primitive(
            "intermediate",
            "the width of an owned FFN",
            "2309.01826",
            _apply_intermediate,
            lambda layer, draft: layer.width or None,
            lambda draft: draft.own_ffn(),
            options=lambda shape: [shape.intermediate_size // n for n in (1, 2, 4) if shape.intermediate_size >= n],
            bank=_width_bank,
            changes="width",
        ),
        Primitive(
            "experts",
            "an owned FFN is n equal experts, of which a router chooses",
            "2310.10837",
            _apply_experts,
            _attr("experts"),
            lambda draft: draft.own_ffn(),
            options=lambda shape: [OWN, *(n for n in (2, 4, 8) if shape.intermediate_size % n == 0)],
            bank=_routers,
            changes="router experts active_experts",
        ),
        Primitive(
            "active_experts",
            "how many experts run for a token, 2 by default",
            "2310.10837",
            _apply_active_experts,
            _attr("active_experts"),
            lambda draft: draft.own_ffn() and draft.current.experts > 1,
            options=lambda shape: [2, 1],
            changes="active_experts",
        ),
        Primitive(
            "router",
            "the router is layer j's",
            "2405.16039",
            _apply_router,
            _owner(ROUTER),
            lambda draft: _above(draft) and draft.current.experts > 1,
            sources=True,
            changes="router",
        ),
        Primitive(
            "value_residual",
            "own values become a mix of them and the first layer's, this share of it",
            "2410.17897",
            _apply_value_residual,
            _attr("value_residual"),
            lambda draft: _above(draft) and draft.current.v == draft.index,
            options=lambda shape: [OWN, 0.5],
            changes="value_residual",
        ),
        Primitive(
            "factor",
            "matrices are composed from a bank of atoms or a basis that layers share, and coefficients of the layer's own",
            "2508.04581",
            _apply_factor,
            _read_factor,
            lambda draft: any(draft.own(slot) for slot in MATRICES),
            options=lambda shape: [
                OWN,
                "dictionary 2 at 0 for q k v o",
                f"basis {max(shape.hidden_size // 4, 1)} at 0 for gate up",
            ],
            bank=_factor_bank,
            changes="factors",
        ),
        Primitive(
            "delta",
            "a correction of rank r, the layer's own, on every matrix that is another layer's",
            "2410.20672",
            _apply_delta,
            _attr("delta"),
            lambda draft: any(draft.current.owner(slot) not in (None, draft.index) for slot in MATRICES),
            options=lambda shape: [OWN, max(shape.hidden_size // 16, 1)],
            bank=_delta_bank,
            changes="delta",
        ),
    )
}
"""Every primitive, in the order in which they are applied. A new one is a row here, and nothing elsewhere."""

WHOLE_ROWS = [row for row in PRIMITIVES.values() if row.whole]
LAYER_ROWS = [row for row in PRIMITIVES.values() if not row.whole]
