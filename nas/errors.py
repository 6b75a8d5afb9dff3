"""What a user can get wrong, said in one line.

Owns the one exception that the command line turns into a message and exit code 2.
A programmer's mistake is an assertion, never a `UserError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: where it stands, the message, and what would do.

    Raised in a dataclass's `__post_init__`, `where` is the field's name; `loading.build` puts the file, line and path in front.
    `str(error)` is one line: `space.yaml:14: kv_heads: 3 does not divide num_attention_heads=8; use 1, 2, 4 or 8`.
    """

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        self.message, self.where, self.hint = message, where, hint
        super().__init__(": ".join(part for part in (where, message) if part) + (f"; {hint}" if hint else ""))

    def at(self, where: str) -> UserError:
        """The same mistake, with its place put in front."""
        return UserError(self.message, where=": ".join(p for p in (where, self.where) if p), hint=self.hint)


class RunFailed(RuntimeError):
    """A run that cannot go on, through no mistake in its input; what it had finished is kept."""


def one_of(names: Iterable[object]) -> str:
    """`1, 2, 4 or 8`: the options as a person would list them."""
    *head, last = [str(name) for name in names] or ["nothing"]
    return f"{', '.join(head)} or {last}" if head else last


LISTED = 30
"""More names than this are not all told."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """A hint for a misspelt name: its nearest neighbour, or the list, of which a long one is cut."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    more = len(names) - LISTED
    return f"use {one_of(names if more <= 0 else [*names[:LISTED], f'one of {more} more'])}"
