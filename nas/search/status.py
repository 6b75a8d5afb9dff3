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
from ..workers import RESULT
from .run import FRONT, Run

STAGES = {
    "final": "train the models of the front",
    "paused-*": "train until early stopping",
    "journal.jsonl": "search",
    "supernet": "train the supernet",
    "predictor": "proxy trainings",
    "converted": "convert the base model",
    "dense": "train the dense model",
}
"""What a run's folder has since a stage began, the last stage first."""


@dataclass(frozen=True)
class Status:
    """A run at a moment.

    state: `finished`, `working` (a process holds its lock) or `stopped`. done: what its last stage has finished, evaluations of
    the search or trainings. front: the configs that no other dominates, and perplexity the lowest of them: of the models of a
    finished run, or of the search so far. bytes: of the folder. seconds: since the run began.
    """

    run: str
    state: str
    stage: str
    done: int
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
    found = next(((name, words) for name, words in STAGES.items() if any(run.folder.glob(name))), ("", "begin"))
    done = len(run.searched()) if found[0] == "journal.jsonl" else len(list(run.folder.glob(f"{found[0]}/*/{RESULT}")))
    return Status(
        name or run.name,
        "finished" if finished else "working" if _locked(run) else "stopped",
        "" if finished else found[1],
        0 if finished or not found[0] else done,
        len(run.front().members) if finished else len(best),
        min((e.losses.perplexity for e in best), default=None),
        sum(path.stat().st_size for path in _files(run.folder)),
        time.time() - (run.folder / "run.json").stat().st_mtime,
    )


def best_so_far(run: Run) -> list[Evaluation]:
    """What the search has evaluated and nothing that it has evaluated dominates."""
    searched = run.searched()
    return [searched[n] for n in front([e.point for e in searched])]


def runs_in(folder: Path) -> list[Run]:
    """The runs below a folder, the latest first."""
    found = [Run(path.parent) for path in folder.glob("**/trial.yaml") if (path.parent / "run.json").is_file()]
    return sorted(found, key=lambda run: -(run.folder / "run.json").stat().st_mtime)


def statuses(folder: Path) -> Iterator[Status]:
    """Of every run below a folder; a damaged one has what is wrong as its state."""
    for run in runs_in(folder):
        name = str(run.folder.relative_to(folder))
        try:
            yield status(run, name)
        except UserError as error:
            yield Status(name, f"damaged: {error}", "", 0, 0, None, 0, 0.0)


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
