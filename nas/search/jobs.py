"""What workers do: convert a checkpoint, evaluate subnets on inherited weights, train a supernet, train one config alone.

Owns the computing of each stage as plain functions of plain arguments, so that any process on any node can run them. Where they
run is `nas.workers`', in which order `nas.search.launch`'. Weights travel as numpy arrays.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data import train_batches
from ..errors import UserError
from ..files import atomic_write
from ..model.decoder import Decoder, init_weights
from ..model.supernet import Supernet
from ..pretrained.conversions import METHODS, Conversion, PretrainedModel, choose, convert
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..splitting import LeafSpace
from ..training.distillation import distillation_backward
from ..training.evaluation import Losses, Stopwatch, losses_by_sequence, losses_over, measure_losses
from ..training.loop import Backward, Trainer, TrainSpec, plain_backward
from ..training.strategies import SupernetStep, sampling_strategy
from ..workers import Session

Array = np.ndarray[Any, Any]


def device() -> torch.device:
    """The accelerator this process was given, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Inherited:
    """What every evaluating worker holds: the space, and how the subnets are run. The weights travel beside it."""

    space: SearchSpace
    autocast: bool


@dataclass(frozen=True)
class SubnetTask:
    """One config to evaluate, on the weights of one (sub-)supernet."""

    config: SharingConfig
    supernet: str


def pack(supernets: Mapping[str, Supernet], windows: Tensor) -> dict[str, Tensor]:
    """The weights of all sub-supernets and the evaluation windows, as the one dictionary that workers share."""
    weights = {f"{name}/{key}": value for name, net in supernets.items() for key, value in net.state_dict().items()}
    return weights | {"windows": windows}


def build_evaluator(payload: Inherited, weights: dict[str, Tensor]) -> Callable[[SubnetTask], tuple[Losses, float]]:
    """The function that measures a subnet: its losses, and the seconds they took. It raises NotFinite."""
    windows = weights["windows"].to(device())
    names = {key.partition("/")[0] for key in weights if "/" in key}
    supernets = {name: _unpack(payload.space, name, weights) for name in names}

    def evaluate(task: SubnetTask) -> tuple[Losses, float]:
        watch = Stopwatch()
        subnet = supernets[task.supernet].subnet(task.config)
        return measure_losses(subnet, windows, autocast=payload.autocast), watch.seconds

    return evaluate


def new_supernet(space: SearchSpace, generator: torch.Generator) -> Supernet:
    """A fresh supernet with every weight that a config of the space can need."""
    return Supernet(space.shape, generator, space.extra_parameters())


def _unpack(space: SearchSpace, name: str, weights: Mapping[str, Tensor]) -> Supernet:
    """A supernet whose Parameters are the shared bytes themselves: nothing is copied, and nothing may be trained."""
    state = {key.removeprefix(f"{name}/"): value for key, value in weights.items() if key.startswith(f"{name}/")}
    supernet = new_supernet(space, torch.Generator())
    supernet.load_state_dict(state, assign=True)
    return supernet.to(device()).eval().requires_grad_(False)


CHECKPOINT_SECONDS = 30.0
REPORT_SECONDS = 0.5


class Reports:
    """What a training tells its session as it goes: progress twice a second, and at its last step."""

    def __init__(self, session: Session, steps: int) -> None:
        self.session, self.steps = session, steps
        self._reported = Stopwatch()

    def step(self, step: int, loss: float, checkpoint: Path | None = None) -> None:
        """One step is done; a checkpoint's folder is told of at once."""
        if checkpoint or self._reported.seconds > REPORT_SECONDS or step == self.steps:
            metrics = {"step": step, "steps": self.steps, "loss_nats_per_token": loss, "perplexity": math.exp(min(loss, 700.0))}
            self.session.report(metrics, checkpoint)
            self._reported = Stopwatch()


class CheckpointedTraining:
    """A training that can stop anywhere: it reports, and makes a checkpoint every half minute."""

    def __init__(self, session: Session, fit: Trainer, steps: int) -> None:
        self.session, self.fit, self.steps = session, fit, steps
        self.tokens = 0
        self._reports, self._saved = Reports(session, steps), Stopwatch()

    def begin(self, start: Path | None) -> None:
        """Go on from the session's checkpoint, else from the state at `start`, else from the beginning."""
        checkpoint = self.session.checkpoint
        state = checkpoint / "fit.pt" if checkpoint else start
        if state:
            self.tokens = self.fit.load(state)["tokens"]

    def step(self, step: int, loss: float, tokens: int) -> None:
        """One step is done, and it computed so many tokens."""
        self.tokens += tokens
        folder = None
        if self._saved.seconds > CHECKPOINT_SECONDS and step < self.steps:
            folder = Path(tempfile.mkdtemp(dir=self.session.folder, prefix="making-"))
            self.save(folder / "fit.pt")
            self._saved = Stopwatch()
        self._reports.step(step, loss, folder)

    def save(self, path: Path) -> None:
        """Write the training's state."""
        self.fit.save(path, tokens=self.tokens)


@dataclass(frozen=True)
class SupernetTraining:
    """Train a (sub-)supernet from the state at `start` (a fresh one, if None), which has `begun` steps, to step `until`.

    With `distill` it learns from the dense model whose weights lie at `teacher`, or from its own largest subnet if that is None.
    """

    space: LeafSpace
    memory: MemorySpec
    spec: TrainSpec
    strategy: str
    distill: bool
    seed: int
    tokens: Array
    until: int
    begun: int = 0
    start: Path | None = None
    teacher: Path | None = None

    def teacher_of(self) -> SharingConfig | Decoder | None:
        """What the subnets learn from beside the text."""
        if not self.distill:
            return None
        return read_teacher(self.space.shape, self.teacher) if self.teacher else self.space.largest()


def new_supernet_trainer(job: SupernetTraining) -> Trainer:
    """The training of a supernet before its first step."""
    generator = torch.Generator().manual_seed(job.seed)
    return Trainer(new_supernet(job.space, generator).to(device()), job.spec, generator)


def train_supernet(job: SupernetTraining, session: Session) -> dict[str, Any]:
    """Do a `SupernetTraining`, the same whether or not it was stopped on the way; leaves `fit.pt` in the session's folder."""
    fit = new_supernet_trainer(job)
    journey = CheckpointedTraining(session, fit, job.until)
    journey.begin(job.start)
    before = read_tokens(job.start)
    rng = random.Random(f"{job.seed} {job.space.leaf}")
    draw = sampling_strategy(job.strategy, job.space, job.memory)
    for _ in range(fit.step - job.begun):
        draw(rng)
    assert isinstance(fit.model, Supernet)
    backward = SupernetStep(fit.model, job.spec, draw, rng, job.teacher_of())
    for step, loss in fit.run(token_batches(job.tokens, job.spec, fit.generator), backward, job.until):
        journey.step(step, loss, backward.subnets * job.spec.batch * job.spec.seq)
    journey.save(session.folder / "fit.pt")
    return {"step": fit.step, "steps": job.until, "tokens": journey.tokens, "stage_tokens": journey.tokens - before}


def token_batches(tokens: Array, spec: TrainSpec, generator: torch.Generator) -> Iterator[Tensor]:
    """Random windows of tokens for a training, where it computes."""
    batches = train_batches(torch.from_numpy(np.array(tokens)), spec.batch, spec.seq, generator)
    return (rows.to(device()) for rows in batches)


def read_tokens(path: Path | None) -> int:
    """The tokens behind a saved state; 0 where there is none."""
    return int(torch.load(path, weights_only=True, map_location="cpu")["extra"]["tokens"]) if path else 0


def read_supernet(space: SearchSpace, path: Path) -> tuple[Supernet, int]:
    """The supernet for a space in a saved state, and the tokens that it was trained on."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    supernet = new_supernet(space, torch.Generator())
    supernet.load_state_dict(state["model"])
    return supernet, state["extra"]["tokens"]


@dataclass(frozen=True)
class StandaloneTraining:
    """Train one config alone, and measure it: from scratch, or from the weights at `start`; on the text, or on the probabilities
    of the dense model whose weights lie at `teacher`. Its own weights stay in the session's folder, if they are to `keep`."""

    shape: ModelShape
    config: SharingConfig
    spec: TrainSpec
    seed: int
    tokens: Array
    windows: Array
    start: Path | None = None
    teacher: Path | None = None
    keep: bool = True

    def begin(self) -> Decoder:
        """The model before its first step."""
        if self.start:
            return read_model(self.shape, self.config, self.start)
        fresh = Decoder(self.shape, self.config.resolve(self.shape))
        return init_weights(fresh, torch.Generator().manual_seed(self.seed))

    def backward(self, model: Decoder) -> Backward:
        """How a batch's gradients are made."""
        if self.teacher is None:
            return plain_backward(model, self.spec)
        return distillation_backward(model, read_teacher(self.shape, self.teacher), self.spec)


def train_standalone(job: StandaloneTraining, session: Session) -> dict[str, Any]:
    """Do a `StandaloneTraining`; its weights are `model.safetensors` in the session's folder. Models of one seed see the same
    batches.

    The result has the losses, and `window_losses` of each evaluation window.
    """
    watch = Stopwatch()
    model = job.begin().to(device())
    fit = Trainer(model, job.spec, torch.Generator().manual_seed(job.seed))
    journey = CheckpointedTraining(session, fit, job.spec.steps)
    journey.begin(None)
    batches = token_batches(job.tokens, job.spec, fit.generator)
    for step, loss in fit.run(batches, job.backward(model)):
        journey.step(step, loss, job.spec.batch * job.spec.seq)
    rows = losses_by_sequence(model.eval(), torch.from_numpy(np.array(job.windows)), autocast=job.spec.autocast)
    losses = losses_over(rows)
    if job.keep:
        write_weights(model, session.folder / "model.safetensors")
    told = {"step": fit.step, "steps": fit.step, "tokens": journey.tokens, "seconds": watch.seconds}
    return asdict(losses) | told | {"window_losses": rows.tolist()}


DENSE = Conversion(
    "dense",
    "",
    "nothing is shared",
    (),
    lambda shape: (),
    lambda dense, numbers: SharingConfig.dense(dense.shape),
    lambda dense, config, start: dense.weights,
)
"""The conversion that changes nothing: the checkpoint beside what is made of it."""


@dataclass(frozen=True)
class Converting:
    """What every converting worker holds: the shape of the checkpoint, and how what is made of it is run."""

    shape: ModelShape
    autocast: bool


@dataclass(frozen=True)
class ConvertTask:
    """One conversion to make, of a method and a size, and the folder to leave `model.safetensors` in."""

    method: str
    size: tuple[int, ...]
    folder: Path


def build_converter(payload: Converting, weights: dict[str, Tensor]) -> Callable[[ConvertTask], dict[str, Any]]:
    """The function that converts and measures: the config, the losses and the seconds they took or, where the model does not
    bear the method, why it is `refused`. It raises NotFinite. `weights` are the checkpoint's, `calibration` and `windows`."""
    model = Decoder(payload.shape, SharingConfig.dense(payload.shape).resolve(payload.shape))
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    dense, windows = PretrainedModel(model.requires_grad_(False), weights["calibration"]), weights["windows"]

    def make(task: ConvertTask) -> dict[str, Any]:
        watch, method = Stopwatch(), METHODS.get(task.method, DENSE)
        try:
            config = choose(method, dense, task.size)
        except UserError as error:
            return {"refused": str(error)}
        converted = convert(method, dense, config, method.read_start(None)).to(device())
        losses = measure_losses(converted.eval(), windows, autocast=payload.autocast)
        task.folder.mkdir(parents=True, exist_ok=True)
        write_weights(converted, task.folder / "model.safetensors")
        return asdict(losses) | {"config": config.to_data(), "seconds": watch.seconds}

    return make


def write_weights(model: Decoder, path: Path) -> None:
    """A stand-alone model's weights as safetensors, whole or not at all."""
    with atomic_write(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, part)


def read_model(shape: ModelShape, config: SharingConfig, path: Path) -> Decoder:
    """The stand-alone model whose weights `write_weights` wrote."""
    model = Decoder(shape, config.resolve(shape))
    model.load_state_dict(load_file(path))
    return model.eval()


def read_teacher(shape: ModelShape, path: Path) -> Decoder:
    """The dense model whose weights lie at a path, to be learnt from and not to be trained."""
    return read_model(shape, SharingConfig.dense(shape), path).to(device()).requires_grad_(False)
