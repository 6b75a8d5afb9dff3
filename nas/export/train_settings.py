"""What a folder's training is given and what it leaves, and what several processes (`torchrun`) decide together.

Owns `TrainSettings` and `Trained`. It does not import `transformers`; the training itself is `train`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..config import Fraction, NonNegativeFloat, OneOf, PositiveFloat, PositiveInt, Seed, Strict
from ..errors import UserError
from ..sharing.shape import DTYPE_BYTES
from ..training.evaluation import Losses

T = TypeVar("T")

CHECKPOINTS = "checkpoints"  # the folder of a training's checkpoints, in the folder that it will write


def world_size() -> int:
    """The number of processes that train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process evaluates, writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """What the main process computes, in all processes; its UserError is raised in all, so that none waits for ever."""
    result: list[Any] = [None]
    if is_main_process():
        try:
            result = [compute()]
        except UserError as error:
            result = [error]
    if world_size() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


@dataclass(frozen=True)
class TrainSettings(Strict):
    """How a folder is trained: AdamW (betas 0.9, 0.95), linear warm-up, cosine to a tenth of the learning rate, as in a search.

    batch: rows per step, divided over the processes and over `grad_accumulation` parts; the result does not depend on how.
    steps: by default as many as make `epochs`. column: of JSON lines or a dataset, what holds the text. eval_text: text to
    evaluate on; by default the last `eval_fraction` of the training text, which is not trained on. eval_steps: evaluate
    every so many steps, besides before and after. save_steps: write a checkpoint every so many steps, from which `resume`
    continues. from_scratch: start from new weights. distill_from: a folder whose model's probabilities are learned with
    `distill_weight` of the loss, the text with the rest (Hinton et al., 1503.02531, at temperature 1). dtype: of the
    weights that are written, by default unchanged; training is in float32. device: as `find_device` reads it; of several
    processes each has the GPU of its rank.
    """

    epochs: PositiveFloat = 1.0
    steps: PositiveInt | None = None
    batch: PositiveInt = 16
    grad_accumulation: PositiveInt = 1
    seq: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    warmup: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    autocast: bool = True
    device: str = "auto"
    gradient_checkpointing: bool = False
    column: str = "text"
    eval_text: str | None = None
    eval_fraction: float = 0.1
    eval_steps: PositiveInt | None = None
    save_steps: PositiveInt = 500
    seed: Seed = 0
    from_scratch: bool = False
    distill_from: str | None = None
    distill_weight: Fraction = 1.0
    dtype: Annotated[str, OneOf(DTYPE_BYTES)] | None = None
    resume: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings as transformers' TrainingArguments, without the length."""
        return {
            **{"per_device_train_batch_size": self.batch, "gradient_accumulation_steps": self.grad_accumulation},
            "learning_rate": self.learning_rate,
            **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            **{"warmup_steps": self.warmup, "weight_decay": self.weight_decay, "adam_beta2": 0.95, "max_grad_norm": self.clip},
            "bf16": self.autocast,
            "ddp_find_unused_parameters": False,  # every owned weight is used
            **{"logging_steps": 10, "save_steps": self.save_steps, "report_to": "none"},
            "seed": self.seed % 2**32,  # numpy takes no larger one
        }

    def rows_per_process(self) -> int:
        """Rows that a process computes at once. Raises UserError if the batch does not divide."""
        parts = world_size() * self.grad_accumulation
        if self.batch % parts:
            message = f"{self.batch} rows do not divide into {world_size()} processes × {self.grad_accumulation} parts"
            raise UserError(message, where="batch", hint=f"use {-(-self.batch // parts) * parts}")
        return self.batch // parts


@dataclass(frozen=True)
class Trained:
    """A finished training: its folder, and the losses on the evaluation text before and after. `notes` say how the folder was
    read."""

    directory: Path
    steps: int
    tokens: int
    seconds: float
    before: Losses
    after: Losses
    bits_per_byte_before: float
    bits_per_byte_after: float
    dtype: str
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """One flat row; `perplexity_before`, `perplexity_after` and so on."""
        head = {"directory": str(self.directory), "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        head |= {"dtype": self.dtype}
        losses = {f"{name}_{when}": v for when in ("before", "after") for name, v in asdict(getattr(self, when)).items()}
        bits = {name: getattr(self, name) for name in ("bits_per_byte_before", "bits_per_byte_after")}
        return head | losses | bits | {"notes": list(self.notes)}
