"""Train a grid of models: resumable, one table.

Owns what the programs of this folder share: an experiment file's texts, tables of plain rows on disk, trainings that go on from
such a table, the options of a command line, and the frame of a page.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, Self, TypeVar

import click
import numpy as np
from numpy.typing import NDArray

from nas.cli.show import Terminal
from nas.config import Document, Ge, PositiveInt, Strict, build, read_yaml
from nas.data import Corpus, DataSpec, eval_sequences, load_corpus
from nas.errors import UserError, did_you_mean
from nas.files import atomic_write, write_text
from nas.search.jobs import Array
from nas.search.progress import Progress, StepCount
from nas.sharing.memory import MemorySpec
from nas.sharing.space import SearchSpace
from nas.training.loop import TrainSpec
from nas.workers import RESULT, Failure, Job, RunSpec, Train, train_all

Numbers = NDArray[np.float64]
AtLeastTwo = Annotated[int, Ge(2)]


# Experiment files.


@dataclass(frozen=True, kw_only=True)
class GridFile(Strict):
    """A grid of trainings as its YAML file has it: models of a search space, each trained alike on each of `texts` with each of
    `seeds` seeds, and evaluated on `windows` sequences."""

    name: str
    space: str
    train: TrainSpec
    texts: dict[str, DataSpec]
    seed: int = 0
    seeds: PositiveInt = 1
    windows: AtLeastTwo = 128
    memory: MemorySpec = field(default_factory=MemorySpec)
    run: RunSpec = field(default_factory=RunSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.texts:
            raise UserError("names no text", where="texts", hint="write texts: {python: {text: python}}")


File = TypeVar("File", bound=GridFile)


@dataclass(frozen=True, eq=False)
class Grid(Generic[File]):
    """A grid that can be trained. `texts` are those asked for; `corpora` has them, or is empty where nothing is trained."""

    file: File
    space: SearchSpace
    texts: tuple[str, ...]
    corpora: Mapping[str, Corpus]

    @classmethod
    def load(cls, kind: type[File], path: Path, asked: Request | None = None) -> Self:
        """The grid in a YAML file, as it is asked for. Raises UserError."""
        asked, document = asked or Request(path), read_yaml(path)
        file = build(kind, document)
        space = SearchSpace.load(path.parent / file.space)
        for name in (*asked.only, *asked.places):
            if name not in file.texts:
                hint = did_you_mean(name, file.texts)
                raise UserError(f"no text is called {name}", where=document.where(("texts",)), hint=hint)
        texts = tuple(name for name in file.texts if not asked.only or name in asked.only)
        file = replace(file, run=asked.run(file.run))
        corpora = {name: _load_text(document, file, name, space, asked.places) for name in texts if asked.train}
        return cls(file, space, texts, corpora)

    @cached_property
    def arrays(self) -> dict[str, tuple[Array, Array]]:
        """Each text's training tokens and evaluation windows: one object for all jobs, so that it travels to workers once."""
        seq, count = self.file.train.seq, self.file.windows
        return {name: (c.train.numpy(), eval_sequences(c.eval, seq, count).numpy()) for name, c in self.corpora.items()}


def _load_text(document: Document, file: GridFile, name: str, space: SearchSpace, places: Mapping[str, str]) -> Corpus:
    """A text of a file, relative to the file, or at the place given for it, with its evaluation text beside it."""
    spec, base = file.texts[name], Path(document.name).parent
    if name in places:
        beside = spec.eval_text and str(Path(places[name]).parent / spec.eval_text)
        spec, base = replace(spec, text=places[name], eval_text=beside), Path()
    try:
        corpus = load_corpus(spec, space.shape.vocab_size, base)
    except UserError as error:
        raise UserError(error.message, where=document.where(("texts", name)), hint=error.hint) from None
    for tokens in (corpus.eval, corpus.train):
        eval_sequences(tokens, file.train.seq, 1)
    return corpus


# Tables.


class TrainedRow(Protocol):
    """A row of a table of trainings: a dataclass of numbers and words."""

    @property
    def training(self) -> tuple[Hashable, ...]:
        """Which training it is of."""

    @property
    def order(self) -> tuple[Any, ...]:
        """Where it stands in the table, whoever finished first."""


Row = TypeVar("Row")
Trained = TypeVar("Trained", bound=TrainedRow)
KINDS: dict[str, Any] = {"int": int, "float": float, "str": str}


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a CSV file; none if there is no file. Raises UserError for a table of anything else."""
    if not path.exists():
        return []
    columns = {f.name: KINDS[str(f.type)] for f in fields(kind)}  # type: ignore[arg-type]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise UserError(f"is no table of {', '.join(columns)}", where=str(path), hint="use the folder of another table")
        return [kind(**{name: read(row[name]) for name, read in columns.items()}) for row in reader]


def write_table(path: Path, rows: Iterable[Any], kind: type) -> None:
    """Write rows as a CSV file, whole or not at all."""
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(kind)])
        writer.writerows(map(astuple, rows))


def folder_name(training: Iterable[Hashable]) -> str:
    """The folder in which a training works."""
    return "-".join(f"{part:g}" if isinstance(part, float) else str(part) for part in training)


def train_left(
    title: str,
    jobs: Mapping[tuple[Hashable, ...], Any],
    train: Train,
    steps: int,
    work: Path,
    run: RunSpec,
    progress: Progress,
    keep: Callable[[tuple[Hashable, ...], dict[str, Any]], None] = lambda training, result: None,
) -> dict[tuple[Hashable, ...], dict[str, Any]]:
    """Train each job below the folder `work`, where it goes on from what is there; results by training.

    `keep` hears of each result as soon as it comes. A training that fails is said, and left out.
    """
    keys = {folder_name(training): training for training in jobs}
    with progress.stage(f"{title} ({len(jobs)} left)", steps * len(jobs), "steps") as stage:
        count = StepCount(stage, dict.fromkeys(keys, steps), [key for key in keys if (work / key / RESULT).exists()])

        def tell(key: str, latest: dict[str, Any]) -> None:
            count(key, latest)
            if "finished" in latest:  # a training's end, not a report on the way
                keep(keys[key], latest)

        settings = [Job(key, jobs[training]) for key, training in keys.items()]
        outcomes = train_all(settings, train, work, run, on_progress=tell)
    for key, outcome in outcomes.items():
        if isinstance(outcome, Failure):
            progress.say(f"{key} failed: {outcome.reason}")
    return {keys[key]: outcome for key, outcome in outcomes.items() if not isinstance(outcome, Failure)}


def fill_table(
    path: Path,
    kind: type[Trained],
    jobs: Mapping[tuple[Hashable, ...], Any],
    rows_of: Callable[[tuple[Any, ...], Mapping[str, Any]], Iterable[Trained]],
    **training: Any,
) -> list[Trained]:
    """Train what a table has no rows of, and write the table with each result; returns all its rows. See `train_left`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_table(path, kind)
    done = {row.training for row in rows}

    def keep(which: tuple[Hashable, ...], result: Mapping[str, Any]) -> None:
        if which not in done:
            done.add(which)
            rows.extend(rows_of(which, result))
            write_table(path, sorted(rows, key=lambda row: row.order), kind)

    if left := {which: job for which, job in jobs.items() if which not in done}:
        for which, result in train_left("train alone", left, keep=keep, **training).items():
            keep(which, result)  # it was trained before, and its rows were not written
    return rows


def noise_of_seeds(losses: Numbers) -> float:
    """The standard deviation of one training's loss over seeds, in nats; NaN with one seed or one model.

    `losses` are `(models, seeds)`. What all models of a seed have in common is taken off, since they see the same batches: it is
    the residual deviation of a two-way layout, with its degrees of freedom.
    """
    models, seeds = losses.shape
    off = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    free = (models - 1) * (seeds - 1)
    return math.sqrt(float(np.square(off).sum()) / free) if free > 0 else math.nan


# The command line, and the page.


@dataclass(frozen=True)
class Request:
    """What a program is asked for: its file, the folder of its page and table, and which texts, trained or read off the table."""

    path: Path
    to: Path = Path()
    only: Sequence[str] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    train: bool = True
    runs: Path = Path("runs")
    workers: int | None = None
    address: str | None = None
    progress: Progress = field(default_factory=Terminal)

    def run(self, spec: RunSpec) -> RunSpec:
        """Where trainings run: as the file says, or else as the command line does."""
        workers = spec.workers if self.workers is None else self.workers
        return replace(spec, workers=workers, address=self.address or spec.address)

    def write_page(self, title: str, program: str, lines: Iterable[str]) -> Path:
        """Write README.md: its title, what was found (the folder's `findings.md`), the command that made it, and then `lines`."""
        found = self.to / "findings.md"
        head = [found.read_text(encoding="utf-8").strip(), ""] if found.exists() else []
        command = f"python -m reports.{program}" + "".join(f" --only {name}" for name in self.only)
        text = "\n".join([f"# {title}", "", *head, f"Made by `{command}`.", "", *lines])
        return write_text(self.to / "README.md", text.rstrip() + "\n")


def _places(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=PATH`, each."""
    pairs = {text: text.partition("=") for text in given}
    for text, (name, _, path) in pairs.items():
        if not (name and path):
            raise click.BadParameter(f"{text!r} is not NAME=PATH")
    return {name: path for name, _, path in pairs.values()}


def program(file: Path, *options: Callable[[Any], Any], to: Path | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function of a `Request` a command, which prints what the function returns.

    `file` is the experiment file where none is given, `to` the folder where none is given (else the file's own); `options` are
    further ones, which the function takes by name.
    """
    shared = (
        click.argument("path", type=click.Path(path_type=Path), metavar="[FILE.yaml]", default=file),
        click.option("--to", "folder", type=click.Path(path_type=Path), help="The folder of the page and its table."),
        click.option("--only", multiple=True, help="Of the file's texts, this one; may be given again."),
        click.option("--text", "places", multiple=True, callback=_places, metavar="NAME=PATH", help="Where a text lies."),
        click.option("--train/--no-train", default=True, help="Train what is not in the table, or show what is."),
        click.option("--runs", type=click.Path(path_type=Path), default="runs", help="The folder of trainings under way."),
        click.option("--workers", type=click.IntRange(0), help="Processes at work at once, in place of the file's."),
        click.option("--address", help="A Ray cluster to join (host:6379, or auto); by default a local one is started."),
    )
    own = {f.name for f in fields(Request)}

    def decorate(function: Callable[..., Any]) -> click.Command:
        def callback(path: Path, folder: Path | None, **given: Any) -> None:
            asked = Request(path, folder or to or path.parent, **{name: given[name] for name in given if name in own})
            click.echo(function(asked, **{name: given[name] for name in given if name not in own}))

        callback.__doc__ = function.__doc__
        for option in reversed((*shared, *options)):
            callback = option(callback)
        return click.command()(callback)

    return decorate
