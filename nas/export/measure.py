"""An exported folder, evaluated: its quality on a text, and its bytes, counted and predicted.

Owns `eval_export`. The formulas of the prediction are `nas.sharing.memory`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..config import PositiveInt, Strict
from ..data import Corpus, bits_per_byte, eval_sequences
from ..data.sources import open_source
from ..data.text import read_text
from ..data.tokenizer import build_tokenizer
from ..errors import UserError
from ..pretrained.files import weight_files
from ..sharing.memory import Memory, MemorySpec, measure_plan
from ..training.device import find_device
from ..training.evaluation import Losses, NotFinite, measure_losses
from ..training.measured import filled_cache
from .load import Loaded, load_export

LOWER_RATE = "train with a lower learning rate"


@dataclass(frozen=True)
class EvalSettings(Strict):
    """How a folder is evaluated: on at most `eval_sequences` sequences of `seq` tokens, spread over the text; `memory` is the
    setting in which bytes are counted.

    bos: whether sequences begin with the BOS token: `auto` where the tokenizer's post-processor puts one there. device: as
    `find_device` reads it.
    """

    seq: PositiveInt = 128
    eval_sequences: PositiveInt = 512
    batch: PositiveInt = 16
    autocast: bool = True
    device: str = "auto"
    column: str = "text"
    bos: Literal["auto", "yes", "no"] = "auto"
    memory: MemorySpec = field(default_factory=MemorySpec)


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation. The bytes in `memory` are predicted by its formulas; the `measured_` ones are counted.

    measured_weight_bytes: of the distinct tensors of the model, in `spec.dtype`. measured_kv_cache_bytes: of a cache that
    holds `spec.context` tokens of `spec.batch` sequences. file_bytes: of the weights' files, in their own dtype. notes: sentences
    that a user must be told about how the folder was read.
    """

    losses: Losses
    bits_per_byte: float
    tokens: int
    spec: MemorySpec
    memory: Memory
    measured_weight_bytes: int
    measured_kv_cache_bytes: int
    file_bytes: int
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """One flat row."""
        quality = asdict(self.losses) | {"bits_per_byte": self.bits_per_byte, "tokens": self.tokens}
        counted = {name: getattr(self, name) for name in ("measured_weight_bytes", "measured_kv_cache_bytes", "file_bytes")}
        return quality | asdict(self.spec) | self.memory.to_data() | counted | {"notes": list(self.notes)}


def eval_export(directory: Path, text: str | Path, settings: EvalSettings | None = None) -> Measured:
    """The folder's model on the whole of a text (a path, or a corpus's name), and its bytes. Raises UserError."""
    settings = settings or EvalSettings()
    device, loaded = find_device(settings.device), load_export(directory)
    loaded.model.to(device)
    corpus = whole_corpus(directory, text, loaded.shape.vocab_size, settings.column)
    bos = _bos(loaded, corpus, settings)
    rows = eval_sequences(corpus.eval, settings.seq, settings.eval_sequences, bos)
    losses = finite_losses(loaded, rows, settings)
    spec = settings.memory
    model = loaded.model.to(getattr(torch, spec.dtype))
    return Measured(
        losses=losses,
        bits_per_byte=bits_per_byte(losses.loss_nats_per_token, corpus),
        tokens=rows[:, 1:].numel(),
        spec=spec,
        memory=measure_plan(loaded.shape, model.plan, spec),
        measured_weight_bytes=weight_bytes(model),
        measured_kv_cache_bytes=filled_cache(model, spec.context, spec.batch).bytes,
        file_bytes=sum(path.stat().st_size for path in weight_files(directory)),
        notes=(*loaded.notes_for(settings.seq), *_bos_note(loaded, bos)),
    )


def _bos(loaded: Loaded, corpus: Corpus, settings: EvalSettings) -> int | None:
    """The token with which sequences begin. Raises UserError if one is asked for, and the folder names none."""
    if settings.bos == "no":
        return None
    named = loaded.metadata.token_ids.get("bos_token_id")
    bos = corpus.bos if corpus.bos is not None else named if isinstance(named, int) else None
    if settings.bos == "yes" and bos is None:
        raise UserError("the folder names no BOS token", where="bos", hint="leave out --bos yes")
    return bos if settings.bos == "yes" else corpus.bos


def _bos_note(loaded: Loaded, bos: int | None) -> tuple[str, ...]:
    return () if bos is None else (f"every sequence begins with {loaded.tokenizer.id_to_token(bos)}",)


def finite_losses(loaded: Loaded, rows: torch.Tensor, settings: EvalSettings) -> Losses:
    """The losses over token sequences `(sequences, seq + 1)`. Raises UserError if they are not finite."""
    try:
        return measure_losses(loaded.model, rows, settings.batch, settings.autocast)
    except NotFinite as error:
        raise UserError(str(error), hint=LOWER_RATE) from None


def whole_corpus(directory: Path, text: str | Path, vocab_size: int, column: str = "text") -> Corpus:
    """A corpus whose test part is the whole text, by the folder's tokenizer."""
    source = open_source(str(text), Path(), column)
    read = read_text(source, None)
    if not read.data:
        raise UserError("is empty", where=str(text), hint="give a text with something in it")
    tokenizer = build_tokenizer(str(directory.resolve() / "tokenizer.json"), vocab_size, b"", Path())
    data = read.joined(tokenizer.end)
    tokens = tokenizer.encode(data)
    return Corpus(tokens[:0], tokens[:0], tokens, b"", data, tokenizer.json, "", source.words, tokenizer.bos, tokenizer.end)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's distinct tensors."""
    distinct = {weight.data_ptr(): weight for weight in model.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in distinct.values())
