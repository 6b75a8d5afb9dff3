"""Several processes that train one model together, as `torchrun` starts them.

Owns who speaks for all of them. That gradients are averaged is `transformers.Trainer`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import UserError

T = TypeVar("T")


def processes() -> int:
    """How many train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is the one that measures, writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def agreed(find: Callable[[], T]) -> T:
    """What the leading process finds, in all of them; so is its UserError, lest the others wait for ever."""
    found: list[Any] = [None]
    if leads():
        try:
            found = [find()]
        except UserError as error:
            found = [error]
    if processes() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]
