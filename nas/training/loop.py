"""The training loop, and the rules by which a supernet's subnets are chosen to be trained.

Owns `fit` (one loop for a model alone and for a supernet), its settings and its resumable state, and `STRATEGIES`. What is
trained, on which text, and where, is the caller's.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Strict
from ..errors import UserError, did_you_mean
from ..model.decoder import Decoder
from ..model.supernet import Supernet
from ..sharing.memory import MemorySpec
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from .evaluation import NotFinite, window_losses


@dataclass(frozen=True)
class TrainSpec(Strict):
    """How long and how fast: AdamW (betas 0.9, 0.95), linear warm-up, cosine to a tenth of the learning rate, bfloat16 autocast.

    The rate falls over the last `lr_decay_fraction` of the steps: all of them by default; with 0 it stays, as it must where
    models are compared at several points of one training (Hägele et al., 2405.18392, who average weights in place of the fall).
    """

    steps: int
    batch: int = 16
    seq: int = 128
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    autocast: bool = True
    lr_decay_fraction: float = 1.0

    def __post_init__(self) -> None:
        least = {
            "steps": 0,
            "batch": 1,
            "seq": 1,
            "learning_rate": 0.0,
            "weight_decay": 0.0,
            "warmup": 0.0,
            "lr_decay_fraction": 0.0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{getattr(self, name)} is too small", where=name, hint=f"use {low} or more")
        if not self.clip > 0:
            raise UserError(f"{self.clip} would stop all learning", where="clip", hint="use a gradient norm, such as 1.0")
        for name in ("warmup", "lr_decay_fraction"):
            if getattr(self, name) > 1:
                raise UserError(f"{getattr(self, name)} is more than all steps", where=name, hint="use a fraction, such as 0.05")

    @property
    def tokens(self) -> int:
        """Tokens seen over all steps, each batch counted once."""
        return self.steps * self.batch * self.seq


def require_rates(rates: Sequence[float]) -> None:
    """Raise UserError for learning rates that cannot be tried beside one another."""
    if not rates or len(set(rates)) < len(rates) or min(rates) <= 0:
        message = f"{rates} are not different rates above zero"
        raise UserError(message, where="learning_rates", hint="list some, such as [0.002, 0.004, 0.008]")


def learning_rate_at(spec: TrainSpec, step: int) -> float:
    """The learning rate of a step counted from 0."""
    warm = max(int(spec.warmup * spec.steps), 1)
    if step < warm:
        return spec.learning_rate * (step + 1) / warm
    high = max(warm, round((1 - spec.lr_decay_fraction) * spec.steps))
    if step < high:
        return spec.learning_rate
    progress = (step - high) / max(spec.steps - high, 1)
    return spec.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW with each Parameter once, however many layers use it; norms are not decayed."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)  # on a CPU too: far less per Parameter


Backward = Callable[[Tensor], float]
"""Adds the gradients of one batch `(batch, seq + 1)` and returns its loss in nats a token."""


@dataclass
class Trainer:
    """A training under way: everything a checkpoint must hold to go on exactly as if it had not stopped."""

    model: nn.Module
    spec: TrainSpec
    generator: torch.Generator
    step: int = 0

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, self.spec)

    def run(self, batches: Iterator[Tensor], backward: Backward, until: int | None = None) -> Iterator[tuple[int, float]]:
        """Train to a step (the last by default), yielding `(steps done, loss)` after each. Raises NotFinite at a NaN."""
        self.model.train()
        last = self.spec.steps if until is None else min(until, self.spec.steps)
        while self.step < last:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.spec, self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss = backward(next(batches))
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
            if not math.isfinite(loss) or not torch.isfinite(norm):
                raise NotFinite(f"the loss is {loss} and its gradient's norm {norm} at step {self.step}")
            self.optimizer.step()
            self.step += 1
            yield self.step, loss

    def save(self, path: Path, **extra: Any) -> None:
        """Write the state, whole or not at all even if the power goes; `extra` must be plain data."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(state | {"generator": self.generator.get_state(), "extra": extra}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a saved state; returns its `extra`."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        return dict(state["extra"])


class WeightAverage:
    """The mean of a model's weights over the last `fraction` of the steps before each of some points, in float32.

    It stands in for the fall of the rate that a training of just so many steps would have (LAWA, 2209.14981; 2405.18392), so that
    one training is judged at several lengths, with less of the noise that single steps leave.
    """

    def __init__(self, model: nn.Module, fraction: float, points: Sequence[int]) -> None:
        self.model, self.fraction, self.points = model, fraction, sorted(points)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def step(self, done: int) -> dict[str, Tensor] | None:
        """After step `done`, counted from 1: the mean state dict if this is one of the points, else None."""
        point = next((point for point in self.points if done <= point), 0)
        if done > point - max(round(self.fraction * point), 1):
            self._count += 1
            for name, weight in self.model.state_dict().items():
                if self._count == 1:
                    self._sums[name] = weight.float().clone()
                else:
                    self._sums[name].lerp_(weight.float(), 1 / self._count)
        if done != point:
            return None
        mean, self._sums, self._count = self._sums, {}, 0
        return mean


def plain_backward(model: Decoder, spec: TrainSpec) -> Backward:
    """Cross-entropy of one model."""

    def backward(rows: Tensor) -> float:
        loss = window_losses(model, rows, spec.autocast).mean()
        loss.backward()
        return loss.item()

    return backward


def distillation_backward(model: Decoder, teacher: Decoder, spec: TrainSpec) -> Backward:
    """Cross-entropy of a model with a teacher's probabilities (Hinton et al., 1503.02531, at temperature 1)."""

    def backward(rows: Tensor) -> float:
        loss = _cross_entropy(_logits(model, rows, spec), teacher_probabilities(teacher, rows, spec))
        loss.backward()
        return loss.item()

    return backward


@torch.no_grad()
def teacher_probabilities(teacher: Decoder, rows: Tensor, spec: TrainSpec) -> Tensor:
    """What a teacher expects after each token of rows `(batch, seq + 1)` but the last: probabilities `(batch, seq, vocab)`."""
    return _logits(teacher, rows, spec).softmax(-1)


def _logits(model: Decoder, rows: Tensor, spec: TrainSpec) -> Tensor:
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=spec.autocast):
        logits: Tensor = model(rows[:, :-1])
    return logits.float()


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens; `target` is `(batch, seq)` token ids or `(batch, seq, vocab)` probabilities."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


SamplingStrategy = Callable[[SearchSpace, MemorySpec], Callable[[random.Random], list[SharingConfig]]]
"""Given a space, how each step's subnets are drawn."""


def _keep(space: SearchSpace, memory: MemorySpec) -> Callable[[SharingConfig], bool]:
    return lambda config: space.meets_limits(config, memory)


def _uniform(space: SearchSpace, memory: MemorySpec) -> Callable[[random.Random], list[SharingConfig]]:
    keep = _keep(space, memory)
    return lambda rng: [space.sample(rng, keep)]


def _dense_biased(space: SearchSpace, memory: MemorySpec) -> Callable[[random.Random], list[SharingConfig]]:
    keep, likely = _keep(space, memory), space.whole_options()

    def draw(rng: random.Random) -> list[SharingConfig]:
        def pick(name: str, options: tuple[Any, ...]) -> Any:
            return likely[name] if likely[name] in options and rng.random() < 0.5 else rng.choice(options)

        tried = (space.walk(pick)[0] for _ in range(TRIES))
        found = next((config for config in tried if space.holds(config) and keep(config)), None)
        return [found or space.sample(rng, keep)]

    return draw


TRIES = 100
"""Draws of a subnet within the limits before any is taken."""


def _sandwich(space: SearchSpace, memory: MemorySpec) -> Callable[[random.Random], list[SharingConfig]]:
    ends = [space.largest(), space.extreme(memory, "memory_bytes", 1)]
    keep = _keep(space, memory)
    return lambda rng: [ends[0], *(space.sample(rng, keep) for _ in range(2)), ends[1]]


def _fair(space: SearchSpace, memory: MemorySpec) -> Callable[[random.Random], list[SharingConfig]]:
    decks: dict[str, list[Any]] = {}
    count = max(map(len, space.options.values()), default=1)

    def draw(rng: random.Random) -> list[SharingConfig]:
        def pick(name: str, options: tuple[Any, ...]) -> Any:
            if not decks.get(name):
                decks[name] = rng.sample(options, len(options))
            return decks[name].pop()

        dealt = [space.walk(pick)[0] for _ in range(count)]
        return [config for config in dealt if space.holds(config)] or [space.sample(rng)]

    return draw


STRATEGIES: dict[str, SamplingStrategy] = {
    "uniform": _uniform,
    "dense_biased": _dense_biased,
    "sandwich": _sandwich,
    "fair": _fair,
}
"""How a supernet step draws its subnets.

`uniform`: one random subnet (SPOS, 1904.00420). `dense_biased`: one that takes at each decision, half of the time, what shares
least; a layer that may use any of five others' weights has its own in one draw of six else, and they are hardly trained.
`sandwich`: the largest, two random, the smallest (1903.05134). `fair`: as many subnets as the widest decision has options, each
decision dealing its options from a shuffled deck without replacement, so that how often its options were drawn never differs by
more than one (FairNAS, 1907.01845, extended to decisions not always open); limits do not bind it. What is drawn follows from
the generator alone, so that a stopped training can draw again what it drew.
"""


def sampling_strategy(name: str, space: SearchSpace, memory: MemorySpec) -> Callable[[random.Random], list[SharingConfig]]:
    """The drawing function of a strategy by name. Raises UserError for an unknown one."""
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}", where="supernet.strategy", hint=did_you_mean(name, STRATEGIES))
    return STRATEGIES[name](space, memory)


@dataclass
class SupernetStep:
    """One batch through several subnets, gradients added up in the shared bank; one drawn twice runs once and counts twice.

    With a config as `teacher`, its subnet learns from the text and every other from its probabilities (1903.05134, section 3.3);
    with a model, which stays as it is, every subnet learns from the model's.
    """

    supernet: Supernet
    spec: TrainSpec
    draw: Callable[[random.Random], list[SharingConfig]]
    rng: random.Random
    teacher: SharingConfig | Decoder | None = None
    subnets: int = 0
    """How many subnets the last step ran."""

    def __call__(self, rows: Tensor) -> float:
        """The mean loss of the step's subnets in nats a token; a distilled one's is its cross-entropy with the teacher."""
        drawn, soft = Counter(self.draw(self.rng)), None
        if isinstance(self.teacher, Decoder):
            soft = teacher_probabilities(self.teacher, rows, self.spec)
        elif self.teacher is not None:
            drawn = Counter([self.teacher]) | drawn
        self.subnets, total = len(drawn), 0.0
        for config, times in drawn.items():
            logits = _logits(self.supernet.subnet(config), rows, self.spec)
            loss = _cross_entropy(logits, rows[:, 1:] if soft is None else soft) * (times / drawn.total())
            loss.backward()
            total += loss.item()
            if self.teacher is not None and soft is None:
                soft = logits.detach().softmax(-1)
        return total
