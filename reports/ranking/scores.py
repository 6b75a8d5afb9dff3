"""Every estimator's score on one text's benchmark, and the table of what supernets have estimated.

Owns the estimators that need no training of their own (`FREE`, single trainings, predictors), the scores, and `estimates.csv`.
How a supernet is trained is `estimators`'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.search.candidates import Predictor, shrink_to_observed

from ..grid import Numbers, Request, read_table, write_table
from ..ground_truth.agreement import Agreement, agreement
from ..ground_truth.table import BenchmarkTable
from ..ground_truth.training import GroundTruth
from .estimators import Estimate, RankFile, SupernetEstimate

TABLE = "estimates.csv"
FREE: dict[str, Callable[[BenchmarkTable], Numbers]] = {
    "bytes": lambda table: -table.memory,
    "weight bytes": lambda table: -table.weights,
    "operations": lambda table: -table.flops,
}
"""Estimates that train nothing: more memory, more weights or more operations a token, lower loss."""
DRAWS = 20
"""How often a predictor's training configs are drawn."""
COUNTS = (6, 12, 24)
"""Configs that a predictor is fitted to."""
INFORMED = 24, 2
"""Configs, and the point of their training, that a predictor is fitted to which has a supernet's estimate as a feature."""

Estimates = Mapping[str, Sequence[Estimate]]
"""By the supernet's name, one a seed."""


@dataclass(frozen=True)
class Score:
    """An estimator's agreement with the benchmark: one entry a seed (or draw), and the tokens that one of them takes in all."""

    estimator: str
    tokens: float
    agreements: tuple[Agreement, ...]

    def mean(self, name: str) -> float:
        """The mean of one measure."""
        return float(np.mean([getattr(one, name) for one in self.agreements]))

    def deviation(self, name: str) -> float:
        """Its standard deviation over seeds; 0 for one."""
        return float(np.std([getattr(one, name) for one in self.agreements], ddof=1)) if len(self.agreements) > 1 else 0.0


def free_scores(table: BenchmarkTable) -> Iterator[Score]:
    """Estimates that train nothing."""
    for name, estimate in FREE.items():
        yield Score(name, 0, (agreement(table.memory, table.final, estimate(table)),))


def single_scores(table: BenchmarkTable, rows: Numbers, configs: int) -> Iterator[Score]:
    """Every config trained alone with one seed up to each point, scored on the other seeds: its own losses, a predictor fitted to
    all of them in their place (`smoothed`), or losses shrunk to that (`with a predictor`). The tokens are those of all
    `configs`."""
    ways: dict[str, Callable[[Numbers], Numbers]] = {
        "": lambda own: own,
        ", smoothed": lambda own: Predictor.fit(rows, own)(rows),
        ", with a predictor": lambda own: shrink_to_observed(Predictor.fit(rows, own)(rows), own),
    }
    for words, estimate in ways.items():
        for point, tokens in enumerate(table.tokens):
            found = (
                agreement(table.memory, table.without(s), estimate(table.losses[:, s, point]))
                for s in range(table.losses.shape[1])
            )
            yield Score(f"alone, {table.part(point)} of the tokens{words}", tokens * configs, tuple(found))


def predictor_scores(table: BenchmarkTable, rows: Numbers, counts: Sequence[int], points: Sequence[int]) -> Iterator[Score]:
    """Predictors fitted to so many configs at a point of training, with one seed; the other seeds of the other configs score."""
    for count in counts:
        for point in points:
            found = (_predicted(table, rows, count, point, draw) for draw in range(DRAWS))
            name = f"predictor, {count} configs, {table.part(point)} of the tokens"
            yield Score(name, table.tokens[point] * count, tuple(found))


def spread(memory: Numbers, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` configs to fit to, one at random of each of as many bands of memory."""
    return np.array([rng.choice(band) for band in np.array_split(np.argsort(memory, kind="stable"), count)])


def _predicted(table: BenchmarkTable, rows: Numbers, count: int, point: int, draw: int) -> Agreement:
    rng = np.random.default_rng(draw)
    seed = draw % table.losses.shape[1]
    fitted = spread(table.memory, count, rng)
    rest = np.setdiff1d(np.arange(len(table.hashes)), fitted)
    estimate = Predictor.fit(rows[fitted], table.losses[fitted, seed, point])(rows[rest])
    return agreement(table.memory[rest], table.without(seed)[rest], estimate)


def supernet_scores(table: BenchmarkTable, estimates: Estimates) -> Iterator[Score]:
    """The supernets that have been trained."""
    for name, mine in estimates.items():
        values = [np.array([one.losses[h] for h in table.hashes]) for one in mine]
        found = tuple(agreement(table.memory, table.final, value) for value in values)
        yield Score(name, float(np.mean([one.tokens for one in mine])), found)


def informed_scores(table: BenchmarkTable, rows: Numbers, estimates: Estimates) -> Iterator[Score]:
    """Predictors that have a supernet's estimate as a feature: does a supernet know anything more?"""
    count, point = INFORMED
    if count > len(table.hashes) // 2:
        return
    for name, mine in estimates.items():
        given = [np.column_stack([rows, [-one.losses[h] for h in table.hashes]]) for one in mine]
        found = tuple(_predicted(table, given[draw % len(given)], count, point, draw) for draw in range(DRAWS))
        tokens = float(np.mean([one.tokens for one in mine])) + table.tokens[point] * count
        yield Score(f"predictor, {count} configs, {table.part(point)} of the tokens, given {name}", tokens, found)


def other_texts(table: BenchmarkTable, others: Sequence[BenchmarkTable]) -> Iterator[Score]:
    """The benchmark of each other text as an estimate of this one's: does the order of configs depend on the text?"""
    for other in others:
        means = dict(zip(other.hashes, other.final.tolist(), strict=True))
        if other.text != table.text and means.keys() >= set(table.hashes):
            found = agreement(table.memory, table.final, np.array([means[h] for h in table.hashes]))
            tokens = other.tokens[-1] * other.losses.shape[0] * other.losses.shape[1]
            yield Score(f"the benchmark of {other.text}", tokens, (found,))


def all_scores(table: BenchmarkTable, others: Sequence[BenchmarkTable], rows: Numbers, configs: int, folder: Path) -> list[Score]:
    """Every estimator's score on one text; `rows` are the features of the table's configs, of `configs` in all."""
    estimates = read_estimates(folder / TABLE, table.text)
    early = [p for p, tokens in enumerate(table.tokens) if tokens / table.tokens[-1] > 0.09]
    counts = [count for count in COUNTS if count <= len(table.hashes) // 2]
    return [
        *free_scores(table),
        *single_scores(table, rows, configs),
        *predictor_scores(table, rows, counts, early),
        *supernet_scores(table, estimates),
        *informed_scores(table, rows, estimates),
        *other_texts(table, others),
    ]


def own_slopes(table: BenchmarkTable, rows: Numbers) -> dict[int, float]:
    """By tokens: of what a config's training is off the predictor, how much another seed's end is off its own; by least squares
    through zero, the mean over pairs of seeds. It is what `nas.search.candidates.OWN` may be."""
    seeds = range(table.losses.shape[1])

    def off(point: int) -> list[Numbers]:
        return [table.losses[:, s, point] - Predictor.fit(rows, table.losses[:, s, point])(rows) for s in seeds]

    def slope(early: list[Numbers]) -> float:
        return float(np.mean([early[s] @ end[t] / (early[s] @ early[s]) for s in seeds for t in seeds if s != t]))

    end = off(-1)
    return {tokens: slope(off(point)) for point, tokens in enumerate(table.tokens)}


@dataclass(frozen=True)
class EstimateRow:
    """What one supernet estimates of one config."""

    text: str
    estimator: str
    seed: int
    tokens: int
    hash: str
    loss_nats_per_token: float

    @property
    def training(self) -> tuple[str, str, int]:
        """Which supernet it is of, by the name that it has now."""
        return self.text, re.sub("^even", "dense-biased", self.estimator), self.seed


def read_estimates(path: Path, text: str) -> dict[str, list[Estimate]]:
    """What supernets have estimated of a text's configs; nothing, where there is no table."""
    losses: dict[tuple[str, str, int], dict[str, float]] = {}
    rows = [row for row in read_table(path, EstimateRow) if row.text == text]
    for row in rows:
        losses.setdefault(row.training, {})[row.hash] = row.loss_nats_per_token
    tokens = {row.training: row.tokens for row in rows}
    found: dict[str, list[Estimate]] = {}
    for training, mine in losses.items():
        found.setdefault(training[1], []).append(Estimate(mine, tokens[training]))
    return found


def train_supernets(file: RankFile, truth: GroundTruth, text: str, asked: Request) -> None:
    """Train every supernet of a file that the table does not have, a seed after the other, into the table."""
    path = asked.to / TABLE
    rows = read_table(path, EstimateRow)
    done = {row.training for row in rows}
    left = {
        (text, name, seed): SupernetEstimate(file, truth, text, kind, seed)
        for seed in range(file.seeds)
        for name, kind in file.kinds.items()
        if (text, name, seed) not in done
    }
    for estimate in left.values():
        estimate.trial()  # what cannot be is said before the first is trained
    for (_, name, seed), estimate in left.items():
        asked.progress.say(f"{text}, seed {seed}: {name}")
        folder = asked.runs / file.name / text / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
        found = estimate.run(folder, asked.progress)
        rows += [EstimateRow(text, name, seed, found.tokens, h, round(loss, 6)) for h, loss in found.losses.items()]
        write_table(path, rows, EstimateRow)
