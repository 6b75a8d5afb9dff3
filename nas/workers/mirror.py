"""Trainings by workers that do not see the driver's disk: what they read comes from there, and what they keep goes there.

Owns how a worker finds out, and a machine's copies:

    CACHE/fetched/HASH/NAME     a file or folder that trainings read, once a machine
    CACHE/fetched/HASH.lock     held by whoever fetches or reads it; its time is that of the last use
    CACHE/trainings/...         the folder of a training while it lasts

The driver's folder stays the truth: states and results are there before anybody hears of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.cache import cache_folder
from ..files import atomic_write, temporary_folder
from .cluster import ray
from .disk import CHUNK, Disk, Listing
from .executor import Report, Trainings, unheard
from .work import LOCAL, Session

AHEAD = 4  # pieces of a file that are on their way at once
KEPT = 86_400.0  # seconds after which what is not used is removed from the cache, when something else is fetched
MARK = ".seen-"  # of a file in the driver's folder, named at random: who sees it sees the driver's disk

# ---- on the driver's side


@contextmanager
def offered(trainings: Trainings, options: dict[str, Any]) -> Iterator[Trainings]:
    """Trainings that any worker can do, whether or not it sees their folder; `options` are those of an actor on this machine. A
    cluster that was started here is this machine alone, and nothing is needed."""
    if trainings.spec.address in (None, LOCAL):
        yield trainings
        return
    for left in trainings.folder.glob(f"{MARK}*"):
        left.unlink(missing_ok=True)
    mark = trainings.folder / f"{MARK}{secrets.token_hex(8)}"
    mark.touch()
    disk = ray.remote(Disk).options(max_concurrency=2 * AHEAD, **options).remote()
    try:
        yield Anywhere(**vars(trainings), disk=disk, mark=mark)
    finally:
        mark.unlink(missing_ok=True)
        ray.kill(disk)


# ---- on a worker's side


@dataclass(frozen=True)
class Anywhere(Trainings):
    """Trainings with a `disk` for workers that do not see the `mark`."""

    disk: Any = None
    mark: Path = Path()

    @contextmanager
    def begun(self, key: str, tell: Report = unheard) -> Iterator[tuple[Session, Any]]:
        """See `Trainings`. Where the driver's disk is not seen, the training's folder and whatever its settings name by a path
        are copies."""
        if self.mark.exists():
            with super().begun(key, tell) as seen:
                yield seen
            return
        home = self.folder / key
        with ExitStack() as stack:
            folder = stack.enter_context(temporary_folder(cache_folder() / "trainings", "")) / key
            folder.mkdir()
            _receive(self.disk, home, _ask(self.disk.begin.remote(str(home))), folder)
            settings = with_paths(self.left[key], lambda path: _fetch(self.disk, path, stack))
            yield MirroredSession(folder, partial(tell, key), self.ranks, self.disk, str(home)), settings


@dataclass(frozen=True)
class MirroredSession(Session):
    """A session whose folder is a copy of `home` on the driver's disk."""

    disk: Any = None
    home: str = ""

    def keep(self, checkpoint_folder: Path) -> None:
        """See `Session`: it is on the driver's disk when this returns."""
        sent = self._send(checkpoint_folder)
        _ask(self.disk.keep.remote(self.home, sent))
        super().keep(checkpoint_folder)

    def finish(self, data: dict[str, Any]) -> dict[str, Any]:
        """See `Session`: all that the training left is on the driver's disk when this returns."""
        for path in self.folder.glob("checkpoint*"):
            shutil.rmtree(path)
        _ask(self.disk.finish.remote(self.home, self._send(self.folder), data))
        return data

    def _send(self, folder: Path) -> str:
        sent = _ask(self.disk.room.remote(self.home))
        for name, *_ in Disk().listing(str(folder), hashed=False) or ():
            for _ in _in_flight(self.disk.write.remote(str(Path(sent, name)), *piece) for piece in _pieces(folder / name)):
                pass
        return str(sent)


def with_paths(settings: Any, find: Callable[[Path], Path]) -> Any:
    """A copy of settings in which every path is what `find` says."""
    stored = io.BytesIO()

    class Writer(ray.cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, found: Any) -> str | None:
            return str(found) if isinstance(found, Path) else None

    class Reader(pickle.Unpickler):
        def persistent_load(self, name: str) -> Path:
            return find(Path(name))

    Writer(stored).dump(settings)
    stored.seek(0)
    return Reader(stored).load()


def _fetch(disk: Any, path: Path, stack: ExitStack) -> Path:
    """This machine's copy of a file or folder, which is held until the stack ends; the path itself if nothing is there."""
    found = _ask(disk.listing.remote(str(path), hashed=True))
    if found is None:
        return path
    root, identity = cache_folder() / "fetched", json.dumps([path.name, found])
    root.mkdir(parents=True, exist_ok=True)
    entry = root / hashlib.sha256(identity.encode()).hexdigest()[:32]
    lock = stack.enter_context(entry.with_suffix(".lock").open("a"))
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not entry.exists():
        fcntl.flock(lock, fcntl.LOCK_EX)
    if not entry.exists():
        _remove_unused(root)
        with atomic_write(entry) as part:
            shutil.rmtree(part, ignore_errors=True)
            _receive(disk, path, found, part / path.name)
            if Disk().listing(str(part / path.name), hashed=True) != found:
                raise OSError(f"{path} changed while it was fetched")
    os.utime(lock.name)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return entry / path.name


def _remove_unused(root: Path) -> None:
    for path in root.glob("*.lock"):
        with suppress(OSError), path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > KEPT:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def _receive(disk: Any, source: Path, files: Listing, target: Path) -> None:
    """Write files of the driver's disk to a folder, or one to a path, here."""
    for name, size, _ in files:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            for piece in _in_flight(disk.read.remote(str(source / name), at) for at in range(0, size, CHUNK)):
                file.write(piece)


def _pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file's pieces and where they begin; of an empty file an empty one."""
    with path.open("rb") as file:
        yield 0, file.read(CHUNK)
        while piece := file.read(CHUNK):
            yield file.tell() - len(piece), piece


def _in_flight(calls: Iterator[Any]) -> Iterator[Any]:
    """The results of calls, in order, of which the next are made meanwhile."""
    waiting = deque(islice(calls, AHEAD))
    while waiting:
        yield _ask(waiting.popleft())
        waiting.extend(islice(calls, 1))


def _ask(ref: Any) -> Any:
    """What a call of the driver's disk returned. Raises what it raised."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
