"""Commands of this package in processes that can be killed.

Owns how they are started: forked from a process that has imported everything, so that a start takes no time. To be killed at the
number of a write needs no clock: the process does it itself, before it writes.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["nas.search.launch", "nas.cli", "mlflow", "nas.export.measure", "nas.tracking.spec", "optuna"])
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MARK, HALTED = "NAS_FAULTS", "halted-"
PROGRESS = 900.0
"""Seconds without which nothing more is expected, on however busy a machine."""


class Found(NamedTuple):
    """What was tried, in a sentence, and what was wrong, a line each."""

    tried: str
    wrong: list[str]


def listed(counts: Mapping[Any, object]) -> str:
    """Counts as text."""
    return ", ".join(f"{name} {counts[name]}" for name in sorted(counts, key=str))


class Driver:
    """`nas WORDS` in a folder; its output is in `log`. With `kill_at` it kills itself before that many writes. One that `halts`
    does so in each stage, as soon as Ray's workers were given something to do, until it is told to go on (`stages`)."""

    def __init__(self, words: Sequence[str], folder: Path, kill_at: int = 0, *, halts: bool = False, **environment: str) -> None:
        self.mark, self.log, self.folder = str(random.SystemRandom().random()), folder / "log.txt", folder
        self.log.unlink(missing_ok=True)  # of the command before
        environment |= {MARK: self.mark, "OMP_NUM_THREADS": "1"}
        self._process = FORKS.Process(target=_run, args=(list(words), str(folder), kill_at, halts, environment), daemon=True)
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = PROGRESS) -> int | None:
        """The exit code; None if it has not ended after some seconds."""
        self._process.join(seconds)
        return self.code

    def stages(self) -> Iterator[str]:
        """Each stage in which it halts, by its name; it goes on when the next one is asked for."""
        while wait_for(lambda: next(self.folder.glob(f"{HALTED}*"), None), lambda: self.code is None):
            (file,) = self.folder.glob(f"{HALTED}*")
            yield file.name.removeprefix(HALTED)
            file.unlink()

    def failure(self) -> str:
        """How it ended, if not well."""
        return f"exit {self.code}: {self.log.read_text()[-300:]}" if self.code != 0 else ""

    def family(self) -> dict[psutil.Process, str]:
        """What it started and is alive. Ray's workers write their titles over their environment: they are found as children."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                mine = process.pid == self.pid or os.getsid(process.pid) == self.pid or process.environ().get(MARK) == self.mark
                for one in (process, *process.children(recursive=True)) if mine else ():
                    found[one] = " ".join(one.cmdline())[:80] or one.name()
        return {process: name for process, name in found.items() if is_alive(process)}


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _run(words: list[str], folder: str, kill_at: int, halts: bool, environment: dict[str, str]) -> None:
    """One command in this forked process."""
    import torch

    from nas.cli import main

    os.setsid()
    os.chdir(folder)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.update(environment)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    sys.argv, left = ["nas", *words], kill_at

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if opened or event in ("os.rename", "os.mkdir", "os.remove", "os.truncate", "sqlite3.connect"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if halts:
        _halt_in_each_stage()
    main()


def _halt_in_each_stage() -> None:
    from nas.workers.pool import RayPool

    give, halted = RayPool._give, set[RayPool[Any, Any]]()

    def give_and_halt(pool: RayPool[Any, Any], *given: Any) -> None:
        give(pool, *given)
        if pool not in halted and any(slot.given for slot in pool._slots):
            halted.add(pool)
            file = Path(HALTED + _stage(pool))
            file.touch()
            wait_for(lambda: not file.exists())

    RayPool._give = give_and_halt  # type: ignore[method-assign]


def _stage(pool: Any) -> str:
    """The folder of the trainings that a pool does, or the function that builds its evaluator."""
    return str(pool._payload[0].folder.name if isinstance(pool._payload, tuple) else pool._build.__name__)


def wait_for(moment: Callable[[], object], alive: Callable[[], object] = lambda: True, seconds: float = PROGRESS) -> bool:
    """Whether a moment came while something was alive."""
    end = time.monotonic() + seconds
    while not moment():
        if not alive() or time.monotonic() > end:
            return bool(moment())
        time.sleep(0.02)
    return True
