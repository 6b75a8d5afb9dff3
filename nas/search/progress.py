"""What a run says while it works, without knowing who listens; how far it is, kept in its folder; and the time that is left.

Owns the protocol, the counting of steps, `progress.json`, and `Status`, which any process reads off a run's folder. The display
is the command line's.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..config import read_json, reading
from ..errors import UserError
from ..pareto import front
from ..tracking.view import PROGRESS as PROGRESS_SERIES
from ..training.evaluation import Evaluation
from .run import FRONT, Run


class Stage(Protocol):
    """A stage that is under way."""

    def update(self, done: int, note: str = "", found: Sequence[Evaluation] = ()) -> None:
        """So many units are done; `note` is the best so far, in words, and `found` what was evaluated."""


class Progress(Protocol):
    """Where stages are shown."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Stage]:
        """Begin a stage of `total` units; it ends with the context."""

    def say(self, text: str) -> None: ...


class StepCount:
    """Updates a stage by the steps of several trainings at once, as an executor's `Report`. `steps` has each training's number
    of steps, by its key; `done` the keys of those that are finished already."""

    def __init__(self, stage: Stage, steps: Mapping[str, int], done: Collection[str]) -> None:
        self.stage, self.steps = stage, steps
        self.done = {key: steps[key] for key in done}
        stage.update(sum(self.done.values()))

    def __call__(self, key: str, latest: Mapping[str, Any]) -> None:
        if "step" in latest:
            self.done[key] = self.steps[key] - (latest["steps"] - latest["step"])
        loss = latest.get("loss_nats_per_token", math.nan)
        self.stage.update(sum(self.done.values()), f"loss {loss:.3f}" if math.isfinite(loss) else "")


class Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        yield self

    def update(self, done: int, note: str = "", found: Sequence[Evaluation] = ()) -> None: ...

    def say(self, text: str) -> None: ...


BUDGET, PROGRESS = "budget.json", "progress.json"
AGAIN = "delete it: the run does not need it"

EVERY = 1.0  # seconds between two writings of it, and between two points of a stage's series


Row = TypeVar("Row", "StageSeen", "StageBudget")


@dataclass(frozen=True)
class StageBudget:
    """What a stage takes, by estimate.

    stage: as `Progress.stage` names it, without the count. count: trainings, or evaluations; no more than this (`at_most`)
    where it depends on what will be measured. tokens: those that are trained on, as the finished run counts them. flops: of all
    passes, two for each multiply-add. peak_bytes: the most that one worker holds; 0 where the system does not tell. disk_bytes:
    what stays, at most. seconds: with all workers. workers: those that do each training together.
    """

    stage: str
    count: int
    tokens: int
    flops: float
    peak_bytes: int
    disk_bytes: int
    seconds: float
    workers: int = 1
    at_most: bool = False


@dataclass(frozen=True)
class StageSeen:
    """How far a stage is, or was when it ended: `done` of `total` units, and its seconds in all processes that worked on it."""

    stage: str
    total: int
    unit: str
    done: int = 0
    seconds: float = 0.0
    ended: bool = False

    @property
    def part(self) -> float:
        """What is done of it, 0 to 1."""
        return 1.0 if self.ended else min(self.done / self.total, 1.0) if self.total else 0.0


def read_progress(folder: Path) -> list[StageSeen]:
    """The stages of a run that have begun, in their order. Raises UserError."""
    return _read(folder / PROGRESS, StageSeen)


def read_budget(folder: Path) -> list[StageBudget]:
    """What a run's stages were estimated to take; none in a run of an earlier version. Raises UserError."""
    return _read(folder / BUDGET, StageBudget)


def _read(path: Path, row: Callable[..., Row]) -> list[Row]:
    if not path.exists():
        return []
    with reading(path, AGAIN):
        return [row(**data) for data in read_json(path, AGAIN)["stages"]]


def forget_after(folder: Path, stage: str) -> None:
    """Forget the stages that began after one, which is gone on with: they will begin anew."""
    seen = read_progress(folder)
    last = max((n for n, one in enumerate(seen) if one.stage == stage), default=len(seen))
    _write(folder, seen[: last + 1])


def _write(folder: Path, seen: Iterable[StageSeen]) -> None:
    part = folder / f"{PROGRESS}.part"
    with suppress(OSError):  # nothing depends on it, so that it is not synced either
        part.write_text(json.dumps({"stages": [asdict(one) for one in seen]}))
        part.replace(folder / PROGRESS)


def seconds_left(budget: Sequence[StageBudget], seen: Sequence[StageSeen]) -> list[float]:
    """What each stage of a budget will still take: its estimate, corrected by what those before it took beyond theirs, and by
    what the stage itself did, the more the further it is."""
    taken = [seen_of(budget, n, seen) for n in range(len(budget))]
    known = [(one, row.seconds * one.part) for one, row in zip(taken, budget, strict=True) if one and one.part]
    estimated = sum(seconds for _, seconds in known)
    factor = sum(one.seconds for one, _ in known) / estimated if estimated else 1.0
    found = []
    for row, one in zip(budget, taken, strict=True):
        part = one.part if one else 0.0
        left = row.seconds * factor * (1 - part)
        found.append((1 - part) * left + part * one.seconds * (1 / part - 1) if one and part else left)
    last = max((n for n, one in enumerate(taken) if one), default=0)
    return [0.0 if n < last else left for n, left in enumerate(found)]  # what another has followed is over


def seen_of(budget: Sequence[StageBudget], n: int, seen: Sequence[StageSeen]) -> StageSeen | None:
    """What was seen of a budget's stage: of those of one name, the first is the first."""
    before = sum(row.stage == budget[n].stage for row in budget[:n])
    return next(iter([one for one in seen if name_of(one.stage) == budget[n].stage][before:]), None)


class Recorded:
    """A `Progress` that hands all on, keeps in a run's folder how far its stages are, and adds the time that is left in all.
    `log` is told the percentage of a stage, as a series of the seconds since the run began."""

    def __init__(
        self, inner: Progress, folder: Path, budget: Sequence[StageBudget], log: Callable[[str, float, int], None], begun: float
    ) -> None:
        self.inner, self.folder, self.budget, self.log, self.begun = inner, folder, budget, log, begun
        self.seen: dict[tuple[str, int], StageSeen] = {}
        for one in read_progress(folder):
            name = name_of(one.stage)
            self.seen[name, sum(known == name for known, _ in self.seen)] = one
        self._begun, self._written, self._logged = Counter[str](), 0.0, dict[str, int]()

    def say(self, text: str) -> None:
        self.inner.say(text)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        key = name_of(name), self._begun[name_of(name)]  # a run that is resumed begins its stages in the same order
        self._begun[key[0]] += 1
        before = self.seen.pop(key, StageSeen(name, total, unit))
        self.seen[key] = replace(before, stage=name, total=total, ended=False)
        with self.inner.stage(name, total, unit) as stage:
            yield _RecordedStage(self, stage, key, before.seconds)
            self.change(key, now=True, ended=True)

    def change(self, key: tuple[str, int], now: bool = False, **fields: Any) -> str:
        """Keep what a stage has become; the time that is left in all, in words."""
        self.seen[key] = replace(self.seen[key], **fields)
        if now or time.monotonic() - self._written > EVERY:
            self._written = time.monotonic()
            series = PROGRESS_SERIES + "_".join(key[0].replace("-", " ").split())
            at = max(int(time.time() - self.begun), self._logged.get(series, -1) + 1)  # a series has one value a second
            self._logged[series] = at
            self.log(series, 100 * self.seen[key].part, at)
            _write(self.folder, self.seen.values())
        left = sum(seconds_left(self.budget, list(self.seen.values())))
        return f"{said_seconds(left)} left in all" if left >= 1 else ""


class _RecordedStage:
    def __init__(self, progress: Recorded, inner: Stage, key: tuple[str, int], before: float) -> None:
        self.progress, self.inner, self.key, self.before = progress, inner, key, before
        self.began = time.monotonic()

    def update(self, done: int, note: str = "", found: Sequence[Evaluation] = ()) -> None:
        left = self.progress.change(self.key, done=done, seconds=self.before + time.monotonic() - self.began)
        self.inner.update(done, " · ".join(filter(None, (note, left))), found)


def name_of(title: str) -> str:
    """The name of a stage in its title, which may have a count."""
    return title.partition(" (")[0]


def said_seconds(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`: an estimate, no more exact than it is."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
        _bytes(run.folder),
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


def _bytes(folder: Path) -> int:
    """Of the files below a folder; one that a working process deletes meanwhile is left out."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.stat().st_size if path.is_file() else 0
    return found
