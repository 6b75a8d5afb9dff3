"""Every estimator beside the others, scored on one truth, and how far that truth can be trusted.

Owns the scores, their table of estimates on disk, and the page. What an estimator does is `estimators`' and `predict`'s.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..search.predictor import Numbers, Predictor, shrink_to_observed, spread
from ..search.progress import Progress
from .agreement import Agreement, agreement
from .estimators import FREE, Estimate, RankFile, SupernetEstimate
from .known import Known
from .spec import TruthPlan

ESTIMATES = "estimates.csv"
COLUMNS = ("text", "estimator", "seed", "tokens", "hash", "loss_nats_per_token")
DRAWS = 20
"""How often a predictor's training configs are drawn."""
COUNTS = (6, 12, 24)
"""Configs that a predictor learns from."""
INFORMED = 24, 2
"""Configs, and the point of their training, that a predictor learns from which something else tells something too."""


@dataclass(frozen=True)
class Score:
    """An estimator's agreement with the truth: one entry a seed (or draw), and the tokens that one of them takes in all."""

    estimator: str
    tokens: float
    agreements: tuple[Agreement, ...]

    def mean(self, name: str) -> float:
        """The mean of one measure."""
        return float(np.mean([getattr(one, name) for one in self.agreements]))

    def to_data(self) -> dict[str, Any]:
        """Plain data: the mean of each measure, and its standard deviation as `tau_deviation` and so on."""
        names = Agreement.__dataclass_fields__
        measured = {name: self.mean(name) for name in names} | {f"{name}_deviation": self.deviation(name) for name in names}
        return {"estimator": self.estimator, "tokens": self.tokens, "runs": len(self.agreements)} | measured

    def deviation(self, name: str) -> float:
        """Its standard deviation over seeds; 0 for one."""
        return float(np.std([getattr(one, name) for one in self.agreements], ddof=1)) if len(self.agreements) > 1 else 0.0


def free_scores(known: Known, configs: int) -> Iterator[Score]:
    """Estimates that train nothing, and the truth of one seed at each of its points against the other seeds at the end: what that
    takes for all `configs`."""
    for name, estimate in FREE.items():
        yield Score(name, 0, (agreement(known.memory, known.truth, estimate(known)),))
    seeds = range(known.losses.shape[1])
    for point, tokens in enumerate(known.tokens):
        found = (agreement(known.memory, known.without(s), known.losses[:, s, point]) for s in seeds)
        yield Score(f"alone, {_part(known, point)} of the tokens", tokens * configs, tuple(found))


def predictor_scores(known: Known, rows: Numbers, counts: Sequence[int], points: Sequence[int]) -> Iterator[Score]:
    """Predictors from so many configs at a point of training: one seed teaches, the other seeds of the other configs score."""
    for count in counts:
        for point in points:
            found = [_predicted(known, rows, count, point, draw) for draw in range(DRAWS)]
            yield Score(
                f"predictor, {count} configs, {_part(known, point)} of the tokens", known.tokens[point] * count, tuple(found)
            )


def smoothed_scores(known: Known, rows: Numbers, configs: int) -> Iterator[Score]:
    """Every config trained alone with one seed up to each point, and a predictor fitted to all of them, in place of their own
    losses (`smoothed`) or leaning to them (`with a predictor`); scored on the other seeds. What it takes is for all `configs`."""
    ways = {"smoothed": lambda predicted, own: predicted, "with a predictor": shrink_to_observed}
    for words, judged in ways.items():
        for point, tokens in enumerate(known.tokens):
            found = []
            for s in range(known.losses.shape[1]):
                own = known.losses[:, s, point]
                found.append(agreement(known.memory, known.without(s), judged(Predictor.fit(rows, own)(rows), own)))
            yield Score(f"alone, {_part(known, point)} of the tokens, {words}", tokens * configs, tuple(found))


def other_texts(known: Known, others: Sequence[Known]) -> Iterator[Score]:
    """The truth of each other text as an estimate of this one's: does the order of configs hang on the text?"""
    for other in others:
        means = dict(zip(other.hashes, other.truth.tolist(), strict=True))
        if other.text != known.text and means.keys() >= set(known.hashes):
            found = agreement(known.memory, known.truth, np.array([means[h] for h in known.hashes]))
            yield Score(f"the truth of {other.text}", other.tokens[-1] * other.losses.shape[0] * other.losses.shape[1], (found,))


def own_slopes(known: Known, rows: Numbers) -> dict[int, float]:
    """By tokens: of what a config's training is off the predictor's line, how much another seed's end is off its own; by least
    squares through zero, the mean over pairs of seeds. It is what `nas.predict.OWN` may be."""
    seeds = range(known.losses.shape[1])

    def off(point: int) -> list[Numbers]:
        return [known.losses[:, s, point] - Predictor.fit(rows, known.losses[:, s, point])(rows) for s in seeds]

    def slope(early: list[Numbers]) -> float:
        return float(np.mean([early[s] @ end[t] / (early[s] @ early[s]) for s in seeds for t in seeds if s != t]))

    end = off(-1)
    return {tokens: slope(off(point)) for point, tokens in enumerate(known.tokens)}


def _part(known: Known, point: int) -> str:
    return f"{known.tokens[point] / known.tokens[-1]:.0%}"


def _predicted(known: Known, rows: Numbers, count: int, point: int, draw: int) -> Agreement:
    rng = np.random.default_rng(draw)
    seed = draw % known.losses.shape[1]
    teacher_probabilities = spread(known.memory, count, rng)
    rest = np.setdiff1d(np.arange(len(known.hashes)), teacher_probabilities)
    estimate = Predictor.fit(rows[teacher_probabilities], known.losses[teacher_probabilities, seed, point])(rows[rest])
    return agreement(known.memory[rest], known.without(seed)[rest], estimate)


def supernet_scores(known: Known, estimates: Mapping[tuple[str, int], Estimate]) -> Iterator[Score]:
    """The supernets that have been asked, by `(estimator, seed)`."""
    for name in dict.fromkeys(name for name, _ in estimates):
        mine = [said for (estimator, _), said in estimates.items() if estimator == name]
        values = [np.array([said.losses[h] for h in known.hashes]) for said in mine]
        found = tuple(agreement(known.memory, known.truth, value) for value in values)
        yield Score(name, float(np.mean([said.tokens for said in mine])), found)


def informed_scores(known: Known, rows: Numbers, estimates: Mapping[tuple[str, int], Estimate]) -> Iterator[Score]:
    """Predictors that are told what a supernet says of each config, beside what it keeps: does a supernet know anything more?"""
    count, point = INFORMED
    if count > len(known.hashes) // 2:
        return
    for name in dict.fromkeys(name for name, _ in estimates):
        mine = [said for (estimator, _), said in estimates.items() if estimator == name]
        told = [np.column_stack([rows, [-said.losses[h] for h in known.hashes]]) for said in mine]
        found = [_predicted(known, told[draw % len(told)], count, point, draw) for draw in range(DRAWS)]
        tokens = float(np.mean([said.tokens for said in mine])) + known.tokens[point] * count
        yield Score(f"predictor, {count} configs, {_part(known, point)} of the tokens, told by {name}", tokens, tuple(found))


def read_estimates(path: Path, text: str) -> dict[tuple[str, int], Estimate]:
    """What supernets have said of a text's configs, by `(estimator, seed)`; nothing, where there is no table."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"] == text]
    losses: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        losses.setdefault((row["estimator"], int(row["seed"])), {})[row["hash"]] = float(row["loss_nats_per_token"])
    tokens = {(row["estimator"], int(row["seed"])): int(row["tokens"]) for row in rows}
    return {key: Estimate(mine, tokens[key]) for key, mine in losses.items()}


def add_estimate(path: Path, text: str, estimator: str, seed: int, said: Estimate) -> None:
    """Add what a supernet says of every config, all of it or nothing."""
    before = path.read_text(encoding="utf-8") if path.exists() else ",".join(COLUMNS) + "\n"
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(before)
        rows = ([text, estimator, seed, said.tokens, h, round(loss, 6)] for h, loss in said.losses.items())
        csv.writer(file, lineterminator="\n").writerows(rows)
    part.replace(path)


def ask_supernets(file: RankFile, plan: TruthPlan, text: str, folder: Path, work: Path, progress: Progress) -> None:
    """Train every supernet of a file that has not been asked yet, a seed after the other, into the table in `folder`."""
    done = read_estimates(folder / ESTIMATES, text)
    left = {
        (name, seed): SupernetEstimate(file, plan, text, kind, seed)
        for seed in range(file.seeds)
        for name, kind in file.kinds.items()
        if (name, seed) not in done
    }
    for estimate in left.values():
        estimate.trial()  # what cannot be is said before the first is trained
    for (name, seed), estimate in left.items():
        progress.say(f"{text}, seed {seed}: {name}")
        place = work / text / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
        add_estimate(folder / ESTIMATES, text, name, seed, estimate.run(place, progress))


def all_scores(plan: TruthPlan, known: Known, rows: Numbers, table: Path) -> list[Score]:
    """Every estimator's score on one text's truth; `rows` are the features of its configs."""
    estimates = read_estimates(table, known.text)
    early = [p for p, tokens in enumerate(known.tokens) if tokens / known.tokens[-1] > 0.09]
    counts = [count for count in COUNTS if count <= len(known.hashes) // 2]
    return [
        *free_scores(known, len(plan.configs)),
        *smoothed_scores(known, rows, len(plan.configs)),
        *predictor_scores(known, rows, counts, early),
        *supernet_scores(known, estimates),
        *informed_scores(known, rows, estimates),
    ]
