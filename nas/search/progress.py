"""What a run says while it works, without knowing who listens.

Owns the protocol; the terminal's display is the command line's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """One stage under way."""

    def update(self, done: int, note: str = "") -> None:
        """So many units are done; `note` is the best so far, in words."""


class Progress(Protocol):
    """Where stages are announced."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Stage]:
        """Begin a stage of `total` units; it ends with the context."""

    def say(self, text: str) -> None:
        """A line for a person: what was found, and how it goes on."""


class Silent:
    """Nobody listens."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        """See `Progress`."""
        yield self

    def update(self, done: int, note: str = "") -> None:
        """See `Stage`."""

    def say(self, text: str) -> None:
        """See `Progress`."""
