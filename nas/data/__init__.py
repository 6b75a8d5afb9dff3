"""Text to batches: where a trial's text comes from, how it becomes tokens, and which sequences of it are read.

Owns the sources of text (`sources`), texts of any size (`text`), their parts and tokens (`corpus`), the cache of those (`cache`),
the tokenizers (`tokenizer`) and the sequences (`batches`). Devices, epochs and losses belong to `training`. The `bytes`
tokenizer needs torch alone; `tokenizers`, `pyarrow` and `datasets` are imported when a trial asks for them.
"""

from .batches import TokenFile as TokenFile
from .batches import eval_sequences as eval_sequences
from .batches import train_batches as train_batches
from .corpus import Corpus as Corpus
from .corpus import DataSpec as DataSpec
from .corpus import ShowStage as ShowStage
from .corpus import bits_per_byte as bits_per_byte
from .corpus import load_corpus as load_corpus
from .corpus import open_texts as open_texts
from .sources import CORPORA as CORPORA
from .tokenizer import TOKENIZERS as TOKENIZERS
