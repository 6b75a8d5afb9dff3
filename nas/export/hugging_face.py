"""Hugging Face folders: with the code that runs a model that shares (`hf`), or dense and without code (`dense`).

Owns both formats' files and the names of weights in them, `config.json`, and what `transformers` must be told of a tokenizer. It
writes plain files and does not import `transformers`, which is needed to use a folder, not to write one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..config import format_bytes
from ..data.tokenizer import end_token
from ..model import attention, decoder
from ..pretrained import FolderMetadata, family_of, materialise, materialised_shape, require_plain, tensors_of
from ..pretrained.files import TOKEN_IDS
from ..sharing import plan
from ..sharing.label import label
from ..sharing.memory import MemorySpec, measure, measure_plan
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .card import CONFIG_JSON, Artifact, common_texts, write_texts, write_weights

MODEL_TYPE = "nas_sharing"
CLASSES = {"AutoConfig": "configuration_nas.NasConfig", "AutoModelForCausalLM": "modeling_nas.NasForCausalLM"}

CODE = {
    "plan.py": Path(str(plan.__file__)),
    "attention.py": Path(str(attention.__file__)),
    "model.py": Path(str(decoder.__file__)),
    "modeling_nas.py": Path(__file__).parent / "modeling_nas.py",
    "configuration_nas.py": Path(__file__).parent / "configuration_nas.py",
}
"""Name of each Python file in a folder of the format `hf`, and the source file that it is."""

# The shape is needed by type checkers alone, but `transformers` looks for a file for every relative import it sees.
IMPORTS = {
    r"from \.+(sharing\.)?shape import": "from .configuration_nas import NasConfig as",
    r"from \.+(sharing\.)?plan import": "from .plan import",
    r"from \.+model\.decoder import": "from .model import",
}
"""Relative imports of the package, and what they are in a folder, where all files are side by side."""

HF_USAGE = """
With `transformers` 5.23 or later. `trust_remote_code=True` lets it run the Python files of this folder, which need torch
and `transformers` alone.

GENERATE
The weights are stored in STORED. To train the model further, load it with `dtype=torch.float32` and give it to
`transformers.Trainer`, to `accelerate` or to a loop of your own, like any other model. The project that made it can train and
evaluate it:

```
nas train . --text FILE
nas eval . --text FILE
```
"""

DENSE_USAGE = """
With `transformers`, vLLM, llama.cpp's converter and whatever else loads ARCHITECTURE; no code of this folder is run.

GENERATE
COST Training updates each layer on its own: to keep what is shared, export the configuration CONFIG in the format `hf`. The
project that made it can train and evaluate it:

```
nas train . --text FILE
nas eval . --text FILE
```
"""

GENERATE = """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.DTYPE)

prompt = tokenizer(["The ", "In the beginning "], padding=True, return_tensors="pt")
for text in tokenizer.batch_decode(model.generate(**prompt, max_new_tokens=100, do_sample=True), skip_special_tokens=True):
    print(text, end="\\n\\n")
```
"""


def hf_name(name: str) -> str:
    """The name that `transformers` gives to a decoder's weight; for a decoder that shares nothing, Llama's name."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def write_hf(artifact: Artifact, folder: Path) -> Artifact:
    """Fill an empty folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads."""
    head = {"architectures": ["NasForCausalLM"], "auto_map": CLASSES, "dtype": artifact.dtype}
    config = config_json(artifact, head, special_ids(artifact.tokenizer_json, artifact.metadata))
    usage = HF_USAGE.replace("GENERATE", GENERATE).replace("STORED", artifact.dtype)
    write_texts(folder, carried_code() | {CONFIG_JSON: config} | tokenizer_texts(artifact))
    write_texts(folder, common_texts(artifact, usage, "transformers"))
    write_weights(folder, {hf_name(name): weight for name, weight in artifact.weights.items()})
    return artifact


def carried_code() -> dict[str, str]:
    """Name and text of the Python files in a folder: this package's own, with imports of one another that fit the folder."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in CODE.items()}
    for pattern, place in IMPORTS.items():
        texts = {name: re.sub(pattern, place, text) for name, text in texts.items()}
    return texts


def config_json(artifact: Artifact, head: dict[str, Any], tail: dict[str, Any]) -> str:
    """The text of a `config.json`: the head, the shape, the tail, and the plan with one layer a line."""
    text = json.dumps({"model_type": MODEL_TYPE} | head | asdict(artifact.head_shape) | tail, indent=2)
    data = artifact.plan.to_data()
    layers = ",\n".join(f"      {json.dumps(layer)}" for layer in data["layers"])
    outside = json.dumps(data["outside"])
    return f'{text[:-2]},\n  "plan": {{\n    "layers": [\n{layers}\n    ],\n    "outside": {outside}\n  }}\n}}\n'


def write_dense(artifact: Artifact, folder: Path) -> Artifact:
    """Fill an empty folder that `transformers` loads as a model of a family of its own; returns the dense model in it.

    Shared weights are materialised once for each layer that uses them. The family is the artifact's, by default the first that
    has models of this shape. Raises UserError for a model that no plain decoder can compute.
    """
    family = artifact.family or family_of(materialised_shape(artifact.shape, artifact.plan))
    shape, weights = materialise(artifact.shape, artifact.plan, artifact.weights)
    dense = replace(artifact, shape=shape, config=SharingConfig.dense(shape), weights=weights, family=family)
    config = family.config(shape) | special_ids(artifact.tokenizer_json, artifact.metadata) | {"dtype": dense.dtype}
    usage = DENSE_USAGE.replace("GENERATE", GENERATE.replace(", trust_remote_code=True", ""))
    name = f"`{label(artifact.config)}` (`{artifact.config.hash}`)"
    usage = usage.replace("ARCHITECTURE", family.architecture).replace("CONFIG", name)
    usage = usage.replace("COST", dense_cost(artifact.shape, artifact.config, artifact.card.memory))
    write_texts(folder, tokenizer_texts(dense) | {CONFIG_JSON: json.dumps(config, indent=2) + "\n"})
    write_texts(folder, common_texts(dense, usage, "transformers"))
    write_weights(folder, tensors_of(family, weights))
    return dense


def dense_cost(shape: ModelShape, config: SharingConfig, spec: MemorySpec) -> str:
    """A sentence on the bytes that the dense form of a model takes. Raises UserError for a model that has none."""
    plan = config.resolve(shape)
    require_plain(plan)
    plain = materialised_shape(shape, plan)
    shared, dense = measure(shape, config, spec), measure_plan(plain, SharingConfig.dense(plain).resolve(plain), spec)
    parts = [
        f"{format_bytes(getattr(dense, name))} of {words} in place of {format_bytes(getattr(shared, name))}"
        for words, name in (("weights", "weight_bytes"), ("KV cache", "kv_cache_bytes"))
        if getattr(dense, name) != getattr(shared, name)
    ]
    if not parts:
        return "Its dense form takes no more bytes."
    where = f"{spec.dtype}, a context of {spec.context:,} tokens and a batch of {spec.batch}"
    return f"Its dense form takes {' and '.join(parts)} (in {where})."


# What transformers must be told of a tokenizer.json

NUL = "Ā"  # the symbol of byte 0 in byte-level vocabularies: text does not contain that byte, so it can be padding


def tokenizer_texts(artifact: Artifact) -> dict[str, str]:
    """Name and text of the files beside a tokenizer.json: the ones that came with the model, the others made. A
    `tokenizer_config.json` that names no padding token gets one, if the vocabulary has one."""
    tokenizer, metadata = artifact.tokenizer_json, artifact.metadata
    settings = _tokenizer_config(tokenizer, metadata, artifact.shape.max_position_embeddings)
    kept = metadata.texts.get("tokenizer_config.json", "null")
    return {
        "generation_config.json": json.dumps(special_ids(tokenizer, metadata), indent=2) + "\n",
        **metadata.texts,
        "tokenizer_config.json": kept if json.loads(kept) == settings else json.dumps(settings, indent=2) + "\n",
    }


def special_ids(tokenizer_json: str, metadata: FolderMetadata) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad texts, by their keys in a `config.json`; None where there is none. A tokenizer
    that is not from a folder begins and ends texts with the token that joined its documents, as GPT-2's does."""
    ids = dict.fromkeys(TOKEN_IDS) | _own_ids(tokenizer_json, metadata)
    pad = _tokenizer_config(tokenizer_json, metadata).get("pad_token")
    if ids["pad_token_id"] is None and pad:
        ids["pad_token_id"] = Tokenizer.from_str(tokenizer_json).token_to_id(pad if isinstance(pad, str) else pad["content"])
    return ids


def _own_ids(tokenizer_json: str, metadata: FolderMetadata) -> dict[str, Any]:
    return dict(metadata.token_ids or dict.fromkeys(("bos_token_id", "eos_token_id"), end_token(tokenizer_json)))


def _tokenizer_config(tokenizer_json: str, metadata: FolderMetadata, context: int = 0) -> dict[str, Any]:
    """The contents of `tokenizer_config.json` for a model of so much context: the one that came with it, or a new one."""
    pad = _pad_token(json.loads(tokenizer_json))
    padding: dict[str, Any] = {"pad_token": pad} if pad else {}
    if pad == NUL:
        padding = {"split_special_tokens": True} | padding  # or the letter Ā in a text would be read as padding
    given = json.loads(metadata.texts.get("tokenizer_config.json", "null"))
    if given is not None:
        given.pop("auto_map", None)  # the code that it names is not in the folder
        return given if given.get("pad_token") else given | {key: padding[key] for key in reversed(padding)}
    names, ids = Tokenizer.from_str(tokenizer_json), _own_ids(tokenizer_json, metadata)
    named = ((name, ids.get(f"{name}_id")) for name in ("bos_token", "eos_token"))
    bos_and_eos = {name: names.id_to_token(found) for name, found in named if isinstance(found, int)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "padding_side": "left",  # generated tokens follow the text, not its padding
        "clean_up_tokenization_spaces": False,
        **bos_and_eos,
        **padding,
    }


def _pad_token(tokenizer: dict[str, Any]) -> str | None:
    """The vocabulary's padding token, else any special token (an attention mask hides it), else NUL if it is of bytes."""
    special = [token["content"] for token in tokenizer.get("added_tokens", []) if token.get("special")]
    named = [content for content in special if "pad" in content.lower()]
    bytewise = "ByteLevel" in _types(tokenizer.get("decoder")) and NUL in tokenizer["model"]["vocab"]
    return next(iter([*named, *special, *([NUL] if bytewise else [])]), None)


def _types(part: Any) -> Iterator[str]:
    """The types of a tokenizer's decoder and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.get("decoders") or []:
            yield from _types(inner)
