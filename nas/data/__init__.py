"""Text to batches: where a trial's text is from, how it becomes tokens, and which windows of it are read.

Owns the reading of text (`sources`, `stdlib`), the division into training and evaluation text (`corpus`), the
tokenizers (`tokenizer`) and the windows (`batches`). Does not own devices, epochs, losses or perplexity: batches come
as plain tensors where the tokens are, and what is made of them belongs to `training` and `evaluate`.

Needs torch alone for the `bytes` tokenizer; `tokenizers` and `datasets` are imported when a trial asks for them.
"""

from __future__ import annotations

from .batches import eval_windows, train_batches
from .corpus import Corpus, DataSpec, bits_per_byte, load_corpus
from .sources import CORPORA
from .tokenizer import TOKENIZERS

__all__ = [
    "CORPORA",
    "TOKENIZERS",
    "Corpus",
    "DataSpec",
    "bits_per_byte",
    "eval_windows",
    "load_corpus",
    "train_batches",
]
