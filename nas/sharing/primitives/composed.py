"""What a matrix is made of, and what is added to it: shared banks, low-rank corrections, the first layer's values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..builder import Draft
from ..plan import ATTENTION, MATRICES, Factor, LayerPlan, Shapes, corrected, short, slot_shape
from ..shape import ModelShape
from .row import OWN, Primitive, above, field_of, refuse, source_layer, whole_number


def _apply_value_residual(draft: Draft, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise refuse("value_residual", f"{share!r} is not a share of the first layer's values", "use a number such as 0.5")
    layer, name = draft.current, "value_residual"
    if draft.index == 0 or layer.v != draft.index:
        lacks = "is the first" if draft.index == 0 else "makes no values of its own"
        raise refuse(name, f"layer {draft.index} {lacks}", "leave it out")
    first = draft.layers[0]
    if first.v != 0 or first.v_heads != layer.v_heads:
        rule = f"layer 0 makes values of {first.v_heads} heads, and layer {draft.index} of {layer.v_heads}"
        raise refuse(name, rule, "give both as many heads, and let layer 0 own its values")
    draft.change(value_residual=float(share))


_FACTOR = re.compile(r"(dictionary|basis) (\d+) at (\d+) for ([a-z ]+?)(?: using ([\d ]+))?")
_SHORT = {slot.rpartition(".")[2].removesuffix("_proj"): slot for slot in MATRICES}


def _read_factor_text(text: Any) -> Iterator[tuple[Factor, str]]:
    """The factors in a text and the slots they are for. Raises UserError."""
    for part in str(text).split(";"):
        match = _FACTOR.fullmatch(" ".join(part.split()))
        if not match or not match[4].split() or not all(word in _SHORT for word in match[4].split()):
            remedy = 'write "dictionary 4 at 0 for q k v o", or "basis 16 at 0 for gate up"'
            raise refuse("factor", f"{text!r} does not say how matrices are composed", remedy)
        kind, size, at = match[1], int(match[2]), int(match[3])
        used = tuple(sorted(set(map(int, match[5].split())))) if match[5] else tuple(range(size))
        if not size or (kind == "basis" and match[5]) or not all(n < size for n in used):
            rule = f"{part.strip()!r} uses what is not there" if size else f"{part.strip()!r} is empty"
            raise refuse("factor", rule, f"use atoms 0 to {size - 1} of a dictionary" if size else "use a size of 1 or more")
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
        raise refuse("factor", f"layer {i} uses {what} {name}", "compose only matrices that the layer owns")
    if draft.factor(slot) is not None:
        raise refuse("factor", f"composes {name} twice", "name each matrix once")
    if slot in ATTENTION and draft.current.heads:
        raise refuse("factor", f"layer {i} ties single heads", "leave either out")
    size = slot_shape(draft.shape, draft.current, slot)
    if factor.kind == "basis" and factor.size > min(size):
        raise refuse("factor", f"rank {factor.size} is more than {name} of {size[0]} by {size[1]} has", f"use up to {min(size)}")
    source_layer(draft, "factor", factor.at)
    if factor.at < i:
        theirs = draft.layers[factor.at]
        kept = theirs.factors[MATRICES.index(slot)]
        if theirs.owner(slot) != factor.at or kept is None or replace(kept, used=()) != replace(factor, used=()):
            rule = f"layer {factor.at} keeps no {factor.kind} of {factor.size} for {name}"
            raise refuse("factor", rule, f"begin one at layer {factor.at}, or write at {i}")
        if slot_shape(draft.shape, theirs, slot) != size:
            raise refuse("factor", f"{name} has another shape at layer {factor.at}", "give both the same heads and width")


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
    whole_number("delta", r, 1)
    draft.change(delta=r)
    if not corrected(draft.index, draft.current):
        raise refuse("delta", f"layer {draft.index} uses no other layer's matrix", "tie something, or leave delta out")


def _delta_bank(shape: ModelShape, i: int, r: Any) -> Shapes:
    full = Draft(shape).owning()
    for slot in MATRICES:
        rows, columns = slot_shape(shape, full, slot)
        yield f"layers.{i}.{short(slot)}_delta_a.weight", (r, columns)
        yield f"layers.{i}.{short(slot)}_delta_b.weight", (rows, r)


ROWS: tuple[Primitive, ...] = (
    Primitive(
        "value_residual",
        "own values become a mix of them and the first layer's, this share of it",
        "2410.17897",
        _apply_value_residual,
        field_of("value_residual"),
        lambda draft: above(draft) and draft.current.v == draft.index,
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
        field_of("delta"),
        lambda draft: any(draft.current.owner(slot) not in (None, draft.index) for slot in MATRICES),
        options=lambda shape: [OWN, max(shape.hidden_size // 16, 1)],
        bank=_delta_bank,
        changes="delta",
    ),
)
