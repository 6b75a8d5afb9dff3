"""How far a run is, read off its folder by any process, while another works on it or none does.

Owns `Status`. Nothing is written.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..pareto import front
from ..training.evaluation import Evaluation
from .progress import StageSeen, read_budget, read_progress, seconds_left, seen_of
from .run import FRONT, Run


@dataclass(frozen=True)
class Status:
    """A run at a moment.

    state: `finished`, `working` (a process holds its lock) or `stopped`. stage: the last that began, of which `done` of `total`
    units are done. seconds_left: of all stages, by estimate; none where nothing was estimated. front: the configs that no other
    dominates, and perplexity the lowest of them: of the models of a finished run, or of the search so far. bytes: of the folder.
    seconds: since the run began.
    """

    run: str
    state: str
    stage: str
    done: int
    total: int
    unit: str
    seconds_left: float | None
    front: int
    perplexity: float | None
    bytes: int
    seconds: float

    def to_data(self) -> dict[str, Any]:
        """One flat row."""
        return asdict(self)


def status(run: Run, name: str = "") -> Status:
    """How far a run is, by its own name or another. Raises UserError if its files are damaged."""
    finished = run.has(FRONT)
    best = list(run.front().evaluations) if finished else best_so_far(run)
    budget, seen = read_budget(run.folder), read_progress(run.folder)
    last = StageSeen("", 0, "") if finished else seen[-1] if seen else StageSeen("begin", 0, "")
    return Status(
        name or run.name,
        "finished" if finished else "working" if _locked(run) else "stopped",
        *(last.stage, last.done, last.total, last.unit),
        sum(seconds_left(budget, seen)) if budget and not finished else None,
        len(run.front().members) if finished else len(best),
        min((e.losses.perplexity for e in best), default=None),
        sum(path.stat().st_size for path in _files(run.folder)),
        time.time() - run.began,
    )


@dataclass(frozen=True)
class StageStatus:
    """A stage of a run: how much of it is done, 0 to 1; the tokens trained on so far, and in all; its seconds so far, and those
    that are left, by estimate."""

    stage: str
    part: float
    tokens: int
    all_tokens: int
    seconds: float
    seconds_left: float


def stages(run: Run) -> list[StageStatus]:
    """Every stage that is planned; none of a run of an earlier version. Raises UserError if its files are damaged."""
    budget, seen = read_budget(run.folder), read_progress(run.folder)
    left, found = seconds_left(budget, seen), list[StageStatus]()
    for n, row in enumerate(budget):
        one = seen_of(budget, n, seen)
        part, seconds = (one.part, one.seconds) if one else (0.0, 0.0)
        found.append(StageStatus(row.stage, part, round(part * row.tokens), row.tokens, seconds, left[n]))
    return found


def best_so_far(run: Run) -> list[Evaluation]:
    """What the search has evaluated and nothing that it has evaluated dominates."""
    searched = run.searched()
    return [searched[n] for n in front([e.point for e in searched])]


def runs_in(folder: Path) -> list[Run]:
    """The runs below a folder, the latest first."""
    found = [Run(path.parent) for path in folder.glob("**/trial.yaml") if (path.parent / "run.json").is_file()]
    return sorted(found, key=lambda run: -run.began)


def statuses(folder: Path) -> Iterator[Status]:
    """Of every run below a folder; a damaged one has what is wrong as its state."""
    for run in runs_in(folder):
        name = str(run.folder.relative_to(folder))
        try:
            yield status(run, name)
        except UserError as error:
            yield Status(name, f"damaged: {error}", "", 0, 0, "", None, 0, None, 0, 0.0)


def _locked(run: Run) -> bool:
    path = run.folder / ".lock"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder; one that a working process deletes meanwhile is left out."""
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                path.stat()
                yield path
        except OSError:
            continue
