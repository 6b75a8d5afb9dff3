"""The driver's disk, as workers on other machines reach it.

Owns `Disk`, an actor's class. Importing this does not import Ray, or torch: the actor is small.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from ..files import flush
from .work import PREFIX, Session, write_result

CHUNK = 8 * 2**20  # bytes that travel at a time

Listing = list[tuple[str, int, str]]
"""The files of a folder, or one file, whose name is empty: names, sizes in bytes, and SHA-256 if that is asked for."""


class Disk:
    """The driver's disk, as an actor on the driver's machine. Where the actor dies in a call, the call is made again."""

    def __init__(self) -> None:
        self._known, self._lock = dict[tuple[str, int, int], str](), threading.Lock()

    def listing(self, path: str, hashed: bool) -> Listing | None:
        """What is at a path; None if nothing is. Hidden files, and what is being written, are left out."""
        top = Path(path)
        if not top.exists():
            return None
        found = [Path(place, name) for place, _, names in os.walk(top) for name in names] if top.is_dir() else [top]
        inside = {"" if one == top else one.relative_to(top).as_posix(): one for one in sorted(found)}
        wanted = {name: one for name, one in inside.items() if not any(map(_is_hidden, Path(name).parts))}
        return [(name, one.stat().st_size, self._sha256(one) if hashed else "") for name, one in wanted.items()]

    def _sha256(self, path: Path) -> str:
        with self._lock, path.open("rb") as file:
            stat = os.fstat(file.fileno())
            key = str(path), stat.st_size, stat.st_mtime_ns
            if key not in self._known:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            return self._known[key]

    def read(self, path: str, offset: int) -> bytes:
        with Path(path).open("rb") as file:
            return os.pread(file.fileno(), CHUNK, offset)

    def begin(self, folder: str) -> Listing:
        """What a training's folder has, without what earlier workers left half sent."""
        _remove_torn(folder)
        if (found := self.listing(folder, hashed=False)) is None:
            raise FileNotFoundError(f"{folder} is gone")
        return found

    def room(self, folder: str) -> str:
        """A new folder in a training's, for what is sent."""
        return tempfile.mkdtemp(dir=folder, prefix=PREFIX)

    def write(self, path: str, offset: int, piece: bytes) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            while piece:
                written = os.pwrite(handle, piece, offset)
                offset, piece = offset + written, piece[written:]
        finally:
            os.close(handle)

    def keep(self, folder: str, sent: str) -> None:
        """See `Session.keep`, of a checkpoint that was sent."""
        if Path(sent).exists():
            Session(Path(folder)).keep(Path(sent))

    def finish(self, folder: str, sent: str, data: dict[str, Any]) -> None:
        """See `Session.finish`; what was sent comes into the folder first."""
        for name, *_ in self.listing(sent, hashed=False) or ():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            flush(Path(sent, name))
            Path(sent, name).replace(target)
            flush(target.parent)
        _remove_torn(folder)
        write_result(Path(folder), data)


def _remove_torn(folder: str) -> None:
    for torn in Path(folder).glob(f"{PREFIX}*"):
        shutil.rmtree(torn, ignore_errors=True)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", PREFIX)) or name.endswith(".part")
