"""When the state of a training is saved, and how a training ends that is asked to.

Owns `Saver` and the wish to end (`WANTED`), which a signal, or the driver of a cluster, makes known to a process's trainings.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .work import Session

LEAST_SECONDS = 30.0  # seconds between two checkpoints, at least
SHARE = 0.05  # the share of the time, at most, that a training stands still for its checkpoints
BYTES_PER_SECOND = 2**29  # how fast a state is assumed to be written until one was
PREFIX = "making-"  # of the folder of a checkpoint that is being written
WANTED = threading.Event()  # set in a process whose trainings are to save their state and end


class Ended(SystemExit):
    """Ends a training whose state was saved, since it was asked to."""


class Saver:
    """Saves a training's state by `write(folder)`, `size` bytes: not more often than `LEAST_SECONDS` and `SHARE` allow. At
    SIGTERM or Ctrl-C it is saved at once, and the training ends.

    The training stands still while `write` hands its state to the operating system. That it reaches the disk, and then replaces
    the one before, is waited for in a thread. What goes wrong there is raised at the next step, or at the end.
    """

    def __init__(self, session: Session, write: Callable[[Path], None], size: int) -> None:
        self._session, self._write = session, write
        self._cost, self._saved = size / BYTES_PER_SECOND, time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._signals = ending_by_signals()

    def __enter__(self) -> Saver:
        for torn in self._session.folder.glob(f"{PREFIX}*"):
            shutil.rmtree(torn, ignore_errors=True)
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._join()
        self._signals.__exit__(None, None, None)
        if self._error and kind is None:
            raise self._error

    def step(self) -> None:
        """Called after each step but the last."""
        if self._error:
            raise self._error
        if WANTED.is_set():
            self._join()
            self._save()
            self._join()
            raise Ended
        waiting = self._thread is not None and self._thread.is_alive()
        if not waiting and time.monotonic() - self._saved > max(LEAST_SECONDS, self._cost / SHARE):
            self._save()

    def _save(self) -> None:
        began, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=self._session.folder, prefix=PREFIX))
        self._write(folder)
        self._saved = time.monotonic()
        self._cost = self._saved - began
        self._thread = threading.Thread(target=self._keep, args=(folder,))
        self._thread.start()

    def _keep(self, folder: Path) -> None:
        try:
            self._session.keep(folder)
        except Exception as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C are wishes while this lasts, and do what they did before when it ends; a second one does so at once.

    No signal comes to a thread that is not the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def wish(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if came[1:]:
            restore()
            signal.raise_signal(number)
        WANTED.set()

    before = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()
        if came:
            WANTED.clear()
            signal.raise_signal(came[0])
