"""Evaluations grouped for display: one mark a config, its seeds taken together, weights of different origin kept apart.

Owns `MeasuredConfig` and `Panel`, which decides the members of a front. Dominance and the knee are defined in `nas.pareto`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..paired import NOISE, Difference, difference
from ..pareto import front, knee
from ..sharing.label import label, labels
from ..sharing.objectives import OBJECTIVES, QUALITY, SPREAD, STANDARD_ERROR, TASK, Objective
from ..training.evaluation import PART_WORDS, Evaluation, Weights

KINDS: tuple[Weights, ...] = ("retrained", "fine_tuned", "zero_shot", "inherited", "predicted", "converted")
"""The origins of weights, in the order in which they are shown."""

CHOSEN_BY_VALIDATION = "the front, the knee and picks are chosen by the validation text"
"""What a page says where the figures shown are of the test text."""


@dataclass(frozen=True)
class MeasuredConfig:
    """One config with weights of one origin and budget: an evaluation a seed, and every name it goes by."""

    evaluations: tuple[Evaluation, ...]
    names: tuple[str, ...] = ()
    told_apart: str = ""

    @property
    def label(self) -> str:
        """What a person calls it: the conversion that made its weights, and the presets that it is; else the config's label, told
        apart from those beside it."""
        return " = ".join(self.names) or self.config_label

    @property
    def config_label(self) -> str:
        """The same of a preset, too."""
        return self.told_apart or label(self.first.config)

    @property
    def first(self) -> Evaluation:
        """One of its evaluations: what does not depend on the seed is this one's."""
        return self.evaluations[0]

    @property
    def perplexities(self) -> list[float]:
        return [e.losses.perplexity for e in self.evaluations]

    @property
    def perplexity(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.perplexities)

    @property
    def bits_per_byte(self) -> float:
        return statistics.fmean(e.bits_per_byte for e in self.evaluations)

    @property
    def standard_error(self) -> float:
        """Of the perplexity, over the evaluation windows; every seed meets the same windows, so more seeds do not lessen it."""
        return statistics.fmean(e.losses.perplexity_standard_error for e in self.evaluations)

    @property
    def spread(self) -> float:
        """The standard deviation of the perplexity over seeds; nan with one seed."""
        return statistics.stdev(self.perplexities) if len(self.evaluations) > 1 else math.nan

    @property
    def memory_bytes(self) -> int:
        return self.first.memory.memory_bytes

    @property
    def full_label(self) -> str:
        return f"{self.first.run}:{self.label}" if self.first.run else self.label

    def less(self, other: MeasuredConfig) -> Difference | None:
        """Its losses less another's, over the seeds and windows of both; None where they were not kept."""
        mine, theirs = ({e.seed: e.windows for e in m.evaluations if e.windows} for m in (self, other))
        seeds = sorted(mine.keys() & theirs.keys())
        if len({len(rows[seed]) for rows in (mine, theirs) for seed in seeds}) != 1:
            return None
        return difference([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])

    @property
    def objectives(self) -> list[Objective]:
        """By which it is compared, perplexity the last."""
        return [OBJECTIVES[name] for name in self.first.objectives]

    def value(self, name: str) -> float:
        """Of what depends on the weights, perplexity and scores, the mean over seeds."""
        if name == QUALITY:
            return self.perplexity
        return statistics.fmean(e.value(name) for e in self.evaluations) if name.startswith(TASK) else self.first.value(name)

    @property
    def point(self) -> tuple[float, ...]:
        """What fronts and knees are chosen by (`Evaluation.point`), perplexity the last: the mean over seeds."""
        costs = (row.cost(self.value(row.name)) for row in self.objectives[:-1])
        return *costs, statistics.fmean(e.point[-1] for e in self.evaluations)

    @property
    def place(self) -> tuple[float, float]:
        """Where it is drawn: the first objective in the unit of its axis, and perplexity."""
        first = self.objectives[0]
        return self.value(first.name) / first.per, self.perplexity

    @property
    def shown(self) -> str:
        """Its objectives beside perplexity, for a person."""
        return ", ".join(row.show(self.value(row.name)) for row in self.objectives[:-1])

    @property
    def is_dense(self) -> bool:
        return self.first.config.is_dense


def extra_figures(m: MeasuredConfig) -> dict[str, str]:
    """The objectives that no table has anyway, for a person, by their words; a measured one with its spread."""
    found = {}
    for row in m.objectives:
        if row.name not in ("memory_bytes", "weight_bytes", "kv_cache_bytes", QUALITY):
            spread = m.first.values.get(row.name + SPREAD)
            found[row.words] = row.show(m.value(row.name)) + (f" ± {row.show(spread)}" if spread is not None else "")
    return found | _scores(m)


def _scores(m: MeasuredConfig) -> dict[str, str]:
    """Downstream scores, the mean over seeds, with the standard error of one seed's."""
    found, values = {}, m.first.values
    for name in (name for name in values if name.startswith(TASK) and not name.endswith(STANDARD_ERROR)):
        known = [e.values[name] for e in m.evaluations if name in e.values]
        error = values.get(name + STANDARD_ERROR)
        words = name.removeprefix(TASK).replace(".", " ")
        found[words] = f"{statistics.fmean(known):.3f}" + (f" ± {error:.3f}" if error is not None else "")
    return found


@dataclass(frozen=True)
class Panel:
    """Configs with weights of one origin: the only ones that may be compared. Presets are those that have a name."""

    weights: Weights
    all: tuple[MeasuredConfig, ...]

    @property
    def title(self) -> str:
        return "predicted losses" if self.weights == "predicted" else f"{self.weights.replace('_', '-')} weights"

    @property
    def text(self) -> str:
        """The part of the text that the perplexities are of, in words."""
        return " and ".join(sorted({PART_WORDS[e.part] for m in self.all for e in m.evaluations}))

    @property
    def chosen_by_validation(self) -> bool:
        """Whether front and knee follow from other perplexities than those shown."""
        return any(e.validation_perplexity is not None for m in self.all for e in m.evaluations)

    @cached_property
    def runs(self) -> dict[str, list[MeasuredConfig]]:
        """The configs of each run, where several stand together."""
        found: dict[str, list[MeasuredConfig]] = {}
        for m in self.all:
            found.setdefault(m.first.run, []).append(m)
        return dict(sorted(found.items())) if len(found) > 1 else {}

    def is_member(self, m: MeasuredConfig) -> bool:
        """Whether no other dominates a config; another run's equal is no other."""
        return any(m is o or _are_twins(m, o) for o in self.front)

    @cached_property
    def front(self) -> list[MeasuredConfig]:
        """Those that no other dominates, presets and searched alike, by the first objective."""
        return [self.all[i] for i in front([m.point for m in self.all])]

    @cached_property
    def knee(self) -> MeasuredConfig | None:
        """The knee of the front; None if the front has no bend."""
        return self.all[knee([m.point for m in self.all])] if len(self.front) > 2 else None

    @cached_property
    def searched(self) -> list[MeasuredConfig]:
        """Those off the front that are no presets."""
        members = {id(m) for m in self.front}
        return [m for m in self.all if id(m) not in members and not m.names]

    @cached_property
    def presets(self) -> list[MeasuredConfig]:
        return [m for m in self.all if m.names]

    @cached_property
    def preset_front(self) -> list[MeasuredConfig]:
        """The presets that no other preset dominates, by the first objective."""
        return [self.presets[i] for i in front([m.point for m in self.presets])]

    @cached_property
    def dense(self) -> MeasuredConfig | None:
        return next((m for m in self.all if m.is_dense), None)

    def neighbour(self, m: MeasuredConfig) -> MeasuredConfig | None:
        """The member of the front that a config must be better than: of those no larger, the one that is best otherwise."""
        fit = [o for o in self.front if o is not m and not _are_twins(m, o)]
        others = (o for o in fit if all(a <= b for a, b in zip(o.point[:-1], m.point[:-1], strict=True)))
        return min(others, key=lambda o: o.point[-1], default=None)

    def differences(self, m: MeasuredConfig) -> tuple[Difference | None, Difference | None]:
        """A config's loss less the dense model's and less its neighbour's; None where there is none, or windows were not kept."""
        dense, neighbour = ((other and other is not m and m.less(other)) or None for other in (self.dense, self.neighbour(m)))
        return dense, neighbour

    def is_noise(self, m: MeasuredConfig) -> bool:
        """Whether a config is told from its neighbour on the front by no more than noise."""
        _, found = self.differences(m)
        return found is not None and found.is_noise

    @cached_property
    def is_paired(self) -> bool:
        return any(found for m in self.all for found in self.differences(m))

    def whisker(self, m: MeasuredConfig) -> tuple[float, float] | None:
        """The perplexities within `NOISE` standard errors of the difference to the neighbour: of a config within noise, they
        include the neighbour's. Within one standard error over windows, where differences are not known."""
        if self.is_paired:
            _, found = self.differences(m)
            reach = NOISE * found.standard_error if found else math.nan
            ends = m.perplexity * math.exp(-reach), m.perplexity * math.exp(reach)
        else:
            ends = m.perplexity - m.standard_error, m.perplexity + m.standard_error
        return ends if all(map(math.isfinite, ends)) else None

    def beside(self, m: MeasuredConfig) -> dict[str, Any]:
        """What rows for machines say of a config among these: its label and, where they are known, its differences in nats."""
        names, neighbour = {"label": m.config_label}, self.neighbour(m)
        if not self.is_paired:
            return names
        rows = dict[str, Any]()
        for name, found in zip(("dense", "neighbour"), self.differences(m), strict=True):
            rows[f"loss_vs_{name}_nats_per_token"] = found and found.mean
            rows[f"loss_vs_{name}_standard_error"] = found and found.standard_error
        _, found = self.differences(m)
        rows |= {"neighbour": neighbour.config_label if neighbour else None, "within_noise": found and found.is_noise}
        return names | rows | {"windows_needed": found and found.windows_needed(), "seeds_needed": found and found.seeds_needed()}

    def noise(self) -> list[str]:
        """A line for each member of the front that is within noise of its neighbour: what would tell them apart."""
        lines = []
        for m in self.front:
            (_, found), neighbour = self.differences(m), self.neighbour(m)
            if found and neighbour and found.is_noise:
                needed = [("evaluate.final_windows", found.windows_needed()), ("final.seeds", found.seeds_needed())]
                said = " or ".join(f"`{name}: {count}`" for name, count in needed if count)
                nothing = "neither windows nor seeds alone tell them apart"
                apart = f"{said} would tell them apart, if they differ so" if said else nothing
                lines.append(f"{m.full_label} and {neighbour.full_label} are within noise: {spell(found)}; {apart}.")
        return lines


def _are_twins(one: MeasuredConfig, other: MeasuredConfig) -> bool:
    """Whether two runs trained one model, or two that nothing tells apart."""
    return one.first.run != other.first.run and one.point == other.point


_Group = tuple[str, str, int, str, str]


def _group(e: Evaluation) -> _Group:
    return e.config.hash, e.weights, e.tokens, e.supernet, e.run


def by_config(evaluations: Iterable[Evaluation]) -> tuple[MeasuredConfig, ...]:
    """Evaluations of one config, origin and budget as one, in order of first appearance."""
    groups: dict[_Group, list[Evaluation]] = {}
    for e in evaluations:
        groups.setdefault(_group(e), []).append(e)
    names = labels(group[0].config for group in groups.values())
    return tuple(_measured(group, names[group[0].config]) for group in groups.values())


def _measured(group: Sequence[Evaluation], config_label: str) -> MeasuredConfig:
    """Presets that coincide at this depth are one config under several names, not several seeds."""
    by_seed: dict[int, Evaluation] = {}
    for e in group:
        by_seed.setdefault(e.seed, e)
    names = dict.fromkeys(name for e in group if e.name for name in e.name.split(" = "))
    return MeasuredConfig(tuple(by_seed.values()), tuple(names), config_label)


def panels(evaluations: Sequence[Evaluation]) -> list[Panel]:
    """A panel for each origin of weights that occurs, in the order of `KINDS`."""
    found = (Panel(kind, by_config(e for e in evaluations if e.weights == kind)) for kind in KINDS)
    return [panel for panel in found if panel.all]


def spell(found: Difference) -> str:
    """`-0.7% ± 0.5%`: a perplexity beside another's, and the standard error."""
    return f"{found.ratio:+.1%} ± {found.ratio_standard_error:.1%}"


def rows_of(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A row an evaluation for machines: what it says itself, and its config beside the others."""
    found = {_group(m.first): panel.beside(m) for panel in panels(evaluations) for m in panel.all}
    return [e.to_data() | found[_group(e)] for e in evaluations]


def measured_at(measured: Iterable[MeasuredConfig]) -> str:
    """Where the memory was measured, in words; empty if that differs. Those that cannot tell are passed over: with windows the
    cache is of fewer tokens, and there may be none."""
    found = set()
    for first in (m.first for m in measured):
        memory, windowed = first.memory, any(name == "window" for layer in first.config.layers for name, _ in layer)
        if memory.kv_bytes_per_token and not windowed:
            tokens = memory.kv_cache_bytes // memory.kv_bytes_per_token
            found.add(f"weights + KV cache of {tokens:,} tokens, {memory.weight_bytes // memory.unique_params} bytes a number")
    return found.pop() if len(found) == 1 else ""


def budget(measured: Iterable[MeasuredConfig]) -> str:
    """The training tokens and the number of seeds, in words."""
    evaluations = [e for m in measured for e in m.evaluations]
    tokens, seeds = sorted({e.tokens for e in evaluations}), len({e.seed for e in evaluations})
    amount = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return f"{amount} training tokens, {seeds} seed{'s' * (seeds > 1)}"
