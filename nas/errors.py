"""Errors in a user's input, in one line.

Owns `UserError`, which the command line turns into a message and exit code 2. A programmer's mistake is an assertion.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import accumulate


class UserError(ValueError):
    """An error in the user's input: its location, a message, and a suggested fix.

    If a dataclass's `__post_init__` raises it, `where` is the field's name, and `nas.config.build` puts file, line and path in
    front. `str(error)` is one line: `space.yaml:14: kv_heads: 3 does not divide num_attention_heads=8; use 1, 2, 4 or 8`.
    """

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        message, where, hint = (shown(" ".join(part.splitlines()), LONGEST) for part in (message, where, hint))
        self.message, self.where, self.hint = message, where, hint
        super().__init__(": ".join(part for part in (where, message) if part) + (f"; {hint}" if hint else ""))

    def at(self, where: str) -> UserError:
        """The same error, with `where` in front of its location."""
        return UserError(self.message, where=": ".join(p for p in (where, self.where) if p), hint=self.hint)


class RunFailed(RuntimeError):
    """A run that cannot continue, without an error in its input; its finished work is kept."""


LONGEST = 400  # the most characters of a message, a location or a hint


def shown(value: object, most: int = 80) -> str:
    """A value as an error shows it: a long one is cut in the middle."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most // 3) :]}"


def one_of(names: Iterable[object]) -> str:
    """`1, 2, 4 or 8`: the options as text."""
    *head, last = [str(name) for name in names] or ["nothing"]
    return f"{', '.join(head)} or {last}" if head else last


LISTED = 200  # the most characters of the names that a hint lists


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """A hint for an unknown name: the most similar known one, else a list of as many as `LISTED` characters hold."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    ends = accumulate(len(name) + 2 for name in names)
    fits = sum(end <= LISTED for end in ends)
    return f"use {one_of(names if fits == len(names) else [*names[:fits], f'one of {len(names) - fits} more'])}"
