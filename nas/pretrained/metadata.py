"""What a folder says beside its model and its vocabulary: how text is laid out, and which tokens begin, end and fill it.

Owns `FolderMetadata`, which a model made of another one carries on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import AGAIN, read_json

TEXTS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that are carried on to the letter."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class FolderMetadata:
    """The texts of a folder's files by their names, of those in `TEXTS`, and `TOKEN_IDS` as its `config.json` has them."""

    texts: Mapping[str, str] = field(default_factory=dict)
    token_ids: Mapping[str, Any] = field(default_factory=dict)


def read_extras(directory: Path, token_ids: Mapping[str, Any]) -> FolderMetadata:
    """The extras of a folder whose `config.json`, or what stands for it, has these token ids. Raises UserError."""
    texts = {}
    for name in TEXTS:
        path = directory / name
        if path.is_file():
            texts[name] = _text(path)
            if path.suffix == ".json":
                read_json(path)
    return FolderMetadata(texts, {name: token_ids.get(name) for name in TOKEN_IDS})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError("cannot be read as UTF-8 text", where=str(path), hint=AGAIN) from None
