"""Learning from a teacher's probabilities (Hinton et al., 1503.02531, at temperature 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.decoder import Decoder
from .cross_entropy import token_losses
from .loop import Backward, TrainSpec


def distillation_backward(model: Decoder, teacher: Decoder, spec: TrainSpec) -> Backward:
    """Gradients of the cross-entropy of a model with a teacher's probabilities."""

    def backward(rows: Tensor) -> Tensor:
        loss = cross_entropy(token_logits(model, rows, spec), teacher_probabilities(teacher, rows, spec))
        loss.backward()
        return loss.detach()

    return backward


@torch.no_grad()
def teacher_probabilities(teacher: Decoder, rows: Tensor, spec: TrainSpec) -> Tensor:
    """A teacher's probabilities `(batch, seq, vocab)` of each next token in rows `(batch, seq + 1)`."""
    return token_logits(teacher, rows, spec).float().softmax(-1)


def token_logits(model: Decoder, rows: Tensor, spec: TrainSpec) -> Tensor:
    """Logits `(batch, seq, vocab)` of each next token in rows `(batch, seq + 1)`."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=spec.autocast):
        logits: Tensor = model(rows[:, :-1])
    return logits


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens; `target` is `(batch, seq)` token ids or `(batch, seq, vocab)` probabilities."""
    return token_losses(logits, target).mean()
