"""A server that is away, workers that die and a disk that is full, in the middle of a search.

Moments are met by halting the search, so that no clock decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.kills import differences, outcome, prepare, undisturbed
from tests.faults.processes import Driver, Found, wait_for

KIND = "supernet"


def _halted(driver: Driver, moment: Callable[[], object], do: Callable[[], object]) -> bool:
    """Do something at a moment of a search, while it is halted; False if it ended before."""
    came = wait_for(moment, lambda: driver.code is None)
    driver.signal(signal.SIGSTOP)
    do()
    driver.signal(signal.SIGCONT)
    return came


def _evaluated(run: Path, count: int) -> bool:
    journal = run / "journal.jsonl"
    return journal.exists() and journal.read_bytes().count(b"\n") >= count


def server_away(folder: Path) -> Found:
    """An MLflow server is ended, begun again and hung while it is searched; `nas sync` writes the rest."""
    many = {"search": {"evaluations": 24, "batch": 2}}
    expected = undisturbed(folder / "undisturbed", KIND, **many)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = prepare(folder / "search", KIND, tracking={"uri": f"http://127.0.0.1:{port}"}, **many)
    run, servers = place / "runs" / KIND, [_served(folder, port)]
    driver = Driver(["search", "trial.yaml"], place, MLFLOW_HTTP_REQUEST_TIMEOUT="3")
    came = [
        _halted(driver, (run / "tracking.json").exists, lambda: _end(servers[0])),
        _halted(driver, lambda: _evaluated(run, 8), lambda: servers.append(_served(folder, port))),
        _halted(driver, lambda: _evaluated(run, 16), lambda: os.killpg(servers[1].pid, signal.SIGSTOP)),
    ]
    wrong = [] if all(came) else [f"the search ended before {came}"]
    if driver.wait() != 0:
        wrong.append(f"the search: {driver.failure()}")
    os.killpg(servers[1].pid, signal.SIGCONT)
    for _ in range(2):
        sync = Driver(["sync", KIND, "--tracking", f"http://127.0.0.1:{port}"], place)
        if sync.wait() != 0:
            wrong.append(f"nas sync: {sync.failure()}")
    said = sync.log.read_text()
    _end(servers[1])
    if "0 entries" not in said:
        wrong.append(f"a second nas sync writes again: {said}")
    tried = "An MLflow server killed, begun again and halted in a search of 24 evaluations, then `nas sync` twice."
    return Found(tried, wrong + differences(outcome(run, folder / "server.db"), expected))


def _served(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """An MLflow server that answers."""
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "server.txt").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as page:
            return bool(page.status == 200)
        return False

    assert wait_for(answers, lambda: server.poll() is None), (folder / "server.txt").read_text()[-2000:]
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def workers_killed(folder: Path) -> Found:
    """On real Ray a worker is killed in an evaluation and one in a training: the same numbers."""
    final = {"steps": 60, "batch": 2, "seq": 16, "candidates": 2}
    expected = undisturbed(folder / "undisturbed", KIND, final=final)
    place = prepare(folder / "search", KIND, final=final, run={"workers": 2})
    run, killed = place / "runs" / KIND, list[str]()
    driver = Driver(["search", "trial.yaml"], place)

    def kill() -> None:
        workers = [process for process, name in driver.family().items() if name.startswith(("ray::_Worker", "ray::IDLE"))]
        busy = [process for process in workers if "IDLE" not in process.cmdline()[0]]
        for worker in (busy or workers)[:1]:
            killed.append(worker.cmdline()[0])
            worker.kill()

    came = [_halted(driver, lambda: _evaluated(run, 2), kill), _halted(driver, lambda: _trains(run), kill)]
    whole = driver.wait() == 0 and all(came) and len(killed) == 2
    wrong = differences(outcome(run), expected) if whole else [f"moments {came}: {driver.failure()}"]
    return Found(f"Ray workers killed in the evaluations and in the trainings: {', '.join(killed)}.", wrong)


def nodes_lost(folder: Path) -> Found:
    """A machine of a cluster goes away in the evaluations, and another in the trainings: the same numbers."""
    from ray.cluster_utils import Cluster

    final = {"steps": 60, "batch": 2, "seq": 16, "candidates": 2, "presets": False}
    expected = undisturbed(folder / "undisturbed", KIND, final=final)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        others = [nodes.add_node(num_cpus=1)]
        place = prepare(folder / "search", KIND, final=final, run={"workers": 2, "address": nodes.address})
        run = place / "runs" / KIND
        driver = Driver(["search", "trial.yaml"], place)

        def lose() -> None:
            nodes.remove_node(others.pop(), allow_graceful=False)
            others.append(nodes.add_node(num_cpus=1))

        came = [_halted(driver, lambda: _evaluated(run, 2), lose), _halted(driver, lambda: _trains(run), lose)]
        whole = driver.wait() == 0 and all(came)
    finally:
        nodes.shutdown()
    wrong = differences(outcome(run), expected) if whole else [f"moments {came}: {driver.failure()}"]
    return Found("Of a cluster's two machines one lost in the evaluations, and the one in its place in the trainings.", wrong)


def _trains(run: Path) -> bool:
    """Whether a training of the front has begun that is not done."""
    begun = {path for path in run.glob("final/*") if path.is_dir() and next(path.iterdir(), None)}
    return any(not (path / "result.json").exists() for path in begun)


@contextmanager
def small_disk(folder: Path, size: int = 30) -> Iterator[Path]:
    """A file system of so many MiB. Raises OSError where there is none to be had."""
    folder.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        raise OSError(made.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk_full(folder: Path, tries: int, seed: int = 0) -> Found:
    """Searches on a disk with little room, each resumed when there is room again."""
    chance, wrong = random.Random(seed), list[str]()
    expected = undisturbed(folder / "undisturbed", KIND)
    free = [0, *(int(2 ** chance.uniform(2, 12)) for _ in range(tries - 1))]
    for n, kib in enumerate(free):
        place = prepare(folder / f"search-{n}", KIND)
        with small_disk(folder / f"disk-{n}") as disk:
            wrong += [f"{kib} KiB free: {line}" for line in _searched_on(disk, place, kib, expected)]
    return Found(f"{tries} searches on a disk of 30 MiB with {', '.join(map(str, sorted(free)))} KiB free (seed {seed}).", wrong)


def _searched_on(disk: Path, place: Path, kib: int, expected: dict[str, object]) -> list[str]:
    run, ballast, where = disk / "runs" / KIND, disk / "ballast", ["--runs", str(disk / "runs")]
    (disk / "runs").mkdir()
    room = os.statvfs(disk)
    ballast.write_bytes(bytes(max(room.f_bavail * room.f_frsize - kib * 1024, 0)))
    driver = Driver(["search", "trial.yaml", *where], place)
    code, lines = driver.wait(), driver.log.read_text().splitlines()
    errors = [line for line in lines if line.startswith(("error", "Traceback"))]
    wrong = [f"exit {code}: {lines[-3:]}"] if code != 0 and (code != 1 or errors != lines[-1:] or len(lines[-1]) > 300) else []
    wrong += [f"half-written: {path.relative_to(disk)}" for path in disk.rglob("*.part")]
    for path in disk.rglob("*.json"):
        json.loads(path.read_text())
    ballast.unlink()
    words = ["resume", KIND] if (run / "trial.yaml").exists() else ["search", "trial.yaml"]
    driver = Driver([*words, *where], place)
    if driver.wait() != 0:
        return [*wrong, f"{words[0]} with room again: {driver.failure()}"]
    return wrong + [f"after {words[0]}: {line}" for line in differences(outcome(run), expected)]
