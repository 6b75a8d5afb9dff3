"""Two configs of one model, side by side in words: the layers in which they differ, and what each costs.

Owns those two tables. The same in a picture is `nas.report.sharing.draw_side_by_side`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from ..errors import UserError
from ..sharing.label import layer_line, spans
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import LayerChoices, SharingConfig
from .picture import Picture, picture
from .tables import Row

Named = tuple[str, ModelShape, SharingConfig]  # a config, its name and the shape of its model

NOTHING = "–"


def pictures(a: Named, b: Named, spec: MemorySpec) -> tuple[Picture, Picture]:
    """The two pictures. Raises UserError for configs of two models."""
    if a[1] != b[1]:
        models = (f"{name} is of {shape.num_hidden_layers} layers of width {shape.hidden_size}" for name, shape, _ in (a, b))
        hint = "compare configs of one model; --model says which a sharing.yaml or a preset is for"
        raise UserError(f"of two models: {', '.join(models)}", hint=hint)
    one, other = (picture(shape, config, spec, name) for name, shape, config in (a, b))
    return one, other


def differences(a: SharingConfig, b: SharingConfig) -> list[dict[str, Any]]:
    """The layers that differ, those alike and beside each other as one, and then what is stated for the whole model: `layers`
    (empty for the whole model) and, for `a` and `b`, each primitive's value."""
    pairs = list(zip(a.layers, b.layers, strict=True))
    runs = groupby(range(len(pairs)), key=lambda i: pairs[i])
    found: list[tuple[list[int], tuple[LayerChoices, LayerChoices]]] = [(list(layers), pair) for pair, layers in runs]
    found.append(([], (a.model_choices, b.model_choices)))
    return [{"layers": layers, "a": dict(one), "b": dict(other)} for layers, (one, other) in found if one != other]


def difference_rows(found: list[dict[str, Any]]) -> list[Row]:
    """`differences` for people."""
    return [
        {"layer": spans(row["layers"]) or "model"}
        | {side.upper(): layer_line(tuple(row[side].items())) or NOTHING for side in "ab"}
        for row in found
    ]


def pair_rows(both: tuple[Picture, Picture]) -> list[Row]:
    """What each costs, for people, and the second beside the first."""
    rows = []
    for one, other in zip(both[0].costs, both[1].costs, strict=True):
        change = "" if not one.amount else f"{other.amount / one.amount - 1:+.1%}"
        rows.append({"cost": one.words, "A": one.value, "B": other.value, "B beside A": change})
    return rows
