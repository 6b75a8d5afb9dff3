"""What `transformers` must be told of a tokenizer.json beside it.

Owns the choice of a padding token, which batches of unequal texts need. The tokenizer itself is kept to the letter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

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


def pad_token_id(tokenizer_json: str) -> int | None:
    """The id of the padding token that `tokenizer_config` names; None if it names none."""
    pad = _pad_token(json.loads(tokenizer_json))
    return Tokenizer.from_str(tokenizer_json).token_to_id(pad) if pad else None


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
