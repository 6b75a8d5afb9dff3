"""A search space: the model's shape and the choices open at each layer, from YAML.

Owns the walk from choices to configs (`suggest`), its inverse (`assignment`), and the limits; how many configs there are is
`nas.reach`'s. A walk decides layer by layer, primitive by primitive in the order of `PRIMITIVES`; a primitive that earlier
decisions have closed is not asked. A source names a layer to share with, and means what that layer uses: sharing with a sharer is
sharing with its root.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ..config import Document, PositiveInt, Strict, build, format_bytes, parse_bytes, read_yaml
from ..errors import UserError, did_you_mean, one_of
from .builder import ModelOptions, PlanBuilder
from .memory import LIMITS as LIMITS
from .memory import MemorySpec, measure_plan
from .plan import LayerPlan
from .primitives import ENTRIES, LAYER_ROWS, MODEL_ROWS, OWN, PRIMITIVES, Primitive, entry
from .reach import SpaceSize as SpaceSize
from .reach import Tree
from .shape import ModelShape
from .sharing_config import SharingConfig, attempt

Assignment = dict[str, Any]


class Trial(Protocol):
    """What of an Optuna trial is used here."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of the choices."""


@dataclass(frozen=True)
class Window(Strict):
    """Sources: the `window` layers just below."""

    window: PositiveInt


@dataclass(frozen=True)
class ChoiceSpec(Strict):
    """One primitive's choices: where (`layers`, all by default) and from what (`sources`, or `options`)."""

    layers: list[int] | str | None = None
    sources: Literal["previous", "adjacent"] | Window | list[int] | None = None
    options: list[bool | int | float | str] | None = None


@dataclass(frozen=True)
class SpaceFile(Strict):
    """A space as its YAML file has it; without a model it is open to any that a trial brings."""

    choices: dict[str, ChoiceSpec]
    model: ModelShape | None = None
    norms: str | list[str] = "private"
    limits: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchSpace:
    """A shape, and for each decision (`layer_3.kv`) its options; `limits` are in bytes, by the names in `LIMITS`."""

    shape: ModelShape
    options: Mapping[str, tuple[Any, ...]]
    limits: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def load(path: Path, shape: ModelShape | None = None) -> SearchSpace:
        """The space in a YAML file; `shape` is for one that names no model. Raises UserError with file, line, rule and hint."""
        return SearchSpace.from_document(read_yaml(path), shape)

    @staticmethod
    def from_document(document: Document, shape: ModelShape | None = None) -> SearchSpace:
        """The space in a document."""
        raw = build(SpaceFile, document)
        shape = raw.model or shape
        if shape is None:
            raise UserError("model is missing", where=document.where(("model",)), hint="add `model:`")
        try:
            return _expand(raw, shape)
        except UserError as error:
            raise UserError(error.message, where=document.find(error.where), hint=error.hint) from None

    def suggest(self, trial: Trial) -> SharingConfig:
        """The config of a trial's choices; only open decisions are asked."""
        return self.walk(lambda name, options: trial.suggest_categorical(name, options))[0]

    def sample(self, rng: random.Random, keep: Callable[[SharingConfig], bool] | None = None) -> SharingConfig:
        """A random config: each open decision drawn evenly. With `keep`, drawn until it says yes (10,000 times at most)."""
        for _ in range(10_000):
            config = self.walk(lambda name, options: rng.choice(options))[0]
            if keep is None or keep(config):
                return config
        raise UserError("no config that meets the limits was found in 10,000 draws", hint="loosen the limits")

    def walk(self, pick: Callable[[str, tuple[Any, ...]], Any]) -> tuple[SharingConfig, Assignment]:
        """Decide everything by `pick(name, options)`; the canonical config and the decisions that were asked."""
        asked: Assignment = {}

        def record(name: str, options: tuple[Any, ...]) -> Any:
            asked[name] = pick(name, options)
            return asked[name]

        builder = PlanBuilder(self.shape)
        for row in MODEL_ROWS:
            if row.name in self.options:
                row.apply(builder, self._decide(row.name, record))
        builder.start()
        for _ in range(self.shape.num_hidden_layers):
            self._walk_layer(builder, record)
        return SharingConfig.of_plan(self.shape, builder.plan()), asked

    def _decide(self, name: str, pick: Callable[[str, tuple[Any, ...]], Any]) -> Any:
        options = self.options[name]
        return options[0] if len(options) == 1 else pick(name, options)

    def _walk_layer(self, builder: PlanBuilder, pick: Callable[[str, tuple[Any, ...]], Any]) -> None:
        for row in self._open_rows(builder.index):
            if row.is_open(builder):
                _take(builder, row, self._decide(f"layer_{builder.index}.{row.name}", pick))
        builder.finish()

    def _open_rows(self, i: int) -> list[Primitive]:
        return [row for row in LAYER_ROWS if f"layer_{i}.{row.name}" in self.options]

    def beginnings(self) -> dict[ModelOptions, Assignment]:
        """Every way to decide what is decided once for the whole model, with its assignment."""
        rows = [row for row in MODEL_ROWS if row.name in self.options]
        found: dict[ModelOptions, Assignment] = {}
        for values in itertools.product(*(self.options[row.name] for row in rows)):
            builder = PlanBuilder(self.shape)
            for row, value in zip(rows, values, strict=True):
                row.apply(builder, value)
            asked = {row.name: value for row, value in zip(rows, values, strict=True) if len(self.options[row.name]) > 1}
            found.setdefault(builder.whole, asked)
        return found

    def layer_outcomes(self, builder: PlanBuilder, target: LayerPlan | None = None) -> dict[LayerPlan, Assignment]:
        """Every plan the builder's current layer can have, each with its first assignment in the order of the options.

        With a `target`, only what may still become that plan is followed.
        """
        trial = builder.copy()
        found: dict[LayerPlan, Assignment] = {trial.current: {}}
        rows = self._open_rows(builder.index)
        for n, row in enumerate(rows):
            name, before, found = f"layer_{builder.index}.{row.name}", found, {}
            for plan, decided in before.items():
                trial.current = plan
                options = self.options[name] if row.is_open(trial) else (OWN,)
                for option in options:
                    trial.current = plan
                    _take(trial, row, option)
                    if trial.current not in found:
                        found[trial.current] = {**decided, name: option} if len(options) > 1 else decided
            if target is not None:
                settled = _settled_after(rows[n + 1 :])
                found = {plan: decided for plan, decided in found.items() if _may_become(plan, target, settled)}
        return {self._settled(trial, plan): decided for plan, decided in found.items()}

    def _settled(self, builder: PlanBuilder, plan: LayerPlan) -> LayerPlan:
        builder.current = plan
        return builder.settled()

    def assignment(self, config: SharingConfig) -> Assignment | None:
        """The inverse of `suggest`: the decisions that give a config, None if the space has no such config."""
        plan = config.resolve(self.shape)
        for whole, asked in self.beginnings().items():
            if whole.outside != plan.outside:
                continue
            builder, decided = PlanBuilder(self.shape, whole), dict(asked)
            for target in plan.layers:
                found = self.layer_outcomes(builder, target).get(target)
                if found is None:
                    break
                decided |= found
                builder.layers.append(target)
                builder.start()
            else:
                return decided
        return None

    def extras(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight that a supernet for this space keeps beyond a dense model's, or wider than it."""
        sizes: dict[str, tuple[int, ...]] = {}
        for name, options in self.options.items():
            layer, _, primitive = name.rpartition(".")
            i = int(layer.removeprefix("layer_") or 0)
            for option in options:
                if option != OWN:
                    for weight, size in PRIMITIVES[primitive].bank(self.shape, i, option):
                        sizes[weight] = tuple(map(max, size, sizes.get(weight, size)))
        return sizes

    def restrict(self, name: str, options: tuple[Any, ...]) -> SearchSpace:
        """The same space with fewer options for one decision; what is left of one option is not asked any more."""
        return replace(self, options={**self.options, name: options})

    def holds(self, config: SharingConfig) -> bool:
        """Whether a config that a walk found is one of this space's; a part of a space says no to the rest."""
        return True

    def meets_limits(self, config: SharingConfig, spec: MemorySpec) -> bool:
        """Whether a config's memory is within every limit."""
        if not self.limits:
            return True
        memory = measure_plan(self.shape, config.resolve(self.shape), spec).to_data()
        return all(memory[name] <= limit for name, limit in self.limits.items())

    def require_reachable(self, reach: SpaceSize) -> None:
        """Raise UserError for a limit that nothing in the space meets, with the nearest that can be met."""
        for name, limit in self.limits.items():
            if reach.least[name] > limit:
                least = f"{reach.least[name]} ({format_bytes(reach.least[name])})"
                message = f"no config of this space has {name} of {limit} ({format_bytes(limit)}) or less"
                raise UserError(message, where=f"limits.{name}", hint=f"the smallest that can be met is {least}")

    def reach(self, spec: MemorySpec, width: int = 2_000, seed: int = 0) -> SpaceSize:
        """How many distinct configs there are, and the least and most bytes among them.

        Exact where no level of the tree of layer prefixes is wider than `width`; else the count is estimated by random descents,
        and the extremes are those of `extreme`.
        """
        return Tree(self, spec).reach(width, random.Random(seed))

    def largest(self) -> SharingConfig:
        """The config that shares least: everything owned, every other decision at its greatest option."""
        least = self.whole_options()
        return self.walk(lambda name, options: least[name])[0]

    def whole_options(self) -> dict[str, Any]:
        """Each decision's option that shares least: `own`, or the greatest."""
        return {name: OWN if OWN in options else _greatest(name, options) for name, options in self.options.items()}

    def extreme(self, spec: MemorySpec, name: str, sign: int, width: int = 16) -> SharingConfig:
        """The config of least (`sign` 1) or most (-1) bytes by one of `LIMITS`, by a beam over layer prefixes."""
        return SharingConfig.of_plan(self.shape, Tree(self, spec).extreme(name, sign, width).plan)


def _greatest(name: str, options: tuple[Any, ...]) -> Any:
    """The option of most weights and keys: the highest count, full width for an embedding (0), and nothing switched on."""
    if name == "embedding_rank" and 0 in options:
        return 0
    numbers = [option for option in options if isinstance(option, int | float)]
    pick = min if isinstance(options[0], bool) else max
    return pick(numbers) if numbers else options[0]


def _take(builder: PlanBuilder, row: Primitive, option: Any) -> None:
    """Take an option at the builder's current layer; one that the decisions before rule out leaves the layer as it is.

    A source means the layer whose part that one uses.
    """
    if option != OWN:
        value = row.root(builder, option) if row.sources else option
        if value is not None:
            attempt(builder, row, value)


def _settled_after(rows: Sequence[Primitive]) -> dict[str, bool]:
    """The entries of a plan that no more row sets, and whether one may still clear them."""
    changes = {name for row in rows for name in row.changes.split()}
    return {name: f"-{name}" in changes for name in ENTRIES if name not in changes}


def _may_become(plan: LayerPlan, target: LayerPlan, settled: Mapping[str, bool]) -> bool:
    """Whether what is settled of a plan is the target's, or may still be cleared as it is there."""
    return all(
        entry(plan, name) == entry(target, name) or (clears and not entry(target, name)) for name, clears in settled.items()
    )


def _expand(raw: SpaceFile, shape: ModelShape) -> SearchSpace:
    options: dict[str, tuple[Any, ...]] = {}
    for i in range(shape.num_hidden_layers):
        for row in LAYER_ROWS:
            if row.name in raw.choices and i in _layers(raw, shape, row.name):
                found = _options(raw, shape, row.name, i)
                if found:
                    options[f"layer_{i}.{row.name}"] = found
    for name in raw.choices:
        if name not in PRIMITIVES:
            raise UserError("unknown choice", where=f"choices.{name}", hint=did_you_mean(name, PRIMITIVES))
    _require_free_sources(options)
    return SearchSpace(shape, _whole(raw, shape) | options, _limits(raw))


def _whole(raw: SpaceFile, shape: ModelShape) -> dict[str, tuple[Any, ...]]:
    """The options of what is decided once for the model."""
    norms = [raw.norms] if isinstance(raw.norms, str) else list(raw.norms)
    found = {"norms": _checked(shape, PRIMITIVES["norms"], norms, "norms")}
    for row in MODEL_ROWS:
        if row.name in raw.choices and row.name != "norms":
            found[row.name] = _options(raw, shape, row.name, 0)
    return found


CLOSING = ("window", "tie", "attn", "k", "v", "drop", "kv", "k_from", "v_from", "attn_map")
"""What may not be open at a layer whose keys and values a layer below reads: it has to own them."""


def _require_free_sources(options: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in options.items():
        layer, _, primitive = name.rpartition(".")
        above = [j for j in values if primitive == "kv" and j != OWN and j > int(layer.removeprefix("layer_"))]
        for j in above:
            wrong = [closing for closing in CLOSING if f"layer_{j}.{closing}" in options]
            if wrong:
                message = f"layer {j} is read by a layer below it, so it has to own its keys and values"
                raise UserError(message, where=f"choices.{wrong[0]}", hint=f"leave layer {j} out of its layers")


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
        error = None if option == OWN and not row.whole else _objection(shape, row, option)
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
                attempt(builder, PRIMITIVES[name], value)
            before = builder.current
            try:
                row.apply(builder, option)
            except UserError as found:
                builder.current, error = before, found
            else:
                return None
            builder.finish()
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


def _limits(raw: SpaceFile) -> dict[str, int]:
    for name in raw.limits:
        if name not in LIMITS:
            raise UserError("unknown limit", where=f"limits.{name}", hint=did_you_mean(name, LIMITS))
    return {name: parse_bytes(value, f"limits.{name}") for name, value in raw.limits.items()}
