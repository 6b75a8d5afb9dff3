"""Machines of a Ray cluster that share no disk with its driver, on one machine."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

HIDE = 'mount -t tmpfs tmpfs "$1" && cd "$2" && shift 2 && exec "$@"'
UNSHARE = (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"])


class Apart:
    """A machine for two workers of the cluster at an address. For its processes the folder `hidden` is empty, whatever others see
    in it; their own folder and their cache are in `own`. The test is skipped where the system hides nothing."""

    def __init__(self, address: str, hidden: Path, own: Path) -> None:
        self.own, self._address = own, address
        hidden.mkdir(parents=True, exist_ok=True)
        own.mkdir(parents=True)
        hiding = ["sh", "-c", HIDE, "sh", str(hidden), str(own)]
        self._start = next(([*words, *hiding] for words in UNSHARE if _works([*words, *hiding, "true"])), [])
        if not self._start:
            pytest.skip("no folder can be hidden from a process here")

    def come(self) -> None:
        """Join the cluster."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={self._address}", "--num-cpus=2"]
        given = os.environ | {"NAS_CACHE": str(self.own / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
        command = [*self._start, *ray, "--dashboard-agent-listen-port=0"]
        for last in (False, False, True):  # on a busy machine Ray gives a start up
            with (self.own / "log.txt").open("w") as log:
                self._process = subprocess.Popen(command, env=given, stdout=log, stderr=log)
            while "Ray runtime started" not in (said := (self.own / "log.txt").read_text()) and self._process.poll() is None:
                time.sleep(0.05)
            if self._process.poll() is None:
                return
            assert not last, said

    def go(self) -> None:
        """Vanish, with all of its processes."""
        one = psutil.Process(self._process.pid)
        for process in (*one.children(recursive=True), one):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()


@contextlib.contextmanager
def apart(address: str, hidden: Path, own: Path) -> Iterator[Apart]:
    """Such a machine, which has joined, and goes in the end."""
    machine = Apart(address, hidden, own)
    machine.come()
    try:
        yield machine
    finally:
        machine.go()


def _works(command: list[str]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False
