"""Commands of this package in processes that can be killed.

Owns how they are started: forked from a process that has imported everything, so that a start takes no time, or as a user starts
them, for Ray. The killing by the number of a write needs no clock: the process kills itself before it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["nas.search.launch", "nas.cli", "mlflow", "nas.export.measure", "nas.tracking.database", "optuna"])
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MARK = "NAS_FAULTS"
PROGRESS = 900.0
"""Seconds without which nothing more is expected, on however busy a machine."""


class Driver:
    """`nas WORDS` in a folder; its output is in `log`. With `kill_at` it kills itself before that many writes."""

    def __init__(self, words: Sequence[str], folder: Path, ray: bool = False, kill_at: int = 0, **environment: str) -> None:
        self.mark, self.log = f"{os.getpid()}-{random.SystemRandom().random()}", folder / "log.txt"
        environment |= {MARK: self.mark, "OMP_NUM_THREADS": "1"}
        self._forked: Any = None
        if ray:
            kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"} | environment
            code = "import torch; torch.set_num_threads(1); from nas.cli import main; main()"
            command = [sys.executable, "-c", code, *words]
            with self.log.open("w") as log:
                self._begun = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=kept, start_new_session=True)
            self.pid = self._begun.pid
        else:
            self._forked = FORKS.Process(target=_run, args=(list(words), str(folder), kill_at, environment), daemon=True)
            self._forked.start()
            self.pid = self._forked.pid

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._forked.exitcode if self._forked else self._begun.poll()

    @property
    def writes(self) -> int:
        """How often it had opened, made, moved or removed a file when it ended."""
        return int(self.log.with_name("writes.txt").read_text())

    def signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = PROGRESS) -> int | None:
        """The exit code; None if it has not ended after some seconds."""
        if self._forked:
            self._forked.join(seconds)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._begun.wait(seconds)
        return self.code

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
    """Whether it runs."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _run(words: list[str], folder: str, kill_at: int, environment: dict[str, str]) -> None:
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
    sys.argv = ["nas", *words]
    writes = _killed_at(kill_at)
    try:
        main()
    finally:
        Path("writes.txt").write_text(str(writes()))


def _killed_at(number: int) -> Callable[[], int]:
    """Count this process's writes, and kill it before one of them."""
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("os.rename", "os.mkdir", "os.remove", "os.truncate", "sqlite3.connect") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        ):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return lambda: seen


def wait_for(moment: Callable[[], object], alive: Callable[[], object] = lambda: True, seconds: float = PROGRESS) -> bool:
    """Whether a moment came while something was alive."""
    end = time.monotonic() + seconds
    while not moment():
        if not alive() or time.monotonic() > end:
            return bool(moment())
        time.sleep(0.02)
    return True


def read_json(path: Path) -> Any:
    """A file's data, None if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else None
