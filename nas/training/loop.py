"""The training loop: its settings, its optimizer, its resumable state, and the gradients of a text or of a teacher.

Owns `TrainSpec` and `Trainer`, one loop for a stand-alone model and a supernet. Which gradients a batch adds is a `Backward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict, reading, require_kinds
from ..errors import UserError
from ..files import atomic_write
from ..model.decoder import Decoder
from .evaluation import NotFinite, sequence_losses, token_losses
from .ranks import ALONE, Ranks


@dataclass(frozen=True)
class TrainSpec(Strict):
    """Length and settings of a training: AdamW (betas 0.9, 0.95), linear warm-up, cosine decay to a tenth of the learning rate.

    The learning rate decays over the last `lr_decay_fraction` of the steps, by default over all of them. With 0 it is constant,
    as it must where models are compared at several points of one training (Hägele et al., 2405.18392).
    """

    steps: NonNegativeInt
    batch: PositiveInt = 16
    seq: PositiveInt = 128
    learning_rate: NonNegativeFloat = 3e-3
    warmup: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    autocast: bool = True
    lr_decay_fraction: Fraction = 1.0

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
    """AdamW with each Parameter once, however many layers use it; norms have no weight decay."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)  # on a CPU too: far less per Parameter


Backward = Callable[[Tensor], Tensor]
"""Adds the gradients of one batch `(batch, seq + 1)` and returns its loss in nats a token, `()`, on the batch's device: the host
does not wait for it."""


@dataclass
class Trainer:
    """A training in progress: a checkpoint of it resumes bitwise as if it had not stopped. It may be one of several processes."""

    model: nn.Module
    spec: TrainSpec
    generator: torch.Generator
    ranks: Ranks = ALONE
    step: int = 0

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, self.spec)

    def run(self, batches: Iterator[Tensor], backward: Backward, until: int | None = None) -> Iterator[tuple[int, float]]:
        """Train to a step (the last by default), yielding `(steps done, loss)` after each. Raises NotFinite at a NaN."""
        self.model.train()
        device = next(self.model.parameters()).device
        last = self.spec.steps if until is None else min(until, self.spec.steps)
        while self.step < last:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.spec, self.step)
            self.optimizer.zero_grad(set_to_none=True)
            found = self.ranks.average(self.model, backward(self.ranks.part(next(batches)).to(device)))
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
            loss, length = torch.stack([found, norm]).tolist()  # the one place where the host waits for a GPU
            if not math.isfinite(loss) or not math.isfinite(length):
                raise NotFinite(f"the loss is {loss} and its gradient's norm {length} at step {self.step}")
            self.optimizer.step()
            self.step += 1
            yield self.step, loss

    def write(self, path: Path, **extra: Any) -> None:
        """Write a checkpoint, which may not have reached the disk yet; `extra` must be plain data. After the last step the
        optimizer's state is left out: nothing goes on from there."""
        optimizer = self.optimizer.state_dict() if self.step < self.spec.steps else None
        state = {"model": self.model.state_dict(), "optimizer": optimizer, "step": self.step}
        torch.save(state | {"generator": self.generator.get_state(), "extra": extra}, path)

    def save(self, path: Path, **extra: Any) -> None:
        """Write a checkpoint atomically; `extra` must be plain data."""
        with atomic_write(path) as part:
            self.write(part, **extra)

    def load(self, path: Path) -> dict[str, Any]:
        """Resume from a checkpoint; returns its `extra`."""
        state = read_state(path, self.model)
        self.model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        return dict(state["extra"])


def read_state(path: Path, model: nn.Module | None = None) -> dict[str, Any]:
    """A training's state as `Trainer.write` wrote it, for a model. The file is mapped: processes share what they read of it.
    Raises UserError."""
    with reading(path, f"delete {path.parent}: that training is done again"):
        try:
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except (EOFError, RuntimeError, UnpicklingError) as error:  # what torch says of a file that it did not write
            raise ValueError(str(error).partition("\n")[0]) from None
        require_kinds(state, {"model": dict, "step": int, "generator": Tensor, "extra": dict})
        shapes = {name: weight.shape for name, weight in model.state_dict().items()} if model else {}
        if model and {name: weight.shape for name, weight in state["model"].items()} != shapes:
            raise ValueError("the weights are another model's")
    return state


# --- what a batch adds


def backward_of(loss: Callable[[Tensor], Tensor]) -> Backward:
    """Gradients of a loss `()` of rows `(batch, seq + 1)`."""

    def backward(rows: Tensor) -> Tensor:
        found = loss(rows)
        found.backward()
        return found.detach()

    return backward


def plain_backward(model: Decoder, spec: TrainSpec) -> Backward:
    """Gradients of one model's cross-entropy."""
    return backward_of(lambda rows: sequence_losses(model, rows, spec.autocast).mean())


def distillation_backward(model: Decoder, teacher: Decoder, spec: TrainSpec) -> Backward:
    """Gradients of the cross-entropy of a model with a teacher's probabilities (Hinton et al., 1503.02531, at temperature 1)."""
    return backward_of(
        lambda rows: token_losses(token_logits(model, rows, spec), teacher_probabilities(teacher, rows, spec)).mean()
    )


@torch.no_grad()
def teacher_probabilities(teacher: Decoder, rows: Tensor, spec: TrainSpec) -> Tensor:
    """A teacher's probabilities `(batch, seq, vocab)` of each next token in rows `(batch, seq + 1)`."""
    return token_logits(teacher, rows, spec).float().softmax(-1)


def token_logits(model: Decoder, rows: Tensor, spec: TrainSpec) -> Tensor:
    """Logits `(batch, seq, vocab)` of each next token in rows `(batch, seq + 1)`."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=spec.autocast):
        logits: Tensor = model(rows[:, :-1])
    return logits
