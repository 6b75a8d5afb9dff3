"""A server that is away, workers that die and a disk that is full, in the middle of a search.

Moments are met by halting the search, so that no clock decides.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.kills import differences, outcome, prepare, undisturbed
from tests.faults.processes import Driver, Found, wait_for
from tests.machines import apart

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


SEARCHES: dict[str, dict[str, Any]] = {
    "predictor": {"final": {"steps": 4, "batch": 2, "seq": 16, "candidates": 2, "early_stopping": {"grace": 2}}},
    "supernet": {"dense": {"steps": 4, "batch": 2, "seq": 16}},
}
STAGES = {
    "predictor": ["build_timer", "predictor", "predictor", "paused-2", "final"],
    "supernet": [
        *("build_timer", "dense", "build_converter", "build_evaluator"),
        *("supernet", "build_comparer", "supernet", "build_evaluator", "final"),
    ],
}
"""Searches, by kind, which between them have every stage that Ray's workers work in: trainings by their folder, others by the
function that builds what they work with. What is measured at work depends on the machine, and is not among them."""


def workers_killed(folder: Path, kinds: Sequence[str] = tuple(SEARCHES)) -> Found:
    """On real Ray every worker is killed in each stage, once they have something to do: the same numbers."""

    def kill(driver: Driver) -> None:
        for process, name in driver.family().items():
            if name.startswith("ray::_Worker"):
                process.kill()

    return Found(f"All of Ray's workers killed in each stage{_listed(kinds)}", _disturbed(folder, kinds, kill))


def nodes_lost(folder: Path, kinds: Sequence[str] = tuple(SEARCHES)) -> Found:
    """The machine of a cluster that the workers are on goes away in each stage, and another comes: the same numbers."""

    def lose(driver: Driver) -> None:
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        nodes.add_node(num_cpus=2)

    with cluster() as nodes:
        wrong = _disturbed(folder, kinds, lose, nodes.address)
    tried = f"The machine that all workers are on lost, and another one put in its place, in each stage{_listed(kinds)}"
    return Found(tried, wrong)


def nodes_apart(folder: Path, kinds: Sequence[str] = tuple(SEARCHES)) -> Found:
    """The machine that the workers are on sees nothing of the driver's folder, goes away in each stage and comes back: the same
    numbers."""

    def lose(driver: Driver) -> None:
        machine.go()
        machine.come()

    with cluster(machines=0) as nodes, apart(nodes.address, folder / "driver", folder / "machine") as machine:
        wrong = _disturbed(folder / "driver", kinds, lose, nodes.address)
        fetched = [path.name for path in (machine.own / "cache" / "fetched").glob("*/*")]
    if fetched.count("train_tokens.bin") != 1:  # the searches have one text
        wrong.append(f"fetched: {sorted(fetched)}")
    tried = "The machine that all workers are on, which shares no disk with the driver, lost and back again in each stage"
    return Found(f"{tried}{_listed(kinds)}", wrong)


def _listed(kinds: Sequence[str]) -> str:
    return f" of {len(kinds)} searches. " + "; ".join(f"{kind}: {', '.join(STAGES[kind])}" for kind in kinds) + "."


@contextmanager
def cluster(machines: int = 1) -> Iterator[Any]:
    """A Ray cluster of a head, on which nothing is computed, and machines for two workers each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(machines):
            nodes.add_node(num_cpus=2)
        yield nodes
    finally:
        for node in (*nodes.worker_nodes, nodes.head_node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def head_lost(folder: Path) -> Found:
    """The head of a cluster goes away, and the driver's machine leaves another: one line each, and `nas resume` without a cluster
    gives the same numbers."""
    kind = "predictor"
    expected, wrong, slowest = undisturbed(folder / "undisturbed", kind), list[str](), 0.0
    for stage, process in (("predictor", "gcs_server"), ("final", "raylet")):
        with cluster() as nodes:
            place = prepare(folder / stage, kind, run={"workers": 2, "address": nodes.address})
            driver, stages = Driver(["search", "trial.yaml"], place, halts=True), list[str]()
            for met in driver.stages():
                stages.append(met)
                if met == stage:
                    getattr(nodes.head_node, f"kill_{process}")(check_alive=False)
                    began = time.monotonic()
            code, said = driver.wait(), driver.log.read_text().splitlines()
            slowest = max(slowest, time.monotonic() - began)
        if code != 1 or stages[-1] != stage or "Ray failed" not in said[-1] or any("Traceback" in line for line in said):
            wrong.append(f"{process}, in {stages}: {driver.failure()}")
        driver = Driver(["resume", kind, "--address", "local"], place)
        found = differences(outcome(place / "runs" / kind), expected) if driver.wait() == 0 else [driver.failure()]
        wrong += [f"{process}: {line}" for line in found]
    tried = "A cluster's head lost in the proxy trainings, and the driver's own machine in the trainings of the front"
    return Found(f"{tried}: the driver ended within {slowest:.0f} s, and `nas resume --address local` went on.", wrong)


def _disturbed(folder: Path, kinds: Sequence[str], do: Callable[[Driver], None], address: str | None = None) -> list[str]:
    """What was wrong with searches in each of whose stages something is done, once its workers have something to do."""
    wrong = []
    for kind in kinds:
        expected = undisturbed(folder / f"undisturbed-{kind}", kind, **SEARCHES[kind])
        place, stages = prepare(folder / kind, kind, run={"workers": 2, "address": address}, **SEARCHES[kind]), list[str]()
        driver = Driver(["search", "trial.yaml"], place, halts=True)
        for stage in driver.stages():
            stages.append(stage)
            do(driver)
        found = differences(outcome(place / "runs" / kind), expected) if driver.wait() == 0 else [driver.failure()]
        found += [f"its stages were {stages}"] if stages != STAGES[kind] else []
        wrong += [f"{kind}: {line}" for line in found]
    return wrong


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
