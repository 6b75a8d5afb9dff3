"""A plain Hugging Face folder: a model of the Llama family that computes what the sharing one does, without code of its own.

Owns what is in the folder and what is said of the cost. Which sharing can be written out is `nas.checkpoint`'s.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config import format_bytes
from ..model.supernet import dense_config, dense_plan
from ..pretrained import Family, family_of, tensors_of, written_out
from ..pretrained.write import require_plain, written_shape
from ..sharing.memory import MemorySpec, measure, measure_plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .artifact import Artifact, write_texts, write_weights
from .card import Usage
from .hugging_face import common_texts, dtype_of
from .tokenizer import special_ids, texts_beside

USE = """
With `transformers`, vLLM, llama.cpp's converter and whatever else loads ARCHITECTURE; nothing of this folder is run.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.DTYPE)

prompt = tokenizer(["The ", "In the beginning "], padding=True, return_tensors="pt")
for text in tokenizer.batch_decode(model.generate(**prompt, max_new_tokens=100, do_sample=True), skip_special_tokens=True):
    print(text, end="\\n\\n")
```

COST In training each layer goes a way of its own: to keep what is shared, export the configuration `HASH` in the format `hf`.
The project that made it trains and measures it too:

```
nas train . --text FILE
nas eval . --text FILE
```
"""


def write_plain(artifact: Artifact, folder: Path, family: Family | None = None) -> tuple[ModelShape, dict[str, Tensor]]:
    """Fill an empty folder that `transformers` loads as a model of its own; returns the decoder in it, its shape and weights.

    Of a family that has such models, by default the first. Raises UserError for a model that no plain decoder is.
    """
    plan = artifact.config.resolve(artifact.shape)
    family = family or family_of(written_shape(artifact.shape, plan))
    shape, weights = written_out(artifact.shape, plan, artifact.weights)
    plain = replace(artifact, shape=shape, config=dense_config(shape), weights=weights)
    ids = special_ids(artifact.tokenizer_json, artifact.extras)
    config = family.config(shape) | ids | {"dtype": dtype_of(plain)}
    cost = written_cost(artifact.shape, artifact.config, artifact.card.memory)
    use = USE.replace("ARCHITECTURE", family.architecture).replace("COST", cost).replace("HASH", artifact.config.hash)
    texts = texts_beside(artifact.tokenizer_json, shape.max_position_embeddings, artifact.extras)
    write_texts(folder, texts | {"config.json": json.dumps(config, indent=2) + "\n"})
    write_texts(folder, common_texts(plain, Usage(use, "transformers")))
    write_weights(folder, tensors_of(family, weights))
    return shape, weights


def written_cost(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> str:
    """What writing a model out loses, in a sentence. Raises UserError for one that cannot be."""
    plan = config.resolve(shape)
    require_plain(plan)
    plain = written_shape(shape, plan)
    ours, theirs = measure(shape, config, spec), measure_plan(plain, dense_plan(plain), spec)
    parts = [
        f"{format_bytes(getattr(theirs, name))} of {words} in place of {format_bytes(getattr(ours, name))}"
        for words, name in (("weights", "weight_bytes"), ("KV cache", "kv_cache_bytes"))
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if not parts:
        return "Written out it takes no more bytes than before."
    where = f"{spec.dtype}, a context of {spec.context:,} tokens and a batch of {spec.batch}"
    return f"Written out it takes {' and '.join(parts)} (in {where})."
