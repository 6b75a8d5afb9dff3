"""How a piece of work that cannot be done is told: by its reason, as a value.

Owns `Failure` and the one place where any exception is caught. A search goes on past a failed task; it never counts it as bad.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

R = TypeVar("R")

NO_MEMORY = ("OutOfMemoryError", "can't allocate memory", "not enough memory", "CUDA out of memory")
"""How torch says it: a class of its own on a GPU, a plain RuntimeError on a CPU."""


@dataclass(frozen=True)
class Failure:
    """Why a piece of work has no result, in one line.

    `permanent` if doing it again would end the same way (a loss that is not finite); `traceback` is for the log.
    """

    reason: str
    permanent: bool = False
    traceback: str = ""

    @staticmethod
    def of(error: BaseException) -> Failure:
        """The failure that an exception stands for."""
        name, text = type(error).__name__, first_line(error)
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, MemoryError) or any(sign in f"{name}: {error}" for sign in NO_MEMORY):
            return Failure(f"out of memory: {text or name}", traceback=trace)
        return Failure(f"{name}: {text}" if text else name, isinstance(error, ArithmeticError), trace)


def first_line(error: BaseException) -> str:
    """The first line that says something, of an exception's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


FAILURES = {
    "running low on memory": "out of memory",
    "node has died": "its machine went away",
    "unavailable": "its machine went away",
    "exit code": "its process ended itself",
}


def failure_reason(error: BaseException) -> str:
    """What Ray knows of a worker's end, in a few words; it tells in paragraphs, of which most are always the same."""
    text = str(error)
    if getattr(error, "actor_init_failed", False):
        return text.strip().splitlines()[-1].strip()
    return next((words for sign, words in FAILURES.items() if sign in text), "its process was killed, or crashed")


def attempt(work: Callable[..., R], *given: Any) -> R | Failure:
    """The work's result, or why there is none. Memory is given back before the next piece of work begins."""
    try:
        return work(*given)
    except Exception as error:
        failure = Failure.of(error)
    _free_memory()
    return failure


def _free_memory() -> None:
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()
