"""Texts of any size: UTF-8 in memory or in a file, where documents end, how they are divided, how they are read in pieces.

Owns `Text`. What reads a text in pieces holds a few megabytes of it, whatever its length.
"""

from __future__ import annotations

import codecs
import hashlib
import io
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, overload

from ..errors import UserError
from .sources import READ, TextSource
from .tokenizer import END, chunks


@dataclass(frozen=True)
class FileBytes:
    """Bytes `start` to `stop` of a file, used as `bytes` are: slices are no copies, and `bytes(…)` reads them."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __bytes__(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(len(self))

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> FileBytes: ...
    def __getitem__(self, at: int | slice) -> int | FileBytes:
        if isinstance(at, slice):
            start, stop, _ = at.indices(len(self))
            return FileBytes(self.path, self.start + start, self.start + max(start, stop))
        return bytes(self[at : at + 1])[0]


@dataclass(frozen=True)
class Text:
    """UTF-8 bytes, and the offsets at which documents end, but for the last one's end."""

    data: bytes | FileBytes
    ends: Sequence[int] = ()

    def split(self, at: int) -> tuple[Text, Text]:
        """The text before an offset, and the text from there on."""
        first, second = bisect_left(self.ends, at), bisect_right(self.ends, at)
        after = array("q", (end - at for end in self.ends[second:]))
        return Text(self.data[:at], self.ends[:first]), Text(self.data[at:], after)

    def joined(self, end: int | None) -> bytes:
        """The documents with `END` between them, if the tokenizer has that token."""
        return b"".join(self.blocks(end))

    def blocks(self, end: int | None, at: int = 0) -> Iterator[bytes]:
        """The same from its byte `at` on, about `READ` bytes at a time, cut anywhere."""
        mark, ends = END.encode(), self.ends if end is not None else ()
        n = bisect_right(range(len(ends)), at, key=lambda i: ends[i] + len(mark) * (i + 1))
        offset = at - n * len(mark)
        while offset < len(self.data):
            raw = bytes(self.data[offset : offset + READ])
            stop, parts, done = bisect_right(ends, offset + len(raw)), [], 0
            for i in range(n, stop):
                parts += [raw[done : ends[i] - offset], mark]
                done = ends[i] - offset
            yield b"".join((*parts, raw[done:]))
            offset, n = offset + len(raw), stop

    def pieces(self, end: int | None, at: int, size: int) -> Iterator[tuple[str, int]]:
        """Pieces that tokenizers encode as they do the whole (`chunks`), each with its last byte's offset; from byte `at` on."""
        decoder, held = codecs.getincrementaldecoder("utf-8")(), ""
        for block in self.blocks(end, at):
            held += decoder.decode(block)
            while len(held) > 2 * size and len(piece := next(chunks(held, size))) + 1 < len(held):
                held = held[len(piece) :]
                at += len(piece.encode())
                yield piece, at
        if held:
            yield held, at + len(held.encode())


def read_text(
    source: TextSource, max_bytes: int | None, to: Path | None = None, report: Callable[[int], None] = lambda done: None
) -> Text:
    """A source's documents in a row, or as many whole characters of them as `max_bytes` hold; in the file `to`, if there is one.
    `report` is told how many bytes are read."""
    ends = array("q")
    with io.BytesIO() if to is None else to.open("wb") as sink:
        for document in source.documents(max_bytes):
            for block in (document,) if isinstance(document, bytes) else document:
                sink.write(block)
                report(sink.tell())
            if sink.tell() > (ends[-1] if ends else 0):  # an empty document is none
                ends.append(sink.tell())
            if max_bytes is not None and sink.tell() > max_bytes:
                break
        whole: bytes | FileBytes = FileBytes(to, 0, sink.tell()) if to else cast(io.BytesIO, sink).getvalue()
    if max_bytes is not None:
        whole = whole[: character_start(whole, max_bytes)]
    return Text(whole, ends[: bisect_left(ends, len(whole))])


def character_start(data: bytes | bytearray | FileBytes, offset: int) -> int:
    """The last offset up to this one at which a character begins."""
    while offset < len(data) and data[offset] & 0xC0 == 0x80:  # 10xxxxxx continues a character
        offset -= 1
    return min(offset, len(data))


def sha256(*texts: Text) -> str:
    """Of texts in a row."""
    digest = hashlib.sha256()
    for text in texts:
        for block in text.blocks(None):
            digest.update(block)
    return digest.hexdigest()


def divide(text: Text, fraction: float, key: str) -> tuple[Text, Text]:
    """A text without its last `fraction`, and that: at the end of a document, else of a line, else of a character.

    A document's or a line's end is taken only if it moves the offset by no more than half of the smaller side. Documents stay
    whole where they can: the second half of a file is easy for a model trained on the first. Raises UserError if a side would be
    empty; `key` is that of the text in a trial's `data:`.
    """
    end = _offset(text, fraction)
    if not 0 < end < len(text.data):
        message = f"{len(text.data)} bytes {'of it ' * (key == 'text')}cannot be divided"
        hint = f"use a longer text, or give data.{'eval_text' if key == 'text' else 'test_text'}"
        raise UserError(message, where=f"data.{key}", hint=hint)
    return text.split(end)


def _offset(text: Text, fraction: float) -> int:
    data, size = text.data, len(text.data)
    wanted = size - round(size * fraction)
    slack = min(wanted, size - wanted) / 2
    at = bisect_left(text.ends, wanted)
    for ends in (text.ends[max(at - 1, 0) : at + 1], _line_ends(data, wanted, int(min(slack, READ)))):
        end = min(ends, key=lambda end: abs(end - wanted), default=0)
        if 0 < end < size and abs(end - wanted) <= slack:
            return end
    return character_start(data, wanted)


def _line_ends(data: bytes | FileBytes, wanted: int, reach: int) -> list[int]:
    """The ends of lines nearest to an offset, at most `reach` bytes away."""
    before, after = bytes(data[wanted - reach : wanted]), bytes(data[wanted : wanted + reach + 1])
    found = [wanted - reach + before.rfind(b"\n") + 1] if b"\n" in before else []
    return found + ([wanted + after.find(b"\n") + 1] if b"\n" in after else [])
