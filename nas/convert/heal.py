"""Training before and after a conversion: what was torn is healed, and what will be tied is drawn together.

Owns the two losses. The loop and its settings are `nas.training`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import train_batches
from ..evaluate import window_losses
from ..model import Decoder
from ..training import Backward, Fit, TrainSpec, plain_backward

Steps = Iterator[tuple[int, float]]
"""`(steps done, loss)` after each step."""


def heal(model: Decoder, spec: TrainSpec, tokens: Tensor, generator: torch.Generator, teacher: Decoder | None = None) -> Steps:
    """Train a converted model on text `(tokens,)`, or on a teacher's probabilities there. Raises NotFinite."""
    backward = plain_backward(model, spec) if teacher is None else distilled(model, teacher, spec)
    return Fit(model, spec, generator).run(train_batches(tokens, spec.batch, spec.seq, generator), backward)


def draw_together(
    model: Decoder, penalty: Callable[[Decoder], Tensor], spec: TrainSpec, tokens: Tensor, generator: torch.Generator
) -> Steps:
    """Train a dense model on half its loss and half a penalty, as PostShare does (2402.11819). Raises NotFinite."""

    def backward(rows: Tensor) -> float:
        loss = (window_losses(model, rows, spec.autocast).mean() + penalty(model)) / 2
        loss.backward()
        return loss.item()

    return Fit(model, spec, generator).run(train_batches(tokens, spec.batch, spec.seq, generator), backward)


def distilled(model: Decoder, teacher: Decoder, spec: TrainSpec) -> Backward:
    """Cross-entropy of a model with a teacher's probabilities (Hinton et al., 1503.02531, at temperature 1)."""

    def backward(rows: Tensor) -> float:
        with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=spec.autocast):
            with torch.no_grad():
                wanted = teacher(rows[:, :-1]).float().softmax(-1)
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(0, 1))
        loss.backward()
        return loss.item()

    return backward
