"""MLflow's own page, opened on one search.

Owns the server's process: it starts on this machine's loopback, answers before its address is given out, and leaves nothing
running.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import UserError
from .spec import Link, TrackingSpec, artifact_folder, database_file, is_server, prepare_database, require_same
from .store import QUIET

HOST = "127.0.0.1"
PORT = 5123  # the port taken if it is free: a browser keeps its settings by address, so the address had better stay the same
START_SECONDS = 90.0  # seconds within which the server must answer


@contextmanager
def ui(folder: Path, port: int = 0, tracking: str | None = None) -> Iterator[str]:
    """The address of a run folder's own view in MLflow, served until the context ends; `port` 0 takes 5123, or a free one.

    A search tracked on a server gets that server's address, and nothing is started. A database is opened if it is the one that
    `tracking`, MLFLOW_TRACKING_URI or the run's place says. Raises UserError: the run was not tracked, or elsewhere, the port is
    taken, the server did not start.
    """
    link = Link.load(folder)
    if not link:
        hint = "run the search with `tracking: {enabled: true}`"
        raise UserError("this run has nothing in MLflow", where=str(folder), hint=hint)
    if is_server(link.uri):
        yield link.view_url(link.uri)
        return
    uri = TrackingSpec(tracking).resolve(folder.resolve().parent)
    if tracking is None:
        require_same(link.uri, uri, folder, "nas ui")
    database = database_file(uri)
    if database and not database.exists():
        hint = f"`nas front {shlex.quote(str(folder))}` needs none"
        raise UserError("MLflow's database is gone", where=str(database), hint=hint)
    with serve(uri, folder.parent, port) as base:
        yield link.view_url(base)


@contextmanager
def serve(uri: str, runs: Path, port: int = 0) -> Iterator[str]:
    """MLflow's server over a database, at the address it yields; gone when the context ends, by Ctrl-C or SIGTERM too."""
    prepare_database(uri)
    with tempfile.TemporaryFile() as said, _signals_interrupt(), claim(port) as claimed:
        process = _start(uri, runs, claimed, said)
        try:
            _await(process, f"http://{HOST}:{claimed}", said)
            yield f"http://{HOST}:{claimed}"
        finally:
            _stop(process)


def wait() -> None:
    """Sleep until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """What asks this process to end ends it as Ctrl-C does, so that nothing is left behind; in the main thread only."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    ours = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, interrupt) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(uri: str, runs: Path, port: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    artifacts = artifact_folder(uri, runs)
    program = Path(__file__).with_name("served.py")
    command = [sys.executable, "-P", str(program), HOST, str(port), artifacts.as_uri() if artifacts else ""]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | QUIET | os.environ
    environment |= {"MLFLOW_BACKEND_STORE_URI": uri}
    # A session of its own: the whole family can be ended together, and Ctrl-C reaches it only through `_stop`.
    return subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=runs, start_new_session=True)


def _await(process: subprocess.Popen[bytes], base: str, said: IO[bytes]) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError), direct.open(f"{base}/health", timeout=2):
            return
        time.sleep(0.1)
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    raise UserError(f"MLflow's server did not start: {lines[-1]}", where=base)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a worker that outlived its parent


@contextmanager
def claim(port: int) -> Iterator[int]:
    """The port asked for, which must be free; if none is, the usual one or whichever is free. The server binds it seconds
    later; until then a lock keeps a second `nas ui` from it, which would wait for an answer there and get the first one's."""
    for candidate in [port] if port else [PORT, _bind(0), _bind(0)]:
        lock = _lock(candidate) if _bind(candidate) else None
        if lock:
            with lock:
                yield candidate
            return
    raise UserError(f"port {port or PORT} is taken", where="--port", hint="give another, or none for a free one")


def _lock(port: int) -> IO[str] | None:
    import fcntl

    try:
        lock = (Path(tempfile.gettempdir()) / f"nas-ui-{port}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or another user's file
        return None
    return lock


def _bind(port: int) -> int:
    """The port that binding gives (any free one for 0); 0 if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return 0
        return int(probe.getsockname()[1])
