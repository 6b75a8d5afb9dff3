"""A ranking from its file to its scores: reads the truth, trains what is still to be asked, scores everything.

Owns the order of it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..search.predictor import features
from ..search.progress import Progress
from ..workers.cluster import cluster
from .estimators import RankFile
from .known import Known, Reliability, reliability
from .score import ESTIMATES, Score, all_scores, ask_supernets, other_texts, own_slopes
from .spec import TruthPlan
from .truth import TRUTH, read_truth


@dataclass(frozen=True)
class Section:
    """One text's truth, how far it can be trusted, what a config's own early loss tells (`nas.rank.score.own_slopes`), and every
    estimator's score."""

    known: Known
    reliability: Reliability
    slopes: dict[int, float]
    scores: list[Score]


LEAST = 12
"""Configs that must be known before anything is scored: three in each quartile of memory."""


def read_known(
    path: Path, folder: Path, only: Collection[str], at: Mapping[str, str], train: bool
) -> tuple[TruthPlan, list[Known]]:
    """A truth's file, with its texts if something is to be trained, and what the table in a folder knows of each.

    Raises UserError where that is too little.
    """
    plan, rows = TruthPlan.load(path, only, at, train), read_truth(folder / TRUTH)
    knowns = [Known.of(rows, text) for text in plan.texts]
    for known in knowns:
        if len(known.hashes) < LEAST:
            message = f"{len(known.hashes)} configs of {known.text} are known with every seed, and scores need {LEAST}"
            raise UserError(message, where=str(folder / TRUTH), hint=f"go on with `nas truth {path} --to {folder}`")
    return plan, knowns


def carry_out(
    path: Path, folder: Path, runs: Path, only: Collection[str], at: Mapping[str, str], progress: Progress | None
) -> tuple[list[Section], int]:
    """What is found of each text, and the tokens that training every config of the truth once takes.

    Without `progress` nothing is trained. Raises UserError if the folder has no truth, or too little of one.
    """
    file = RankFile.load(path)
    plan, knowns = read_known(path.parent / file.truth, folder, only, at, progress is not None)
    configs = {config.hash: config for config in plan.configs}
    if progress is not None:
        with cluster(plan.file.run):
            for known in knowns:
                ask_supernets(file, plan, known.text, folder, runs / file.name, progress)

    def section(known: Known) -> Section:
        rows = features(plan.space.shape, [configs[h] for h in known.hashes], plan.file.memory)
        scores = [*all_scores(plan, known, rows, folder / ESTIMATES), *other_texts(known, knowns)]
        return Section(known, reliability(known), own_slopes(known, rows), scores)

    return [section(known) for known in knowns], len(plan.configs) * plan.file.train.tokens
