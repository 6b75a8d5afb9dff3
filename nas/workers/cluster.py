"""The Ray cluster of a run: a local one that is started and ended with it, or one that is joined and left.

Owns how Ray is imported, configured and started, how a worker process is configured, and what Ray's errors mean. Every
module that needs Ray takes it from here, since Ray reads most of `SETTINGS` at import.
"""

from __future__ import annotations

import _thread
import logging
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RunFailed, UserError
from ..files import temporary_folder
from .work import LOCAL, RunSpec, first_line

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would upload the working directory
}
"""What is set before Ray is imported: to be quiet, and to leave the machine alone. What the user has set already stays."""

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

import ray as ray  # noqa: E402

# Ray prints the death of every worker, a page of it, on standard output, where `--json` goes, whatever `log_to_driver` says.
ray._private.worker._worker_logs_enabled = False

# Ray would put a handler of SIGTERM that ends without a word in place of the program's.
ray._private.utils.set_sigterm_handler = lambda handler: None

log = logging.getLogger(__name__)

Resources = dict[str, float]  # what a machine has, or a worker needs, by Ray's names
PARTS = 10_000  # Ray counts GPUs in parts of this size
PATIENCE = 5.0  # seconds given to a named cluster to answer
START_LIMIT = 120.0  # seconds given to a local cluster to start
WATCH = 0.2  # seconds between two looks at a local cluster's own processes
GRACE = 8.0  # seconds in which trainings may save their state when a joined cluster is lost, before this process is ended
HEAD_LIMIT = 40.0  # seconds given to the head of a joined cluster to answer again; Ray gives it 60

SILENT = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}


@contextmanager
def cluster(spec: RunSpec) -> Iterator[None]:
    """Ray, ready to be used; inside another `cluster`, that one goes on.

    A local cluster is always a fresh one, so that no stale session is joined, and its files go with it. Nothing is uploaded:
    a joined cluster's machines have this package installed. Raises UserError: no cluster answers at the address, or none of
    its machines has room for a worker. Raises RunFailed: a local cluster does not start, or Ray fails later.
    """
    if ray.is_initialized():
        _require_room(spec)
        yield
        return
    with ExitStack() as stack:
        address = None if spec.address == LOCAL else spec.address
        folder = None if address else stack.enter_context(session_folder())
        if folder:
            stack.enter_context(_private(folder))
        stack.callback(ray.shutdown)
        _start(spec, folder) if folder else _join(str(address))
        if threading.current_thread() is threading.main_thread():  # Ray's C++ has put its own handler, which prints a stack
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
        stack.enter_context(_one_line(folder is None))
        _require_room(spec)
        yield


@contextmanager
def session_folder() -> Iterator[str]:
    """Where a local cluster keeps its sockets and logs: the user's own, and short, since a socket's path has little room. It
    goes when the cluster does, and one whose driver was killed goes with the next."""
    root = Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())
    with temporary_folder(root, "nas-ray-") as folder:
        yield str(folder)


@contextmanager
def _private(folder: str) -> Iterator[None]:
    """A local cluster begun in here is this machine's and this session's: its ports are bound to loopback, and its token is in
    the session's folder, not in the user's home, which may not be there."""
    constants, loader = ray._private.ray_constants, ray._raylet.AuthenticationTokenLoader
    names, binds = ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"), constants.ENABLE_RAY_CLUSTER
    before = {name: os.environ[name] for name in names if name in os.environ}
    token = Path(folder) / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token))
    constants.ENABLE_RAY_CLUSTER = False
    loader.instance().reset_cache()
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
        constants.ENABLE_RAY_CLUSTER = binds
        loader.instance().reset_cache()
        ray._raylet.Config.initialize("")  # Ray keeps the mode in there, too


def _start(spec: RunSpec, folder: str) -> None:
    """A fresh local cluster, tried twice. Its CPUs are a count of workers, not of cores, so that any spec fits on any machine.
    Raises RunFailed if it does not start within `START_LIMIT` seconds."""
    cpus = max(1, math.ceil(spec.workers * spec.cpus_per_worker))
    for last in (False, True):
        limit = threading.Timer(START_LIMIT, _give_up, [folder])
        limit.start()
        try:
            return ray.init(address="local", num_cpus=cpus, _temp_dir=folder, **SILENT)
        except Exception as error:  # Ray has no family for these either
            limit.cancel()
            ray.shutdown()
            _end_processes(folder)
            if last:
                raise RunFailed(f"Ray does not start: {first_line(error)}; `--workers 0` runs without Ray") from error
            log.warning("Ray did not start (%s): it is tried once more", first_line(error))
        finally:
            limit.cancel()


def _give_up(folder: str) -> None:
    """End a start that takes too long: what Ray waits for fails, or Ray ends this process."""
    log.warning("Ray has not started in %d s: it is ended", START_LIMIT)
    _end_processes(folder)


def _end_processes(folder: str) -> None:
    """Kill what was begun of the cluster whose session is in a folder."""
    import psutil  # comes with Ray

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and any(folder in word for word in process.cmdline()):
                process.kill()


@contextmanager
def _one_line(is_joined: bool) -> Iterator[None]:
    """What Ray raises in here is a RunFailed, and so is the end of one of a local cluster's own processes, or what a joined one
    cannot be without."""
    node, over, lost = ray._private.worker._global_node, threading.Event(), list[str]()
    joined = _Joined(node) if is_joined else None

    def watch() -> None:
        while not over.wait(WATCH):
            dead = node.dead_processes()
            if why := f"its {dead[0][0]} ended" if dead else joined.lost() if joined else "":
                lost.append(why)
                _thread.interrupt_main(wake)
                if is_joined and not over.wait(GRACE):  # it is in a call of Ray's that does not come back
                    os.write(2, f"error: {_failed(why, is_joined)}\n".encode())
                    os._exit(1)
                return

    wake, before = signal.SIGINT, None
    if threading.current_thread() is threading.main_thread():  # SIGINT is ignored in what a script starts in the background
        wake, before = signal.SIGUSR2, signal.signal(signal.SIGUSR2, signal.default_int_handler)
    watcher = threading.Thread(target=watch, name="ray", daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if not lost and not isinstance(error, ray.exceptions.RayError):
            raise
        raise RunFailed(_failed(lost[0] if lost else failure_reason(error), is_joined)) from error
    finally:
        over.set()
        watcher.join()
        if wake == signal.SIGUSR2:
            signal.signal(wake, before or signal.SIG_DFL)


def _failed(why: str, is_joined: bool) -> str:
    elsewhere = ", with --address on another cluster or (`local`) on this machine alone" * is_joined
    return f"Ray failed: {why}; the same command, or `nas resume RUN`, goes on{elsewhere}"


class _Joined:
    """What keeps this process in a joined cluster: Ray waits for it up to a minute, and then ends the process without a word."""

    def __init__(self, node: Any) -> None:
        import psutil

        host, _, port = node.gcs_address.rpartition(":")
        self._head, self._answered, self._asked = (host.strip("[]"), int(port)), time.monotonic(), 0.0
        self._raylet = None
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if f"--raylet_socket_name={node.raylet_socket_name}" in process.cmdline():
                    self._raylet = process

    def lost(self) -> str:
        """What has ended, or does not answer any more; the head is asked once a second, at most."""
        if self._raylet and not _runs(self._raylet):
            return "this machine is no part of its cluster any more"
        if time.monotonic() - self._asked > 1.0:
            self._asked = time.monotonic()
            with suppress(OSError):
                socket.create_connection(self._head, timeout=PATIENCE).close()
                self._answered = time.monotonic()
        gone = time.monotonic() - self._answered > HEAD_LIMIT
        return f"its head {self._head[0]}:{self._head[1]} does not answer any more" if gone else ""


def _runs(process: Any) -> bool:
    import psutil

    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


ADDRESS_HINT = "name the cluster's head as host:port, or `local` to run on this machine alone"


def _join(address: str) -> None:
    """Join a cluster that this machine is part of. Raises UserError, within seconds, if there is none."""
    if address != "auto":
        _require_answer(address, *_parse(address))
    quiet = {name: value for name, value in SILENT.items() if name != "include_dashboard"}
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray has no family for these: ConnectionError, RuntimeError, ValueError have been seen
        start = "ray start --head" if address == "auto" else f"ray start --address={address}"
        message = f"cannot join the Ray cluster {address}: {first_line(error).split('. ')[0]}"
        raise UserError(message, where="run.address", hint=f"`{start}` makes this machine part of one") from None


def _parse(address: str) -> tuple[str, int]:
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is Ray Client, whose program is on no machine of the cluster",
            where="run.address",
            hint="start the search on a machine of the cluster, and name its head as host:6379",
        )
    match = re.fullmatch(r"(.+):(\d{1,5})", address)
    if not match:
        raise UserError(f"{address!r} is not an address", where="run.address", hint=ADDRESS_HINT)
    return match[1].strip("[]"), int(match[2])


def _require_answer(address: str, host: str, port: int) -> None:
    """A Ray cluster answers. `ray.init` would wait for a minute and then end the whole process, so another one tries first."""
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
        trial = [sys.executable, "-c", "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1])", address]
        subprocess.run(trial, timeout=6 * PATIENCE, check=True, capture_output=True)
    except OSError as error:
        raise UserError(f"nothing answers at {address} ({error})", where="run.address", hint=ADDRESS_HINT) from None
    except subprocess.SubprocessError:
        raise UserError(f"what answers at {address} is not Ray", where="run.address", hint=ADDRESS_HINT) from None


def share_gpus(spec: RunSpec, nodes: Sequence[Resources]) -> float:
    """The GPUs of each worker on machines with these resources: what the spec says or, for `auto`, one, or as large an equal part
    as lets all workers find room; 0 where no worker would find room beside a GPU."""
    if spec.gpus_per_worker != "auto":
        return spec.gpus_per_worker
    shares = [PARTS // workers / PARTS for workers in range(1, max(spec.workers, 1) + 1)]
    rooms = {share: min(sum(_room(node, _need(spec, share)) for node in nodes), spec.workers) for share in shares}
    best = max(shares, key=lambda share: (rooms[share], share))
    return best if rooms[best] else 0.0


def share_trainings(spec: RunSpec, nodes: Sequence[Resources], trainings: int, batch: int) -> int:
    """The workers of each of so many trainings on machines with these resources: what the spec says or, for `auto`, the most that
    divide the batch evenly and with which every training has whole GPUs at once (NCCL refuses two workers on one); else 1."""
    gpus = 1.0 if spec.gpus_per_worker == "auto" else spec.gpus_per_worker
    if spec.workers_per_training != "auto" or gpus < 1:
        return spec.together
    most = min(sum(_room(node, _need(spec, gpus)) for node in nodes), spec.workers) // max(trainings, 1)
    return max((size for size in range(1, most + 1) if batch % size == 0), default=1)


def place(spec: RunSpec) -> RunSpec:
    """The spec with its GPUs a worker as a number, on the cluster that is joined."""
    return replace(spec, gpus_per_worker=share_gpus(spec, alive_nodes()))


def workers_summary(spec: RunSpec) -> str:
    """How many workers there are, and what each computes on, for a person."""
    share, nodes = share_gpus(spec, alive_nodes()), alive_nodes()
    workers = f"{spec.workers} worker{'s' * (spec.workers > 1)}"
    if not share:
        return f"{workers} on CPUs"
    kinds = sorted({name.partition(":")[2] for node in nodes for name in node if name.startswith("accelerator_type:")})
    part = f"{share:g} GPUs each" if share > 1 else "a GPU each" if share == 1 else f"1/{round(1 / share)} of a GPU each"
    there = f"{sum(node.get('GPU', 0.0) for node in nodes):g} there{': ' * bool(kinds)}{', '.join(kinds)}"
    return f"{workers} with {part} ({there})"


def alive_nodes() -> list[Resources]:
    """What each machine of the cluster that is joined has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _need(spec: RunSpec, gpus: float) -> Resources:
    return {"CPU": spec.cpus_per_worker, "GPU": gpus}


def _require_room(spec: RunSpec) -> None:
    nodes = alive_nodes()
    need = _need(spec, gpus := share_gpus(spec, nodes))
    room = sum(_room(node, need) for node in nodes)
    if room == 0:
        best = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in need}
        raise UserError(
            f"no machine has {spec.cpus_per_worker:g} CPUs and {gpus:g} GPUs for a worker",
            where="run",
            hint=f"at most {best['CPU']:g} cpus_per_worker and {best['GPU']:g} gpus_per_worker fit",
        )
    if room < spec.workers:
        log.warning("the cluster has room for %d of %d workers; the others wait for it", room, spec.workers)


def _room(node: Resources, need: Resources) -> int:
    """Workers that fit on a node."""
    return int(min((node.get(name, 0.0) / share for name, share in need.items() if share), default=10**6))


def configure_worker(spec: RunSpec) -> None:
    """Make this process one of the spec's workers: its share of the node's cores, and no GPU that it did not ask for. Called in
    the thread that computes: OpenMP counts threads for each of them."""
    if not spec.gpus_per_worker:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(spec.threads(cores))


OUT_OF_MEMORY = "out of memory"

FAILURES = {
    "running low on memory": OUT_OF_MEMORY,
    "node has died": "its machine went away",
    "unavailable": "its machine went away",
    "exit code": "its process ended itself",
}


def failure_reason(error: BaseException) -> str:
    """Why a worker ended, or Ray failed, in a few words of the paragraphs that Ray says it in."""
    text = str(error)
    if getattr(error, "actor_init_failed", False):
        return text.strip().splitlines()[-1].strip()
    other = "its process was killed, or crashed" if isinstance(error, ray.exceptions.RayActorError) else first_line(error)
    return next((words for sign, words in FAILURES.items() if sign in text), other)
