"""What `transformers` must be told of a tokenizer.json beside it.

Owns the choice of a padding token, which batches of unequal texts need. The tokenizer itself is kept to the letter, and so
is what the folder that a model comes from says of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from ..pretrained.metadata import TOKEN_IDS, FolderMetadata

NUL = "Ā"
"""The symbol of byte 0 in byte-level vocabularies: no text holds that byte, so it is free to be padding."""


def tokenizer_config(tokenizer_json: str, context: int) -> dict[str, Any]:
    """The contents of a `tokenizer_config.json` for a model of so much context."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "padding_side": "left",  # what is generated follows the text, not its padding
        "clean_up_tokenization_spaces": False,
    }
    pad = _pad_token(json.loads(tokenizer_json))
    if pad == NUL:
        settings["split_special_tokens"] = True  # or the letter Ā in a text would be taken for padding
    return settings | ({"pad_token": pad} if pad else {})


def texts_beside(tokenizer_json: str, context: int, extras: FolderMetadata) -> dict[str, str]:
    """Texts of the files that go with a tokenizer.json: those that came with the model, and for those that did not, made ones.

    A `tokenizer_config.json` that names no padding token gets one, where there is one.
    """
    settings, kept = _settings(tokenizer_json, context, extras), extras.texts.get("tokenizer_config.json", "null")
    return {
        "generation_config.json": json.dumps(special_ids(tokenizer_json, extras), indent=2) + "\n",
        **extras.texts,
        "tokenizer_config.json": kept if json.loads(kept) == settings else json.dumps(settings, indent=2) + "\n",
    }


def special_ids(tokenizer_json: str, extras: FolderMetadata) -> dict[str, Any]:
    """Ids of the tokens that begin, end and fill texts, by their names in a `config.json`; None where there is none."""
    ids = {name: extras.token_ids.get(name) for name in TOKEN_IDS}
    pad = _settings(tokenizer_json, 0, extras).get("pad_token")
    if ids["pad_token_id"] is None and pad:
        ids["pad_token_id"] = Tokenizer.from_str(tokenizer_json).token_to_id(pad if isinstance(pad, str) else pad["content"])
    return ids


def _settings(tokenizer_json: str, context: int, extras: FolderMetadata) -> dict[str, Any]:
    made, said = tokenizer_config(tokenizer_json, context), json.loads(extras.texts.get("tokenizer_config.json", "null"))
    if said is None:
        return made
    said.pop("auto_map", None)  # the code that it names does not come along
    filling = {key: made[key] for key in ("pad_token", "split_special_tokens") if key in made}
    return said if said.get("pad_token") else said | filling


def _pad_token(tokenizer: dict[str, Any]) -> str | None:
    """Its own padding token, else any special token (an attention mask hides it), else NUL if it has one for bytes."""
    special = [token["content"] for token in tokenizer.get("added_tokens", []) if token.get("special")]
    named = [content for content in special if "pad" in content.lower()]
    bytewise = "ByteLevel" in _types(tokenizer.get("decoder")) and NUL in tokenizer["model"]["vocab"]
    return next(iter([*named, *special, *([NUL] if bytewise else [])]), None)


def _types(part: Any) -> Iterator[str]:
    """The types of a decoder and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.get("decoders") or []:
            yield from _types(inner)
