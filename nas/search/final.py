"""Which configs are trained alone, and what the reported front is.

Owns the choice of candidates and the `Front` of models that were trained alike. Inherited numbers and theirs never meet in one
front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import parse_bytes
from ..errors import UserError, did_you_mean
from ..pareto import Point, front, knee
from ..report.measured import MeasuredConfig, by_config
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Weights


def reference(evaluations: Sequence[Evaluation]) -> Point:
    """A point a tenth beyond the worst of each coordinate: what a hypervolume is measured against."""
    points = [e.point for e in evaluations]
    return 1.1 * max(x for x, _ in points), 1.1 * max(y for _, y in points)


def zero_shot(evaluations: Sequence[Evaluation]) -> dict[SharingConfig, Evaluation]:
    """Each config as the search saw it at its best, on inherited weights or converted by a method.

    The two kinds may be compared to choose what is fine-tuned: same windows, and either is what the config costs before it is
    trained alone, whose weights it then begins with. They never share a front that is reported.
    """
    found: dict[SharingConfig, Evaluation] = {}
    for e in evaluations:
        known = found.get(e.config)
        if known is None or e.losses.loss_nats_per_token < known.losses.loss_nats_per_token:
            found[e.config] = e
    return found


def choose(
    evaluations: Sequence[Evaluation],
    count: int,
    known: Collection[SharingConfig] = (),
    scale: Callable[[float], float] = math.log,
) -> list[SharingConfig]:
    """`count` configs to train alone, besides the `known` ones: the best in each of `count` bands of memory, which are equally
    wide on a scale (by default in ratio).

    A supernet tells configs of like size apart better than small from large (it starves the large ones), so its own front may lie
    at one end of the range. Bands give every part of the range its candidate. A band without any leaves its place to the
    fullest one's next best.
    """
    fresh = [e for e in evaluations if e.config not in known]
    if not fresh:
        return []
    sizes = [scale(e.memory.memory_bytes) for e in evaluations]
    width = (max(sizes) - min(sizes)) / count or 1.0
    bands: dict[int, list[Evaluation]] = {}
    for e in sorted(fresh, key=lambda e: (e.losses.loss_nats_per_token, e.number)):
        bands.setdefault(min(int((scale(e.memory.memory_bytes) - min(sizes)) / width), count - 1), []).append(e)
    chosen = [band.pop(0) for band in bands.values()]
    while len(chosen) < min(count, len(fresh)):
        chosen.append(max(bands.values(), key=len).pop(0))
    return [e.config for e in sorted(chosen, key=lambda e: e.point)]


@dataclass(frozen=True)
class Front:
    """Models trained alike, candidates and presets, by memory, and the configs that no other dominates (means over seeds)."""

    evaluations: tuple[Evaluation, ...]

    def __post_init__(self) -> None:
        ordered = sorted(self.evaluations, key=lambda e: (e.point, e.config.hash, e.seed))
        object.__setattr__(self, "evaluations", tuple(ordered))

    @property
    def weights(self) -> Weights:
        """Where the weights are from: one kind in all of them."""
        (kind,) = {e.weights for e in self.evaluations}
        return kind

    @cached_property
    def configs(self) -> tuple[MeasuredConfig, ...]:
        """Every config, its seeds taken together, from least memory to most."""
        return tuple(sorted(by_config(self.evaluations), key=lambda m: m.point))

    @cached_property
    def members(self) -> tuple[MeasuredConfig, ...]:
        """The front, from least memory to most."""
        return tuple(self.configs[i] for i in front([m.point for m in self.configs]))

    @property
    def knee(self) -> MeasuredConfig:
        """The front's knee."""
        return self.members[knee([m.point for m in self.members])]

    @property
    def presets(self) -> tuple[Evaluation, ...]:
        """The published schemes among them."""
        return tuple(e for e in self.evaluations if e.name)

    def pick(self, pick: str) -> Evaluation:
        """A model by a pick of `PICKS`, a preset's name or a config's hash; of several seeds the best.

        Raises UserError for a pick that nothing meets, with the nearest that would.
        """
        return min(self._pick(pick).evaluations, key=lambda e: e.losses.perplexity)

    def _pick(self, pick: str) -> MeasuredConfig:
        name, equals, value = pick.partition("=")
        if equals and name in LIMIT_OF:
            return self._within(LIMIT_OF[name], parse_bytes(value, f"--pick {name}"), name)
        known = {"knee": self.knee, "lowest-perplexity": self.members[-1], "smallest": self.members[0]}
        known |= {f"trial={m.first.number}": m for m in self.configs if m.first.number >= 0}
        known |= {name: m for m in self.configs for name in (m.first.config.hash, *m.names)}
        if pick not in known:
            raise UserError("no such model", where=f"--pick {pick}", hint=did_you_mean(pick, (*LIMIT_OF, *known)))
        return known[pick]

    def _within(self, name: str, limit: int, pick: str) -> MeasuredConfig:
        sizes = [getattr(m.first.memory, name) for m in self.configs]
        if min(sizes) > limit:
            said = f"no {self.weights} model has {name} of {limit} or less"
            raise UserError(said, where=f"--pick {pick}", hint=f"the smallest is {pick}={min(sizes)}")
        return min((m for m, size in zip(self.configs, sizes, strict=True) if size <= limit), key=lambda m: m.perplexity)

    def to_data(self) -> dict[str, Any]:
        """Plain data: the front's rows, then the other models'; a row for each seed."""
        members = {m.first.config for m in self.members}
        rows = [(e.config in members, e.to_data()) for m in self.configs for e in m.evaluations]
        on, off = ([row for member, row in rows if member is wanted] for wanted in (True, False))
        return {"knee": self.knee.first.config.hash, "front": on, "dominated": off}

    @staticmethod
    def from_data(shape: ModelShape, data: Mapping[str, Any]) -> Front:
        """The inverse of `to_data`."""
        return Front(tuple(Evaluation.from_data(shape, row) for row in (*data["front"], *data["dominated"])))


LIMIT_OF = {"max-memory": "memory_bytes", "max-weights": "weight_bytes", "max-cache": "kv_cache_bytes"}
PICKS = ("knee", "lowest-perplexity", "smallest", *(f"{name}=300MiB" for name in LIMIT_OF), "trial=17")
"""How a model is picked from a front."""
