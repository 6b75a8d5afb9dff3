"""A trial's text as tokens to train on and tokens to evaluate on.

Owns `DataSpec`, `Corpus`, and the rule that neither the model nor its tokenizer is ever trained on evaluation text.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from torch import Tensor

from ..config import Ge, OpenFraction, Strict
from ..errors import UserError
from .sources import TextSource, open_source
from .tokenizer import END, build_tokenizer


@dataclass(frozen=True)
class DataSpec(Strict):
    """Which text, and how it becomes tokens: a trial's `data:`.

    text: `python` (the standard library's source and documentation, no download), or a path: a text file, JSON lines
        (`.jsonl`), a folder of them, or a dataset folder saved by `datasets`. A folder called python is `./python`.
    eval_text: another one, for evaluation; without it, the last `eval_fraction` of the text.
    tokenizer: `bytes` (256 bytes and the end-of-text token), `bpe` (trained on the training text, to the model's vocab_size), or
        the path of a tokenizer.json.
    column: the column of a dataset folder or of JSON lines that holds the text.
    max_bytes: reads only the first so many bytes of the text, and of `eval_text`; for quick runs.
    """

    text: str = "python"
    eval_text: str | None = None
    eval_fraction: OpenFraction = 0.1
    tokenizer: str = "bytes"
    column: str = "text"
    max_bytes: Annotated[int, Ge(2)] | None = None


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens to train and to evaluate on. Two corpora are compared by `sha256`.

    train, eval: `(tokens,)` int32.
    eval_text: the evaluation text, in UTF-8, as `eval` encodes it: documents are joined by `END` if the tokenizer has it.
    tokenizer_json: the tokenizer, for `tokenizers.Tokenizer.from_str`; a user's own is unchanged.
    sha256: of the training text followed by the evaluation text; without `eval_text`, the file's own.
    source: where the text is from, in words.
    bos: the token with which sequences begin, where the tokenizer has one.
    end: the token between documents, where the tokenizer has one.
    """

    train: Tensor
    eval: Tensor
    eval_text: bytes
    tokenizer_json: str
    sha256: str
    source: str
    bos: int | None = None
    end: int | None = None

    @property
    def eval_bytes(self) -> int:
        """Bytes of the evaluation text itself: the tokens between documents have none."""
        ends = 0 if self.end is None else int((self.eval == self.end).sum())
        return len(self.eval_text) - len(END) * ends


@dataclass(frozen=True)
class Text:
    """UTF-8 bytes, and the offsets at which documents end, but for the last one's end."""

    data: bytes
    ends: tuple[int, ...]

    def split(self, at: int) -> tuple[Text, Text]:
        """The text before an offset, and the text from there on."""
        before, after = (end for end in self.ends if end < at), (end - at for end in self.ends if end > at)
        return Text(self.data[:at], tuple(before)), Text(self.data[at:], tuple(after))

    def joined(self, end: int | None) -> bytes:
        """The documents with `END` between them, if the tokenizer has that token; empty documents are left out."""
        if end is None:
            return self.data
        parts = pairwise((0, *self.ends, len(self.data)))
        return END.encode().join(self.data[start:stop] for start, stop in parts if start < stop)


def load_corpus(spec: DataSpec, vocab_size: int, base: Path) -> Corpus:
    """The corpus of a spec, for a model with `vocab_size` rows; relative paths resolve against `base`.

    Raises UserError if the text or the tokenizer cannot be read or does not fit.
    """
    source, text = _read(spec.text, spec, base, "data.text")
    words = f"{source.words}, first {len(text.data)} bytes" if spec.max_bytes is not None else source.words
    if spec.eval_text is None:
        train, evaluation = text.split(train_eval_split(text, spec.eval_fraction))
        words += f"; evaluation: the last {len(evaluation.data)} bytes"
    else:
        eval_source, eval_text = _read(spec.eval_text, spec, base, "data.eval_text")
        _check_no_overlap(spec.eval_text, source, eval_source, text.data == eval_text.data)
        train, evaluation = text, eval_text
        words += f"; evaluation: {eval_source.words}"
    try:
        tokenizer = build_tokenizer(spec.tokenizer, vocab_size, train.data, base)
    except UserError as error:
        raise error if error.where else error.at("data.tokenizer") from None
    sha256 = hashlib.sha256(train.data + evaluation.data).hexdigest()
    held = evaluation.joined(tokenizer.end)
    tokens = tokenizer.encode(train.joined(tokenizer.end)), tokenizer.encode(held)
    return Corpus(*tokens, held, tokenizer.json, sha256, words, tokenizer.bos, tokenizer.end)


def bits_per_byte(loss_nats_per_token: float, corpus: Corpus) -> float:
    """The loss of all tokens, in bits for a byte of the evaluation text, which compares models across tokenizers."""
    return loss_nats_per_token * len(corpus.eval) / (corpus.eval_bytes * math.log(2))


def _read(given: str, spec: DataSpec, base: Path, where: str) -> tuple[TextSource, Text]:
    try:
        source = open_source(given, base, spec.column)
        text = read_text(source, spec.max_bytes)
    except UserError as error:
        raise error.at(where) from None
    if not text.data:
        raise UserError(f"{given} is empty", where=where, hint="give a text with something in it")
    return source, text


def read_text(source: TextSource, max_bytes: int | None) -> Text:
    """A source's documents in a row, or as many whole characters of them as `max_bytes` hold."""
    data, ends = bytearray(), []
    for document in source.documents(max_bytes):
        data += document
        ends.append(len(data))
        if max_bytes is not None and len(data) > max_bytes:
            break
    if max_bytes is not None:
        del data[_character_start(data, max_bytes) :]
    return Text(bytes(data), tuple(end for end in ends if end < len(data)))


def _character_start(data: bytes | bytearray, offset: int) -> int:
    """The last offset up to this one at which a character begins."""
    while offset < len(data) and data[offset] & 0xC0 == 0x80:  # 10xxxxxx continues a character
        offset -= 1
    return min(offset, len(data))


def train_eval_split(text: Text, eval_fraction: float) -> int:
    """The offset at which the last `eval_fraction` begins: at the end of a document, else of a line, else of a character.

    A document's or a line's end is taken only if it moves the offset by no more than half of the smaller side. Documents stay
    whole where they can: the second half of a file is easy for a model trained on the first. Raises UserError if a side would be
    empty.
    """
    data, size = text.data, len(text.data)
    wanted = size - round(size * eval_fraction)
    slack = min(wanted, size - wanted) / 2
    lines = (data.rfind(b"\n", 0, wanted) + 1, data.find(b"\n", wanted) + 1)
    for ends in (text.ends, lines):
        end = min(ends, key=lambda end: abs(end - wanted), default=0)
        if 0 < end < size and abs(end - wanted) <= slack:
            return end
    end = _character_start(data, wanted)
    if not 0 < end < size:
        message = f"a text of {size} bytes cannot be split for training and evaluation"
        raise UserError(message, where="data.text", hint="use a longer text, or give data.eval_text")
    return end


def _check_no_overlap(given: str, train: TextSource, evaluation: TextSource, same: bool) -> None:
    common = sorted(train.files & evaluation.files)
    if common or same:
        message = f"{common[0] if common else given} is in the training text"
        hint = "give another text, or leave it out to evaluate on the end of data.text"
        raise UserError(message, where="data.eval_text", hint=hint)
