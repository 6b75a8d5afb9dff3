"""`SharingConfig`: what each layer shares, in canonical form, and its YAML file.

A config is applied to a `PlanBuilder` layer by layer, with the primitives in the order of `nas.sharing.primitives.PRIMITIVES`.
Its canonical form is read back from the plan, so that configs which compute the same function are one config with one hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..config import Document, Strict, build, dump_yaml, parse_yaml, read_yaml
from ..errors import UserError, did_you_mean
from .builder import ModelOptions, PlanBuilder
from .memo import LayerMemo
from .plan import ATTENTION_NORM, FFN_NORM, LayerPlan, Plan
from .primitives import LAYER_ROWS, MODEL_ROWS, PRIMITIVES, Primitive
from .shape import ModelShape

LayerChoices = tuple[tuple[str, Any], ...]  # `(primitive, value)` pairs, in the order of `PRIMITIVES`


@dataclass(frozen=True)
class SharingConfig:
    """What each layer shares, in canonical form: equal configs compute the same function of the same weights.

    `layers[i]` holds the primitives that change layer i, `model_choices` those that change the whole model. `make`, `dense` and
    the loaders validate and canonicalise; the constructor trusts its arguments.
    """

    layers: tuple[LayerChoices, ...]
    model_choices: LayerChoices = ()

    @staticmethod
    def make(shape: ModelShape, layers: Sequence[Mapping[str, Any]], **model_choices: Any) -> SharingConfig:
        """The canonical config of one `{primitive: value}` a layer, for a model of this shape. Raises UserError."""
        return _build(shape, layers, model_choices)

    @staticmethod
    def dense(shape: ModelShape) -> SharingConfig:
        return SharingConfig(((),) * shape.num_hidden_layers)

    @staticmethod
    def of_plan(shape: ModelShape, plan: Plan) -> SharingConfig:
        """The canonical config that resolves to a plan."""
        builder = PlanBuilder(shape, _canonical_options(plan.layers, ModelOptions("private", plan.outside)))
        layers = []
        for target in plan.layers:
            builder.current = target
            layers.append(commit_canonical(builder))
        return finished_config(builder, layers)

    @lru_cache(maxsize=1 << 14)  # noqa: B019  # configs are small and frozen, and are resolved again and again
    def resolve(self, shape: ModelShape) -> Plan:
        """The plan that a `Decoder` of this shape runs. Raises UserError if the config is for another shape."""
        _check_depth(shape, self.layers)
        builder = PlanBuilder(shape)
        for name, value in self.model_choices:
            PRIMITIVES[name].apply(builder, value)
        memo = _resolved(shape, builder.model_options)
        for layer in self.layers:
            builder.layers.append(memo(builder, layer, lambda: _commit(builder, layer)))  # noqa: B023
        return builder.plan()

    @property
    def is_dense(self) -> bool:
        """Whether nothing is shared or left out."""
        return not any(self.layers) and not self.model_choices

    @property
    def norms(self) -> str:
        """`private` or `tied`."""
        return str(dict(self.model_choices).get("norms", "private"))

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits of the canonical form's SHA-256: the config's name everywhere."""
        return hashlib.sha256(json.dumps(self.to_data(), sort_keys=True).encode()).hexdigest()[:12]

    def to_data(self) -> dict[str, Any]:
        """Plain data, the same that `to_yaml` writes: only layers that share something are named."""
        layers = {i: dict(layer) for i, layer in enumerate(self.layers) if layer}
        return {"num_hidden_layers": len(self.layers), "norms": self.norms} | dict(self.model_choices) | {"layers": layers}

    def to_yaml(self) -> str:
        return dump_yaml(self.to_data())

    @staticmethod
    def from_data(shape: ModelShape, data: Mapping[str, Any], document: Document | None = None) -> SharingConfig:
        """The inverse of `to_data`; validates and canonicalises. Raises UserError, with the line if there is a document."""
        document = document or Document(data, "sharing")
        model_choices, rest = {}, data
        if isinstance(data, Mapping):
            model_choices = {row.name: data[row.name] for row in MODEL_ROWS if row.name in data}
            rest = {key: value for key, value in data.items() if key not in model_choices}
        raw = build(_SharingFile, replace(document, data=rest))
        if raw.num_hidden_layers != shape.num_hidden_layers:
            message = f"{raw.num_hidden_layers} is not the model's {shape.num_hidden_layers}"
            raise UserError(message, where=document.where(("num_hidden_layers",)), hint="describe every layer of the model")
        for i in raw.layers:
            if not 0 <= i < raw.num_hidden_layers:
                hint = f"use 0 to {raw.num_hidden_layers - 1}"
                raise UserError(f"there is no layer {i}", where=document.where(("layers", str(i))), hint=hint)
        return _build(shape, [raw.layers.get(i, {}) for i in range(raw.num_hidden_layers)], model_choices, document)

    @staticmethod
    def from_yaml(shape: ModelShape, text: str) -> SharingConfig:
        document = parse_yaml(text, "sharing.yaml")
        return SharingConfig.from_data(shape, document.data, document)

    @staticmethod
    def load(shape: ModelShape, path: Path) -> SharingConfig:
        document = read_yaml(path)
        return SharingConfig.from_data(shape, document.data, document)


@lru_cache(maxsize=16)
def _resolved(shape: ModelShape, model_options: ModelOptions) -> LayerMemo[LayerPlan]:
    """The layers that configs of a shape have had, by their choices."""
    return LayerMemo()


def _commit(builder: PlanBuilder, choices: LayerChoices) -> LayerPlan:
    """Commit a layer of these choices. Raises UserError."""
    for name, value in choices:
        PRIMITIVES[name].apply(builder, value)
    builder.commit_layer()
    return builder.layers[-1]


@dataclass(frozen=True)
class _SharingFile(Strict):
    num_hidden_layers: int
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)


def _build(
    shape: ModelShape, layers: Sequence[Mapping[str, Any]], model_choices: Mapping[str, Any], document: Document | None = None
) -> SharingConfig:
    """The canonical config of a user's choices. Raises UserError with the place of a choice that cannot be made."""
    _check_depth(shape, layers)
    builder, canonical = PlanBuilder(shape), []
    with _located(document, ()):
        _apply(builder, MODEL_ROWS, model_choices)
    for i, choices in enumerate(layers):
        with _located(document, ("layers", str(i))):
            _apply(builder, LAYER_ROWS, choices)
            canonical.append(commit_canonical(builder))
    return finished_config(builder, canonical)


def _check_depth(shape: ModelShape, layers: Sequence[Any]) -> None:
    if len(layers) != shape.num_hidden_layers:
        message = f"{len(layers)} layers for a model of num_hidden_layers={shape.num_hidden_layers}"
        raise UserError(message, where="layers", hint="describe every layer of the model")


def _apply(builder: PlanBuilder, rows: Sequence[Primitive], choices: Mapping[str, Any]) -> None:
    """Apply choices in the order of the rows. Raises UserError that names the primitive."""
    names = [row.name for row in rows]
    for name in choices:
        if name not in names:
            raise UserError("unknown primitive", where=str(name), hint=did_you_mean(name, names))
    for row in rows:
        if row.name in choices:
            row.apply(builder, choices[row.name])


@contextmanager
def _located(document: Document | None, path: tuple[str, ...]) -> Iterator[None]:
    """Prefix an error's location with `path`."""
    try:
        yield
    except UserError as error:
        keys = path if error.where in ("", *path[-1:]) else (*path, error.where)
        raise UserError(error.message, where=document.where(keys) if document else ".".join(keys), hint=error.hint) from None


def try_apply(builder: PlanBuilder, row: Primitive, value: Any) -> bool:
    """Apply a primitive if that is possible; return whether it changed anything."""
    before = builder.model_options, builder.current
    try:
        row.apply(builder, value)
    except UserError:
        builder.model_options, builder.current = before
    return (builder.model_options, builder.current) != before


def commit_canonical(builder: PlanBuilder) -> LayerChoices:
    """Commit the builder's current layer; the canonical choices that give its plan."""
    target, choices = builder.with_norms(), list[tuple[str, Any]]()
    builder.start_layer()
    for row in LAYER_ROWS:
        if builder.with_norms() == target:
            break
        value = row.from_plan(target, builder)
        if value is not None and not (row.sources and value == builder.index) and try_apply(builder, row, value):
            choices.append((row.name, value))
    builder.commit_layer()
    assert builder.layers[-1] == target, f"layer {builder.index - 1}: {choices} gives {builder.layers[-1]}, not {target}"
    return tuple(choices)


def finished_config(builder: PlanBuilder, layers: Sequence[LayerChoices]) -> SharingConfig:
    """The config of a finished builder, given each layer's canonical choices."""
    target = _canonical_options(builder.layers, builder.model_options)
    other = PlanBuilder(builder.shape)
    values = ((row, row.from_options(target)) for row in MODEL_ROWS)
    return SharingConfig(tuple(layers), tuple((row.name, value) for row, value in values if try_apply(other, row, value)))


def _canonical_options(layers: Sequence[LayerPlan], options: ModelOptions) -> ModelOptions:
    return replace(options, norms="tied" if ties_norms(layers) else "private")


def ties_norms(layers: Sequence[LayerPlan]) -> bool:
    """Whether any layer uses another's norm, which is all that `norms: tied` changes."""
    return any(layer.owner(norm) not in (None, i) for i, layer in enumerate(layers) for norm in (ATTENTION_NORM, FFN_NORM))
