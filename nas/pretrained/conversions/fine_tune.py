"""Training before and after a conversion: what was torn is fine-tuned, and what will be tied is drawn together.

Owns the penalty's loss. The loop, its settings and the other losses are `nas.training`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...data import train_batches
from ...model.decoder import Decoder
from ...training.distillation import distillation_backward
from ...training.evaluation import window_losses
from ...training.loop import Trainer, TrainSpec, plain_backward

Steps = Iterator[tuple[int, float]]
"""`(steps done, loss)` after each step."""


def fine_tune(
    model: Decoder, spec: TrainSpec, tokens: Tensor, generator: torch.Generator, teacher: Decoder | None = None
) -> Steps:
    """Train a converted model on text `(tokens,)`, or on a teacher's probabilities there. Raises NotFinite."""
    backward = plain_backward(model, spec) if teacher is None else distillation_backward(model, teacher, spec)
    return Trainer(model, spec, generator).run(train_batches(tokens, spec.batch, spec.seq, generator), backward)


def align_heads(
    model: Decoder, penalty: Callable[[Decoder], Tensor], spec: TrainSpec, tokens: Tensor, generator: torch.Generator
) -> Steps:
    """Train a dense model on half its loss and half a penalty, as PostShare does (2402.11819). Raises NotFinite."""

    def backward(rows: Tensor) -> float:
        loss = (window_losses(model, rows, spec.autocast).mean() + penalty(model)) / 2
        loss.backward()
        return loss.item()

    return Trainer(model, spec, generator).run(train_batches(tokens, spec.batch, spec.seq, generator), backward)
