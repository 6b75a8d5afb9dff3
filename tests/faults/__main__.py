"""Many faults of every kind; prints what was found and writes it into `reports/faults.md`."""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.fuzz import fuzz
from tests.faults.kills import kill
from tests.faults.processes import Found
from tests.faults.services import SEARCHES, disk_full, head_lost, nodes_apart, nodes_lost, server_away, workers_killed

PAGE = Path(__file__).parents[2] / "reports" / "faults.md"


PARTS: dict[str, tuple[str, Callable[[Path, argparse.Namespace], Found]]] = {
    "kills": (
        "A driver that is killed",
        lambda folder, given: kill(folder, given.kills, given.seed, given.ray_every, given.seconds),
    ),
    "server": ("A server that is away", lambda folder, given: server_away(folder)),
    "workers": ("Workers that are killed", lambda folder, given: workers_killed(folder, given.search or tuple(SEARCHES))),
    "nodes": ("Machines that go away", lambda folder, given: nodes_lost(folder, given.search or tuple(SEARCHES))),
    "apart": ("Machines that share no disk", lambda folder, given: nodes_apart(folder, given.search or tuple(SEARCHES))),
    "head": ("A cluster's head that goes away", lambda folder, given: head_lost(folder)),
    "disk": ("A disk that is full", lambda folder, given: disk_full(folder, given.disks, given.seed)),
    "files": ("Files that are broken", lambda folder, given: fuzz(folder, given.inputs, given.seed, given.seconds)),
}


def main() -> int:
    """Try the parts that are named, by default all; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Of {', '.join(PARTS)}; by default all.")
    for name, default in (("kills", 60), ("ray-every", 4), ("disks", 8), ("inputs", 10_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="For kills, and for broken files: then none is begun."
    )
    parser.add_argument(
        "--search", action="append", choices=SEARCHES, help="For workers, nodes, apart: this one; by default all."
    )
    given = parser.parse_args()
    wrong = 0
    for name in given.parts or PARTS:
        folder = Path(tempfile.mkdtemp(prefix=f"nas-faults-{name}-"))
        title, part = PARTS[name]
        tried, lines = part(folder, given)
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.write("\n".join([tried, *lines]) + "\n\n")
        sys.stdout.flush()
        wrong += len(lines)
        _write(title, tried, lines)
    return int(wrong > 0)


def _write(title: str, tried: str, wrong: Sequence[str]) -> None:
    """Put what was found of a part in its place in the page; other parts stay as they are."""
    head, *old = PAGE.read_text(encoding="utf-8").split("\n## ") if PAGE.exists() else ["# Faults\n"]
    sections = dict(part.split("\n", 1) for part in old)
    command = shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]])
    found = "\n".join(f"- {' '.join(line.split())}" for line in wrong) or "- Nothing was wrong."
    sections[title] = f"\n{tried}\n\n{found}\n\n    {command}\n"
    PAGE.write_text("\n## ".join([head, *(f"{name}\n{text}" for name, text in sections.items())]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
