"""The checkpoint that a search is from: a trained model that shares nothing.

Owns `BaseModel` and what must be true of it. What is made of its weights is the stages'.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..config import plain
from ..data import Corpus, eval_sequences, train_batches
from ..errors import UserError
from ..export import load_export, read_config
from ..model.decoder import Decoder
from ..pretrained import FolderMetadata
from ..pretrained.conversions import PretrainedModel, require_dense
from ..sharing.shape import ModelShape
from ..training.evaluation import Losses, NotFinite, measure_losses
from .jobs import device
from .trial import Trial

CALIBRATION = 32
"""Rows of training text by which conversions choose and the supernet's starts are weighed."""


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A checkpoint, read: its folder, the model in float32, a fingerprint of its weights, and its losses as it came.

    `extras` are what goes with whatever is made of it, `notes` what a user must be told of how it was read.
    """

    folder: Path
    model: Decoder
    sha256: str
    losses: Losses
    extras: FolderMetadata = field(default_factory=FolderMetadata)
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        shape = self.model.shape
        size = f"{shape.num_hidden_layers} layers of width {shape.hidden_size}"
        return f"{self.folder}: {size}, perplexity {self.losses.perplexity:.4g} on the evaluation text"

    def provenance(self) -> dict[str, Any]:
        """What a run's figures rest on, of it: where it is, its fingerprint, and its perplexity as it came."""
        return {"from": str(self.folder.resolve()), "from_sha256": self.sha256, "from_perplexity": self.losses.perplexity}

    def dense(self, trial: Trial, corpus: Corpus) -> PretrainedModel:
        """The model with the rows of training text that it is looked at through; the trial's seed draws them."""
        generator = torch.Generator().manual_seed(trial.file.seed)
        rows = next(train_batches(corpus.train, CALIBRATION, trial.file.final.seq, generator))
        return PretrainedModel(self.model, rows[:, :-1])

    def require(self, sha256: str) -> None:
        """Raise UserError unless it has that fingerprint."""
        if self.sha256 != sha256:
            hint = "put the old weights back, or start a new run"
            raise UserError("the checkpoint is not the one this run began with", where=str(self.folder), hint=hint)


def require_base_model(trial: Trial) -> None:
    """Raise UserError if the trial's checkpoint is none, shares anything, or is not of the space's shape; no weights are read."""
    if trial.checkpoint is None:
        return
    shape, config = read_config(trial.checkpoint)
    require_dense(config, str(trial.checkpoint))
    _require_agreement(trial, shape)


def _require_agreement(trial: Trial, theirs: ModelShape) -> None:
    space = trial.file.space
    for name in (f.name for f in fields(ModelShape)):
        ours, given = getattr(trial.space.shape, name), getattr(theirs, name)
        if ours != given:
            where = f"model.{name}" if isinstance(space, dict) else f"{space}: model.{name}"
            raise UserError(f"is {ours}, and {given} in {trial.file.from_}", where=where, hint="leave the space's `model:` out")


def read_base_model(trial: Trial, corpus: Corpus) -> BaseModel | None:
    """The trial's checkpoint, measured on the windows of the front; None if it has none. Raises UserError if it does not fit."""
    if trial.checkpoint is None:
        return None
    require_base_model(trial)
    loaded = load_export(trial.checkpoint)
    if Tokenizer.from_str(corpus.tokenizer_json).to_str() != loaded.tokenizer.to_str():
        message = f"{trial.file.data.tokenizer} is not the tokenizer of {trial.file.from_}"
        raise UserError(message, where="data.tokenizer", hint="leave it out, and the checkpoint's is used")
    sha256, model = fingerprint(loaded.model), loaded.model.float().requires_grad_(False).eval()
    file = trial.file
    windows = eval_sequences(corpus.eval, file.final.seq, file.evaluate.final_windows)
    try:
        losses = measure_losses(model.to(device()), windows, autocast=file.final.autocast)
    except NotFinite as error:
        raise UserError(str(error), where=str(trial.checkpoint), hint="give a trained model") from None
    return BaseModel(trial.checkpoint, model.cpu(), sha256, losses, loaded.metadata, loaded.notes)


def fingerprint(model: Decoder) -> str:
    """The SHA-256 of a model's shape and of its weights, bit by bit, however they lie in files."""
    digest = hashlib.sha256(json.dumps(plain(model.shape)).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
