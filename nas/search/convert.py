"""Conversions of a dense model by published methods: `nas convert`, and the first stage of a search from a base model.

Owns the order of `nas convert` (converted, fine-tuned, measured at every stage, written), its settings, and the model card; and
which conversions a search tries, with their results: `converted/METHOD-SIZE` in the run's folder, and `converted/dense` for the
base model itself. There a conversion keeps its config and its losses; its weights are made again where they are wanted. The
methods are `nas.pretrained.conversions`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import NonNegativeInt, PositiveFloat, PositiveInt, Seed, Strict
from ..data import Corpus, DataSpec, bits_per_byte, eval_sequences, load_corpus, train_batches
from ..errors import RunFailed, UserError
from ..export import Loaded, ModelCard, export, load_export
from ..export.formats import require_free
from ..model.decoder import Decoder
from ..model.supernet import standalone
from ..presets import PRESETS
from ..presets.rows import check_size
from ..pretrained.conversions import (
    METHODS,
    Conversion,
    PretrainedModel,
    align_heads,
    choose,
    convert,
    find,
    fine_tune,
    require_dense,
    spell,
)
from ..pretrained.conversions.calibration import Numbers
from ..pretrained.conversions.methods import Steps
from ..sharing.label import names_of
from ..sharing.memory import Memory, MemorySpec, measure_plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..training.device import find_device
from ..training.evaluation import Evaluation, Losses, NotFinite, Stopwatch, measure_losses
from ..training.loop import TrainSpec
from ..workers import Failure, Task
from .context import Context
from .jobs import DENSE, ConvertTask, EvaluatorSettings, build_converter
from .progress import Progress, Silent
from .run import CONVERTED

ALIGN = 100  # steps of aligning heads, for a method that does, where none are given


@dataclass(frozen=True)
class ConvertSettings(Strict):
    """How a folder is converted: a method of `METHODS`, its size (`3x8`; without one the usual), and training.

    init: which dense matrices a shared one is initialised with, for a method with a choice. fine_tune: steps of training
    afterwards, with `distill` on the dense model's probabilities in place of the text. align: steps of training before, for a
    method that aligns what it will tie. calibration: rows of training text by which a method chooses. windows: at most so many
    evaluation windows, of the text's last `eval_fraction`, which is neither trained on nor calibrated with. device: as
    `find_device` reads it.
    """

    method: str
    size: str | None = None
    init: str | None = None
    fine_tune: NonNegativeInt = 100
    align: NonNegativeInt | None = None
    distill: bool = False
    learning_rate: PositiveFloat = 1e-3
    batch: PositiveInt = 16
    seq: PositiveInt = 128
    calibration: PositiveInt = 32
    windows: PositiveInt = 512
    eval_fraction: float = 0.1
    column: str = "text"
    seed: Seed = 0
    device: str = "auto"
    memory: MemorySpec = field(default_factory=MemorySpec)


@dataclass(frozen=True)
class ConversionStage:
    """The model at one point (`dense`, `converted` or `fine_tuned`): its quality on the evaluation text, and its bytes."""

    name: str
    losses: Losses
    bits_per_byte: float
    memory: Memory

    def to_data(self) -> dict[str, Any]:
        return {"stage": self.name} | asdict(self.losses) | {"bits_per_byte": self.bits_per_byte} | self.memory.to_data()


@dataclass(frozen=True)
class Converted:
    """A finished conversion: its folder, and the model at each stage. `tokens` are those trained on, `notes` say how the dense
    model was read."""

    directory: Path
    method: str
    size: str
    init: str
    config: SharingConfig
    stages: tuple[ConversionStage, ...]
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Plain data; the stages as a list of flat rows."""
        head = {"directory": str(self.directory), "method": self.method, "size": self.size, "init": self.init}
        tail = {"tokens": self.tokens, "seconds": self.seconds, **names_of(self.config), "config": self.config.to_data()}
        return head | tail | {"notes": list(self.notes), "stages": [stage.to_data() for stage in self.stages]}


def convert_export(
    directory: Path, text: str | Path, to: Path, settings: ConvertSettings, progress: Progress | None = None
) -> Converted:
    """Convert a folder's dense model into the folder `to`, in float32; `text` is a path, or a corpus's name.

    Nothing is written before the end. Raises UserError for a folder that is no dense model's export, a method or a size that
    does not fit it, a text that is too short, and a training that diverges.
    """
    if to.resolve() == directory.resolve():
        raise UserError("it is the model to be converted", where=str(to), hint="give another folder")
    require_free(to)
    clock, method, loaded = Stopwatch(), find(settings.method), load_export(directory)
    require_dense(loaded.config, str(directory))
    if settings.align is not None and method.penalty is None:
        raise UserError(f"{method.name} aligns nothing", where="align", hint="leave it out, or use headwise-post")
    numbers, start = method.read_size(loaded.shape, settings.size), method.read_start(settings.init)
    tokenizer = directory.resolve() / "tokenizer.json"
    spec = DataSpec(text=str(text), tokenizer=str(tokenizer), eval_fraction=settings.eval_fraction, column=settings.column)
    corpus = load_corpus(spec, loaded.shape.vocab_size, Path())
    work = _Converting(method, loaded, corpus, settings, progress or Silent())
    config, model = work.run(numbers, start)
    stages, notes = tuple(work.stages), loaded.notes_for(settings.seq)
    done = Converted(to, method.name, spell(numbers), start, config, stages, work.tokens, clock.seconds, notes)
    card = _card(done, work, directory.resolve().name, str(text))
    export(model.cpu(), config, tokenizer.read_text(encoding="utf-8"), to, card, metadata=loaded.metadata)
    return done


class _Converting:
    """A conversion under way: the stages that were measured, and the tokens that were trained on so far."""

    def __init__(self, method: Conversion, loaded: Loaded, corpus: Corpus, settings: ConvertSettings, progress: Progress) -> None:
        self.method, self.corpus, self.settings, self.progress = method, corpus, settings, progress
        if (device := find_device(settings.device)).type == "mps":
            raise UserError("mps has no float64", where="device", hint="use cpu: conversions need it")
        generator = torch.Generator().manual_seed(settings.seed)
        calibration = next(train_batches(corpus.train, settings.calibration, settings.seq, generator, corpus.bos))[:, :-1]
        self.dense = PretrainedModel(loaded.model.float().to(device), calibration)
        self.windows = eval_sequences(corpus.eval, settings.seq, settings.windows, corpus.bos)
        self.stages: list[ConversionStage] = []
        self.tokens = 0

    def run(self, numbers: tuple[int, ...], start: str) -> tuple[SharingConfig, Decoder]:
        """The converted model, fine-tuned if that is asked for; every stage is measured."""
        self._measure("dense", self.dense.model)
        config = choose(self.method, self.dense, numbers)
        model = standalone(convert(self.method, self._align(config), config, start))
        self._measure("converted", model)
        if self.settings.fine_tune:
            spec, teacher = self._spec(self.settings.fine_tune), self.dense.model if self.settings.distill else None
            self._train("fine_tune", spec, fine_tune(model, spec, self.corpus.train, self._generator(), teacher, self.corpus.bos))
            self._measure("fine_tuned", model)
        return config, model

    def _align(self, config: SharingConfig) -> PretrainedModel:
        """The dense model, after the training that the method asks for."""
        penalty, plan = self.method.penalty, config.resolve(self.dense.shape)
        if penalty is None:
            return self.dense
        model, spec = deepcopy(self.dense.model), self._spec(ALIGN if self.settings.align is None else self.settings.align)
        text, bos = self.corpus.train, self.corpus.bos
        steps = align_heads(model, lambda trained: penalty(trained, plan), spec, text, self._generator(), bos)
        self._train("align", spec, steps)
        return PretrainedModel(model, self.dense.calibration)

    def _spec(self, steps: int) -> TrainSpec:
        given = self.settings
        return TrainSpec(steps=steps, batch=given.batch, seq=given.seq, learning_rate=given.learning_rate)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed + 1)

    def _train(self, name: str, spec: TrainSpec, steps: Steps) -> None:
        with self.progress.stage(name, spec.steps, "steps") as stage, _finite():
            for step, loss in steps:
                stage.update(step, f"loss {loss:.3f}")
        self.tokens += spec.tokens

    def _measure(self, name: str, model: Decoder) -> None:
        with _finite():
            losses = measure_losses(model, self.windows, self.settings.batch)
        memory, bits = measure_plan(model.shape, model.plan, self.settings.memory), losses.loss_nats_per_token
        self.stages.append(ConversionStage(name, losses, bits_per_byte(bits, self.corpus), memory))


@contextmanager
def _finite() -> Iterator[None]:
    """A loss that is not finite is a UserError here."""
    try:
        yield
    except NotFinite as error:
        raise UserError(str(error), hint="use a lower learning rate") from None


_WHEN = {"dense": "before", "converted": "once converted", "fine_tuned": "once fine-tuned"}


def _card(done: Converted, work: _Converting, source: str, text: str) -> ModelCard:
    method, given = work.method, work.settings
    quality = ", ".join(f"{stage.losses.perplexity:.4g} {_WHEN[stage.name]}" for stage in done.stages)
    begun = f", the {done.init} start" if done.init else ""
    trained = f" Trained for {done.tokens:,} tokens at a learning rate of {given.learning_rate:g}." if done.tokens else ""
    options = [f"--init {done.init}"] * bool(done.init) + [f"--fine-tune {given.fine_tune}"] + ["--distill"] * given.distill
    return ModelCard(
        title=f"{source}: {method.name} {done.size}",
        found=f"Converted from the dense model `{source}` by {method.name} (arXiv {method.paper}): {method.meaning}{begun}."
        f"{trained} Perplexity a token: {quality}; on evaluation text that was neither trained on nor calibrated with.",
        command=f"nas convert {source} --method {method.name} --size {done.size} --text {text} {' '.join(options)} --to DIR",
        data=work.corpus.source,
        memory=given.memory,
    )


SIZES = 3  # at most so many sizes of a method are tried


def convert_all(ctx: Context) -> list[Evaluation]:
    """The conversions within the trial's limits, measured; none without a base model.

    Conversions that are on disk are not made again; methods that do not fit the model are skipped, with a line that says so.
    Raises RunFailed if the base model itself could not be measured.
    """
    if ctx.base_model is None:
        return []
    wanted = conversions_of(ctx.trial.space.shape)
    left = {key: task for key, task in wanted.items() if not ctx.run.has(f"{CONVERTED}/{key}/result.json")}
    if left:
        weights = ctx.base_model.model.state_dict() | {
            "calibration": ctx.base_model.pretrained(ctx.trial, ctx.corpus).calibration,
            "windows": ctx.windows(ctx.trial.file.evaluate.windows),
        }
        settings = EvaluatorSettings(ctx.trial.space, ctx.trial.supernet.autocast)
        with (
            ctx.progress.stage("convert the base model", len(wanted), "conversions") as bar,
            ctx.executor.pool(build_converter, settings, weights) as pool,
        ):
            bar.update(done := len(wanted) - len(left))
            for task, results in pool.run(_groups(left)):
                for key, one in task.data.items():
                    _record(ctx, one, results if isinstance(results, Failure) else results[key])
                bar.update(done := done + len(task.data))
    space, memory = ctx.trial.space, ctx.trial.file.memory
    found = [e.config for e in ctx.run.converted(comparable=False) if space.meets_limits(e.config, memory)]
    within = {*ctx.measurable(found)}
    return [e for e in ctx.run.converted() if e.config in within]


def conversions_of(shape: ModelShape) -> dict[str, ConvertTask]:
    """The conversions that are tried, by key; the base model itself is the first."""
    sizes = [(method.name, size) for method in METHODS.values() for size in size_grid(method, shape)]
    return {task.key: task for task in (ConvertTask(DENSE.name, ()), *(ConvertTask(name, size) for name, size in sizes))}


def _groups(left: Mapping[str, ConvertTask]) -> list[Task[dict[str, ConvertTask]]]:
    """The base model, then conversions that need the same measurements of it together, the largest groups first."""
    groups: dict[str, dict[str, ConvertTask]] = {}
    for key, task in left.items():
        groups.setdefault(task.row.like or task.method, {})[key] = task
    return [Task(name, groups[name]) for name in sorted(groups, key=lambda name: (name != DENSE.name, -len(groups[name])))]


def size_grid(method: Conversion, shape: ModelShape) -> list[Numbers]:
    """The sizes of a method that are tried: its usual one, those of its preset, half and double the usual; `SIZES` at most.
    None where no size fits the model, or where a method takes training before it converts."""
    if method.penalty is not None:
        return []
    try:
        usual = method.usual(shape)
    except UserError:
        return []
    tried = PRESETS[method.name].sizes(shape) if method.name in PRESETS else []
    preset = [size if isinstance(size, tuple) else (size,) for size in tried if size is not None]
    scaled = [(first, *usual[1:]) for first in (usual[0] // 2, usual[0] * 2)]
    return [size for size in dict.fromkeys([usual, *preset, *scaled]) if _fits(method, shape, size)][:SIZES]


def _fits(method: Conversion, shape: ModelShape, size: Numbers) -> bool:
    try:
        check_size(method.name, method.parameters, shape, size)
    except UserError:
        return False
    return True


def _record(ctx: Context, task: ConvertTask, result: dict[str, Any] | Failure) -> None:
    """Write a conversion's evaluation, or why there is none."""
    key = task.key
    reason = result.reason if isinstance(result, Failure) else result.get("refused", "")
    if reason and key == DENSE.name:
        raise RunFailed(f"the base model could not be measured: {reason}")
    if isinstance(result, Failure) or reason:
        ctx.progress.say(f"not converted by {key}: {reason}")
        row = {"refused": reason}
    elif (config := SharingConfig.from_data(ctx.trial.space.shape, result["config"])).is_dense and key != DENSE.name:
        row = {"refused": "it leaves nothing shared in this model"}
    else:
        rest = {"seconds": result["seconds"], "name": task.name(ctx.presets.get(config, "")), "supernet": key}
        row = ctx.evaluation(config, Losses.of(result), "converted", 0, **rest).to_data()
    ctx.run.write_json(f"{CONVERTED}/{key}/result.json", row)
