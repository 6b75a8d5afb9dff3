"""What a folder's training is asked for, and what it leaves: its settings, its result and the folder that is written.

Owns `TrainSettings`, `Trained` and the writing. The training itself is `nas.export.train`'s.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from ..config import Fraction, NonNegativeFloat, OneOf, PositiveFloat, PositiveInt, Strict
from ..data import Corpus
from ..errors import UserError
from ..sharing.shape import DTYPE_BYTES
from ..training.evaluation import Losses
from .artifact import Artifact, whole_folder
from .card import FIGURE, ModelCard
from .formats import FORMATS
from .load import Loaded, read_format
from .plain_folder import write_plain
from .provenance import PROVENANCE

CHECKPOINTS = "checkpoints"
"""The folder of a training's checkpoints, in the folder that it will write."""


@dataclass(frozen=True)
class TrainSettings(Strict):
    """How a folder is trained: AdamW (betas 0.9, 0.95), linear warm-up, cosine to a tenth of the rate, as the search trains.

    batch: rows in a step, divided over the processes and over `grad_accumulation` parts; the result is the same however it is.
    steps: as many as make `epochs`, unless given. eval_text: what is measured on; without it, the text's last `eval_fraction`,
    which is not trained on; every `eval_steps`, and before and after. save_steps: a checkpoint is kept so often, from which
    `resume` goes on. fresh: begins from new weights. distill_from: a folder whose model's probabilities are learned, by
    `distill_weight` of the loss, the text being the rest (Hinton et al., 1503.02531, at temperature 1). dtype: of the weights as
    they are written, by default what they were; they are trained in float32.
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
    gradient_checkpointing: bool = False
    eval_text: str | None = None
    eval_fraction: float = 0.1
    eval_steps: PositiveInt | None = None
    save_steps: PositiveInt = 500
    seed: int = 0
    fresh: bool = False
    distill_from: str | None = None
    distill_weight: Fraction = 1.0
    dtype: Annotated[str, OneOf(DTYPE_BYTES)] | None = None
    resume: bool = False

    def rows(self, processes: int) -> int:
        """Rows that a process sends through the model at once. Raises UserError if the batch does not divide."""
        parts = processes * self.grad_accumulation
        if self.batch % parts:
            message = f"{self.batch} rows do not divide into {processes} processes × {self.grad_accumulation} parts"
            raise UserError(message, where="batch", hint=f"use {-(-self.batch // parts) * parts}")
        return self.batch // parts


@dataclass(frozen=True)
class Trained:
    """A finished training: the folder it is in, and the losses on the part of the text that was kept from it."""

    directory: Path
    steps: int
    tokens: int
    seconds: float
    before: Losses
    after: Losses
    bits_per_byte_before: float
    bits_per_byte_after: float
    dtype: str

    def to_data(self) -> dict[str, Any]:
        """One flat row; `perplexity_before`, `perplexity_after` and so on."""
        head = {"directory": str(self.directory), "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        head |= {"dtype": self.dtype}
        losses = {f"{name}_{when}": v for when in ("before", "after") for name, v in asdict(getattr(self, when)).items()}
        return head | losses | {name: getattr(self, name) for name in ("bits_per_byte_before", "bits_per_byte_after")}


def write_trained(loaded: Loaded, source: Path, trained: Trained, settings: TrainSettings, corpus: Corpus) -> None:
    """Write a trained model into its folder, whole or not at all: in the format of the folder that it came from, with what a user
    may have changed there, and a word on the training in its README. Its checkpoints go."""
    tokenizer = (source / "tokenizer.json").read_text(encoding="utf-8")
    artifact = Artifact(loaded.shape, loaded.config, loaded.model.state_dict(), tokenizer, ModelCard(), loaded.extras)
    section = _section(trained, settings, corpus)
    with whole_folder(trained.directory) as folder:
        if loaded.family:  # a plain folder stays one
            write_plain(artifact, folder, loaded.family)
        else:
            FORMATS[read_format(source)].write(artifact, folder)
        for path in source.iterdir():
            if path.name in KEPT:
                shutil.copy2(path, folder)
        with (folder / "README.md").open("a", encoding="utf-8") as readme:
            readme.write(section)
    shutil.rmtree(trained.directory / CHECKPOINTS)


KEPT = {
    PROVENANCE,
    FIGURE,
    "README.md",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
}
"""Files that training does not change, but a user may have."""


def _section(trained: Trained, settings: TrainSettings, corpus: Corpus) -> str:
    """What a README says of one more training."""
    before, after = trained.before, trained.after
    begun = ", from new weights" * settings.fresh
    teacher_probabilities = (
        f", {settings.distill_weight:.0%} of the loss on the probabilities of `{settings.distill_from}`"
        * bool(settings.distill_from)
    )
    return f"""
## Training after the export

{trained.steps:,} steps of {settings.batch} × {settings.seq} tokens at a learning rate of
{settings.learning_rate:g}{begun}{teacher_probabilities}. Weights in {trained.dtype}. Text: {corpus.source}. On that evaluation
text:

| | before | after |
|---|---:|---:|
| perplexity a token | {before.perplexity:.4g} | {after.perplexity:.4g} |
| its standard error | {before.perplexity_standard_error:.2g} | {after.perplexity_standard_error:.2g} |
| bits a byte | {trained.bits_per_byte_before:.4g} | {trained.bits_per_byte_after:.4g} |
"""
