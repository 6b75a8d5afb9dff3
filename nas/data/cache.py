"""The cache of tokens: one folder for each text and tokenizer, made once, and mapped by whoever needs it.

Owns where it lies, the layout of an entry, and what `nas data` says and does. A new entry is made under another name and renamed.

    CACHE/tokens/KEY/meta.json                   what it is of, its counts, the SHA-256 of its files
    CACHE/tokens/KEY/train.bin, validation.bin, test.bin    tokens, two bytes each, four where the tokenizer has more than 65,536
    CACHE/tokens/KEY/validation.txt, test.txt, tokenizer.json
    CACHE/tokens/KEY.part, KEY.lock              an entry that is being made, or that will be gone on with
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from ..config import read_json, reading, require_kinds
from ..errors import UserError
from ..files import flush, locked

META = "meta.json"
NOTED: dict[str, Any] = {
    **dict.fromkeys(("text", "tokenizer", "source", "sha256", "dtype"), str),
    **{"tokens": dict, "files": dict, "bos": (int, NoneType), "end": (int, NoneType)},
}
"""The kinds of its values."""
BYTES = {"uint16": 2, "int32": 4}  # of a token, by the name of its dtype
DAMAGED = "remove it with `nas data remove`: it is made again"


def cache_folder() -> Path:
    """NAS_CACHE, or `nas` in XDG_CACHE_HOME, or `~/.cache/nas`; where that cannot be written, a folder that ends with the process
    (a run keeps the tokens that it needs)."""
    own = os.environ.get("NAS_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nas"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return _temporary()


@cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="nas-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@dataclass(frozen=True)
class Entry:
    """A folder of the cache."""

    folder: Path

    @staticmethod
    def of(identity: Any) -> Entry:
        """The entry of a text and a tokenizer, both in plain data; it may not be there yet."""
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return Entry(cache_folder() / "tokens" / key)

    @property
    def key(self) -> str:
        return self.folder.name.removesuffix(PART)

    @property
    def part(self) -> Path:
        """The folder in which it is made."""
        return self.folder.with_name(f"{self.key}{PART}")

    @property
    def complete(self) -> bool:
        """Whether it is there, and its files have the sizes that they had."""
        try:
            return all((self.folder / name).stat().st_size == file["bytes"] for name, file in self.meta()["files"].items())
        except (UserError, OSError):
            return False

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())

    def locked(self, wait: bool = True) -> AbstractContextManager[None]:
        """Hold the entry for this process. Raises UserError if another has it and it is not waited for."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        refusal = UserError("is being made by another process", where=self.key, hint="wait for it")
        return locked(self.folder.with_name(f"{self.key}.lock"), None if wait else refusal)

    def finish(self, meta: dict[str, Any]) -> None:
        """Give the folder in which it was made its name, with `meta` and the sizes and SHA-256 of its files."""
        (self.part / META).unlink(missing_ok=True)  # of a making that was killed right here
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(self.part.iterdir())}
        (self.part / META).write_text(json.dumps(meta | {"files": files}, indent=2) + "\n", encoding="utf-8")
        for path in (*self.part.iterdir(), self.part):
            flush(path)
        if self.folder.exists():
            shutil.rmtree(self.folder)  # a damaged one
        self.part.replace(self.folder)

    def meta(self) -> dict[str, Any]:
        """What it is of. Raises UserError."""
        data = read_json(self.folder / META, DAMAGED)
        with reading(self.folder / META, DAMAGED):
            require_kinds(data, NOTED)
            require_kinds(data["tokens"], dict.fromkeys(("train", "validation", "test"), int))
            for file in data["files"].values():
                require_kinds(file, {"bytes": int, "sha256": str})
            for part, count in data["tokens"].items():
                if data["files"][f"{part}.bin"]["bytes"] != count * BYTES[data["dtype"]]:
                    raise ValueError(f"{part} has not {count} tokens")
        return data

    def damaged(self) -> list[str]:
        """The files that are not what was written."""
        if self.folder.name.endswith(PART):
            return []
        files = self.meta()["files"]
        return [name for name, file in files.items() if _sha256(self.folder / name) != file["sha256"]]

    def remove(self) -> None:
        """Delete it, and what was made of it; runs keep their own tokens. Raises UserError if it is being made."""
        with self.locked(wait=False):
            for folder in (self.folder, self.part):
                shutil.rmtree(folder, ignore_errors=True)


PART = ".part"


def entries() -> list[Entry]:
    """What the cache holds, unfinished entries too, the oldest first."""
    found = (path for path in (cache_folder() / "tokens").glob("*") if path.is_dir())
    return [Entry(path) for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
