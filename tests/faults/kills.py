"""Searches whose driver is killed at random moments: resumed, they give what an undisturbed one gives, to the last digit.

Owns what is compared: front, journal, weights, and the runs in MLflow.
"""

import hashlib
import json
import math
import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from nas.search.run import Run
from tests.faults.processes import Driver, Found, is_alive, listed, wait_for
from tests.searches import FROM, PREDICTOR, SUPERNET, write_trial

KINDS: dict[str, dict[str, Any]] = {"predictor": PREDICTOR, "supernet": SUPERNET, "from": FROM}
LIVES = 5
"""The most kills of one search."""
WRITES = 600
"""About as many as a search does. The last are to MLflow: most kills come earlier."""


def prepare(folder: Path, kind: str, **changes: Any) -> Path:
    """A folder with a tracked trial of a kind."""
    folder.mkdir(parents=True)
    write_trial(folder, KINDS[kind] | {"name": kind, "tracking": {}}, **changes)
    return folder


def undisturbed(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """What a search gives that nothing disturbs."""
    driver = Driver(["search", "trial.yaml"], prepare(folder, kind, **changes))
    assert driver.wait() == 0, driver.failure()
    return outcome(folder / "runs" / kind)


def outcome(run: Path, database: Path | None = None) -> dict[str, Any]:
    """All of a finished run that does not depend on the clock."""
    front, journal = json.loads((run / "front.json").read_text()), list(Run(run).journal().read())
    for row in (*front["front"], *front["dominated"], *journal):
        del row["seconds"]
    journal.sort(key=lambda row: (row["number"], row["hash"]))
    files = sorted(path for part in ("final", "predictor", "converted") for path in run.glob(f"{part}/**/model.safetensors"))
    weights = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"journal": journal, "front": front, "weights": weights} | tracked(database or run.parent / "mlflow.db", run.name)


def tracked(database: Path, name: str) -> dict[str, Any]:
    """What MLflow has of a search: its runs' states, their children's, the points, and those that are there twice."""
    own = f"select run_uuid from runs where lifecycle_stage = 'active' and name = '{name}'"
    child = f"select run_uuid from tags where key = 'mlflow.parentRunId' and value in ({own})"
    with closing(sqlite3.connect(database)) as db:
        parents = db.execute(f"select status from runs where run_uuid in ({own})").fetchall()
        children = db.execute(
            "select value, status from tags join runs using (run_uuid) where key = 'nas.key' and lifecycle_stage = 'active' "
            f"and run_uuid in ({child}) order by 1"
        ).fetchall()
        points = db.execute(f"select key, step, value from metrics where run_uuid in ({own}) order by 1, 2").fetchall()
    series = [point for point in points if point[0] == "hypervolume"]  # losses are reported by the clock
    double = [place for place, count in Counter(point[:2] for point in points).items() if count > 1]
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


def kill(folder: Path, kills: int, seed: int = 0, ray_every: int = 4, seconds: float = math.inf) -> Found:
    """Kill that many times, or as often as some seconds are enough for, searches of one folder of runs.

    Every so many are on real Ray, killed by the clock alone.
    """
    chance, killed, searches, wrong, slowest = random.Random(seed), Counter[str](), Counter[str](), list[str](), 0.0
    told, slowest_told = Counter[str](), 0.0
    expected = {kind: undisturbed(folder / f"undisturbed-{kind}", kind) for kind in KINDS}
    end = time.monotonic() + seconds
    while killed.total() < kills and time.monotonic() < end:
        number = searches.total()
        kind, ray = list(KINDS)[number % 3], number % ray_every == ray_every - 1
        place = prepare(folder / f"{number}-{kind}", kind, **({"run": {"workers": 2}} if ray else {}))
        run, what = folder / "runs" / f"{number}-{kind}", kind + " on Ray" * ray
        for _ in range(min(LIVES, kills - killed.total())):
            life = _one_life(place, run, chance, ray)
            slowest = max(slowest, life.seconds_left)
            killed[stage(run)] += life.driver.code != 0
            if life.driver.code == 0:
                break
            if life.signal != signal.SIGKILL:
                told[life.signal.name] += 1
                slowest_told = max(slowest_told, life.seconds)
            wrong += [f"{number}: {what}: {line}" for line in life.wrong()]
        driver = Driver(_words(run), place)
        found = differences(outcome(run), expected[kind]) if driver.wait() == 0 else [driver.failure()]
        wrong += [f"{number}: {what}: {line}" for line in found]
        searches[what] += 1
    if slowest > 60:
        wrong.append(f"a process was left for {slowest:.0f} s")
    if slowest_told > 10:
        wrong.append(f"a driver that was told to end did so in {slowest_told:.0f} s")
    tried = (
        f"{killed.total()} kills of the driver in {searches.total()} searches (seed {seed}): {listed(searches)}; killed in: "
        f"{listed(+killed)}. Of them {listed(told) or 'none'} were signals of another kind than SIGKILL, "
        f"after which the driver ended in one line within {slowest_told:.1f} s."
    )
    return Found(f"{tried} No process was left {slowest:.1f} s after a kill, at the latest.", wrong)


def _words(run: Path) -> list[str]:
    begun = (run / "trial.yaml").is_file()
    words = ["resume", run.name] if begun else ["search", "trial.yaml", "--overwrite", "--name", run.name]
    return [*words, "--runs", str(run.parent)]


class Life(NamedTuple):
    """How a driver was ended, in how many seconds, and in how many more all that it had begun was gone."""

    driver: Driver
    signal: signal.Signals
    seconds: float
    seconds_left: float

    def wrong(self) -> list[str]:
        """SIGKILL has no words; the others are one line and their exit code."""
        if self.signal == signal.SIGKILL:
            return [] if self.driver.code == -self.signal else [self.driver.failure()]
        said = self.driver.log.read_text().splitlines()
        traceback = any("Traceback" in line for line in said)
        right = self.driver.code == 128 + self.signal and "nas resume" in said[-1] and not traceback
        return [] if right else [f"{self.signal.name}: {self.driver.failure()}"]


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def _one_life(place: Path, run: Path, chance: random.Random, ray: bool) -> Life:
    """Begin or go on, and be ended, by SIGKILL before a write or by a signal at a moment."""
    by_clock, family, which, told = ray or chance.random() < 0.4, set[psutil.Process](), signal.SIGKILL, time.monotonic()
    driver = Driver(_words(run), place, 0 if by_clock else 1 + int(WRITES * chance.random() ** 2))
    if by_clock:
        which, seconds = chance.choice(SIGNALS), chance.uniform(0.0, 60.0 if ray else 8.0)
        if which != signal.SIGKILL:  # its handler is the first that a command sets up, and the text the first that is said
            wait_for(lambda: driver.log.exists() and driver.log.stat().st_size, lambda: driver.code is None)
        if driver.wait(seconds) is None:
            family = {process for process, name in driver.family().items() if "Agent" not in name}  # Ray's own look once a minute
            told = time.monotonic()
            driver.signal(which)
    driver.wait()
    ended = time.monotonic()
    wait_for(lambda: not any(map(is_alive, family)), seconds=120)
    for process in filter(is_alive, family):
        process.kill()
    return Life(driver, which, ended - told, time.monotonic() - ended)
