"""The files of a model's folder: JSON, weights from safetensors alone, and the texts that are copied unchanged.

Owns the checks that hold for any model. Nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import config
from ..config import AGAIN, Document, Strict, build, read_text, reading
from ..errors import UserError, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")  # files that hold a model's licence

TEXTS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", *LICENCES)
"""Files that are copied unchanged."""

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")  # the keys of a card's front matter that name a licence

KNOWN_LICENCES = {r"Apache License\s+Version 2\.0": "apache-2.0", r"MIT License": "mit"}
"""How the texts of licences begin, and the Hub's identifiers."""

OTHERS: dict[str, tuple[str, str]] = {
    "adapter_config.json": (
        "holds a PEFT adapter, not a model",
        "merge it: peft's AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(TO)",
    ),
    "lit_model.pth": (
        "is a folder of LitGPT, with pickled weights",
        "run `litgpt convert_from_litgpt`, load that into the model of transformers, and save it with `save_pretrained`",
    ),
}
"""Files that say of a folder which kind of model it holds that is not read: the message and the hint."""

LFS_POINTER = b"version https://git-lfs"

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class FolderMetadata(Strict):
    """What a folder holds beside its model and its vocabulary, and what a model made from it keeps: the texts of the files in
    `TEXTS`, by name, the `TOKEN_IDS` of its `config.json`, and the `LICENCE_KEYS` of its card. Raises UserError for texts that
    are not those files'."""

    texts: Mapping[str, str] = field(default_factory=dict)
    token_ids: Mapping[str, int | list[int] | None] = field(default_factory=dict)
    licence: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (("texts", self.texts, TEXTS), ("token_ids", self.token_ids, TOKEN_IDS), ("licence", self.licence, LICENCE_KEYS))
        for kind, names, known in given:
            for name in (name for name in names if name not in known):
                raise UserError(f"{shown(name)} is not carried from a folder", where=kind, hint=AGAIN)
        for name, text in self.texts.items():
            if name.endswith(".json"):
                _require_settings(text, f"texts.{name}")


def _require_settings(text: str, where: str) -> None:
    """Raise UserError for JSON that is no object, or whose padding token is neither text nor has a `content` of text."""
    with reading(Path(where)):
        data = config.parse_json(text)
    if not isinstance(data, dict):
        raise UserError("holds no keys and values", where=where, hint=AGAIN)
    pad = data.get("pad_token")
    if pad is not None and not isinstance(pad.get("content") if isinstance(pad, dict) else pad, str):
        raise UserError(f"pad_token is {shown(pad)}", where=where, hint="write the token's text")


def read_metadata(directory: Path, token_ids: Mapping[str, Any]) -> FolderMetadata:
    """The metadata of a folder with these token ids. Raises UserError."""
    texts = {}
    for path in own_files(directory, TEXTS):
        require_contents(path)
        texts[path.name] = path.read_text("utf-8", "replace") if path.name in LICENCES else read_text(path)
        if path.suffix == ".json":
            _require_settings(texts[path.name], str(path))
    ids = {"token_ids": {name: token_ids.get(name) for name in TOKEN_IDS}}
    metadata = build(FolderMetadata, Document(ids, str(directory / "config.json")))
    return replace(metadata, texts=texts, licence=_licence(directory, texts))


def _licence(directory: Path, texts: Mapping[str, str]) -> dict[str, str]:
    """The licence of a folder's model by the card's keys: as its card names it, else by the file that holds it; empty where
    neither does. The rest of a card may be anything."""
    for path in own_files(directory, [CARD]):
        head = re.match(r"---\s*\n(.*?)\n---", path.read_text("utf-8", "replace"), re.DOTALL)
        lines = dict(re.findall(r"^(\w+):[ \t]*(\S.*?)\s*$", head[1], re.MULTILINE)) if head else {}
        if "license" in lines:
            return {key: lines[key].strip("'\"") for key in LICENCE_KEYS if key in lines}
    for name in (name for name in LICENCES if name in texts):
        found = next((known for start, known in KNOWN_LICENCES.items() if re.search(start, texts[name][:500])), "")
        return {"license": found} if found else {"license": "other", "license_name": "custom", "license_link": name}
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    require_contents(path)
    return config.read_json(path)


def own_files(directory: Path, names: Iterable[str]) -> list[Path]:
    """The files of these names in a folder, whose content may be carried into another. Raises UserError for what is no file, and
    for a link out of the folder (and, in the Hub's cache, out of its `blobs`): the content would be private, and be published."""
    folder, found = directory.resolve(), [directory / name for name in names if os.path.lexists(directory / name)]
    cache = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    for path in found:
        if not path.is_file():
            raise UserError("is not a file", where=str(path), hint="delete it")
        if path.resolve().parent not in (folder, *cache):
            raise UserError("is a link out of the folder", where=str(path), hint="replace it by the file, or delete it")
    return found


def require_contents(path: Path) -> None:
    """Raise UserError if git-LFS has left a pointer in the place of a file, as a clone without it does."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                hint = "run `git lfs pull` in its folder, or download the file"
                raise UserError("is a pointer of git-LFS, not the file", where=str(path), hint=hint)


def other_model(directory: Path) -> UserError | None:
    """What is wrong with a folder that holds a model of a kind in `OTHERS`."""
    found = (said for name, said in OTHERS.items() if (directory / name).is_file())
    return next((UserError(message, where=str(directory), hint=hint) for message, hint in found), None)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the folder's weights, one or several. Raises UserError if they are not there."""
    names, index = [WEIGHTS], directory / INDEX
    if index.is_file() and not (directory / WEIGHTS).is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError("names no files of weights: it has no weight_map", where=str(index), hint=AGAIN)
        names = sorted({Path(str(name)).name for name in shards.values()})
    for name in names:
        if not (directory / name).is_file():
            raise other_model(directory) or _no_weights(directory, name)
        require_contents(directory / name)
    return [directory / name for name in names]


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its name, in the file's dtype. Raises UserError."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(directory):
        weights |= read_weights_file(path)
    return weights


def read_weights_file(path: Path, hint: str = AGAIN) -> dict[str, Tensor]:
    """Every tensor of a safetensors file by its name. Raises UserError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"is not a safetensors file ({error})", where=str(path), hint=hint) from None


def _no_weights(directory: Path, wanted: str) -> UserError:
    pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(suffix))
    if pickled:
        message = f"has pickled weights only ({pickled[0]}), and unpickling runs code from the file"
        return UserError(message, where=str(directory), hint="save it with `save_pretrained`, which writes safetensors")
    return UserError(f"has no {wanted}", where=str(directory), hint=AGAIN)


def require_match(weights: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """Raise UserError unless exactly the wanted weights are there, in their shapes and in one dtype."""
    where = str(directory)
    for names, what in ((wanted.keys() - weights.keys(), "lack"), (weights.keys() - wanted.keys(), "have, beyond the model's,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the weights {what} {min(names)}{more}", where=where, hint=AGAIN)
    for name, size in wanted.items():
        if tuple(weights[name].shape) != size:
            raise UserError(f"{name} is {tuple(weights[name].shape)}, not {size}", where=where, hint=AGAIN)
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"the weights are {kinds}", where=where, hint="save them all in one of float32, bfloat16 or float16")
