"""Sequences of tokens: random ones to train on, fixed ones to evaluate on.

A sequence of `seq + 1` tokens holds `seq` inputs and, shifted by one, `seq` targets. It is on the device of the tokens. With a
tokenizer that begins texts with a BOS token, the first token of each sequence is replaced by it: models that were trained so
predict badly without it. The targets stay the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_write


@dataclass(frozen=True)
class TokenFile:
    """Tokens in a file that processes map: two bytes a token, four where one is 65,536 or more. Pickled, it is a path."""

    path: Path
    count: int
    dtype: torch.dtype

    def put(self, path: Path) -> TokenFile:
        """The same tokens at another place, which keeps them if this one is removed: another name of the file where both are on
        one disk, else a copy."""
        if path.exists() and path.samefile(self.path):  # a name of a file cannot replace another name of it
            return TokenFile(path.absolute(), self.count, self.dtype)
        with atomic_write(path) as part:
            part.unlink(missing_ok=True)
            try:
                os.link(self.path, part)
            except OSError:
                shutil.copyfile(self.path, part)
        return TokenFile(path.absolute(), self.count, self.dtype)

    def read(self) -> Tensor:
        """`(tokens,)`, mapped: processes of a machine share what they read. Raises UserError if the file has another size."""
        if not self.path.is_file() or self.path.stat().st_size != self.count * self.dtype.itemsize:
            message = f"{self.count:,} tokens were stored here, and the file is missing or has another size"
            raise UserError(message, where=str(self.path), hint="`nas resume` writes it again")
        if not self.count:
            return torch.empty(0, dtype=self.dtype)
        return torch.from_file(str(self.path), shared=False, size=self.count, dtype=self.dtype)


def train_batches(tokens: Tensor, batch: int, seq: int, generator: torch.Generator, bos: int | None = None) -> Iterator[Tensor]:
    """Batches of random sequences, `(batch, seq + 1)` int64, without end; they follow from the generator's state alone. Raises
    UserError, at once, if `(tokens,)` is shorter than one sequence."""
    _check_length(tokens, seq, "training")
    windows = tokens.unfold(0, seq + 1, 1)

    def sample() -> Iterator[Tensor]:
        while True:
            starts = torch.randint(len(windows), (batch,), generator=generator, device=generator.device)
            yield begin(windows[starts.to(windows.device)].long(), bos)

    return sample()


def begin(rows: Tensor, bos: int | None) -> Tensor:
    """Rows `(…, seq + 1)`, their first token replaced by the BOS token, if there is one."""
    if bos is None:
        return rows
    return torch.cat([torch.full_like(rows[..., :1], bos), rows[..., 1:]], dim=-1)


def eval_sequences(tokens: Tensor, seq: int, count: int, bos: int | None = None, part: str = "evaluation") -> Tensor:
    """`(count, seq + 1)` int64: sequences that do not overlap, spread evenly over `(tokens,)`, always the same. Fewer if no
    more fit. Raises UserError if not even one does; `part` says of which text."""
    assert count > 0, count
    _check_length(tokens, seq, part)
    count = min(count, len(tokens) // (seq + 1))
    starts = torch.arange(count, device=tokens.device) * len(tokens) // count
    return begin(tokens.unfold(0, seq + 1, 1)[starts].long(), bos)


def _check_length(tokens: Tensor, seq: int, what: str) -> None:
    assert seq > 0, seq
    if len(tokens) <= seq:
        message = f"the {what} text has {len(tokens)} tokens, and one sequence takes {seq + 1}"
        shorter = f", or a sequence length of at most {len(tokens) - 1}" if len(tokens) > 1 else ""
        raise UserError(message, where="data", hint=f"use a longer text{shorter}")
