"""A folder without weights: the two files that say what a model is, for a trainer that builds it.

Owns the files and reading them back. `nas.load` builds the model.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..config import dump_yaml, load
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .artifact import MODEL_YAML, Artifact, write_texts
from .card import Usage
from .hugging_face import common_texts

USE = """
There are no weights here: `model.yaml` has the model's dimensions, `sharing.yaml` what its layers share. The project that made
them builds the model:

```python
import torch

import nas

model = nas.load(".", seed=0)  # a torch.nn.Module, initialised as the search does
tokens = torch.randint(model.shape.vocab_size, (2, 16))
print(model(tokens).shape)  # logits (batch, seq, vocab) of tokens (batch, seq)
```

It trains like any other module; each shared weight is one Parameter:

```python
import torch
from torch.nn import functional as F

import nas

model = nas.load(".", seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(10):
    rows = torch.randint(model.shape.vocab_size, (8, 65))  # your text as tokens (batch, seq + 1); `tokenizer.json` makes them
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
```

```
nas describe . --to sharing.svg
nas describe sharing.yaml --model model.yaml
```
"""


def write_config(artifact: Artifact, folder: Path) -> None:
    """Fill an empty folder with a `model.yaml` and a `sharing.yaml`."""
    texts = {MODEL_YAML: dump_yaml(asdict(artifact.shape))}
    write_texts(folder, texts | common_texts(artifact, Usage(USE, weights=False)))


def read_config_folder(directory: Path) -> tuple[ModelShape, SharingConfig]:
    """The shape and the sharing in such a folder. Raises UserError."""
    shape = load(ModelShape, directory / MODEL_YAML)
    return shape, SharingConfig.load(shape, directory / "sharing.yaml")
