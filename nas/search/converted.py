"""A dense model's export, converted into one that shares: chosen, initialised, fine-tuned, measured at every stage, and written.

Owns the order of it, its settings and what is said of the result. The methods are `nas.convert`'s, the folders `nas.export`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import NonNegativeInt, PositiveFloat, PositiveInt, Strict
from ..data import Corpus, DataSpec, bits_per_byte, eval_sequences, load_corpus, train_batches
from ..errors import UserError
from ..export import Loaded, ModelCard, export, load_export
from ..export.formats import require_free
from ..model.decoder import Decoder
from ..pretrained.conversions import (
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
from ..pretrained.conversions.methods import Steps
from ..sharing.memory import Memory, MemorySpec, measure_plan
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Losses, NotFinite, Stopwatch, measure_losses
from ..training.loop import TrainSpec
from .progress import Progress, Silent

ALIGN = 100
"""Steps of drawing heads together, for a method that does, where none are given."""


@dataclass(frozen=True)
class ConvertSettings(Strict):
    """How a folder is converted: a method of `nas.convert.METHODS`, its size (`3x8`; without one the usual), and training.

    init: which dense matrices a shared one begins as, for a method with a choice. fine_tune: steps of training afterwards, with
    `distill` on the dense model's probabilities in place of the text. align: steps of training before, for a method that draws
    together what it will tie. calibration: windows of training text by which a method chooses. windows: at most so many measure
    the perplexity, of the text's last `eval_fraction`, which is neither trained on nor calibrated with.
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
    seed: int = 0
    memory: MemorySpec = field(default_factory=MemorySpec)


@dataclass(frozen=True)
class Stage:
    """The model as it was at one point (`dense`, `converted` or `fine_tuned`): its quality on the evaluation text, and its
    bytes."""

    name: str
    losses: Losses
    bits_per_byte: float
    memory: Memory

    def to_data(self) -> dict[str, Any]:
        """One flat row."""
        return {"stage": self.name} | asdict(self.losses) | {"bits_per_byte": self.bits_per_byte} | self.memory.to_data()


@dataclass(frozen=True)
class Converted:
    """A finished conversion: the folder it is in, and the model before, after and fine-tuned. `tokens` are those trained on,
    `notes` what is to be known of how the dense one was read."""

    directory: Path
    method: str
    size: str
    init: str
    config: SharingConfig
    stages: tuple[Stage, ...]
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Plain data; the stages as a list of flat rows."""
        head = {"directory": str(self.directory), "method": self.method, "size": self.size, "init": self.init}
        tail = {"tokens": self.tokens, "seconds": self.seconds, "hash": self.config.hash, "config": self.config.to_data()}
        return head | tail | {"notes": list(self.notes), "stages": [stage.to_data() for stage in self.stages]}


def convert_export(
    directory: Path, text: str | Path, to: Path, settings: ConvertSettings, progress: Progress | None = None
) -> Converted:
    """Convert a folder's dense model into the folder `to`, in float32; `text` is a path, or a corpus's name.

    Nothing is written before the end. Raises UserError for a folder that is no dense model's export, a method or a size that
    does not fit it, a text that is too short, and a training that diverges.
    """
    clock, method, loaded = Stopwatch(), find(settings.method), load_export(directory)
    require_dense(loaded.config, str(directory))
    if to.resolve() == directory.resolve():
        raise UserError("it is the model to be converted", where=str(to), hint="give another folder")
    require_free(to)
    numbers, start = method.read_size(loaded.shape, settings.size), method.read_start(settings.init)
    work = _Work(method, loaded, _corpus(directory, text, loaded, settings), settings, progress or Silent())
    config, model, stages = work.convert(numbers, start)
    done = Converted(to, method.name, spell(numbers), start, config, stages, work.tokens, clock.seconds, loaded.notes)
    tokenizer = (directory / "tokenizer.json").read_text(encoding="utf-8")
    export(model, config, tokenizer, to, _card(done, work, directory.resolve().name, str(text)), metadata=loaded.metadata)
    return done


def _corpus(directory: Path, text: str | Path, loaded: Loaded, settings: ConvertSettings) -> Corpus:
    tokenizer = str(directory.resolve() / "tokenizer.json")
    spec = DataSpec(text=str(text), tokenizer=tokenizer, eval_fraction=settings.eval_fraction)
    return load_corpus(spec, loaded.shape.vocab_size, Path())


@dataclass(eq=False)
class _Work:
    """A conversion under way; `tokens` are those trained on so far."""

    method: Conversion
    loaded: Loaded
    corpus: Corpus
    settings: ConvertSettings
    progress: Progress
    tokens: int = 0

    def __post_init__(self) -> None:
        said, generator = self.settings, torch.Generator().manual_seed(self.settings.seed)
        if said.align is not None and self.method.penalty is None:
            message = f"{self.method.name} draws nothing together"
            raise UserError(message, where="align", hint="leave it out, or use headwise-post")
        calibration = next(train_batches(self.corpus.train, said.calibration, said.seq, generator))[:, :-1]
        self.dense = PretrainedModel(self.loaded.model.float(), calibration)

    @cached_property
    def windows(self) -> Tensor:
        """Those that every stage is measured on."""
        return eval_sequences(self.corpus.eval, self.settings.seq, self.settings.windows)

    def convert(self, numbers: tuple[int, ...], start: str) -> tuple[SharingConfig, Decoder, tuple[Stage, ...]]:
        """The converted model, fine-tuned if that is asked for, and what was measured on the way."""
        stages = [self.measured("dense", self.dense.model)]
        config = choose(self.method, self.dense, numbers)
        model = convert(self.method, self.aligned(config), config, start)
        stages.append(self.measured("converted", model))
        if self.settings.fine_tune:
            spec, teacher = self.training(self.settings.fine_tune), self.dense.model if self.settings.distill else None
            self.follow("fine_tune", spec, fine_tune(model, spec, self.corpus.train, self.generator(), teacher))
            stages.append(self.measured("fine_tuned", model))
        return config, model, tuple(stages)

    def aligned(self, config: SharingConfig) -> PretrainedModel:
        """The dense model, after the training that the method asks for."""
        penalty, plan = self.method.penalty, config.resolve(self.loaded.shape)
        if penalty is None:
            return self.dense
        model, spec = deepcopy(self.dense.model), self.training(ALIGN if self.settings.align is None else self.settings.align)
        steps = align_heads(model, lambda trained: penalty(trained, plan), spec, self.corpus.train, self.generator())
        self.follow("align", spec, steps)
        return PretrainedModel(model, self.dense.calibration)

    def training(self, steps: int) -> TrainSpec:
        """The settings of a training of so many steps."""
        said = self.settings
        return TrainSpec(steps=steps, batch=said.batch, seq=said.seq, learning_rate=said.learning_rate)

    def generator(self) -> torch.Generator:
        """What a training draws its batches with."""
        return torch.Generator().manual_seed(self.settings.seed + 1)

    def follow(self, name: str, spec: TrainSpec, steps: Steps) -> None:
        """Run a training to its end, telling the progress."""
        with self.progress.stage(name, spec.steps, "steps") as stage, _finite():
            for step, loss in steps:
                stage.update(step, f"loss {loss:.3f}")
        self.tokens += spec.tokens

    def measured(self, name: str, model: Decoder) -> Stage:
        """A model's quality and bytes at this point."""
        with _finite():
            losses = measure_losses(model, self.windows, self.settings.batch)
        memory = measure_plan(model.shape, model.plan, self.settings.memory)
        return Stage(name, losses, bits_per_byte(losses.loss_nats_per_token, self.corpus), memory)


@contextmanager
def _finite() -> Iterator[None]:
    """A loss that is no number is the user's to mend."""
    try:
        yield
    except NotFinite as error:
        raise UserError(str(error), hint="use a lower learning rate") from None


def _card(done: Converted, work: _Work, source: str, text: str) -> ModelCard:
    method, said = work.method, work.settings
    quality = ", ".join(f"{stage.losses.perplexity:.4g} {_WHEN[stage.name]}" for stage in done.stages)
    begun = f", the {done.init} start" if done.init else ""
    trained = f" Trained for {done.tokens:,} tokens at a learning rate of {said.learning_rate:g}." if done.tokens else ""
    options = [f"--init {done.init}"] * bool(done.init) + [f"--fine-tune {said.fine_tune}"] + ["--distill"] * said.distill
    return ModelCard(
        title=f"{source}: {method.name} {done.size}",
        found=f"Converted from the dense model `{source}` by {method.name} (arXiv {method.paper}): {method.meaning}{begun}."
        f"{trained} Perplexity a token: {quality}; on evaluation text that was neither trained on nor calibrated with.",
        command=f"nas convert {source} --method {method.name} --size {done.size} --text {text} {' '.join(options)} --to DIR",
        data=work.corpus.source,
        memory=said.memory,
    )


_WHEN = {"dense": "before", "converted": "once converted", "fine_tuned": "once fine-tuned"}
