"""The zoo on equal terms: every preset trained alone, from scratch, on equal tokens, at each of several learning rates.

Owns the comparison's file and folder, and what of its trainings is shown. The best learning rate moves with what is shared, so
that schemes compared at one rate are not compared; each is shown at its own. How it is shown is `nas.report.compare`'s.

    FOLDER/compare.yaml, run.json, tokenizer.json     what was asked, and on which text
    FOLDER/trained/HASH-RATE-SEED/result.json         there if that training is done: it is not done again
    FOLDER/README.md, compared.csv, compared.png      at the end

A comparison goes on by its own command; more presets, rates or seeds may then be asked for, since a training's key names all that
tells it from the others of the folder. What they have in common (`COMMON`) may not change.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..config import Document, Ge, PositiveInt, Strict, build, dump_yaml, parse_yaml, read_yaml
from ..data import Corpus, DataSpec, bits_per_byte, eval_windows, load_corpus
from ..errors import RunFailed, UserError
from ..presets import PRESETS, preset, presets
from ..presets.weights import WEIGHTS
from ..report.compare import Compared, Comparison, write_comparison
from ..report.measured import MeasuredConfig
from ..sharing.memory import MemorySpec, measure
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation, Losses
from ..training.loop import TrainSpec, require_rates
from ..workers import RESULT, Failure, Job, RunSpec, train_all
from .jobs import StandaloneTraining, train_standalone
from .launch import Launch
from .progress import Progress, StepCount
from .run import Run, provenance

FILE, TRAINED = "compare.yaml", "trained"
COMMON = ("model", "train", "windows", "data")
"""What all trainings of a folder have in common."""


@dataclass(frozen=True)
class CompareFile(Strict):
    """A comparison as its YAML file has it: `presets` are all that the model can have, unless they are listed."""

    name: str
    model: ModelShape
    train: TrainSpec
    learning_rates: list[float] = field(default_factory=lambda: [0.002, 0.004, 0.008])
    presets: list[str] | None = None
    seed: int = 0
    seeds: PositiveInt = 1
    windows: Annotated[int, Ge(2)] = 128
    data: DataSpec = field(default_factory=DataSpec)
    memory: MemorySpec = field(default_factory=MemorySpec)
    run: RunSpec = field(default_factory=RunSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rates(self.learning_rates)
        if self.train.steps < 1:
            raise UserError("0 steps train nothing", where="train.steps", hint="use 1 or more")
        if self.presets == []:
            raise UserError("names no preset", where="presets", hint="leave it out to compare all of them")

    def to_data(self) -> dict[str, Any]:
        """Plain data, the same as the file's."""
        data = asdict(self)
        del data["train"]["learning_rate"]
        return data


@dataclass(frozen=True)
class Entry:
    """One training: a config at one rate, with one seed."""

    config: SharingConfig
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its folder's name."""
        return f"{self.config.hash}-{self.rate}-{self.seed}"


@dataclass(frozen=True)
class ComparePlan:
    """A comparison that can be carried out: its configs, with every preset's name that each goes by, and its text."""

    file: CompareFile
    configs: Mapping[SharingConfig, tuple[str, ...]]
    corpus: Corpus

    @staticmethod
    def load(path: Path) -> ComparePlan:
        """The comparison in a YAML file, everything about it checked. Raises UserError."""
        file, configs = read_compare(path)
        longest = max(file.train.seq, file.memory.context)
        if longest > file.model.max_position_embeddings:
            message = f"{longest} tokens are more than the model's max_position_embeddings={file.model.max_position_embeddings}"
            raise UserError(message, where=file.name, hint="shorten train.seq and memory.context, or raise it")
        corpus = load_corpus(file.data, file.model.vocab_size, path.parent)
        eval_windows(corpus.train, file.train.seq, 1)
        eval_windows(corpus.eval, file.train.seq, 1)
        return ComparePlan(file, configs, corpus)

    @property
    def rates(self) -> list[float]:
        """The learning rates, ascending."""
        return sorted(self.file.learning_rates)

    @property
    def seeds(self) -> range:
        """The seeds that each config is trained with at each rate."""
        return range(self.file.seed, self.file.seed + self.file.seeds)

    @property
    def entries(self) -> list[Entry]:
        """Every training, a config's together."""
        return [Entry(config, rate, seed) for config in self.configs for rate in self.rates for seed in self.seeds]

    def jobs(self) -> list[Job]:
        """Every training for the workers. Their tokens are one array object, so that they travel once, and not once a job."""
        file, tokens = self.file, self.corpus.train.numpy()
        windows = eval_windows(self.corpus.eval, file.train.seq, file.windows).numpy()
        specs = {rate: replace(file.train, learning_rate=rate) for rate in self.rates}
        return [
            Job(e.key, StandaloneTraining(file.model, e.config, specs[e.rate], e.seed, tokens, windows)) for e in self.entries
        ]

    def said(self) -> list[str]:
        """What is about to be done, for a person."""
        file, corpus, shape = self.file, self.corpus, self.file.model
        names = sum(map(len, self.configs.values()))
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        return [
            f"text    {corpus.source}: {len(corpus.train):,} tokens to train on, {len(corpus.eval):,} to evaluate on",
            f"model   {shape.num_hidden_layers} layers of width {shape.hidden_size}",
            f"presets {names}, of which {len(self.configs)} differ in this model",
            f"train   {len(self.entries)} times {file.train.tokens:,} tokens: learning rates {rates}; {file.seeds} seed(s)",
            "stop it when you like: the same command goes on",
        ]


def read_compare(path: Path) -> tuple[CompareFile, dict[SharingConfig, tuple[str, ...]]]:
    """A comparison's file, and its configs with every name of each. Raises UserError."""
    document = read_yaml(path)
    file = build(CompareFile, document)
    if "learning_rate" in document.data["train"]:
        where = document.where(("train", "learning_rate"))
        raise UserError("each rate of learning_rates is tried", where=where, hint="leave it out")
    return file, _named(file, document)


def _named(file: CompareFile, document: Document) -> dict[SharingConfig, tuple[str, ...]]:
    try:
        listed = presets(file.model) if file.presets is None else ((n, preset(n, file.model)) for n in file.presets)
        named: dict[SharingConfig, tuple[str, ...]] = {}
        for name, config in listed:
            named[config] = (*named.get(config, ()), name)
    except UserError as error:
        raise error.at(document.where(("presets",))) from None
    return named


def compare(launch: Launch, progress: Progress, to: Path | None = None) -> tuple[Run, Comparison]:
    """Carry a comparison through, from wherever it stands, and write its page; into the folder `to` as well, if given.

    Raises UserError before anything is written, RunFailed if nothing could be trained.
    """
    plan = _overridden(ComparePlan.load(launch.trial), launch)
    for line in plan.said():
        progress.say(line)
    command = f"nas compare {shlex.quote(str(launch.trial))}" + (f" --to {shlex.quote(str(to))}" if to else "")
    run = _open(launch, plan, command)
    with run.locked():
        comparison = _shown(plan, _train(run, plan, progress), command, progress, run)
        for folder in (run.folder, *((to,) if to else ())):
            write_comparison(folder, comparison)
    return run, comparison


def _overridden(plan: ComparePlan, launch: Launch) -> ComparePlan:
    return replace(plan, file=replace(plan.file, run=launch.run(plan.file.run)))


def _open(launch: Launch, plan: ComparePlan, command: str) -> Run:
    """The comparison's folder: a new one, or one to go on with. Raises UserError if its trainings were of another kind."""
    run = Run(launch.runs / (launch.name or plan.file.name))
    if launch.overwrite and run.has(FILE):
        run.remove()
    if run.has(FILE):
        _require_same(run, plan)
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise UserError("the folder is not empty and is no comparison", where=str(run.folder), hint="use another --name")
    else:
        made = provenance(plan.file.name, plan.file.seed, plan.corpus, command)
        run.write_json("run.json", made)
        run.write("tokenizer.json", plan.corpus.tokenizer_json)
    run.write(FILE, dump_yaml(plan.file.to_data()))
    return run


def _require_same(run: Run, plan: ComparePlan) -> None:
    old, new = (parse_yaml(text, FILE).data for text in (_text(run, FILE), dump_yaml(plan.file.to_data())))
    changed = [name for name in COMMON if old[name] != new[name]]
    if run.read_json("run.json")["text_sha256"] != plan.corpus.sha256:
        changed.append("the text")
    if _text(run, "tokenizer.json") != plan.corpus.tokenizer_json:
        changed.append("the tokenizer")
    if changed:
        hint = "put it back, use another --name, or --overwrite"
        raise UserError(f"{changed[0]} is not what this comparison began with", where=str(run.folder), hint=hint)


def _text(run: Run, name: str) -> str:
    return (run.folder / name).read_text(encoding="utf-8")


def _train(run: Run, plan: ComparePlan, progress: Progress) -> dict[str, dict[str, Any] | Failure]:
    """Every training's result by its key; those that are done already are taken as they are."""
    jobs, file = plan.jobs(), plan.file
    done = [job.key for job in jobs if run.has(f"{TRAINED}/{job.key}/{RESULT}")]
    with progress.stage(f"train alone ({len(jobs)} models)", len(jobs) * file.train.steps, "steps") as stage:
        count = StepCount(stage, dict.fromkeys((job.key for job in jobs), file.train.steps), done)
        return train_all(jobs, train_standalone, run.folder / TRAINED, file.run, on_progress=count)


def _shown(
    plan: ComparePlan, results: Mapping[str, dict[str, Any] | Failure], command: str, progress: Progress, run: Run
) -> Comparison:
    """Every config that could be trained, at its best rate."""
    found = {config: dict(_trained(plan, config, results)) for config in plan.configs}
    failed = {}
    for entry in plan.entries:
        result, name = results[entry.key], plan.configs[entry.config][0]
        if isinstance(result, Failure):
            progress.say(f"{name} failed at a learning rate of {entry.rate:g}: {result.reason}")
            if not found[entry.config]:
                failed[name] = result.reason
    if not any(found.values()):
        raise RunFailed("no model could be trained: every training failed")
    return Comparison(
        title=f"{plan.file.name}: the published schemes on equal terms",
        command=command,
        shape=plan.file.model,
        spec=plan.file.memory,
        seq=plan.file.train.seq,
        windows=len(eval_windows(plan.corpus.eval, plan.file.train.seq, plan.file.windows)),
        rows=list(_compared(plan, {config: rates for config, rates in found.items() if rates})),
        failed=failed,
        provenance=run.read_json("run.json"),
    )


@dataclass(frozen=True)
class Trained:
    """A config at one rate: an evaluation a seed, and the loss of each window `(windows,)`, the mean over seeds."""

    evaluations: tuple[Evaluation, ...]
    window_losses: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def loss(self) -> float:
        """The mean over windows and seeds, in nats a token."""
        return float(self.window_losses.mean())


def _trained(
    plan: ComparePlan, config: SharingConfig, results: Mapping[str, dict[str, Any] | Failure]
) -> Iterator[tuple[float, Trained]]:
    """The rates at which no seed failed."""
    for rate in plan.rates:
        outcomes = {seed: results[Entry(config, rate, seed).key] for seed in plan.seeds}
        told = {seed: outcome for seed, outcome in outcomes.items() if not isinstance(outcome, Failure)}
        if len(told) == len(outcomes):
            windows = np.array([outcome["window_losses"] for outcome in told.values()], dtype=np.float64)
            evaluations = (_evaluation(plan, config, seed, outcome) for seed, outcome in told.items())
            yield rate, Trained(tuple(evaluations), windows.mean(0))


def _evaluation(plan: ComparePlan, config: SharingConfig, seed: int, result: Mapping[str, Any]) -> Evaluation:
    losses = Losses.of(result)
    return Evaluation(
        config=config,
        memory=measure(plan.file.model, config, plan.file.memory),
        losses=losses,
        bits_per_byte=bits_per_byte(losses.loss_nats_per_token, plan.corpus),
        weights="retrained",
        seed=seed,
        tokens=result["tokens"],
        seconds=result["seconds"],
        name=plan.configs[config][0],
    )


def _compared(plan: ComparePlan, found: Mapping[SharingConfig, Mapping[float, Trained]]) -> Iterator[Compared]:
    best = {config: min(rates, key=lambda rate: rates[rate].loss) for config, rates in found.items()}
    dense = next((found[config][best[config]] for config in found if config.is_dense), None)
    for config, rates in found.items():
        chosen, names = rates[best[config]], plan.configs[config]
        yield Compared(
            measured=MeasuredConfig(chosen.evaluations, names),
            kind="" if config.is_dense else _kind(names[0]),
            papers=tuple(dict.fromkeys(filter(None, (_row(name).paper for name in names)))),
            learning_rate=best[config],
            losses={rate: rates[rate].loss if rate in rates else math.nan for rate in plan.rates},
            against=None if dense is None or chosen is dense else _ratio(chosen, dense),
        )


def _ratio(one: Trained, other: Trained) -> tuple[float, float]:
    """A perplexity over another's, and its standard error over the windows that both met."""
    differences = one.window_losses - other.window_losses
    ratio = math.exp(differences.mean())
    return ratio, ratio * float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _row(name: str) -> Any:
    return PRESETS.get(name) or PRESETS[name.rpartition("-")[0]]


def _kind(name: str) -> str:
    return "weights" if _row(name) in WEIGHTS else "attention"
