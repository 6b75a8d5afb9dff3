"""The front that a run reports: models that were trained alike, and how one of them is picked.

Owns `Front`. Its evaluations are all of one kind of weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UserError, did_you_mean
from ..pareto import knee
from ..report.measured import MeasuredConfig, Panel, by_config, rows_of
from ..sharing.label import find_config
from ..sharing.memory import MemorySpec
from ..sharing.objectives import DEFAULT, OBJECTIVES, QUALITY, STANDARD_ERROR, parse_value
from ..sharing.shape import ModelShape
from ..training.evaluation import Evaluation, Weights


@dataclass(frozen=True)
class Front:
    """Models trained alike, candidates and presets, and the configs that no other dominates (means over seeds). Their losses
    are of the test text. Which configs are members, the knee and every pick follow from the validation text."""

    evaluations: tuple[Evaluation, ...]

    def __post_init__(self) -> None:
        ordered = sorted(self.evaluations, key=lambda e: (e.point, e.config.hash, e.seed))
        object.__setattr__(self, "evaluations", tuple(ordered))

    @property
    def weights(self) -> Weights:
        """Where the weights are from: one kind in all of them."""
        (kind,) = {e.weights for e in self.evaluations}
        return kind

    @property
    def kind(self) -> str:
        return self.weights.replace("_", "-")

    @cached_property
    def panel(self) -> Panel:
        """Every config, its seeds together, by the first objective, the best first."""
        return Panel(self.weights, tuple(sorted(by_config(self.evaluations), key=lambda m: m.point)))

    @property
    def configs(self) -> tuple[MeasuredConfig, ...]:
        return self.panel.all

    @property
    def members(self) -> list[MeasuredConfig]:
        """Those that no other dominates."""
        return self.panel.front

    @property
    def order(self) -> str:
        return OBJECTIVES[self.evaluations[0].objectives[0]].words

    @property
    def knee(self) -> MeasuredConfig:
        return self.members[knee([m.point for m in self.members])]

    def at(self, shape: ModelShape, spec: MemorySpec) -> Front:
        """The front of the same models with their memory measured elsewhere. Raises UserError if an objective was measured."""
        return Front(tuple(e.at(shape, spec) for e in self.evaluations))

    def pick(self, pick: str) -> Evaluation:
        """A model by a pick of `PICKS`, a preset's name, or a config's label or hash; of several seeds the best. Raises
        UserError for a pick that nothing meets, with the nearest that would."""
        return min(self._pick(pick).evaluations, key=lambda e: e.point)

    def _pick(self, pick: str) -> MeasuredConfig:
        name, equals, value = pick.partition("=")
        if equals and name in LIMIT_OF:
            return self._within(f"{LIMIT_OF[name]}<={value}", f"{name}=")
        if re.search("[<>]=", pick):
            return self._within(pick)
        known = {
            "knee": self.knee,
            "lowest-perplexity": min(self.members, key=lambda m: m.point[-1]),
            "smallest": self.members[0],
        }
        known |= {f"trial={m.first.number}": m for m in self.configs if m.first.number >= 0}
        known |= {m.first.config.hash: m for m in self.configs}
        best_last = sorted(self.configs, key=lambda m: -m.point[-1])  # of several runs' models of one name, the best
        called = [(m, name) for m in best_last for name in (m.label, *m.names)]
        called = [*((m, name.removesuffix("-converted")) for m, name in called), *called]  # a preset's own model goes before
        known |= {said: m for m, name in called for said in (name, f"{m.first.run}:{name}".removeprefix(":"))}
        if pick not in known and (config := find_config(pick, (m.first.config for m in self.configs), f"--pick {pick}")):
            return next(m for m in self.configs if m.first.config == config)
        if pick not in known:
            raise UserError("no such model", where=f"--pick {pick}", hint=did_you_mean(pick, (*LIMIT_OF, *known)))
        return known[pick]

    def _within(self, pick: str, asked: str = "") -> MeasuredConfig:
        """The model of the lowest perplexity within bounds; `asked` is what the user wrote for a single one."""
        left = list(self.configs)
        for bound in pick.split(","):
            name, sign, limit = self._bound(bound)
            kept = [m for m in left if (_value(m, name) <= limit if sign == "<=" else _value(m, name) >= limit)]
            if not kept:
                best = (min if sign == "<=" else max)(_value(m, name) for m in left)
                said = f"no {self.kind} model has {name} of {limit:g} or {'less' if sign == '<=' else 'more'}"
                others = f" within the other bounds of {pick}" if len(left) < len(self.configs) else ""
                hint = f"the {'smallest' if sign == '<=' else 'largest'} is {asked or name + sign}{best:.15g}"
                raise UserError(said + others, where=f"--pick {(asked or bound).rstrip('=')}", hint=hint)
            left = kept
        return min(left, key=lambda m: m.point[-1])

    def _bound(self, text: str) -> tuple[str, str, float]:
        match = re.fullmatch(r"\s*([\w.-]+)\s*([<>]=)\s*(.+?)\s*", text)
        name, sign, value = match.groups() if match else ("",) * 3
        known = [name for name in self.evaluations[0].to_data() if name in OBJECTIVES and not name.endswith(STANDARD_ERROR)]
        if name not in known:
            hint = did_you_mean(name, known) if name else "write it as memory_bytes<=300MiB"
            raise UserError(f"{name or text!r} is no objective of this run", where=f"--pick {text}", hint=hint)
        return name, sign, parse_value(name, value, f"--pick {name}")

    def to_data(self) -> dict[str, Any]:
        panel, every = self.panel, [(m, e) for m in self.configs for e in m.evaluations]
        rows = [(panel.is_member(m), row) for (m, _), row in zip(every, rows_of([e for _, e in every]), strict=True)]
        on, off = ([row for member, row in rows if member is wanted] for wanted in (True, False))
        return {"knee": self.knee.first.config.hash, "front": on, "dominated": off}

    @staticmethod
    def from_data(shape: ModelShape, data: Mapping[str, Any], objectives: tuple[str, ...] = DEFAULT) -> Front:
        """The inverse of `to_data`. Raises ValueError for models that were not trained alike, and for none."""
        rows = (*data["front"], *data["dominated"])
        found = Front(tuple(Evaluation.from_data(shape, row, objectives) for row in rows))
        kinds = {e.weights for e in found.evaluations}
        if len(kinds) != 1:
            raise ValueError(f"its models are of {len(kinds)} kinds of weights")
        return found


def _value(m: MeasuredConfig, name: str) -> float:
    return m.point[-1] if name == QUALITY else m.value(name)


LIMIT_OF = {"max-memory": "memory_bytes", "max-weights": "weight_bytes", "max-cache": "kv_cache_bytes"}
BOUNDS = "memory_bytes<=300MiB,perplexity<=6"
PICKS = ("knee", "lowest-perplexity", "smallest", *(f"{name}=300MiB" for name in LIMIT_OF), BOUNDS, "trial=17")
"""How a model is picked from a front."""
