"""`SearchSpace`: a model shape and the choices that are open at each layer, from YAML.

Owns decoding of choices into configs (`suggest`, `decode`), its inverse (`encode`), and limits. Decisions are taken layer by
layer, in the order of `PRIMITIVES`; a primitive that earlier decisions rule out is not asked. A source names a layer to share
with and is resolved to the layer that owns what that layer uses. The number of configs is counted in `nas.sharing.prefix_tree`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..config import Document, PositiveInt, Strict, build, format_bytes, read_yaml
from ..errors import UserError, did_you_mean, one_of
from .builder import ModelOptions, PlanBuilder
from .memo import LayerMemo
from .memory import LIMITS as LIMITS
from .memory import MemorySpec
from .objectives import OBJECTIVES, parse_limits, plan_values
from .plan import LayerPlan, Plan, without_number
from .prefix_tree import PrefixTree
from .prefix_tree import SpaceSize as SpaceSize
from .primitives import ENTRIES, LAYER_ROWS, MODEL_ROWS, OWN, PRIMITIVES, Primitive, entry
from .shape import ModelShape
from .sharing_config import LayerChoices, SharingConfig, commit_canonical, finished_config, try_apply

Assignment = dict[str, Any]  # the options taken, by the names of their decisions
Pick = Callable[[str, tuple[Any, ...]], Any]  # `pick(name, options)` takes one of a decision's options


class Decision(NamedTuple):
    """A primitive to decide, at a layer or (`layer` None) once for the model.

    `str(decision)` names it in Optuna, in journals and in MLflow: `layer_3.kv`, `norms`.
    """

    primitive: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.primitive if self.layer is None else f"layer_{self.layer}.{self.primitive}"

    @staticmethod
    def parse(name: str) -> Decision:
        """The inverse of `str`."""
        layer, _, primitive = name.rpartition(".")
        return Decision(primitive, int(layer.removeprefix("layer_")) if layer else None)


@dataclass(frozen=True)
class SingleDecision:
    """One option of one decision, all others sharing least: the bytes of memory that it saves, and by how many nats a token it
    increases a trained model's loss; None if that was not measured."""

    decision: str
    option: Any
    memory_bytes_saved: int
    loss_increase: float | None = None


@dataclass(frozen=True)
class Window(Strict):
    """Sources: the `window` layers directly before."""

    window: PositiveInt


@dataclass(frozen=True)
class ChoiceSpec(Strict):
    """Where a primitive may be chosen (`layers`, by default all), and from which `sources` or `options`."""

    layers: list[int] | str | None = None
    sources: Literal["previous", "adjacent"] | Window | list[int] | None = None
    options: list[bool | int | float | str] | None = None


@dataclass(frozen=True)
class SpaceFile(Strict):
    """The YAML file of a space; without a model, the trial gives one."""

    choices: dict[str, ChoiceSpec]
    model: ModelShape | None = None
    norms: str | list[str] = "private"
    limits: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchSpace:
    """A shape, and the options of each decision by its name (`layer_3.kv`); `limits` are by the names of objectives.

    `measured` are the single decisions whose cost is known, in a search from a trained model.
    """

    shape: ModelShape
    options: Mapping[str, tuple[Any, ...]]
    limits: Mapping[str, float] = field(default_factory=dict)
    measured: tuple[SingleDecision, ...] = ()

    @staticmethod
    def load(path: Path, shape: ModelShape | None = None) -> SearchSpace:
        """The space in a YAML file; `shape` is for one that names no model. Raises UserError with file, line, rule and hint."""
        return SearchSpace.from_document(read_yaml(path), shape)

    @staticmethod
    def from_document(document: Document, shape: ModelShape | None = None) -> SearchSpace:
        raw = build(SpaceFile, document)
        shape = raw.model or shape
        if shape is None:
            raise UserError("model is missing", where=document.where(("model",)), hint="add `model:`")
        try:
            return _expand(raw, shape)
        except UserError as error:
            raise UserError(error.message, where=document.find(error.where), hint=error.hint) from None

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what was found by them is found again where the space is sent to."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def suggest(self, trial: Any) -> SharingConfig:
        """The config of an Optuna trial's choices (`suggest_categorical`); only decisions that are open are asked."""
        return self.decode(lambda name, options: trial.suggest_categorical(name, options))[0]

    def sample(self, rng: random.Random, predicate: Callable[[SharingConfig], bool] | None = None) -> SharingConfig:
        """A random config: each open decision drawn uniformly. With a predicate, the first of 10,000 draws that satisfies it."""
        for _ in range(10_000):
            config = self.decode(lambda name, options: rng.choice(options))[0]
            if predicate is None or predicate(config):
                return config
        raise UserError("no config that meets the limits was found in 10,000 draws", hint="loosen the limits")

    def decode(self, pick: Pick) -> tuple[SharingConfig, Assignment]:
        """Take every open decision by `pick`; the canonical config, and the decisions that had more than one option."""
        builder, asked = PlanBuilder(self.shape), Assignment()
        self._decide_model(builder, pick, asked)
        return finished_config(builder, [self._decide_layer(builder, pick, asked) for _ in self._open_rows]), asked

    def decode_setting(self, setting: Assignment) -> tuple[SharingConfig, Assignment]:
        """The same, of a setting, which has an option for every decision, open or not; layers that were seen before are found
        again."""
        asked = Assignment()
        builder, layers = self._decided(setting, asked)
        return finished_config(builder, layers), asked

    def plan_of(self, setting: Assignment) -> Plan:
        """The plan of a setting."""
        return self._decided(setting, {})[0].plan()

    def config_of(self, setting: Assignment) -> SharingConfig:
        """The config of a setting."""
        return self.decode_setting(setting)[0]

    def _decided(self, setting: Assignment, asked: Assignment) -> tuple[PlanBuilder, list[LayerChoices]]:
        """The builder of a setting with all layers, and the canonical choices of each."""

        def pick(name: str, options: tuple[Any, ...]) -> Any:
            return setting[name]

        def decide() -> tuple[LayerPlan, LayerChoices, Assignment]:
            here = Assignment()
            choices = self._decide_layer(builder, pick, here)
            return builder.layers[-1], choices, here

        builder, layers = PlanBuilder(self.shape), list[LayerChoices]()
        self._decide_model(builder, pick, asked)
        memo = self._memos[builder.model_options, "decode"]
        for rows in self._open_rows:
            plan, choices, here = memo(builder, tuple([setting[name] for _, name in rows]), decide)
            builder.layers.append(plan)
            layers.append(choices)
            asked |= here
        return builder, layers

    def _decide_model(self, builder: PlanBuilder, pick: Pick, asked: Assignment) -> None:
        """Take the decisions for the whole model."""
        for row in MODEL_ROWS:
            if row.name in self.options:
                row.apply(builder, self._option(row.name, pick, asked))

    def _decide_layer(self, builder: PlanBuilder, pick: Pick, asked: Assignment) -> LayerChoices:
        """Take a layer's decisions and commit it; its canonical choices."""
        for row, name in self._open_rows[builder.index]:
            if self._is_open(builder, row):
                _take(builder, row, self._option(name, pick, asked))
        return commit_canonical(builder)

    def _option(self, name: str, pick: Pick, asked: Assignment) -> Any:
        options = self.options[name]
        if len(options) > 1:
            asked[name] = pick(name, options)
        return asked.get(name, options[0])

    @cached_property
    def _memos(self) -> defaultdict[Hashable, LayerMemo[Any]]:
        """What layers became, by the options of the whole model and by what was computed."""
        return defaultdict(LayerMemo)

    @cached_property
    def _open_rows(self) -> list[list[tuple[Primitive, str]]]:
        """For each layer, the primitives that it may decide, with the names of the decisions."""
        rows = [[(row, str(Decision(row.name, i))) for row in LAYER_ROWS] for i in range(self.shape.num_hidden_layers)]
        return [[(row, name) for row, name in layer if name in self.options] for layer in rows]

    def _is_open(self, builder: PlanBuilder, row: Primitive) -> bool:
        """Whether a primitive is decided at the builder's layer, which owns its KV if an earlier layer reads it."""
        if row.sources and not builder.index:
            return False
        return row.is_available(builder) and not (self._is_cyclic and row.name in CLOSING and builder.is_read_from_below())

    @cached_property
    def _is_cyclic(self) -> bool:
        """Whether a layer may read a later layer's keys and values."""
        decisions = [(Decision.parse(name), options) for name, options in self.options.items()]
        return any(d.primitive == "kv" and any(j != OWN and j > (d.layer or 0) for j in options) for d, options in decisions)

    def global_choices(self) -> dict[ModelOptions, Assignment]:
        """Every combination of the options of the whole model, with its assignment."""
        rows = [row for row in MODEL_ROWS if row.name in self.options]
        found: dict[ModelOptions, Assignment] = {}
        for values in itertools.product(*(self.options[row.name] for row in rows)):
            builder = PlanBuilder(self.shape)
            for row, value in zip(rows, values, strict=True):
                row.apply(builder, value)
            asked = {row.name: value for row, value in zip(rows, values, strict=True) if len(self.options[row.name]) > 1}
            found.setdefault(builder.model_options, asked)
        return found

    def layer_outcomes(
        self, builder: PlanBuilder, target: LayerPlan | None = None, unlike: bool = False
    ) -> dict[LayerPlan, Assignment]:
        """Every plan that the builder's current layer can have, each with its first assignment in the order of the options.

        With a `target`, only partial plans that can still become it are followed. If `unlike`, only the first is tried of sources
        whose layers differ in nothing but their number.
        """
        builder.start_layer()
        found: dict[LayerPlan, Assignment] = {builder.current: {}}
        rows = self._open_rows[builder.index]
        for n, (row, name) in enumerate(rows):
            before, found = found, {}
            for plan, decided in before.items():
                builder.current = plan
                options = self.options[name] if self._is_open(builder, row) else (OWN,)
                for option in _unlike(builder, row, options) if unlike and row.sources else options:
                    builder.current = plan
                    _take(builder, row, option)
                    if builder.current not in found:
                        found[builder.current] = {**decided, name: option} if len(options) > 1 else decided
            if target is not None:
                final = _final_entries([row for row, _ in rows[n + 1 :]])
                found = {plan: decided for plan, decided in found.items() if _may_become(plan, target, final)}
        outcomes: dict[LayerPlan, Assignment] = {}
        for builder.current, decided in found.items():
            outcomes[builder.with_norms()] = decided
        builder.start_layer()
        return outcomes

    def encode(self, config: SharingConfig) -> Assignment | None:
        """The inverse of `suggest`: the decisions that give a config; None if the space does not have it."""
        plan = config.resolve(self.shape)
        for model_options, asked in self.global_choices().items():
            if model_options.outside != plan.outside:
                continue
            builder, decided, memo = PlanBuilder(self.shape, model_options), dict(asked), self._memos[model_options, "encode"]
            for target in plan.layers:
                found = memo(builder, target, lambda: self.layer_outcomes(builder, target).get(target))  # noqa: B023
                if found is None:
                    break
                decided |= found
                builder.layers.append(target)
            else:
                return decided
        return None

    def extra_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight that a supernet needs beyond those of a dense model, or larger than there."""
        sizes: dict[str, tuple[int, ...]] = {}
        for name, options in self.options.items():
            decision = Decision.parse(name)
            parameters = PRIMITIVES[decision.primitive].supernet_parameters
            for option in options:
                if option != OWN:
                    for weight, size in parameters(self.shape, decision.layer or 0, option):
                        sizes[weight] = tuple(map(max, size, sizes.get(weight, size)))
        return sizes

    def contains(self, config: SharingConfig) -> bool:
        """Whether a decoded config belongs to this space; a leaf of a split space contains only some of them."""
        return True

    def meets_limits(self, config: SharingConfig, spec: MemorySpec) -> bool:
        """Whether a config is within every limit of what is in closed form."""
        if not self.limits:
            return True
        values = plan_values(self.shape, config.resolve(self.shape), spec, self.limits)
        return not any(OBJECTIVES[name].excess(value, self.limits[name]) for name, value in values.items())

    def require_reachable(self, size: SpaceSize) -> None:
        """Raise UserError for a limit on `LIMITS` that no config of the space meets, with the lowest that can be met."""
        for name, limit in self.limits.items():
            if size.least.get(name, 0) > limit:
                least = f"{size.least[name]} ({format_bytes(size.least[name])})"
                message = f"no config of this space has {name} of {limit} ({format_bytes(limit)}) or less"
                raise UserError(message, where=f"limits.{name}", hint=f"the smallest that can be met is {least}")

    def prefixes(self, spec: MemorySpec) -> PrefixTree:
        """The tree of layer prefixes, with memory measured at `spec`."""

        def outcomes(builder: PlanBuilder, unlike: bool) -> Iterable[LayerPlan]:
            return self.layer_outcomes(builder, unlike=unlike)

        return PrefixTree(self.shape, spec, self.global_choices(), outcomes)

    def size(self, spec: MemorySpec, width: int = 2_000, seed: int = 0) -> SpaceSize:
        """The number of distinct configs, and the least and most bytes of memory, and of what is limited, among them.

        Exact if no level of the prefix tree has more than `width` nodes; else the count is estimated by random descents and the
        extremes are those of `extreme`.
        """
        names = [name for name in LIMITS if name == "memory_bytes" or name in self.limits]
        return self.prefixes(spec).size(width, random.Random(seed), names)

    def extreme(self, spec: MemorySpec, name: str, sign: int, width: int = 16) -> SharingConfig:
        """The config of least (`sign` 1) or most (-1) bytes by one of `LIMITS`, found by beam search over layer prefixes."""
        return SharingConfig.of_plan(self.shape, self.prefixes(spec).extreme(name, sign, width).plan)

    def largest(self) -> SharingConfig:
        """The config that shares least."""
        return self.config_of(self.least_sharing())

    def least_sharing(self) -> Assignment:
        """The option of each decision that shares least: `own`, or the greatest."""
        return {name: OWN if OWN in options else _greatest(name, options) for name, options in self.options.items()}


def _greatest(name: str, options: tuple[Any, ...]) -> Any:
    """The option of most weights and keys: the largest number, a full-width embedding (0), and false for a flag."""
    if name == "embedding_rank" and 0 in options:
        return 0
    numbers = [option for option in options if isinstance(option, int | float)]
    pick = min if isinstance(options[0], bool) else max
    return pick(numbers) if numbers else options[0]


def _unlike(builder: PlanBuilder, row: Primitive, options: tuple[Any, ...]) -> Iterable[Any]:
    """The options of sources without those of earlier layers that are like another option's, but for their number."""
    kept: dict[Any, Any] = {}
    for option in options:
        source = None if option == OWN else row.resolve_source(builder, option)
        alike = option
        if source is not None and source < builder.index:
            alike = without_number(source, builder.layers[source])
        kept.setdefault(alike, option)
    return kept.values()


def _take(builder: PlanBuilder, row: Primitive, option: Any) -> None:
    """Take an option at the builder's current layer; an option that earlier decisions rule out changes nothing."""
    if option != OWN:
        value = row.resolve_source(builder, option) if row.sources else option
        if value is not None:
            try_apply(builder, row, value)


def _final_entries(later: Sequence[Primitive]) -> dict[str, bool]:
    """The entries of a plan that no later row sets, and whether a later row may still clear them."""
    writes = {name for row in later for name in row.writes.split()}
    return {name: f"-{name}" in writes for name in ENTRIES if name not in writes}


def _may_become(plan: LayerPlan, target: LayerPlan, final: Mapping[str, bool]) -> bool:
    """Whether a plan's final entries are the target's, or may still be cleared as they are there."""
    return all(entry(plan, name) == entry(target, name) or (clears and not entry(target, name)) for name, clears in final.items())


def _expand(raw: SpaceFile, shape: ModelShape) -> SearchSpace:
    options: dict[str, tuple[Any, ...]] = {}
    for i in range(shape.num_hidden_layers):
        for row in LAYER_ROWS:
            if row.name in raw.choices and i in _layers(raw, shape, row.name):
                found = _options(raw, shape, row.name, i)
                if found:
                    options[str(Decision(row.name, i))] = found
    for name in raw.choices:
        if name not in PRIMITIVES:
            raise UserError("unknown choice", where=f"choices.{name}", hint=did_you_mean(name, PRIMITIVES))
    _require_free_sources(options)
    return SearchSpace(shape, _model_options(raw, shape) | options, parse_limits(raw.limits, lambda name: f"limits.{name}"))


def _model_options(raw: SpaceFile, shape: ModelShape) -> dict[str, tuple[Any, ...]]:
    """The options of the decisions for the whole model."""
    norms = [raw.norms] if isinstance(raw.norms, str) else list(raw.norms)
    found = {"norms": _checked(shape, PRIMITIVES["norms"], norms, "norms")}
    for row in MODEL_ROWS:
        if row.name in raw.choices and row.name != "norms":
            found[row.name] = _options(raw, shape, row.name, 0)
    return found


CLOSING = frozenset({"window", "tie", "attn", "k", "v", "drop", "kv", "k_from", "v_from", "attn_map"})
"""Primitives that are not decided at a layer which an earlier layer reads: it has to own its keys and values, of all tokens."""


def _require_free_sources(options: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in options.items():
        primitive, i = Decision.parse(name)
        for j in values if primitive == "kv" and i is not None else ():
            wrong = [c for c in CLOSING if j != OWN and j > i and OWN not in options.get(str(Decision(c, j)), (OWN,))]
            if wrong:
                message = f"layer {j} may be read by a layer below it, so it has to be able to own its keys and values"
                raise UserError(message, where=f"choices.{min(wrong)}", hint=f"add own, or leave layer {j} out of its layers")


def _layers(raw: SpaceFile, shape: ModelShape, name: str) -> range | list[int]:
    spec, depth = raw.choices[name].layers, shape.num_hidden_layers
    where = f"choices.{name}.layers"
    if spec is None:
        return range(depth)
    if isinstance(spec, str):
        ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", spec)
        if not ends:
            raise UserError(f"{spec!r} is not a range of layers", where=where, hint=f"write 1-{depth - 1} or [1, 2, 3]")
        spec = list(range(int(ends[1]), int(ends[2]) + 1))
    first = 1 if PRIMITIVES[name].sources else 0
    wrong = [i for i in spec if not first <= i < depth]
    if wrong or not spec:
        given = f"there is no layer {wrong[0]}" if wrong else "names no layer"
        given = "layer 0 has no layer before it to share with" if wrong[:1] == [0] else given
        raise UserError(given, where=where, hint=f"use {first} to {depth - 1}")
    return spec


def _options(raw: SpaceFile, shape: ModelShape, name: str, i: int) -> tuple[Any, ...]:
    spec, row = raw.choices[name], PRIMITIVES[name]
    if row.sources:
        if spec.options is not None:
            raise UserError("takes sources, not options", where=f"choices.{name}.options", hint="write sources: previous")
        sources = _sources(spec.sources or "previous", i, f"choices.{name}.sources", shape.num_hidden_layers)
        return (OWN, *sources) if sources else ()
    where = f"choices.{name}.options"
    if spec.sources is not None:
        raise UserError("takes options, not sources", where=f"choices.{name}.sources", hint="write options: [...]")
    return _checked(shape, row, row.options(shape) if spec.options is None else spec.options, where)


def _checked(shape: ModelShape, row: Primitive, options: Sequence[Any], where: str) -> tuple[Any, ...]:
    """The options, each once. Raises UserError for one that no layer can have, whatever the other layers do."""
    if not options:
        raise UserError("has no option", where=where, hint=f"use {one_of(row.options(shape))}")
    for option in options:
        error = None if option == OWN and not row.per_model else _objection(shape, row, option)
        if error is not None:
            raise UserError(error.message, where=where, hint=error.hint)
    return tuple(dict.fromkeys(options))


def _objection(shape: ModelShape, row: Primitive, option: Any) -> UserError | None:
    """Why no layer can have an option: not with ties, not with experts, and not alone."""
    error = None
    for prepared in ({"tie": 0}, {"experts": shape.intermediate_size}, {}):
        builder = PlanBuilder(shape)
        for _ in range(shape.num_hidden_layers):
            for name, value in prepared.items():
                try_apply(builder, PRIMITIVES[name], value)
            before = builder.current
            try:
                row.apply(builder, option)
            except UserError as found:
                builder.current, error = before, found
            else:
                return None
            builder.commit_layer()
    return error


def _sources(spec: str | Window | list[int], i: int, where: str, depth: int) -> list[int]:
    if isinstance(spec, list):
        wrong = [j for j in spec if not 0 <= j < depth]
        if wrong or not spec:
            message = f"there is no layer {wrong[0]}" if wrong else "names no layer"
            raise UserError(message, where=where, hint=f"use 0 to {depth - 1}")
        above = where == "choices.kv.sources"
        return [j for j in dict.fromkeys(spec) if j < i or (above and j > i)]
    reach = {"previous": i, "adjacent": 1}[spec] if isinstance(spec, str) else spec.window
    return list(range(max(i - reach, 0), i))
