"""The base model of a search: a trained model that shares nothing, from whose weights the search starts.

Owns `BaseModel`, the checks of it and, where the run trains it itself, its folder `dense` in the run's.
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
from ..export import load_export
from ..export.load import check_folder
from ..model.decoder import Decoder
from ..pretrained import FolderMetadata
from ..pretrained.conversions import PretrainedModel, require_dense
from ..sharing.shape import ModelShape
from ..training.device import find_device, on_device
from ..training.evaluation import Losses, NotFinite, measure_losses
from .trial import Trial

CALIBRATION = 32  # rows of training text, at most, by which conversions choose, and the supernet's initial weights are computed


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model that was read: its folder, the model in float32, a fingerprint of its weights, and its losses.

    `dtype` is its weights' own, in which weights that are made of it are kept. `metadata` goes into every folder that is made of
    it; `notes` say how it was read, for the user. `tokens` are those that the run itself trained it on.
    """

    folder: Path
    model: Decoder
    sha256: str
    losses: Losses
    dtype: torch.dtype
    metadata: FolderMetadata = field(default_factory=FolderMetadata)
    notes: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def name(self) -> str:
        """The folder's name, or what the run calls the model that it trained."""
        return "the dense model" if self.tokens else self.folder.resolve().name

    @property
    def summary(self) -> str:
        """Folder, size and perplexity, for a person."""
        shape = self.model.shape
        size = f"{shape.num_hidden_layers} layers of width {shape.hidden_size}"
        whose = f"a dense model trained for {self.tokens:,} tokens" if self.tokens else self.folder
        return f"{whose}: {size}, perplexity {self.losses.perplexity:.4g} on the test text"

    def provenance(self) -> dict[str, Any]:
        """What a run records of it: where it is, its fingerprint, and its perplexity."""
        return {"from": str(self.folder.resolve()), "from_sha256": self.sha256, "from_perplexity": self.losses.perplexity}

    def pretrained(self, trial: Trial, corpus: Corpus) -> PretrainedModel:
        """The model with its calibration rows, drawn from the training text by the trial's seed."""
        generator = torch.Generator().manual_seed(trial.file.seed)
        seq = trial.file.final.seq
        count = min(CALIBRATION, max(1, trial.file.evaluate.calibration // seq))
        rows = next(train_batches(corpus.train, count, seq, generator, corpus.bos))
        return PretrainedModel(self.model, rows[:, :-1])


def require_base_model(trial: Trial) -> Tokenizer | None:
    """The tokenizer of the trial's base model, if it has one. Raises UserError for one that is incomplete, shares anything or is
    not of the space's shape; no weights are read."""
    if trial.base_model is None:
        return None
    theirs, config, tokenizer = check_folder(trial.base_model)
    require_dense(config, str(trial.base_model))
    space = trial.file.space
    for name in (f.name for f in fields(ModelShape)):
        ours, given = getattr(trial.space.shape, name), getattr(theirs, name)
        if ours != given:
            where = f"model.{name}" if isinstance(space, dict) else f"{space}: model.{name}"
            raise UserError(f"is {ours}, and {given} in {trial.file.from_}", where=where, hint="leave the space's `model:` out")
    return tokenizer


def require_tokenizer(trial: Trial, theirs: Tokenizer, tokenizer_json: str | None) -> None:
    """Raise UserError unless the text's tokenizer, None for one that is trained on it, is the base model's."""
    if tokenizer_json is None or Tokenizer.from_str(tokenizer_json).to_str() != theirs.to_str():
        message = f"{trial.file.data.tokenizer} is not the tokenizer of {trial.file.from_}"
        raise UserError(message, where="data.tokenizer", hint="leave it out, and that one is used")


def read_base_model(trial: Trial, corpus: Corpus) -> BaseModel | None:
    """The trial's base model, measured on the test text as the front is; None if it has none. Raises UserError if it does not
    fit."""
    if trial.base_model is None:
        return None
    require_base_model(trial)
    loaded = load_export(trial.base_model)
    sha256, dtype = fingerprint(loaded.model), loaded.model.embed_tokens.weight.dtype
    model = loaded.model.float().requires_grad_(False).eval()
    try:
        with on_device(model, find_device()):
            losses = measure_losses(model, test_windows(trial, corpus), autocast=trial.file.final.autocast)
    except NotFinite as error:
        raise UserError(str(error), where=str(trial.base_model), hint="give a trained model") from None
    return BaseModel(trial.base_model, model, sha256, losses, dtype, loaded.metadata, loaded.notes)


def test_windows(trial: Trial, corpus: Corpus) -> torch.Tensor:
    """The windows of the test text `(windows, seq + 1)` on which models are reported."""
    file = trial.file
    return eval_sequences(corpus.test, file.final.seq, file.evaluate.final_windows, corpus.bos, "test")


def fingerprint(model: Decoder) -> str:
    """The SHA-256 of a model's shape and weights, whatever files they are stored in."""
    digest = hashlib.sha256(json.dumps(plain(model.shape)).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
