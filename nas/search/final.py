"""Which configs are trained from scratch, and what the reported front is.

Owns the choice of candidates and the `Front` of retrained models. Inherited and retrained numbers never meet in one front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UserError, did_you_mean
from ..evaluate import Evaluation
from ..loading import parse_bytes
from ..pareto import Point, front, hypervolume, knee
from ..sharing import SharingConfig


def reference(evaluations: Sequence[Evaluation]) -> Point:
    """A point a tenth beyond the worst of each coordinate: what a hypervolume is measured against."""
    points = [e.point for e in evaluations]
    return 1.1 * max(x for x, _ in points), 1.1 * max(y for _, y in points)


def choose(evaluations: Sequence[Evaluation], count: int) -> list[SharingConfig]:
    """The `count` members of the front that together dominate most: each in turn the one that adds most hypervolume."""
    if not evaluations or count < 1:
        return []
    members = [evaluations[i] for i in front([e.point for e in evaluations])]
    corner, chosen = reference(evaluations), list[Evaluation]()
    while members and len(chosen) < count:
        gains = [hypervolume([e.point for e in (*chosen, member)], corner) for member in members]
        chosen.append(members.pop(max(range(len(members)), key=gains.__getitem__)))
    return [e.config for e in chosen]


@dataclass(frozen=True)
class Front:
    """Retrained models, candidates and presets alike, and which of them no other dominates."""

    evaluations: tuple[Evaluation, ...]

    @cached_property
    def members(self) -> tuple[Evaluation, ...]:
        """The front, from least memory to most."""
        return tuple(self.evaluations[i] for i in front([e.point for e in self.evaluations]))

    @property
    def knee(self) -> Evaluation:
        """The front's knee."""
        return self.members[knee([e.point for e in self.members])]

    def pick(self, rule: str) -> Evaluation:
        """A model by a rule: `knee`, `lowest-perplexity`, `smallest`, `max-memory=300MiB`, `max-weights=…`, `max-cache=…`, `trial=17`,
        or a preset's name or a config's hash. Raises UserError for a rule that nothing meets, with the nearest that would.
        """
        name, equals, value = rule.partition("=")
        if name in LIMIT_OF and equals:
            return self._within(LIMIT_OF[name], parse_bytes(value, f"--pick {name}"), name)
        if name == "trial" and equals:
            return self._one(value, {str(e.number): e for e in self.evaluations if e.number >= 0}, "no retrained model has trial")
        if rule == "knee":
            return self.knee
        if rule in ("lowest-perplexity", "smallest"):
            return self.members[-1 if rule == "lowest-perplexity" else 0]
        named = {e.config.hash: e for e in self.evaluations} | {e.name: e for e in self.evaluations if e.name}
        rules = ("knee", "lowest-perplexity", "smallest", *(f"{limit}=300MiB" for limit in LIMIT_OF), "trial=17")
        return self._one(rule, named, "no such pick:", rules)

    def _within(self, name: str, limit: int, rule: str) -> Evaluation:
        fitting = [e for e in self.evaluations if getattr(e.memory, name) <= limit]
        if not fitting:
            least = min(getattr(e.memory, name) for e in self.evaluations)
            rule_said = f"no retrained model has {name} of {limit} or less"
            raise UserError(rule_said, where=f"--pick {rule}", remedy=f"the smallest is {rule}={least}")
        return min(fitting, key=lambda e: e.losses.perplexity)

    def _one(self, given: str, known: dict[str, Evaluation], rule: str, more: Sequence[str] = ()) -> Evaluation:
        if given not in known:
            raise UserError(f"{rule} {given}", where="--pick", remedy=did_you_mean(given, (*more, *known)))
        return known[given]

    def to_data(self) -> dict[str, Any]:
        """Plain data: the front's rows, then the other retrained models'."""
        members = {e.config.hash for e in self.members}
        rest = [e for e in self.evaluations if e.config.hash not in members]
        return {
            "knee": self.knee.config.hash,
            "front": [e.to_data() for e in self.members],
            "dominated": [e.to_data() for e in sorted(rest, key=lambda e: e.point)],
        }


LIMIT_OF = {"max-memory": "memory_bytes", "max-weights": "weight_bytes", "max-cache": "kv_cache_bytes"}
