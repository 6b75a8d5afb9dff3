"""The front of a search against what could be had without one: published schemes, random configs, smaller dense models.

Owns who takes part and their trainings. All are trained alike, each at its own best of several learning rates (its first
seed's best, for the others), and the search's lessons are on its bill. What is shown of it is `nas.report.contest`'s.

    FOLDER/contest.csv         a row for each text, model, rate and seed: what a contest goes on from
    FOLDER/search-TEXT.json    what the search proposed on a text, and the tokens that it took for it
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import Document, Strict, build, read_yaml
from ..data import Corpus, DataSpec, eval_windows
from ..errors import UserError, one_of
from ..model.supernet import dense_config
from ..report.contest import BESIDE, PUBLISHED, RANDOM, SEARCH, SMALLER, Result, Standing, best_rate
from ..search.context import Context, published
from ..search.jobs import StandaloneTraining, train_standalone
from ..search.predicted import by_bins, learn
from ..search.progress import Progress, StepCount
from ..search.run import Run
from ..search.trial import EvaluateSpec, FinalSpec, PredictorSpec, SearchSpec, Trial, TrialFile
from ..sharing.memory import MemorySpec, measure
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..tracking import Tracker, TrackingSpec
from ..training.loop import TrainSpec, require_rates
from ..workers import RESULT, Failure, Job, RunSpec, executor, train_all
from .rows import read_rows, write_rows
from .spec import asked_for, load_texts

TABLE = "contest.csv"


@dataclass(frozen=True)
class Smaller(Strict):
    """Dense models made smaller: of fewer layers, or narrower (the FFN in proportion)."""

    layers: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def shapes(self, shape: ModelShape) -> Iterator[ModelShape]:
        """The shapes, by name and size. Raises UserError for one that cannot be."""
        yield from (replace(shape, num_hidden_layers=count) for count in self.layers)
        for width in self.widths:
            inner = max(round(shape.intermediate_size * width / shape.hidden_size / 8), 1) * 8
            yield replace(shape, hidden_size=width, intermediate_size=inner, head_dim=0)


@dataclass(frozen=True)
class ContestFile(Strict):
    """A contest as its YAML file has it: a space, texts, how everyone is trained, and what the search may do.

    As many random configs take part as the search's tokens pay for, its lessons included.
    """

    name: str
    space: str
    texts: dict[str, DataSpec]
    train: TrainSpec
    learning_rates: list[float] = field(default_factory=lambda: [0.002, 0.004, 0.008])
    seed: int = 0
    seeds: int = 1
    candidates: int = 12
    evaluations: int = 400
    predictor: PredictorSpec = field(default_factory=PredictorSpec)
    smaller: Smaller = field(default_factory=Smaller)
    windows: int = 128
    memory: MemorySpec = field(default_factory=MemorySpec)
    run: RunSpec = field(default_factory=RunSpec)

    def __post_init__(self) -> None:
        require_rates(self.learning_rates)
        for name, least in {"seeds": 1, "candidates": 1, "evaluations": 1, "windows": 2}.items():
            if getattr(self, name) < least:
                raise UserError(f"{getattr(self, name)} is too few", where=name, hint=f"use {least} or more")
        if not self.texts:
            raise UserError("names no text", where="texts", hint="write texts: {python: {text: python}}")


def read_contest(document: Document, base: Path) -> tuple[ContestFile, SearchSpace]:
    """A contest's file, and its space; its texts are not looked at. Raises UserError."""
    file = build(ContestFile, document)
    space = SearchSpace.load(base / file.space)
    try:
        list(file.smaller.shapes(space.shape))
    except UserError as error:
        raise error.at(document.where(("smaller",))) from None
    return file, space


@dataclass(frozen=True)
class Entrant:
    """A model that takes part; its kind is who proposed it."""

    kind: str
    name: str
    shape: ModelShape
    config: SharingConfig

    @property
    def model(self) -> str:
        """What tells it from every other model of the space's family."""
        return f"{self.config.hash}-{self.shape.num_hidden_layers}x{self.shape.hidden_size}"


@dataclass(frozen=True)
class Bout:
    """One training of one model."""

    text: str
    entrant: Entrant
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its folder's name."""
        return f"{self.text}-{self.entrant.model}-{self.rate:g}-{self.seed}"

    @property
    def result(self) -> tuple[str, str, float, int]:
        """What tells its result from the others."""
        return self.text, self.entrant.model, self.rate, self.seed


@dataclass(frozen=True)
class Proposed:
    """What the search proposed on a text, by itself and `beside` the published schemes, and the tokens that it took for it."""

    configs: tuple[SharingConfig, ...]
    beside: tuple[SharingConfig, ...]
    spent: int


@dataclass(frozen=True)
class Contest:
    """A contest that can be carried out."""

    file: ContestFile
    space: SearchSpace
    corpora: Mapping[str, Corpus]

    @staticmethod
    def load(path: Path, only: Sequence[str] = (), at: Mapping[str, str] | None = None) -> Contest:
        """The contest in a YAML file, with all its texts or `only` some; `at` says where texts lie. Raises UserError."""
        document = read_yaml(path)
        file, space = read_contest(document, path.parent)
        texts = asked_for(document, file.texts, only, at or {})
        return Contest(file, space, load_texts(document, texts, space.shape.vocab_size, at or {}))

    def trial(self) -> Trial:
        """The search that takes part."""
        file = self.file
        spec = TrialFile(
            name=file.name,
            space={},
            final=FinalSpec(**asdict(file.train)),
            predictor=file.predictor,
            search=SearchSpec(evaluations=file.evaluations),
            evaluate=EvaluateSpec(windows=file.windows),
            seed=file.seed,
            memory=file.memory,
            run=file.run,
            tracking=TrackingSpec(enabled=False),
        )
        return Trial(spec, self.space, Path())

    @property
    def model_tokens(self) -> int:
        """What one model takes: every rate with the first seed, one with each other."""
        return self.file.train.tokens * (len(self.file.learning_rates) + self.file.seeds - 1)

    def entrants(self, proposed: Proposed) -> list[Entrant]:
        """Everyone who takes part, in the order of their kinds; a model may be of several."""
        shape, file, spent = self.space.shape, self.file, proposed.spent
        found = [Entrant(SEARCH, config.hash, shape, config) for config in proposed.configs]
        found += [Entrant(BESIDE, config.hash, shape, config) for config in proposed.beside]
        named = [Entrant(PUBLISHED, name, shape, config) for config, name in published(self.space).items()]
        rng = random.Random(f"{file.seed} contest")
        drawn = by_bins(self.space, file.memory, dict.fromkeys(self.space.sample(rng) for _ in range(1_000)), file.candidates)
        count = file.candidates + round(spent / self.model_tokens)
        chance = [Entrant(RANDOM, config.hash, shape, config) for config, _ in zip(drawn, range(count), strict=False)]
        smaller = [
            Entrant(SMALLER, f"{s.num_hidden_layers} layers of {s.hidden_size}", s, dense_config(s))
            for s in file.smaller.shapes(shape)
        ]
        return [*found, *named, *chance, *smaller]

    def bouts(self, text: str, entrants: Iterable[Entrant], results: Iterable[Result]) -> Iterator[Bout]:
        """The trainings that a text's models are judged by and that can be named by now, each once: those of the first seed and,
        where all of a model's have results, those of the others."""
        file, done = self.file, dict[str, list[Result]]()
        for r in results:
            if r.text == text and r.seed == file.seed and r.rate in file.learning_rates:
                done.setdefault(r.model, []).append(r)
        for model, entrant in {entrant.model: entrant for entrant in entrants}.items():
            yield from (Bout(text, entrant, rate, file.seed) for rate in file.learning_rates)
            mine = done.get(model, [])
            if len(mine) == len(file.learning_rates):
                yield from (Bout(text, entrant, best_rate(mine), file.seed + n) for n in range(1, file.seeds))

    def jobs(self, bouts: Mapping[str, Bout]) -> list[Job]:
        """The trainings for the workers. A text's tokens are one array object, so that they travel once, and not once a job."""
        file = self.file
        given = {
            text: (corpus.train.numpy(), eval_windows(corpus.eval, file.train.seq, file.windows).numpy())
            for text, corpus in self.corpora.items()
        }

        def job(bout: Bout) -> StandaloneTraining:
            spec, who = replace(file.train, learning_rate=bout.rate), bout.entrant
            return StandaloneTraining(who.shape, who.config, spec, bout.seed, *given[bout.text], keep=False)

        return [Job(key, job(bout)) for key, bout in bouts.items()]

    def result(self, bout: Bout, told: Mapping[str, Any]) -> Result:
        """What became of a training."""
        memory = measure(bout.entrant.shape, bout.entrant.config, self.file.memory)
        sizes = (memory.memory_bytes, memory.weight_bytes, memory.kv_cache_bytes)
        return Result(*bout.result[:2], *sizes, bout.rate, bout.seed, told["tokens"], round(told["loss_nats_per_token"], 6))


def propose(contest: Contest, text: str, to: Path, work: Path, progress: Progress) -> Proposed:
    """Let the search look for its candidates on a text, unless it has. Raises UserError for a file of another format."""
    path, shape = to / f"search-{text}.json", contest.space.shape
    if not path.exists():
        run = Run(work / f"search-{text}")
        run.folder.mkdir(parents=True, exist_ok=True)
        trial, count = contest.trial(), contest.file.candidates
        with Tracker(trial.file.tracking, run.folder, trial.file.name) as tracker:
            with executor(trial.file.run) as executed:
                learned = learn(Context(run, trial, contest.corpora[text], progress, tracker, executed))
            seen = learned.search()
        picks = {"configs": learned.select_candidates(seen, count)}
        picks["beside"] = learned.select_candidates(seen, count, there=published(contest.space))
        data = {"spent": learned.spent} | {key: [config.to_data() for config in some] for key, some in picks.items()}
        path.write_text(json.dumps(data, indent=1) + "\n")
    data = json.loads(path.read_text(encoding="utf-8"))
    if lacking := {"configs", "beside", "spent"} - data.keys():
        raise UserError(f"has no {one_of(sorted(lacking))}", where=str(path), hint="delete it: the search proposes anew")
    configs, beside = (tuple(SharingConfig.from_data(shape, one) for one in data[key]) for key in ("configs", "beside"))
    return Proposed(configs, beside, data["spent"])


def hold(contest: Contest, to: Path, work: Path, progress: Progress) -> list[Standing]:
    """Carry a contest through from where it stands, writing each result as it comes; how each text's stands.

    A training that failed is said, and done again next time.
    """
    to.mkdir(parents=True, exist_ok=True)
    proposed = {text: propose(contest, text, to, work, progress) for text in contest.corpora}
    entrants = {text: contest.entrants(proposed[text]) for text in contest.corpora}
    results = read_rows(to / TABLE, Result, "make a table of a contest with `nas contest`")
    for _ in ("the first seed", "the others"):
        known = {(r.text, r.model, r.rate, r.seed) for r in results}
        every = (bout for text, them in entrants.items() for bout in contest.bouts(text, them, results))
        if left := {bout.key: bout for bout in every if bout.result not in known}:
            _carry_out(contest, left, results, to, work, progress)
    return [
        Standing(text, [(e.kind, e.name, e.model) for e in them], [r for r in results if r.text == text], proposed[text].spent)
        for text, them in entrants.items()
    ]


def _carry_out(
    contest: Contest, bouts: Mapping[str, Bout], results: list[Result], to: Path, work: Path, progress: Progress
) -> None:
    """Train what is left; each result is among the `results`, and in the table, as soon as it comes."""
    known: set[tuple[str, str, float, int]] = set()
    steps = dict.fromkeys(bouts, contest.file.train.steps)
    with progress.stage(f"train alone ({len(bouts)} left)", sum(steps.values()), "steps") as stage:
        count = StepCount(stage, steps, [key for key in bouts if (work / "trained" / key / RESULT).exists()])

        def keep(key: str, told: Mapping[str, Any]) -> None:
            bout = bouts[key]
            if bout.result not in known:
                known.add(bout.result)
                results.append(contest.result(bout, told))
                write_rows(to / TABLE, sorted(results, key=lambda r: (r.text, r.memory_bytes, r.model, r.rate, r.seed)), Result)

        def tell(key: str, latest: dict[str, Any]) -> None:
            count(key, latest)
            if "window_losses" in latest:
                keep(key, latest)

        done = train_all(contest.jobs(bouts), train_standalone, work / "trained", contest.file.run, on_progress=tell)
    for key, outcome in done.items():
        if isinstance(outcome, Failure):
            progress.say(f"{key} failed: {outcome.reason}")
        else:
            keep(key, outcome)
