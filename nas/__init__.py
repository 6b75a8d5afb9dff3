"""Neural architecture search for how a transformer language model shares its parameters and its KV cache.

Some names of `nas.api` are here, too (docs/python.md). They load when they are used: `import nas` alone loads nothing else.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import ModelShape, SharingConfig, draw, front_of, load, open_run, preset, resume, run_search

__all__ = ["ModelShape", "SharingConfig", "draw", "front_of", "load", "open_run", "preset", "resume", "run_search"]

# GNU OpenMP's waiting threads spin for milliseconds by default. On two busy cores a supernet step of two threads took 0.3 to 5 s
# with the default and 0.25 s with this setting (0.08 s on idle cores either way). OpenMP reads it when torch is first imported;
# worker processes inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
