"""Searches whose driver is killed at random moments: resumed, they give what an undisturbed one gives, to the last digit.

Owns what is compared: front, journal, weights, and the runs in MLflow.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nas.search.run import Run
from tests.faults.processes import Driver, is_alive, read_json, wait_for
from tests.searches import FROM, PREDICTOR, SUPERNET, write_trial

KINDS: dict[str, dict[str, Any]] = {"predictor": PREDICTOR, "supernet": SUPERNET, "from": FROM}
LIVES = 5
"""The most kills of one search."""


@dataclass
class Killed:
    """What was tried, and what was wrong."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    searches: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)


def prepare(folder: Path, kind: str, **changes: Any) -> Path:
    """A folder with a tracked trial of a kind."""
    folder.mkdir(parents=True)
    write_trial(folder, KINDS[kind] | {"name": kind, "tracking": {}}, **changes)
    return folder


def undisturbed(folder: Path, kind: str, **changes: Any) -> tuple[dict[str, Any], int]:
    """What a search gives that nothing disturbs, and how often it writes."""
    driver = Driver(["search", "trial.yaml"], prepare(folder, kind, **changes))
    assert driver.wait() == 0, driver.log.read_text()
    return outcome(folder / "runs" / kind), driver.writes


def outcome(run: Path, database: Path | None = None) -> dict[str, Any]:
    """All of a finished run that does not depend on the clock."""
    journal = sorted((_without_time(entry) for entry in Run(run).journal().read()), key=lambda e: (e["number"], e["hash"]))
    front = read_json(run / "front.json")
    weights = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in _weights(run)}
    front = front | {key: [_without_time(row) for row in front[key]] for key in ("front", "dominated")}
    return {"journal": journal, "front": front, "weights": weights} | tracked(database or run.parent / "mlflow.db")


def _without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def _weights(run: Path) -> list[Path]:
    return sorted(path for part in ("final", "predictor", "converted") for path in run.glob(f"{part}/**/model.safetensors"))


def tracked(database: Path) -> dict[str, Any]:
    """What is in MLflow: the parents' states, the children's keys and states, the points, and those that are there twice."""
    active = "from runs where lifecycle_stage = 'active' and run_uuid"
    child = "(select run_uuid from tags where key = 'mlflow.parentRunId')"
    with closing(sqlite3.connect(database)) as db:
        parents = db.execute(f"select status {active} not in {child}").fetchall()
        children = db.execute(
            f"select t.value, r.status from tags t join (select run_uuid, status {active} in {child}) r using (run_uuid) "
            "where t.key = 'nas.key' order by 1"
        ).fetchall()
        points = db.execute(f"select key, step, value from metrics where run_uuid in (select run_uuid {active} not in {child})")
        rows = points.fetchall()
    counts = Counter((key, step) for key, step, _ in rows)
    series = sorted(row for row in rows if row[0] == "hypervolume")  # losses are reported by the clock
    double = [point for point, count in counts.items() if count > 1]
    return {"parents": parents, "children": children, "series": series, "double": double}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Which parts of two outcomes differ, in a line each."""
    wrong = [f"{key}: {str(found[key])[:120]} ≠ {str(expected[key])[:120]}" for key in expected if found[key] != expected[key]]
    hashes = Counter(entry["hash"] for entry in found["journal"])
    return wrong + [f"{name} was evaluated {count} times" for name, count in hashes.items() if count > 1]


def stage(run: Path) -> str:
    """How far a run has come, by its files."""
    for name, pattern in (
        ("finished", "front.json"),
        ("publishing", "pictures"),
        ("final trainings", "final/*"),
        ("search", "journal.jsonl"),
        ("evaluator", "*/*"),
        ("beginning", "trial.yaml"),
    ):
        if next(run.glob(pattern), None):
            return name
    return "before"


def kill(folder: Path, kills: int, seed: int = 0, ray_every: int = 6) -> Killed:
    """Kill that many times; every so many searches are on real Ray, killed by the clock alone."""
    chance, done = random.Random(seed), Killed(seed)
    expected = {kind: undisturbed(folder / f"undisturbed-{kind}", kind) for kind in KINDS}
    empty = folder / "undisturbed-predictor" / "runs" / "mlflow.db"
    number = 0
    while done.kills.total() < kills:
        kind, ray = list(KINDS)[number % 3], number % ray_every == ray_every - 1
        place = prepare(folder / f"{number}-{kind}", kind, **({"run": {"workers": 2}} if ray else {}))
        if number >= len(KINDS):  # a database that is there already, with another search in it; the first three make theirs
            shutil.copytree(empty.parent, place / "runs", ignore=shutil.ignore_patterns("predictor", "mlartifacts"))
            with closing(sqlite3.connect(place / "runs" / "mlflow.db")) as db:
                db.execute("update runs set lifecycle_stage = 'deleted'")
                db.commit()
        run = place / "runs" / kind
        for _ in range(min(LIVES, kills - done.kills.total())):
            if stage(run) != "finished":
                _one_life(place, run, expected[kind][1], chance, ray, done)
        driver = Driver(_words(run), place, ray)
        code, what = driver.wait(), f"search {number} ({kind}{', Ray' if ray else ''})"
        if code != 0:
            done.wrong.append(f"{what}: exit {code}: {driver.log.read_text()[-300:]}")
        else:
            done.wrong += [f"{what}: {line}" for line in differences(outcome(run), expected[kind][0])]
            shutil.rmtree(place)
        done.searches[f"{kind}{' on Ray' if ray else ''}"] += 1
        number += 1
    return done


def _words(run: Path) -> list[str]:
    return ["resume", run.name] if (run / "trial.yaml").is_file() else ["search", "trial.yaml", "--overwrite"]


def _one_life(place: Path, run: Path, writes: int, chance: random.Random, ray: bool, done: Killed) -> None:
    """Begin or go on, and be killed: before a write, or at a moment."""
    by_clock = ray or chance.random() < 0.4
    before = 0 if by_clock else 1 + int(writes * chance.random() ** 2)  # of the last writes many are to MLflow
    driver, family = Driver(_words(run), place, ray, before), set[psutil.Process]()
    if by_clock and driver.wait(chance.uniform(0.0, 60.0 if ray else 8.0)) is None:
        family = {process for process, name in driver.family().items() if "Agent" not in name}  # Ray's own look once a minute
        driver.signal(signal.SIGKILL)
    code, killed = driver.wait(), time.monotonic()
    if code != -signal.SIGKILL:
        if code != 0:
            done.wrong.append(f"{place.name}: exit {code}: {driver.log.read_text()[-300:]}")
        return
    done.kills[stage(run)] += 1
    if not wait_for(
        lambda: not any(map(is_alive, family | {p for p, name in driver.family().items() if "Agent" not in name})), seconds=120
    ):
        left = [process for process in family if is_alive(process)]
        done.wrong.append(f"{place.name}: left after a kill: {[process.name() for process in left]}")
        for process in left:
            process.kill()
    done.slowest = max(done.slowest, time.monotonic() - killed)
