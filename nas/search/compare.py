"""Presets on equal terms: every preset trained alone, from scratch, on equal tokens, at each of several learning rates.

Owns the comparison's file, its folder, and the choice of each preset's learning rate: the best one depends on what is shared, so
each preset is shown at its own. It is chosen by the validation text, and shown on the test text. How is `nas.report.compare`'s.

    FOLDER/compare.yaml, run.json, tokenizer.json     the settings and the text
    FOLDER/trained/HASH-RATE-SEED/result.json         there if that training is done: it is not done again
    FOLDER/README.md, compared.csv, compared.png      at the end

The same command continues a comparison, with more presets, rates or seeds if wanted. What its trainings have in common (`COMMON`)
must stay the same.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from ..config import Ge, PositiveInt, Seed, Strict, build, dump_yaml, parse_yaml, read_text, read_yaml, reading
from ..data import Corpus, DataSpec, bits_per_byte, eval_sequences, load_corpus, open_texts
from ..errors import RunFailed, UserError
from ..files import require_writable
from ..paired import difference
from ..presets import PRESETS, preset, presets
from ..presets.weights import WEIGHTS
from ..report.compare import Compared, Comparison, write_comparison
from ..report.measured import MeasuredConfig
from ..report.tables import Sample
from ..sharing.memory import MemorySpec, measure
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Losses
from ..training.loop import TrainSpec, require_rates
from ..workers import RESULT, Failure, Job, RunSpec, train_all
from ..workers.executor import Outcome
from .jobs import Array, StandaloneTraining, train_standalone
from .launch import Launch
from .progress import Progress, StepCount
from .run import DAMAGED, TRAIN_TOKENS, Run, provenance, require_parts, require_unused
from .trial import require_lengths
from .trial_file import require_name

FILE, TRAINED = "compare.yaml", "trained"
COMMON = ("model", "train", "windows", "data")  # what all trainings of a folder have in common


@dataclass(frozen=True)
class CompareFile(Strict):
    """A comparison as its YAML file has it. Without a list of `presets` all that the model can have are compared."""

    name: str
    model: ModelShape
    train: TrainSpec
    learning_rates: list[float] = field(default_factory=lambda: [0.002, 0.004, 0.008])
    presets: list[str] | None = None
    seed: Seed = 0
    seeds: PositiveInt = 1
    windows: Annotated[int, Ge(2)] = 128
    data: DataSpec = field(default_factory=DataSpec)
    memory: MemorySpec = field(default_factory=MemorySpec)
    run: RunSpec = field(default_factory=RunSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_name(self.name)
        require_rates(self.learning_rates)
        if self.train.steps < 1:
            raise UserError("0 steps train nothing", where="train.steps", hint="use 1 or more")
        if self.presets == []:
            raise UserError("names no preset", where="presets", hint="leave it out to compare all of them")

    @property
    def rates(self) -> list[float]:
        return sorted(self.learning_rates)

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def to_data(self) -> dict[str, Any]:
        data = asdict(self)
        del data["train"]["learning_rate"]
        return data


def read_compare(path: Path) -> tuple[CompareFile, dict[SharingConfig, tuple[str, ...]]]:
    """A comparison's file, and its configs with every preset's name that each goes by. Raises UserError."""
    document = read_yaml(path)
    file = build(CompareFile, document)
    if "learning_rate" in document.data["train"]:
        where = document.where(("train", "learning_rate"))
        raise UserError("each rate of learning_rates is tried", where=where, hint="leave it out")
    require_lengths({("memory", "context"): file.memory.context, ("train", "seq"): file.train.seq}, document, file.model)
    open_texts(file.data, file.model.vocab_size, path.parent)
    named: dict[SharingConfig, tuple[str, ...]] = {}
    try:
        for name, config in presets(file.model) if file.presets is None else ((n, preset(n, file.model)) for n in file.presets):
            named[config] = (*named.get(config, ()), name)
    except UserError as error:
        raise error.at(document.where(("presets",))) from None
    return file, named


def compare(launch: Launch, progress: Progress, to: Path | None = None) -> tuple[Run, Comparison]:
    """Carry a comparison through, from wherever it stands, and write its page; into the folder `to` as well, if given. Raises
    UserError before anything is written, RunFailed if nothing could be trained."""
    file, configs = read_compare(launch.trial)
    if to:
        require_writable(to)
    shape = file.model
    corpus = load_corpus(file.data, shape.vocab_size, launch.trial.parent, progress.stage)
    corpus.require(file.train.seq)
    count = len(configs) * len(file.rates) * file.seeds
    progress.say(f"text    {corpus.summary}")
    progress.say(f"model   {shape.words}")
    progress.say(f"presets {sum(map(len, configs.values()))}, of which {len(configs)} differ in this model")
    rates = ", ".join(f"{rate:g}" for rate in file.rates)
    progress.say(f"train   {count} times {file.train.tokens:,} tokens: learning rates {rates}; {file.seeds} seed(s)")
    progress.say("stop it when you like: the same command continues")
    command = launch.command("compare") + (f" --to {shlex.quote(str(to))}" if to else "")
    run = _open(launch, file, corpus, command)
    with run.locked():
        jobs = _jobs(file, configs, corpus, run)
        done = [job.key for job in jobs if run.has(f"{TRAINED}/{job.key}/{RESULT}")]
        with progress.stage(f"train alone ({len(jobs)} models)", len(jobs) * file.train.steps, "steps") as stage:
            steps = StepCount(stage, dict.fromkeys((job.key for job in jobs), file.train.steps), done)
            work = file.run.with_given(launch.address, launch.workers)
            outcomes = train_all(jobs, train_standalone, run.folder / TRAINED, work, on_progress=steps)
        found = Results(file, configs, corpus, outcomes)
        rows = list(found.compared())
        comparison = Comparison(
            title=f"{file.name}: the published schemes on equal terms",
            command=command,
            shape=shape,
            spec=file.memory,
            seq=file.train.seq,
            windows=len(_windows(file, corpus, "test")),
            failed=found.failures(progress),
            rows=rows,
            provenance=run.provenance(),
            samples={row.measured.label: found.samples(row) for row in sorted(rows, key=lambda row: row.measured.point)},
        )
        for folder in (run.folder, *((to,) if to else ())):
            write_comparison(folder, comparison)
    return run, comparison


def _key(config: SharingConfig, rate: float, seed: int) -> str:
    """A training's folder."""
    return f"{config.hash}-{rate}-{seed}"


def _windows(file: CompareFile, corpus: Corpus, part: Literal["validation", "test"]) -> Array:
    return eval_sequences(getattr(corpus, part), file.train.seq, file.windows, corpus.bos, part).numpy()


def _jobs(file: CompareFile, configs: Iterable[SharingConfig], corpus: Corpus, run: Run) -> list[Job]:
    specs = {rate: replace(file.train, learning_rate=rate) for rate in file.rates}
    tokens = corpus.put_train(run.folder / TRAIN_TOKENS)
    windows, test = _windows(file, corpus, "validation"), _windows(file, corpus, "test")

    def job(config: SharingConfig, rate: float, seed: int) -> Job:
        training = StandaloneTraining(file.model, config, specs[rate], seed, tokens, windows, bos=corpus.bos, test_windows=test)
        return Job(_key(config, rate, seed), training)

    return [job(*one) for one in itertools.product(configs, file.rates, file.all_seeds)]


def _open(launch: Launch, file: CompareFile, corpus: Corpus, command: str) -> Run:
    """The comparison's folder: a new one, or one to continue. Raises UserError if its trainings were of another kind."""
    run, text = Run(launch.folder(file.name)), dump_yaml(file.to_data())
    if launch.overwrite and run.has(FILE):
        run.remove()
    if run.has(FILE):
        require_parts(run)
        old, new = read_yaml(run.folder / FILE).data, parse_yaml(text, FILE).data
        with reading(run.folder / FILE, DAMAGED):
            same = {name: old[name] == new[name] for name in COMMON}
        same["the text"] = run.provenance()["text_sha256"] == corpus.sha256
        same["the tokenizer"] = read_text(run.folder / "tokenizer.json", DAMAGED) == corpus.tokenizer_json
        for name, kept in same.items():
            if not kept:
                hint = "put it back, use another --name, or --overwrite"
                raise UserError(f"{name} is not what this comparison began with", where=str(run.folder), hint=hint)
    else:
        require_unused(run.folder, "comparison")
        run.write_json("run.json", provenance(file.name, file.seed, corpus, command))
        run.write("tokenizer.json", corpus.tokenizer_json)
    run.write(FILE, text)
    return run


@dataclass(frozen=True)
class Results:
    """What every training of a comparison came to, by its key."""

    file: CompareFile
    configs: Mapping[SharingConfig, tuple[str, ...]]
    corpus: Corpus
    outcomes: Mapping[str, Outcome]

    @cached_property
    def losses(self) -> dict[SharingConfig, dict[float, float]]:
        """By config, and by learning rate if no seed failed at it: the loss on the validation text, the mean over seeds."""
        found: dict[SharingConfig, dict[float, float]] = {config: {} for config in self.configs}
        for config, rate in itertools.product(self.configs, self.file.rates):
            outcomes = [self.outcomes[_key(config, rate, seed)] for seed in self.file.all_seeds]
            losses = [outcome["loss_nats_per_token"] for outcome in outcomes if not isinstance(outcome, Failure)]
            if len(losses) == len(outcomes):
                found[config][rate] = fmean(losses)
        return found

    def _test_losses(self, config: SharingConfig, rate: float) -> Array:
        """The loss of each test window `(seeds, windows)`."""
        rows = [self._result(config, rate, seed)["test"]["window_losses"] for seed in self.file.all_seeds]
        return np.array(rows, dtype=np.float64)

    def failures(self, progress: Progress) -> dict[str, str]:
        """The reason of each preset that could be trained at no rate; every failure is said. Raises RunFailed if that is all."""
        failed = {}
        for config, rate, seed in itertools.product(self.configs, self.file.rates, self.file.all_seeds):
            outcome, name = self.outcomes[_key(config, rate, seed)], self.configs[config][0]
            if isinstance(outcome, Failure):
                progress.say(f"{name} failed at a learning rate of {rate:g}: {outcome.reason}")
                if not self.losses[config]:
                    failed[name] = outcome.reason
        if len(failed) == len(self.configs):
            raise RunFailed("no model could be trained: every training failed")
        return failed

    def compared(self) -> Iterator[Compared]:
        """Every config that could be trained, on the test text, at its rate of least loss on the validation text."""
        best = {config: min(rates, key=lambda rate: rates[rate]) for config, rates in self.losses.items() if rates}
        dense = next((self._test_losses(config, rate) for config, rate in best.items() if config.is_dense), None)
        for config, rate in best.items():
            names, losses = self.configs[config], self.losses[config]
            less = None if dense is None or config.is_dense else difference(self._test_losses(config, rate), dense)
            sources = [PRESETS.get(name) or PRESETS[name.rpartition("-")[0]] for name in names]
            evaluations = (self._evaluation(config, rate, seed) for seed in self.file.all_seeds)
            yield Compared(
                measured=MeasuredConfig(tuple(evaluations), names),
                kind="" if config.is_dense else "weights" if sources[0] in WEIGHTS else "attention",
                papers=tuple(dict.fromkeys(source.paper for source in sources if source.paper)),
                learning_rate=rate,
                losses={one: losses.get(one, math.nan) for one in self.file.rates},
                against=(1 + less.ratio, less.ratio_standard_error) if less else None,
            )

    def _result(self, config: SharingConfig, rate: float, seed: int) -> dict[str, Any]:
        result = self.outcomes[_key(config, rate, seed)]
        assert not isinstance(result, Failure)
        return result

    def samples(self, row: Compared) -> list[Sample]:
        """What a config writes at its rate and the first seed; empty where an earlier version trained it."""
        result = self._result(row.measured.first.config, row.learning_rate, self.file.seed)
        tokenizer = Tokenizer.from_str(self.corpus.tokenizer_json)
        return [Sample.read(sample, tokenizer) for sample in result.get("samples", ())]

    def _evaluation(self, config: SharingConfig, rate: float, seed: int) -> Evaluation:
        result = self._result(config, rate, seed)
        losses = Losses.of(result["test"])
        return Evaluation(
            config=config,
            memory=measure(self.file.model, config, self.file.memory),
            losses=losses,
            bits_per_byte=bits_per_byte(losses.loss_nats_per_token, self.corpus, "test"),
            weights="retrained",
            seed=seed,
            tokens=result["tokens"],
            seconds=result["seconds"],
            name=self.configs[config][0],
            part="test",
        )
