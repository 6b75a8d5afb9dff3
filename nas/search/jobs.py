"""What workers compute: conversions of a base model, losses of subnets, the training of a supernet and of a standalone model.

Owns the computation of each stage as plain functions of plain arguments, so that any process on any node can run them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..data import TokenFile, train_batches
from ..errors import UserError
from ..export import load_export
from ..export.standalone_nas import generate
from ..files import atomic_write
from ..model.decoder import Decoder, init_weights
from ..model.supernet import Supernet, standalone
from ..pretrained.conversions import METHODS, Conversion, PretrainedModel, choose, convert, spell
from ..pretrained.files import read_weights_file, require_match
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..splitting import Compared, Comparison, LeafSpace, compare
from ..training.device import describe_device, find_device
from ..training.evaluation import Losses, Stopwatch, losses_by_sequence, losses_over, measure_losses
from ..training.loop import Trainer, TrainSpec, distillation_backward, plain_backward, read_state
from ..training.measured import measure_objectives
from ..training.strategies import STRATEGIES, SubnetRandom, SupernetStep
from ..workers import Failure, Saver, Session, run_catching

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EvaluatorSettings:
    """What every evaluating worker holds beside weights: the space, and whether models run in bfloat16 autocast."""

    space: SearchSpace
    autocast: bool


@dataclass(frozen=True)
class SubnetTask:
    """One config to evaluate, on the weights of one (sub-)supernet."""

    config: SharingConfig
    supernet: str


def pack(supernets: Mapping[str, Supernet]) -> dict[str, Tensor]:
    """The weights of all sub-supernets, as the one dictionary that workers share."""
    return {f"{name}/{key}": value for name, net in supernets.items() for key, value in net.state_dict().items()}


def build_evaluator(settings: EvaluatorSettings, weights: dict[str, Tensor]) -> Callable[[SubnetTask], tuple[Losses, float]]:
    """The function that measures a subnet: its losses, and the seconds they took. It raises NotFinite."""
    windows = weights["windows"].to(find_device())
    names = {key.partition("/")[0] for key in weights if "/" in key}
    supernets = {name: _unpack(settings.space, name, weights) for name in names}

    def evaluate(task: SubnetTask) -> tuple[Losses, float]:
        watch = Stopwatch()
        subnet = supernets[task.supernet].subnet(task.config)
        return measure_losses(subnet, windows, autocast=settings.autocast), watch.seconds

    return evaluate


def build_comparer(space: SearchSpace, weights: dict[str, Tensor]) -> Callable[[Comparison], Compared]:
    """The function that compares the options of a leaf's decisions by their gradients. It raises NotFinite."""
    names = {key.partition("/")[0] for key in weights}
    supernets = {name: _unpack(space, name, weights).requires_grad_(True) for name in names}
    return lambda given: compare(supernets[given.space.leaf], given)


def new_supernet(space: SearchSpace, generator: torch.Generator | None) -> Supernet:
    """A supernet with every weight that a config of the space can need: from scratch, or to be loaded without a generator."""
    return Supernet(space.shape, generator, space.extra_parameters())


def _unpack(space: SearchSpace, name: str, weights: Mapping[str, Tensor]) -> Supernet:
    """A supernet whose Parameters are the shared bytes themselves: nothing is copied, and nothing may be trained."""
    state = {key.removeprefix(f"{name}/"): value for key, value in weights.items() if key.startswith(f"{name}/")}
    supernet = new_supernet(space, None)
    supernet.load_state_dict(state, assign=True)
    return supernet.to(find_device()).eval().requires_grad_(False)


Measured = tuple[ModelShape, MemorySpec, tuple[str, ...]]  # of which model configs are measured, where, and by which objectives


def build_measurer(given: Measured, weights: dict[str, Tensor]) -> Callable[[SharingConfig], dict[str, Any]]:
    """The function that measures a config at work: its objectives, their spread, and the `device`."""
    (shape, memory, names), device = given, describe_device(find_device())
    return lambda config: measure_objectives(shape, config, memory, names) | {"device": device}


REPORT_SECONDS = 0.5


class Reports:
    """Reports of a training to its session: twice a second, and at the last step."""

    def __init__(self, session: Session, steps: int) -> None:
        self.session, self.steps = session, steps
        self._reported = Stopwatch()

    def step(self, step: int, loss: float) -> None:
        if self._reported.seconds > REPORT_SECONDS or step == self.steps:
            metrics = {"step": step, "steps": self.steps, "loss_nats_per_token": loss, "perplexity": math.exp(min(loss, 700.0))}
            self.session.report(metrics)
            self._reported = Stopwatch()


STATE = "fit.pt"  # the file of a training's state, in its folder or its checkpoint's


def load_checkpoint(session: Session, trainer: Trainer, start: Path | None = None) -> dict[str, Any]:
    """Go on from the session's checkpoint, else from the state at `start`, else from scratch; what was saved beside: the `tokens`
    trained on so far, and the rest."""
    checkpoint = session.checkpoint
    state = checkpoint / STATE if checkpoint else start
    return {"tokens": 0} | (trainer.load(state) if state else {})


def train_with_checkpoints(
    session: Session,
    trainer: Trainer,
    steps: Iterable[tuple[int, float]],
    until: int,
    tokens: int,
    step_tokens: Callable[[], int],
    rest: Callable[[], dict[str, Any]] = dict,
) -> int:
    """Run a trainer's steps to step `until`, with reports and checkpoints (`nas.workers.Saver`); it can be stopped anywhere.

    `tokens` were trained on before, `step_tokens` says how many the last step took, `rest` what is saved beside them. Returns the
    tokens in all.
    """
    reports, size = Reports(session, until), 3 * sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    with Saver(session, lambda folder: trainer.write(folder / STATE, tokens=tokens, **rest()), size) as saver:
        for step, loss in steps:
            tokens += step_tokens()
            if session.leads:
                if step < until:
                    saver.step()
                reports.step(step, loss)
    return tokens


@dataclass(frozen=True)
class SupernetTraining:
    """Train a (sub-)supernet to step `until`, from the state at `start`, or from scratch. With `distill` the teacher is the
    base model in the folder `teacher`, or the supernet's own largest subnet."""

    space: LeafSpace
    memory: MemorySpec
    spec: TrainSpec
    strategy: str
    distill: bool
    seed: int
    tokens: Array | TokenFile
    until: int
    start: Path | None = None
    teacher: Path | None = None
    bos: int | None = None

    def teacher_of(self) -> SharingConfig | Decoder | None:
        if not self.distill:
            return None
        return read_base(self.teacher) if self.teacher else self.space.largest()


def train_supernet(job: SupernetTraining, session: Session) -> dict[str, Any]:
    """Do a `SupernetTraining`, the same whether or not it was stopped on the way; leaves its state in the session's folder."""
    generator = torch.Generator().manual_seed(job.seed)
    supernet = new_supernet(job.space, generator).to(find_device())
    trainer = Trainer(supernet, job.spec, generator, session.ranks)
    saved, leaf = load_checkpoint(session, trainer, job.start), job.space.leaf
    rng = SubnetRandom(f"{job.seed} {leaf}")
    if saved.get("leaf") == leaf:  # it was not cut since, and goes on with its own subnets
        rng.setstate(saved["rng"])
    draw = STRATEGIES[job.strategy](job.space, job.memory)
    backward = SupernetStep(supernet, job.spec, draw, rng, job.teacher_of())
    steps = trainer.run(token_batches(job.tokens, job.spec, generator, job.bos), backward, job.until)

    def rest() -> dict[str, Any]:
        return {"leaf": leaf, "rng": rng.getstate()}

    def step_tokens() -> int:
        return backward.subnets * job.spec.batch * job.spec.seq

    tokens = train_with_checkpoints(session, trainer, steps, job.until, saved["tokens"], step_tokens, rest)
    if not session.leads:
        return {}
    trainer.save(session.folder / STATE, tokens=tokens, **rest())
    before = int(read_state(job.start)["extra"]["tokens"]) if job.start else 0
    return {"step": trainer.step, "steps": job.until, "tokens": tokens, "stage_tokens": tokens - before}


def token_batches(
    tokens: Array | TokenFile, spec: TrainSpec, generator: torch.Generator, bos: int | None = None
) -> Iterator[Tensor]:
    """Random windows of tokens for a training."""
    stored = tokens.read() if isinstance(tokens, TokenFile) else torch.from_numpy(np.array(tokens))
    return train_batches(stored, spec.batch, spec.seq, generator, bos)


def read_supernet(space: SearchSpace, path: Path) -> tuple[Supernet, int]:
    """The supernet for a space in a saved state, in float32, and the tokens that it was trained on. Raises UserError."""
    supernet = new_supernet(space, None)
    state = read_state(path, supernet)
    supernet.load_state_dict(state["model"], assign=True)
    return supernet.float(), state["extra"]["tokens"]


Start = Callable[[SharingConfig], Decoder]
"""Makes the weights that a config's training starts from, where they are wanted: its model in float32, which may be trained."""


@dataclass(frozen=True)
class InheritedWeights:
    """Those of a subnet of the supernet whose state lies at a path."""

    space: SearchSpace
    state: Path

    def __call__(self, config: SharingConfig) -> Decoder:
        return standalone(read_supernet(self.space, self.state)[0].subnet(config))


@dataclass(frozen=True)
class ConvertedWeights:
    """Those that a conversion makes of the base model in a folder, by a calibration text."""

    base: Path
    task: ConvertTask
    calibration: Array

    def __call__(self, config: SharingConfig) -> Decoder:
        dense = PretrainedModel(read_base(self.base), torch.from_numpy(np.array(self.calibration)))
        return standalone(self.task.convert(dense, config))


@dataclass(frozen=True)
class StandaloneTraining:
    """Train one config as a model of its own, and measure it on validation `windows`, and on `test_windows` if there are any.

    It starts from scratch, or from the weights that `start` makes. It learns from the text, or from the probabilities of the base
    model in the folder `teacher`. With `keep` its weights stay in the session's folder, in `dtype`, by which they are rounded
    before they are measured. With `until` it pauses at that step, and leaves its state for the training that has it as `state`.
    """

    shape: ModelShape
    config: SharingConfig
    spec: TrainSpec
    seed: int
    tokens: Array | TokenFile
    windows: Array
    start: Start | None = None
    teacher: Path | None = None
    keep: bool = True
    bos: int | None = None
    dtype: torch.dtype = torch.float32
    until: int | None = None
    state: Path | None = None
    test_windows: Array | None = None


def train_standalone(job: StandaloneTraining, session: Session) -> dict[str, Any]:
    """Do a `StandaloneTraining`. Models of one seed see the same batches.

    The result has the losses on the validation windows, and `window_losses` of each; under `test` the same of the test windows,
    and `samples` of what it writes (`write_samples`). Weights that are kept are `model.safetensors`.
    """
    watch, until = Stopwatch(), job.spec.steps if job.until is None else job.until
    if job.start and not job.state:
        model = job.start(job.config).to(find_device())
    else:
        scratch = Decoder(job.shape, job.config.resolve(job.shape))
        model = init_weights(scratch, torch.Generator().manual_seed(job.seed)).to(find_device())
    trainer = Trainer(model, job.spec, torch.Generator().manual_seed(job.seed), session.ranks)
    tokens, step_tokens = load_checkpoint(session, trainer, job.state)["tokens"], job.spec.batch * job.spec.seq
    teacher = read_base(job.teacher) if job.teacher and job.spec.steps else None
    backward = distillation_backward(model, teacher, job.spec) if teacher else plain_backward(model, job.spec)
    steps = trainer.run(token_batches(job.tokens, job.spec, trainer.generator, job.bos), backward, until)
    tokens = train_with_checkpoints(session, trainer, steps, until, tokens, lambda: step_tokens)
    if not session.leads:
        return {}
    if until < job.spec.steps:
        trainer.save(session.folder / STATE, tokens=tokens)
    model.to(job.dtype).float()
    measured = [_measure(model, windows, job.spec.autocast) for windows in (job.windows, job.test_windows) if windows is not None]
    if job.keep:
        write_weights(model, session.folder / "model.safetensors", job.dtype)
    figures: dict[str, Any] = {"step": trainer.step, "steps": trainer.step, "tokens": tokens, "seconds": watch.seconds}
    if job.test_windows is not None:
        figures |= {"test": measured[1], "samples": write_samples(model, torch.from_numpy(np.array(job.test_windows)))}
    return measured[0] | figures


PROMPTS, PROMPT, WRITTEN = 3, 32, 48
"""How many prompts, of how many tokens at most, and how many tokens at most are written after each."""


def write_samples(model: Decoder, windows: Tensor) -> list[dict[str, list[int]]]:
    """What a model writes, always the likeliest token, after `PROMPTS` prompts spread over windows `(windows, seq + 1)`: the
    tokens of each `prompt`, of the `text` that follows it there, and of what is `written`."""
    chosen = windows[torch.linspace(0, len(windows) - 1, PROMPTS).round().long()].long()
    length, count = min(PROMPT, chosen.shape[1] // 2), min(WRITTEN, chosen.shape[1] - 1)
    prompts, texts = chosen[:, :length], chosen[:, length : length + count]
    written = generate(model.eval(), prompts.to(model.embed_tokens.weight.device), count, temperature=0)[:, length:]
    rows = zip(prompts.tolist(), texts.tolist(), written.tolist(), strict=True)
    return [dict(zip(("prompt", "text", "written"), row, strict=True)) for row in rows]


def _measure(model: Decoder, windows: Array, autocast: bool) -> dict[str, Any]:
    """A model's losses over windows, and `window_losses` of each. Raises NotFinite."""
    rows = losses_by_sequence(model.eval(), torch.from_numpy(np.array(windows)), autocast=autocast)
    return asdict(losses_over(rows)) | {"window_losses": rows.tolist()}


DENSE = Conversion(
    "dense",
    "",
    "nothing is shared",
    (),
    lambda shape: (),
    lambda dense, numbers: SharingConfig.dense(dense.shape),
    lambda dense, config, start: dense.weights,
)
"""The conversion that changes nothing: the base model beside what is made of it."""


@dataclass(frozen=True)
class ConvertTask:
    """A conversion by a method, or none, and a size."""

    method: str
    size: tuple[int, ...]

    @property
    def row(self) -> Conversion:
        return METHODS.get(self.method, DENSE)

    @property
    def key(self) -> str:
        return f"{self.method}-{spell(self.size)}" if self.size else self.method

    def name(self, preset: str = "") -> str:
        """What a model with its weights is called, also after fine-tuning; the name of the `preset` that has its config, if
        another's, comes last."""
        own = self.key if self.row is DENSE else f"{self.key}-converted"
        return own if preset in ("", self.key) else f"{own} = {preset}"

    def convert(self, dense: PretrainedModel, config: SharingConfig) -> Decoder:
        """The model of the config that the method chose, with weights that are the dense one's where they are the same."""
        return convert(self.row, dense, config, self.row.read_start(None))


Conversions = Callable[[dict[str, ConvertTask]], dict[str, dict[str, Any] | Failure]]
"""What comes of each conversion, by its key."""


def build_converter(settings: EvaluatorSettings, weights: dict[str, Tensor]) -> Conversions:
    """The function that converts and measures, by key: the config, the losses and the seconds they took or, where the method does
    not fit the model, why it is `refused`. `weights` are the base model's, `calibration` and `windows`."""
    shape = settings.space.shape
    model = Decoder(shape, SharingConfig.dense(shape).resolve(shape))
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.requires_grad_(False).to(find_device())
    windows = weights["windows"].to(find_device())

    def make(dense: PretrainedModel, task: ConvertTask) -> dict[str, Any]:
        watch = Stopwatch()
        try:
            config = choose(task.row, dense, task.size)
        except UserError as error:
            return {"refused": str(error)}
        converted = task.convert(dense, config)
        losses = measure_losses(converted.eval(), windows, autocast=settings.autocast)
        return asdict(losses) | {"config": config.to_data(), "seconds": watch.seconds}

    def make_all(tasks: dict[str, ConvertTask]) -> dict[str, dict[str, Any] | Failure]:
        dense = PretrainedModel(model, weights["calibration"])  # what is measured of it is kept for these tasks alone
        return {key: run_catching(make, dense, task) for key, task in tasks.items()}

    return make_all


def write_weights(model: Decoder, path: Path, dtype: torch.dtype) -> None:
    """A stand-alone model's weights as safetensors, whole or not at all."""
    with atomic_write(path) as part:
        save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}, part)


def read_model(shape: ModelShape, config: SharingConfig, path: Path) -> Decoder:
    """The stand-alone model whose weights `write_weights` wrote, in their dtype. Raises UserError."""
    model = Decoder(shape, config.resolve(shape))
    weights = read_weights_file(path, f"put it back from a copy, or delete {path.parent} and resume the run")
    require_match(weights, {name: tuple(weight.shape) for name, weight in model.state_dict().items()}, path)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_base(folder: Path) -> Decoder:
    """The base model in a folder, in float32, on this process's device; it is not trained. Its file is mapped, so that processes
    share what they read."""
    return load_export(folder).model.float().to(find_device()).requires_grad_(False).eval()
