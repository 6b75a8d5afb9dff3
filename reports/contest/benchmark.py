"""Which models a search is compared with, and how all are trained.

All are trained alike, each at its own best of several learning rates (its first seed's best, for the others), and the search's
proxy trainings are on its bill.

    FOLDER/contest.csv         a row for each text, model, rate and seed: what a comparison goes on from
    FOLDER/search-TEXT.json    what the search proposed on a text, and the tokens that it took for it
"""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from nas.config import PositiveInt, Strict, read_yaml
from nas.errors import UserError, one_of
from nas.files import write_text
from nas.search.candidates import by_bins
from nas.search.context import Context, presets_in
from nas.search.evaluators import PredictorEvaluator
from nas.search.jobs import StandaloneTraining, train_standalone
from nas.search.run import Run
from nas.search.trial import Trial
from nas.search.trial_file import EvaluateSpec, FinalSpec, PredictorSpec, SearchSpec, TrialFile
from nas.sharing.memory import measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.tracking import Tracker, TrackingSpec
from nas.training.loop import require_rates
from nas.workers import executor

from ..grid import Grid, GridFile, Request, fill_table, read_table
from .leaderboard import BESIDE, PUBLISHED, RANDOM, SEARCH, SMALLER, Leaderboard, Result, best_rate

TABLE = "contest.csv"


@dataclass(frozen=True)
class Smaller(Strict):
    """Dense models made smaller: of fewer layers, or narrower (the FFN in proportion)."""

    layers: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def shapes(self, shape: ModelShape) -> Iterator[ModelShape]:
        """The shapes. Raises UserError for one that cannot be."""
        yield from (replace(shape, num_hidden_layers=count) for count in self.layers)
        for width in self.widths:
            inner = max(round(shape.intermediate_size * width / shape.hidden_size / 8), 1) * 8
            yield replace(shape, hidden_size=width, intermediate_size=inner, head_dim=0)


@dataclass(frozen=True, kw_only=True)
class ContestFile(GridFile):
    """A comparison as its YAML file has it: a grid of trainings, and what the search may do.

    As many random configs are trained as the search's tokens pay for, its proxy trainings included.
    """

    learning_rates: list[float] = field(default_factory=lambda: [0.002, 0.004, 0.008])
    candidates: PositiveInt = 12
    evaluations: PositiveInt = 400
    predictor: PredictorSpec = field(default_factory=PredictorSpec)
    smaller: Smaller = field(default_factory=Smaller)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rates(self.learning_rates)


@dataclass(frozen=True)
class Model:
    """A model that is compared; its kind is who proposed it."""

    kind: str
    name: str
    shape: ModelShape
    config: SharingConfig

    @property
    def key(self) -> str:
        """What tells it from every other model of the space's family."""
        return f"{self.config.hash}-{self.shape.num_hidden_layers}x{self.shape.hidden_size}"


TrainingRun = tuple[str, str, float, int]
"""One training: text, model's key, learning rate, seed."""


@dataclass(frozen=True)
class Proposed:
    """What the search proposed on a text, by itself and `beside` the published schemes, and the tokens that it took for it."""

    configs: tuple[SharingConfig, ...]
    beside: tuple[SharingConfig, ...]
    spent: int


class Benchmark(Grid[ContestFile]):
    """A comparison that can be run."""

    @property
    def model_tokens(self) -> int:
        """What one model takes: every rate with the first seed, one with each other."""
        return self.file.train.tokens * (len(self.file.learning_rates) + self.file.seeds - 1)

    def propose(self, text: str, asked: Request) -> Proposed:
        """Let the search look for its candidates on a text, unless it has. Raises UserError for a file of another format."""
        path, space, count = asked.to / f"search-{text}.json", self.space, self.file.candidates
        if not path.exists() and asked.train:
            run = Run(asked.runs / self.file.name / f"search-{text}")
            run.folder.mkdir(parents=True, exist_ok=True)
            trial = self._trial()
            with Tracker(trial.file.tracking, run.folder, trial.file.name) as tracker, executor(self.file.run) as executed:
                learned = PredictorEvaluator.train(Context(run, trial, self.corpora[text], asked.progress, tracker, executed))
                seen = learned.search()
            picks = {"configs": learned.select(seen, count)}
            picks["beside"] = learned.select(seen, count, presets_in(space))
            data: dict[str, Any] = {"spent": learned.spent} | {
                key: [config.to_data() for config in some] for key, some in picks.items()
            }
            write_text(path, json.dumps(data, indent=1) + "\n")
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if lacking := {"configs", "beside", "spent"} - data.keys():
            raise UserError(f"has no {one_of(sorted(lacking))}", where=str(path), hint="delete it: the search proposes anew")
        configs, beside = (tuple(SharingConfig.from_data(space.shape, one) for one in data[key]) for key in ("configs", "beside"))
        return Proposed(configs, beside, data["spent"])

    def _trial(self) -> Trial:
        """The search that is compared."""
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

    def models(self, proposed: Proposed) -> list[Model]:
        """Every model that is compared, in the order of their kinds; a model may be of several."""
        space, shape, file = self.space, self.space.shape, self.file
        rng = random.Random(f"{file.seed} contest")
        drawn = by_bins(space, file.memory, dict.fromkeys(space.sample(rng) for _ in range(1_000)), file.candidates)
        count = file.candidates + round(proposed.spent / self.model_tokens)
        return [
            *(Model(SEARCH, config.hash, shape, config) for config in proposed.configs),
            *(Model(BESIDE, config.hash, shape, config) for config in proposed.beside),
            *(Model(PUBLISHED, name, shape, config) for config, name in presets_in(space).items()),
            *(Model(RANDOM, config.hash, shape, config) for config in islice(drawn, count)),
            *(
                Model(SMALLER, f"{s.num_hidden_layers} layers of {s.hidden_size}", s, SharingConfig.dense(s))
                for s in file.smaller.shapes(shape)
            ),
        ]

    def training_runs(self, text: str, models: Iterable[Model], results: Iterable[Result]) -> Iterator[TrainingRun]:
        """The trainings that a text's models are judged by and that can be named by now, each once: those of the first seed and,
        where all of a model's have results, those of the others at its best rate."""
        file, done = self.file, dict[str, list[Result]]()
        for r in results:
            if r.text == text and r.seed == file.seed and r.rate in file.learning_rates:
                done.setdefault(r.model, []).append(r)
        for key in dict.fromkeys(model.key for model in models):
            yield from ((text, key, rate, file.seed) for rate in file.learning_rates)
            mine = done.get(key, [])
            if len(mine) == len(file.learning_rates):
                yield from ((text, key, best_rate(mine), file.seed + n) for n in range(1, file.seeds))

    def run(self, asked: Request) -> list[Leaderboard]:
        """Train what the table in the folder lacks; how each text's models compare."""
        proposed = {text: self.propose(text, asked) for text in self.texts}
        models = {text: self.models(proposed[text]) for text in self.texts}
        results = read_table(asked.to / TABLE, Result)
        if asked.train:
            for _ in ("the first seed", "the others"):
                runs = (run for text in self.texts for run in self.training_runs(text, models[text], results))
                results = self._train(runs, {model.key: model for some in models.values() for model in some}, asked)
        return [
            Leaderboard(
                text,
                [(model.kind, model.name, model.key) for model in models[text]],
                [r for r in results if r.text == text],
                proposed[text].spent,
            )
            for text in self.texts
        ]

    def _train(self, runs: Iterable[TrainingRun], models: Mapping[str, Model], asked: Request) -> list[Result]:
        file = self.file

        def job(run: TrainingRun) -> StandaloneTraining:
            text, key, rate, seed = run
            spec = replace(file.train, learning_rate=rate)
            return StandaloneTraining(models[key].shape, models[key].config, spec, seed, *self.arrays[text], keep=False)

        def rows_of(run: tuple[Any, ...], result: Mapping[str, Any]) -> Sequence[Result]:
            text, key, rate, seed = run
            memory = measure(models[key].shape, models[key].config, file.memory)
            sizes = (memory.memory_bytes, memory.weight_bytes, memory.kv_cache_bytes)
            return [Result(text, key, *sizes, rate, seed, result["tokens"], round(result["loss_nats_per_token"], 6))]

        jobs: dict[tuple[Hashable, ...], StandaloneTraining] = {run: job(run) for run in runs}
        where = {"steps": file.train.steps, "work": asked.runs / file.name / "trained", "run": file.run}
        return fill_table(asked.to / TABLE, Result, jobs, rows_of, train=train_standalone, progress=asked.progress, **where)


def load(path: Path, asked: Request | None = None) -> Benchmark:
    """The comparison in a YAML file, as it is asked for. Raises UserError."""
    benchmark = Benchmark.load(ContestFile, path, asked)
    try:
        list(benchmark.file.smaller.shapes(benchmark.space.shape))
    except UserError as error:
        raise error.at(read_yaml(path).where(("smaller",))) from None
    return benchmark
