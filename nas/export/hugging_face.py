"""A Hugging Face folder, written: the files, and the code that travels with them.

Owns what is in the folder and what its weights are called. It writes plain files and imports no `transformers`, which is needed
to use the folder, not to make it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..model import attention, decoder
from ..sharing import plan
from ..sharing.shape import ModelShape
from .artifact import Artifact, write_texts, write_weights
from .card import Usage, readme
from .tokenizer import special_ids, texts_beside

MODEL_TYPE = "nas_sharing"
CLASSES = {"AutoConfig": "configuration_nas.NasConfig", "AutoModelForCausalLM": "modeling_nas.NasForCausalLM"}

USE = """
With `transformers` 5.23 or later. `trust_remote_code=True` lets it run the Python files of this folder, which need torch
and `transformers` alone.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.DTYPE)

prompt = tokenizer(["The ", "In the beginning "], padding=True, return_tensors="pt")
for text in tokenizer.batch_decode(model.generate(**prompt, max_new_tokens=100, do_sample=True), skip_special_tokens=True):
    print(text, end="\\n\\n")
```

The weights are stored in STORED. To train it on, load it with `dtype=torch.float32` and give it to `transformers.Trainer`, to
`accelerate` or to a loop of your own, like any other model. The project that made it trains and measures it too:

```
nas train . --text FILE
nas eval . --text FILE
```
"""


def hf_name(name: str) -> str:
    """A decoder's weight as `transformers` calls it; for a decoder that shares nothing, Llama's name."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def write_folder(artifact: Artifact, folder: Path) -> None:
    """Fill an empty folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads."""
    head: dict[str, Any] = {"architectures": ["NasForCausalLM"], "auto_map": CLASSES, "dtype": dtype_of(artifact)}
    texts = carried_code() | {"config.json": config_json(artifact, head, special_ids(artifact.tokenizer_json, artifact.extras))}
    texts |= texts_beside(artifact.tokenizer_json, artifact.shape.max_position_embeddings, artifact.extras)
    usage = Usage(USE.replace("STORED", dtype_of(artifact)), "transformers")
    write_texts(folder, texts | common_texts(artifact, usage))
    write_weights(folder, {hf_name(name): weight for name, weight in artifact.weights.items()})


def common_texts(artifact: Artifact, usage: Usage) -> dict[str, str]:
    """The files that an export has in any format."""
    return {
        "README.md": readme(exported_shape(artifact), artifact.config, artifact.card, usage),
        "sharing.yaml": artifact.config.to_yaml(),
        "tokenizer.json": artifact.tokenizer_json,
    }


def carried_code() -> dict[str, str]:
    """Name and text of the Python files in the folder: this project's, but for the imports that place them side by side."""
    here = Path(__file__).parent
    files = {"plan.py": plan, "attention.py": attention, "model.py": decoder}
    texts = {name: Path(str(module.__file__)) for name, module in files.items()}
    texts |= {name: here / name for name in ("modeling_nas.py", "configuration_nas.py")}
    return {name: _flattened(path) for name, path in texts.items()}


# The shape is needed by type checkers alone, but `transformers` looks for a file for every relative import it sees.
FLAT = {
    r"from \.+(sharing\.)?shape import": "from .configuration_nas import NasConfig as",
    r"from \.+(sharing\.)?plan import": "from .plan import",
    r"from \.+model\.decoder import": "from .model import",
}


def _flattened(path: Path) -> str:
    """A file's text with its relative imports naming files of its own folder."""
    text = path.read_text(encoding="utf-8")
    for pattern, place in FLAT.items():
        text = re.sub(pattern, place, text)
    return text


def config_json(artifact: Artifact, head: dict[str, Any], tail: dict[str, Any]) -> str:
    """The text of a `config.json`: the head, the shape, the tail, and a layer's plan on each line."""
    shape = asdict(exported_shape(artifact))
    text = json.dumps({"model_type": MODEL_TYPE} | head | shape | tail, indent=2)
    data = artifact.config.resolve(artifact.shape).to_data()
    layers = ",\n".join(f"      {json.dumps(layer)}" for layer in data["layers"])
    outside = json.dumps(data["outside"])
    return f'{text[:-2]},\n  "plan": {{\n    "layers": [\n{layers}\n    ],\n    "outside": {outside}\n  }}\n}}\n'


def exported_shape(artifact: Artifact) -> ModelShape:
    """The shape as the folder has it, with the head that the model has: a config may tie or untie it, whatever its shape says."""
    outside = artifact.config.resolve(artifact.shape).outside
    return replace(artifact.shape, tie_word_embeddings=outside.tie_word_embeddings)


def dtype_of(artifact: Artifact) -> str:
    """Of the weights, by torch's name."""
    return str(next(iter(artifact.weights.values())).dtype).removeprefix("torch.")
