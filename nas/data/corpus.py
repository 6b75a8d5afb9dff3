"""A trial's text as tokens to train on, to choose by (validation), and to report on (test).

Owns `DataSpec`, `Corpus`, and the rule that neither the model nor its tokenizer is ever trained on evaluation text, which is the
validation and the test text together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..config import Ge, OpenFraction, Strict
from ..errors import UserError
from ..files import atomic_write, write_text
from .batches import TokenFile, eval_sequences
from .cache import Entry
from .sources import READ, TextSource, open_source
from .text import FileBytes, Text, character_start, divide, read_text, sha256
from .tokenizer import END, TextTokenizer, build_tokenizer


@dataclass(frozen=True)
class DataSpec(Strict):
    """Which text, and how it becomes tokens: a trial's `data:`. `docs/experiment_files.md` says what each key means.

    text: `python`, a file, a folder or `hf:OWNER/NAME`; a folder called python is `./python`. Without `eval_text` its last
    `eval_fraction` is for evaluation: one half to choose by, one to report on. max_bytes: of each of the texts.
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

    train: `(tokens,)` in `train_file`, mapped: uint16, or int32 where the tokenizer has more than 65,536.
    validation, test: `(tokens,)` int32.
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
    train_file: TokenFile | None = None

    @cached_property
    def eval(self) -> Tensor:
        """All that is not trained on, validation and test: `(tokens,)` int32; for work that chooses nothing."""
        return torch.cat([self.validation, self.test])

    @property
    def eval_text(self) -> bytes:
        return self.validation_text + self.test_text

    def bytes_of(self, part: Literal["validation", "test", "eval"] = "eval") -> int:
        """Bytes of a part's text itself: the tokens between documents have none."""
        ends = 0 if self.end is None else int((getattr(self, part) == self.end).sum())
        return len(getattr(self, f"{part}_text")) - len(END) * ends

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def require(self, seq: int) -> None:
        """Raise UserError unless each part has a sequence of `seq` tokens."""
        for part, tokens in (("training", self.train), ("validation", self.validation), ("test", self.test)):
            eval_sequences(tokens, seq, 1, part=part)

    def put_train(self, path: Path) -> TokenFile:
        """The training tokens in a run's file, which its trainings map: none of them carries it, and the cache may go."""
        assert self.train_file is not None
        return self.train_file.put(path)

    @property
    def summary(self) -> str:
        """The source, and the tokens of each part, for a person."""
        train, validation, test = (f"{size:,}" for size in self.sizes.values())
        return f"{self.source}: {train} tokens to train on, {validation} to choose by (validation), {test} to report on (test)"


class Source(NamedTuple):
    """A text that is to be read, and what it was given by."""

    given: str
    source: TextSource
    where: str


ShowStage = Callable[[str, int, str], AbstractContextManager[Any]]
"""Begins a stage of so many units, which has `update(done)`: `nas.search.progress.Progress.stage`."""


def load_corpus(spec: DataSpec, vocab_size: int, base: Path, stage: ShowStage | None = None) -> Corpus:
    """The corpus of a spec, for a model with `vocab_size` rows; relative paths resolve against `base`.

    Its tokens are in the cache (`nas.data.cache`), and are made if they are not there yet, in memory that does not grow with the
    text. Raises UserError if the text or the tokenizer cannot be read or does not fit.
    """
    sources, tokenizer = open_texts(spec, vocab_size, base)
    named = [spec.tokenizer, vocab_size] if tokenizer is None else hashlib.sha256(tokenizer.json.encode()).hexdigest()
    texts = {key: [source.words, source.version, sorted(map(_stamp, source.files))] for key, (_, source, _) in sources.items()}
    entry = Entry.of([FORMAT, texts, spec.eval_fraction, spec.column, spec.max_bytes, named])
    if not entry.complete:
        with entry.locked():
            if not entry.complete:
                _Making(entry, spec, sources, vocab_size, base, stage).make(tokenizer)
    return _read(entry)


def open_texts(spec: DataSpec, vocab_size: int, base: Path) -> tuple[dict[str, Source], TextTokenizer | None]:
    """The sources of a spec's texts, of which none is read, and its tokenizer; None for one that is trained on the text. Raises
    UserError as `load_corpus` does, as far as it can be told so."""
    given = {"text": spec.text, "eval_text": spec.eval_text, "test_text": spec.test_text}
    sources = {key: _open(name, spec, base, f"data.{key}") for key, name in given.items() if name is not None}
    return sources, None if spec.tokenizer in TRAINED else _tokenizer(spec, vocab_size, Text(b""), base)


FORMAT = 1  # Of the cache's entries. A change of how text is read, divided or encoded makes other entries.

HELD_OUT, TRAINED = ("validation", "test"), ("bpe",)
"""The parts that are not trained on, and the tokenizers that are trained on the training part."""


def _read(entry: Entry) -> Corpus:
    meta, folder = entry.meta(), entry.folder.absolute()
    dtype = getattr(torch, meta["dtype"])
    files = {part: TokenFile(folder / f"{part}.bin", count, dtype) for part, count in meta["tokens"].items()}
    os.utime(entry.folder)  # it was used
    validation, test = (files[part].read().to(torch.int32) for part in HELD_OUT)
    return Corpus(
        train=files["train"].read(),
        validation=validation,
        test=test,
        validation_text=(entry.folder / "validation.txt").read_bytes(),
        test_text=(entry.folder / "test.txt").read_bytes(),
        tokenizer_json=(entry.folder / "tokenizer.json").read_text(encoding="utf-8"),
        sha256=meta["sha256"],
        source=meta["source"],
        bos=meta["bos"],
        end=meta["end"],
        train_file=files["train"],
    )


@dataclass(frozen=True)
class _Making:
    """The making of an entry, which goes on where an earlier one stopped: texts, tokenizer and shards that are there are kept.
    Meanwhile it takes as much disk as the text and its tokens."""

    entry: Entry
    spec: DataSpec
    sources: Mapping[str, Source]
    vocab_size: int
    base: Path
    stage: ShowStage | None

    def make(self, tokenizer: TextTokenizer | None) -> None:
        folder = self.entry.part
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            texts = {key: self._text(key) for key in self.sources}
            for (first, one), (second, other) in combinations(texts.items(), 2):
                _check_no_overlap(self.sources[first], one, self.sources[second], other, _HOLDS[first])
            parts, words = self._divide(texts)
            tokenizer = tokenizer or self._trained(parts["train"])
        except UserError:
            shutil.rmtree(folder)
            raise
        tokens = {}
        for part, text in parts.items():
            tokens[part] = self._encode(part, text, tokenizer)
            if part in HELD_OUT:
                (folder / f"{part}.txt").write_bytes(text.joined(tokenizer.end))
        digest = sha256(*parts.values())
        (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
        for left in (*folder.glob("*.text"), *folder.glob("*.ends"), *folder.glob("*.json.part")):
            left.unlink()
        self.entry.finish(
            {
                "text": self.spec.text,
                "tokenizer": self.spec.tokenizer,
                "source": words,
                "sha256": digest,
                "tokens": tokens,
                "dtype": _dtype(tokenizer),
                "bos": tokenizer.bos,
                "end": tokenizer.end,
            }
        )

    def _text(self, key: str) -> Text:
        """A source's text, copied into a file: compressed, in rows or in many files, it cannot be read from the middle."""
        (given, source, where), (path, ends) = self.sources[key], (self.entry.part / f"{key}.{kind}" for kind in ("text", "ends"))
        if not ends.exists():
            try:
                with _shown(self.stage, "read the text", sum(file.stat().st_size for file in source.files)) as shown:
                    text = read_text(source, self.spec.max_bytes, path, shown)
            except UserError as error:
                raise error.at(where) from None
            if not text.data:
                raise UserError(f"{given} is empty", where=where, hint="give a text with something in it")
            with path.open("rb") as file:
                os.fsync(file.fileno())
            with atomic_write(ends) as part:
                part.write_bytes(array("q", (*text.ends, len(text.data))).tobytes())
        found = array("q", ends.read_bytes())
        size = found.pop()
        return Text(FileBytes(path, 0, size), found)

    def _divide(self, texts: Mapping[str, Text]) -> tuple[dict[str, Text], str]:
        """The training, the validation and the test text of those that were read, and where they are from, in words."""
        train, words = texts["text"], {key: source.words for key, (_, source, _) in self.sources.items()}
        said = f"{words['text']}, first {len(train.data)} bytes" if self.spec.max_bytes is not None else words["text"]
        if "eval_text" in texts:
            held_out, where = texts["eval_text"], words["eval_text"]
        else:
            train, held_out = divide(train, self.spec.eval_fraction, "text")
            where = f"the last {len(held_out.data)} bytes"
        if "test_text" in texts:
            parts = {"train": train, "validation": held_out, "test": texts["test_text"]}
            return parts, f"{said}; validation: {where}; test: {words['test_text']}"
        validation, test = divide(held_out, 0.5, "eval_text" if "eval_text" in texts else "text")
        return {"train": train, "validation": validation, "test": test}, f"{said}; validation and test: {where}, in halves"

    def _trained(self, train: Text) -> TextTokenizer:
        path = self.entry.part / "tokenizer.json"
        if path.exists():
            return build_tokenizer(str(path), self.vocab_size, b"", self.base)
        tokenizer = _tokenizer(self.spec, self.vocab_size, train, self.base)
        write_text(path, tokenizer.json)
        return tokenizer

    def _encode(self, part: str, text: Text, tokenizer: TextTokenizer) -> int:
        """Write a part's tokens; their number. What was written of whole shards before is kept."""
        path, state = self.entry.part / f"{part}.bin", self.entry.part / f"{part}.json.part"
        shard, tokens = json.loads(state.read_text()) if state.exists() else (0, 0)
        dtype = getattr(torch, _dtype(tokenizer))
        with path.open("ab") as file, _shown(self.stage, f"encode the text ({part})", len(text.data)) as shown:
            file.truncate(tokens * dtype.itemsize)
            for found, at in _encoded(text.pieces(tokenizer.end, shard, PIECE), tokenizer.encode):
                file.write(found.to(dtype).numpy().data)  # a full disk is the system's error, which numpy's own writing hides
                tokens += len(found)
                shown(at)
                if at - shard >= SHARD:
                    file.flush()
                    os.fsync(file.fileno())
                    write_text(state, json.dumps([at, tokens]))
                    shard = at
        return tokens


def _encoded(pieces: Iterator[tuple[str, int]], encode: Callable[[bytes], Tensor]) -> Iterator[tuple[Tensor, int]]:
    """The tokens of each piece, in order; while one is encoded, those of another become a tensor."""
    waiting: deque[tuple[Future[Tensor], int]] = deque()
    with ThreadPoolExecutor(2) as pool:
        for piece, at in pieces:
            waiting.append((pool.submit(encode, piece.encode()), at))
            if len(waiting) > 2:
                found, behind = waiting.popleft()
                yield found.result(), behind
        for found, behind in waiting:
            yield found.result(), behind


PIECE = 4 * 2**20  # characters that are encoded at a time, about: enough for every core
SHARD = 64 * 2**20  # bytes of text after which it is noted how far the tokens are: a process that is killed loses no more

SAMPLE = 64 * 2**20
"""Bytes of training text, at most, that a tokenizer is trained on; of a longer text in so many pieces of `READ` bytes, spread
evenly."""

SHOWN = 64 * 10**6  # bytes of text from which on progress is shown


def _sample(text: Text) -> bytes:
    size = len(text.data)
    if size <= SAMPLE:
        return bytes(text.data)
    count = SAMPLE // READ
    starts = (character_start(text.data, n * size // count) for n in range(count))
    return b"".join(bytes(text.data[at : character_start(text.data, at + READ)]) for at in starts)


def _tokenizer(spec: DataSpec, vocab_size: int, train: Text, base: Path) -> TextTokenizer:
    try:
        return build_tokenizer(spec.tokenizer, vocab_size, _sample(train), base)
    except UserError as error:
        raise error if error.where else error.at("data.tokenizer") from None


def _dtype(tokenizer: TextTokenizer) -> str:
    return "uint16" if tokenizer.size <= 2**16 else "int32"


def _stamp(path: Path) -> list[Any]:
    """What tells that a file has not changed."""
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


@contextmanager
def _shown(stage: ShowStage | None, name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes are done, of a text that takes its time."""
    if size < SHOWN or stage is None:
        yield lambda done: None
        return
    with stage(name, size // 10**6, "MB") as bar:
        yield lambda done: bar.update(min(done, size) // 10**6)


def bits_per_byte(loss_nats_per_token: float, corpus: Corpus, part: Literal["validation", "test", "eval"] = "eval") -> float:
    """The loss of all tokens of a part, in bits for a byte of its text, which compares models across tokenizers."""
    return loss_nats_per_token * len(getattr(corpus, part)) / (corpus.bytes_of(part) * math.log(2))


_HOLDS = {"text": "training", "eval_text": "evaluation"}  # what the text of each key is for, where another may not hold it too


def _open(given: str, spec: DataSpec, base: Path, where: str) -> Source:
    try:
        return Source(given, open_source(given, base, spec.column), where)
    except UserError as error:
        raise error.at(where) from None


def _check_no_overlap(one: Source, text: Text, other: Source, its: Text, holds: str) -> None:
    """Raise UserError if a text is in one before it, or has a file in common with it."""
    common = sorted(one.source.files & other.source.files)
    if common or (len(text.data) == len(its.data) and sha256(text) == sha256(its)):
        message = f"{common[0] if common else other.given} is in the {holds} text"
        hint = "give another text, or leave it out, and the end of another is held out"
        raise UserError(message, where=other.where, hint=hint)
