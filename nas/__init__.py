"""Neural architecture search for how a transformer language model shares its parameters and its KV cache.

Import subpackages by name (`nas.sharing`, `nas.search`, …); `import nas` alone loads nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model.decoder import Decoder

# GNU OpenMP's waiting threads spin for milliseconds by default. On two busy cores a supernet step of two threads took 0.3 to 5 s
# with the default and 0.25 s with this setting (0.08 s on idle cores either way). OpenMP reads it when torch is first imported;
# worker processes inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load(directory: str | Path, seed: int = 0) -> Decoder:
    """The model in a folder that `nas export` wrote: a `torch.nn.Module` in which each shared weight is one Parameter.

    `model(tokens)` gives logits `(batch, seq, vocab)` of tokens `(batch, seq)`; `model.shape` and `model.plan` say what it is.
    From a folder with weights it is the trained one, in their dtype; from a `config` folder a new one in float32, initialised
    from `seed` as the search does. Raises `nas.errors.UserError` (a ValueError) in one line for a folder that is none of these.
    """
    from .export.load import load_model

    return load_model(Path(directory), seed)
