"""Files that are written whole or not at all.

Owns the one way in which this package replaces a file or folder that a crash or a power cut must not tear, and its locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

FULL = 2**16  # bytes: a disk with less room is full


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields the path to write to. What is written there takes its place at `path` when the context ends, after it has reached
    the disk; after an error `path` is as it was. A folder may be written too, if none is at `path`.

    Raises OSError for a full disk, whatever the library says that wrote there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        for written in (*part.rglob("*"), part):
            flush(written)
        part.replace(path)
    except Exception as error:
        full = getattr(error, "errno", None) is None and shutil.disk_usage(path.parent).free < FULL  # numpy's OSError has none
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    flush(path.parent)


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text, whole or not at all; returns the path."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


@contextmanager
def temporary_folder(root: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `root` that goes when this ends, and one whose process was killed with the next of its prefix: a lock ends
    with the process that holds it."""
    root.mkdir(parents=True, exist_ok=True)
    for lock in root.glob(f"{prefix}*/lock"):
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    with (folder / "unlocked").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "unlocked").rename(folder / "lock")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, refusal: UserError | None = None) -> Iterator[None]:
    """Hold the lock of a file for this process. Another's is waited for, or raises the refusal."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except OSError:
            if refusal is None:
                raise
            raise refusal from None
        yield


def require_writable(path: Path, *, file: bool = False) -> None:
    """Raise UserError unless a folder, or a file, can be written at `path`: something else is there, it is read-only, a name is
    too long. It is tried with an empty folder, which is removed again. Called before work whose outcome goes there."""
    path = path.absolute()
    found = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if file and found == path and not path.is_dir():
        found = path.parent
    elif found.is_dir() == (file and found == path):
        kind = "a folder, not a file" if found.is_dir() else "a file, not a folder"
        raise UserError(f"is {kind}", where=str(found), hint="give another path")
    try:
        with tempfile.TemporaryDirectory(prefix=".nas-", dir=found) as scratch:
            for name in path.relative_to(found).parts:
                (Path(scratch) / name).touch()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), hint="give another path") from None


def require_no_links(folder: Path, part: str = "") -> None:
    """Raise UserError for a link out of a folder, at or below a part of it: a stranger's would choose what is written over."""
    inside = folder.resolve()
    begin = inside / part
    found = (Path(place, name) for place, folders, files in os.walk(begin) for name in (*folders, *files))
    for path in (begin, *found):
        if os.path.islink(path) and not path.resolve().is_relative_to(inside):
            raise UserError("is a link out of the folder", where=str(path), hint="replace it by the file, or delete it")


def cut_torn_line(file: BinaryIO) -> None:
    """Cut off a last line that a crash left without its end. The process that appends does it: others may be reading."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk: a rename alone may outlive a power cut without its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
