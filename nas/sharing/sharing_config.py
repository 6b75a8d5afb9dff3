"""A sharing configuration: frozen, canonical, hashed, and the builder by which it becomes a plan.

Owns `SharingConfig`, its file, and how it resolves: every layer's primitives are applied in the order of
`nas.primitives.PRIMITIVES`. What a primitive means is that table's. A plan compresses back to the one canonical config: configs
that compute the same thing are one config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..config import Document, Strict, build, dump_yaml, parse_yaml, read_yaml
from ..errors import UserError, did_you_mean
from .builder import ModelOptions, PlanBuilder
from .plan import ATTENTION_NORM, FFN_NORM, LayerPlan, Plan
from .primitives import LAYER_ROWS, MODEL_ROWS, PRIMITIVES, Primitive
from .shape import ModelShape

LayerChoices = tuple[tuple[str, Any], ...]


def ties_norms(layers: Sequence[LayerPlan]) -> bool:
    """Whether any layer uses another's norm: the one thing that `norms: tied` changes."""
    return any(layer.owner(norm) not in (None, i) for i, layer in enumerate(layers) for norm in (ATTENTION_NORM, FFN_NORM))


def apply_layer(builder: PlanBuilder, choices: Mapping[str, Any]) -> None:
    """Decide the builder's current layer by `{primitive: value}` and finish it. Raises UserError naming the primitive."""
    names = [row.name for row in LAYER_ROWS]
    for name in choices:
        if name not in names:
            raise UserError("unknown primitive", where=str(name), hint=did_you_mean(name, names))
    for row in LAYER_ROWS:
        if row.name in choices:
            row.apply(builder, choices[row.name])
    builder.finish()


def attempt(builder: PlanBuilder, row: Primitive, value: Any) -> bool:
    """Apply a primitive if that is possible and changes something; say whether."""
    whole, before = builder.whole, builder.current
    try:
        row.apply(builder, value)
    except UserError:
        builder.whole, builder.current = whole, before
    return (builder.whole, builder.current) != (whole, before)


@dataclass(frozen=True)
class SharingConfig:
    """What each layer shares, in canonical form: equal configs compute the same function of the same weights.

    Make one with `SharingConfig.make` (or `load`), which validates and canonicalises; the constructor trusts its arguments.
    `layers[i]` holds the primitives at layer i that say something, `whole` those of the whole model that do.
    """

    layers: tuple[LayerChoices, ...]
    whole: LayerChoices = ()

    @staticmethod
    def make(shape: ModelShape, layers: Sequence[Mapping[str, Any]], norms: str = "private", **whole: Any) -> SharingConfig:
        """The canonical config of one `{primitive: value}` a layer, for a model of this shape. Raises UserError."""
        return SharingConfig.of_plan(shape, _resolve(shape, layers, whole | {"norms": norms}))

    @staticmethod
    def of_plan(shape: ModelShape, plan: Plan) -> SharingConfig:
        """The canonical config that resolves to a plan: of each primitive, what it changes after those before it."""
        builder = PlanBuilder(shape)
        target = ModelOptions("tied" if ties_norms(plan.layers) else "private", plan.outside)
        whole = _said(builder, ((row, row.read_whole(target)) for row in MODEL_ROWS))
        assert builder.whole == target
        layers = []
        for i, layer in enumerate(plan.layers):
            layers.append(_said(builder, ((row, row.read(layer, builder)) for row in LAYER_ROWS)))
            builder.finish()
            assert builder.layers[i] == layer, f"layer {i}: {layers[-1]} gives {builder.layers[i]}, not {layer}"
        return SharingConfig(tuple(layers), whole)

    @lru_cache(maxsize=1 << 14)  # noqa: B019  # configs are small and frozen, and asked for again and again
    def resolve(self, shape: ModelShape) -> Plan:
        """The plan that a `Decoder` of this shape runs. Raises UserError if the config is for another shape."""
        return _resolve(shape, [dict(layer) for layer in self.layers], dict(self.whole))

    @property
    def norms(self) -> str:
        """`private` or `tied`."""
        return str(dict(self.whole).get("norms", "private"))

    @property
    def is_dense(self) -> bool:
        """Whether nothing is shared."""
        return not any(self.layers) and not self.whole

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits of the canonical form's SHA-256: the config's name everywhere."""
        return hashlib.sha256(json.dumps(self.to_data(), sort_keys=True).encode()).hexdigest()[:12]

    def to_data(self) -> dict[str, Any]:
        """Plain data, the same that `to_yaml` writes: only layers that share something are named."""
        layers = {i: dict(layer) for i, layer in enumerate(self.layers) if layer}
        return {"num_hidden_layers": len(self.layers), "norms": self.norms} | dict(self.whole) | {"layers": layers}

    def to_yaml(self) -> str:
        """The text of a `sharing.yaml`."""
        return dump_yaml(self.to_data())

    @staticmethod
    def from_data(shape: ModelShape, data: Mapping[str, Any], document: Document | None = None) -> SharingConfig:
        """The inverse of `to_data`; validates and canonicalises. Raises UserError with the line if it has a document."""
        whole = {row.name: data[row.name] for row in MODEL_ROWS if row.name in data}
        document = document or Document(dict(data), "sharing")
        rest = {key: value for key, value in document.data.items() if key not in whole}
        raw = build(_SharingFile, replace(document, data=rest))
        if raw.num_hidden_layers != shape.num_hidden_layers:
            message = f"{raw.num_hidden_layers} is not the model's {shape.num_hidden_layers}"
            raise UserError(message, where=document.where(("num_hidden_layers",)), hint="describe every layer of the model")
        for i in raw.layers:
            if not 0 <= i < raw.num_hidden_layers:
                hint = f"use 0 to {raw.num_hidden_layers - 1}"
                raise UserError(f"there is no layer {i}", where=document.where(("layers", str(i))), hint=hint)
        layers = [raw.layers.get(i, {}) for i in range(raw.num_hidden_layers)]
        return SharingConfig.of_plan(shape, _resolve(shape, layers, whole, document))

    @staticmethod
    def from_yaml(shape: ModelShape, text: str, name: str = "sharing.yaml") -> SharingConfig:
        """The config in YAML text."""
        document = parse_yaml(text, name)
        return SharingConfig.from_data(shape, document.data, document)

    @staticmethod
    def load(shape: ModelShape, path: Path) -> SharingConfig:
        """The config in a `sharing.yaml`."""
        document = read_yaml(path)
        return SharingConfig.from_data(shape, document.data, document)


@dataclass(frozen=True)
class _SharingFile(Strict):
    num_hidden_layers: int
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)


def _said(builder: PlanBuilder, values: Iterable[tuple[Primitive, Any]]) -> LayerChoices:
    """Of the values that a plan shows, those that change the builder; a layer that is its own source says nothing by it."""
    shown = ((row, value) for row, value in values if value is not None and not (row.sources and value == builder.index))
    return tuple((row.name, value) for row, value in shown if attempt(builder, row, value))


def _resolve(
    shape: ModelShape, layers: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], document: Document | None = None
) -> Plan:
    if len(layers) != shape.num_hidden_layers:
        message = f"{len(layers)} layers for a model of num_hidden_layers={shape.num_hidden_layers}"
        raise UserError(message, where="layers", hint="describe every layer of the model")
    builder = PlanBuilder(shape)
    for name, value in whole.items():
        if name not in PRIMITIVES or not PRIMITIVES[name].whole:
            raise UserError("unknown primitive", where=name, hint=did_you_mean(name, [row.name for row in MODEL_ROWS]))
        with _placed(document, (name,)):
            PRIMITIVES[name].apply(builder, value)
    for i, choices in enumerate(layers):
        with _placed(document, ("layers", str(i))):
            apply_layer(builder, choices)
    return builder.plan()


@contextmanager
def _placed(document: Document | None, path: tuple[str, ...]) -> Iterator[None]:
    """Say of an error where it stands: `path` and the key that it names itself."""
    try:
        yield
    except UserError as error:
        keys = path if error.where in ("", path[-1]) else (*path, error.where)
        raise UserError(error.message, where=document.where(keys) if document else ".".join(keys), hint=error.hint) from None
