"""A trial's text as tokens to train on, to choose by (validation), and to report on (test).

Owns `DataSpec`, `Corpus`, and the rule that neither the model nor its tokenizer is ever trained on evaluation text, which is the
validation and the test text together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from ..config import Ge, OpenFraction, Strict
from ..errors import UserError
from .batches import eval_sequences
from .sources import TextSource, open_source
from .tokenizer import END, build_tokenizer


@dataclass(frozen=True)
class DataSpec(Strict):
    """Which text, and how it becomes tokens: a trial's `data:`.

    text: `python` (the standard library's source and documentation, no download), or a path: a text file, JSON lines
        (`.jsonl`), a folder of them, or a dataset folder saved by `datasets`. A folder called python is `./python`.
    eval_text: another one, for evaluation; without it, the last `eval_fraction` of the text. Its first half is the validation
        text, by which everything is chosen, its second half the test text, on which results are reported.
    test_text: another one, as the test text; the text for evaluation then is the validation text.
    tokenizer: `bytes` (256 bytes and the end-of-text token), `bpe` (trained on the training text, to the model's vocab_size), or
        the path of a tokenizer.json.
    column: the column of a dataset folder or of JSON lines that holds the text.
    max_bytes: reads only the first so many bytes of the text, of `eval_text` and of `test_text`; for quick runs.
    """

    text: str = "python"
    eval_text: str | None = None
    test_text: str | None = None
    eval_fraction: OpenFraction = 0.1
    tokenizer: str = "bytes"
    column: str = "text"
    max_bytes: Annotated[int, Ge(2)] | None = None


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens to train on, to choose by and to report on. Two corpora are compared by `sha256`.

    train, validation, test: `(tokens,)` int32.
    validation_text, test_text: their text, in UTF-8, as it was encoded: documents are joined by `END` if the tokenizer has it.
    tokenizer_json: the tokenizer, for `tokenizers.Tokenizer.from_str`; a user's own is unchanged.
    sha256: of the training, the validation and the test text in a row; of a text that is divided, the file's own.
    source: where the text is from, in words.
    bos: the token with which sequences begin, where the tokenizer has one.
    end: the token between documents, where the tokenizer has one.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    validation_text: bytes
    test_text: bytes
    tokenizer_json: str
    sha256: str
    source: str
    bos: int | None = None
    end: int | None = None

    @cached_property
    def eval(self) -> Tensor:
        """All that is not trained on, validation and test: `(tokens,)` int32; for work that chooses nothing."""
        return torch.cat([self.validation, self.test])

    @property
    def eval_text(self) -> bytes:
        """The text of `eval`, in UTF-8."""
        return self.validation_text + self.test_text

    def bytes_of(self, part: Literal["validation", "test", "eval"] = "eval") -> int:
        """Bytes of a part's text itself: the tokens between documents have none."""
        ends = 0 if self.end is None else int((getattr(self, part) == self.end).sum())
        return len(getattr(self, f"{part}_text")) - len(END) * ends

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens in each part."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def require(self, seq: int) -> None:
        """Raise UserError unless each part has a sequence of `seq` tokens."""
        for part, tokens in (("training", self.train), ("validation", self.validation), ("test", self.test)):
            eval_sequences(tokens, seq, 1, part=part)

    @property
    def summary(self) -> str:
        """The source, and the tokens of each part, for a person."""
        train, validation, test = (f"{size:,}" for size in self.sizes.values())
        return f"{self.source}: {train} tokens to train on, {validation} to choose by (validation), {test} to report on (test)"


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


class _Read(NamedTuple):
    """A text that was read, and what it was given by."""

    given: str
    source: TextSource
    text: Text


def load_corpus(spec: DataSpec, vocab_size: int, base: Path) -> Corpus:
    """The corpus of a spec, for a model with `vocab_size` rows; relative paths resolve against `base`.

    Raises UserError if the text or the tokenizer cannot be read or does not fit.
    """
    given = {"text": spec.text, "eval_text": spec.eval_text, "test_text": spec.test_text}
    read = {key: _read(name, spec, base, f"data.{key}") for key, name in given.items() if name is not None}
    for (first, one), (second, other) in combinations(read.items(), 2):
        _check_no_overlap(one, _HOLDS[first], other, f"data.{second}")
    (train, validation, test), words = _divide(read, spec)
    try:
        tokenizer = build_tokenizer(spec.tokenizer, vocab_size, train.data, base)
    except UserError as error:
        raise error if error.where else error.at("data.tokenizer") from None
    sha256 = hashlib.sha256(train.data + validation.data + test.data).hexdigest()
    held_out = [part.joined(tokenizer.end) for part in (validation, test)]
    return Corpus(
        train=tokenizer.encode(train.joined(tokenizer.end)),
        validation=tokenizer.encode(held_out[0]),
        test=tokenizer.encode(held_out[1]),
        validation_text=held_out[0],
        test_text=held_out[1],
        tokenizer_json=tokenizer.json,
        sha256=sha256,
        source=words,
        bos=tokenizer.bos,
        end=tokenizer.end,
    )


def bits_per_byte(loss_nats_per_token: float, corpus: Corpus, part: Literal["validation", "test", "eval"] = "eval") -> float:
    """The loss of all tokens of a part, in bits for a byte of its text, which compares models across tokenizers."""
    return loss_nats_per_token * len(getattr(corpus, part)) / (corpus.bytes_of(part) * math.log(2))


_HOLDS = {"text": "training", "eval_text": "evaluation"}
"""What the text of each key is for, where another may not hold it too."""


def _divide(read: Mapping[str, _Read], spec: DataSpec) -> tuple[tuple[Text, Text, Text], str]:
    """The training, the validation and the test text of the texts that were read, and where they are from, in words."""
    _, source, train = read["text"]
    words = f"{source.words}, first {len(train.data)} bytes" if spec.max_bytes is not None else source.words
    if "eval_text" in read:
        _, source, held_out = read["eval_text"]
        where = source.words
    else:
        train, held_out = divide(train, spec.eval_fraction, "text")
        where = f"the last {len(held_out.data)} bytes"
    if "test_text" in read:
        _, source, test = read["test_text"]
        return (train, held_out, test), f"{words}; validation: {where}; test: {source.words}"
    validation, test = divide(held_out, 0.5, "eval_text")
    return (train, validation, test), f"{words}; validation and test: {where}, in halves"


def _read(given: str, spec: DataSpec, base: Path, where: str) -> _Read:
    try:
        source = open_source(given, base, spec.column)
        text = read_text(source, spec.max_bytes)
    except UserError as error:
        raise error.at(where) from None
    if not text.data:
        raise UserError(f"{given} is empty", where=where, hint="give a text with something in it")
    return _Read(given, source, text)


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


def divide(text: Text, fraction: float, key: str) -> tuple[Text, Text]:
    """A text without its last `fraction`, and that: at the end of a document, else of a line, else of a character.

    A document's or a line's end is taken only if it moves the offset by no more than half of the smaller side. Documents stay
    whole where they can: the second half of a file is easy for a model trained on the first. Raises UserError if a side would be
    empty; `key` is that of the text in a trial's `data:`.
    """
    end = _offset(text, fraction)
    if not 0 < end < len(text.data):
        message = f"a text of {len(text.data)} bytes cannot be divided"
        hint = f"use a longer text, or give data.{'eval_text' if key == 'text' else 'test_text'}"
        raise UserError(message, where=f"data.{key}", hint=hint)
    return text.split(end)


def _offset(text: Text, fraction: float) -> int:
    data, size = text.data, len(text.data)
    wanted = size - round(size * fraction)
    slack = min(wanted, size - wanted) / 2
    lines = (data.rfind(b"\n", 0, wanted) + 1, data.find(b"\n", wanted) + 1)
    for ends in (text.ends, lines):
        end = min(ends, key=lambda end: abs(end - wanted), default=0)
        if 0 < end < size and abs(end - wanted) <= slack:
            return end
    return _character_start(data, wanted)


def _check_no_overlap(one: _Read, holds: str, other: _Read, where: str) -> None:
    """Raise UserError if a text is in one before it, or has a file in common with it."""
    common = sorted(one.source.files & other.source.files)
    if common or one.text.data == other.text.data:
        message = f"{common[0] if common else other.given} is in the {holds} text"
        raise UserError(message, where=where, hint="give another text, or leave it out, and the end of another is held out")
