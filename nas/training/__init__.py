"""Training and evaluation: one loop for a stand-alone model and a supernet, and the loss on fixed sequences.

Owns the loop (`loop`), learning from a teacher (`distillation`), the sampling of a supernet's subnets (`strategies`) and the
measured `Evaluation`.
"""

from __future__ import annotations

from .distillation import distillation_backward
from .evaluation import Evaluation, Losses, NotFinite, Stopwatch, losses_by_sequence, losses_over, measure_losses, sequence_losses
from .loop import Backward, Trainer, TrainSpec, make_optimizer, plain_backward
from .strategies import STRATEGIES, SupernetStep, sampling_strategy

__all__ = [
    "STRATEGIES",
    "Backward",
    "Evaluation",
    "Losses",
    "NotFinite",
    "Stopwatch",
    "SupernetStep",
    "TrainSpec",
    "Trainer",
    "distillation_backward",
    "losses_by_sequence",
    "losses_over",
    "make_optimizer",
    "measure_losses",
    "plain_backward",
    "sampling_strategy",
    "sequence_losses",
]
