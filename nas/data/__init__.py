"""Text to batches: where a trial's text comes from, how it becomes tokens, and which sequences of it are read.

Owns the sources of text (`sources`), texts of any size (`text`), their parts and tokens (`corpus`), the cache of those (`cache`),
the tokenizers (`tokenizer`) and the sequences (`batches`). Devices, epochs and losses belong to `training`. The `bytes`
tokenizer needs torch alone; `tokenizers`, `pyarrow` and `datasets` are imported when a trial asks for them.
"""

from __future__ import annotations

from .batches import TokenFile, eval_sequences, train_batches
from .corpus import Corpus, DataSpec, ShowStage, bits_per_byte, load_corpus, open_texts
from .sources import CORPORA
from .tokenizer import TOKENIZERS

__all__ = [
    "CORPORA",
    "TOKENIZERS",
    "Corpus",
    "DataSpec",
    "ShowStage",
    "TokenFile",
    "bits_per_byte",
    "eval_sequences",
    "load_corpus",
    "open_texts",
    "train_batches",
]
