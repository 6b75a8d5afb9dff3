"""Searches on a tabular benchmark, which a surrogate extends to any config of its space.

Owns `Surrogate` and the searches. As in NAS-Bench-301 (2008.09777) the surrogate is a predictor fitted to real trainings, here
that of `nas.search.candidates`, on all that is known. The samplers are those of `nas search`, through the same study; each
evaluation is told with the noise that one training has, and what was found is judged without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nas.pareto import hypervolume
from nas.search.candidates import Predictor, features
from nas.search.context import presets_in
from nas.search.loop import Study
from nas.search.samplers import SAMPLERS
from nas.search.trial_file import SearchSpec
from nas.sharing.memory import measure
from nas.sharing.sharing_config import SharingConfig

from ..grid import Numbers
from ..ground_truth.agreement import Agreement, agreement
from ..ground_truth.table import BenchmarkTable, reliability
from ..ground_truth.training import GroundTruth

BATCH = 24
COUNTS = (5, 24, 48, 96, 192, 384)
"""Evaluations at which a sampler is judged."""
STARTS = {"the zoo": True, "nothing": False}
"""What is evaluated first: the published schemes that the space can express, or nothing."""
KINDS = tuple(itertools.product(SAMPLERS, STARTS))


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The benchmark's memory and loss of any config of its space: of a known one too the fitted value, so that all are alike."""

    truth: GroundTruth
    table: BenchmarkTable
    seen: dict[SharingConfig, tuple[int, float]] = field(default_factory=dict)

    @cached_property
    def _rows(self) -> Numbers:
        configs = {config.hash: config for config in self.truth.configs}
        return features(self.truth.space.shape, [configs[h] for h in self.table.hashes], self.truth.file.memory)

    @cached_property
    def _fitted(self) -> Predictor:
        return Predictor.fit(self._rows, self.table.final)

    @cached_property
    def noise(self) -> float:
        """The deviation of one training's loss, in nats."""
        return reliability(self.table).noise

    def __call__(self, config: SharingConfig) -> tuple[int, float]:
        """Memory in bytes, and loss in nats a token at the last point, the mean of all seeds."""
        if config not in self.seen:
            shape, spec = self.truth.space.shape, self.truth.file.memory
            loss = float(self._fitted(features(shape, [config], spec))[0])
            self.seen[config] = measure(shape, config, spec).memory_bytes, loss
        return self.seen[config]

    def noisy(self, config: SharingConfig, seed: int) -> tuple[float, float]:
        """The same with the noise of one training, which is one of a config and seed."""
        memory, loss = self(config)
        rng = np.random.default_rng([seed, int(config.hash, 16)])
        return float(memory), loss + float(rng.normal()) * self.noise

    def hypervolume(self, configs: Sequence[SharingConfig]) -> float:
        """The hypervolume of some configs' front, by their perplexity without noise, against the worst of both of all known
        configs (the stored tables are of this, not of `nas.pareto.reference_point`)."""
        points = [(float(memory), float(np.exp(loss))) for memory, loss in map(self, configs)]
        return hypervolume(points, (float(self.table.memory.max()), float(np.exp(self.table.final).max())))

    def held_out(self) -> Agreement:
        """How well it orders the known configs, each predicted from the others."""
        rows, losses, everyone = self._rows, self.table.final, np.arange(len(self.table.hashes))
        others = ((n, np.delete(everyone, n)) for n in everyone)
        predicted = [Predictor.fit(rows[rest], losses[rest])(rows[[n]])[0] for n, rest in others]
        return agreement(self.table.memory, losses, np.array(predicted))


@dataclass(frozen=True)
class SearchRow:
    """The hypervolume of one search's front after so many evaluations."""

    text: str
    sampler: str
    start: str
    seed: int
    evaluations: int
    hypervolume: float


def search(surrogate: Surrogate, sampler: str, start: str, seed: int, counts: Sequence[int] = COUNTS) -> list[SearchRow]:
    """One sampler's search: its front after each of `counts` evaluations."""
    space = surrogate.truth.space
    study = Study(space, SearchSpec(evaluations=counts[-1], sampler=sampler, batch=BATCH), seed)
    first = list(presets_in(space)) if STARTS[start] else []
    study.enqueue([space.encode(config) or {} for config in first])
    asked: list[SharingConfig] = []
    while len(asked) < counts[-1]:
        batch = study.ask(min(max(BATCH, 0 if asked else len(first)), counts[-1] - len(asked)))
        for one in batch:
            study.tell(one.number, surrogate.noisy(one.config, seed))
            asked.append(one.config)
    text = surrogate.table.text
    return [SearchRow(text, sampler, start, seed, count, surrogate.hypervolume(asked[:count])) for count in counts]
