"""Many faults of every kind; prints what was found and writes it into `reports/faults.md`."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.faults.fuzz import fuzz
from tests.faults.kills import kill
from tests.faults.services import disk_full, server_away, workers_killed

PAGE = Path(__file__).parents[2] / "reports" / "faults.md"


def kills(folder: Path, given: argparse.Namespace) -> list[str]:
    """The driver killed at random moments."""
    done = kill(folder, given.kills, given.seed, given.ray_every)
    return [
        f"{done.kills.total()} SIGKILLs in {done.searches.total()} searches (seed {done.seed}): {_listed(done.searches)}; "
        f"killed in: {_listed(done.kills)}. No process was left {done.slowest:.1f} s after a kill, at the latest.",
        *done.wrong,
    ]


def server(folder: Path, given: argparse.Namespace) -> list[str]:
    """An MLflow server ended, begun again, and hung."""
    return [
        "An MLflow server killed, begun again and halted in a search of 24 evaluations, then `nas sync` twice.",
        *server_away(folder),
    ]


def workers(folder: Path, given: argparse.Namespace) -> list[str]:
    """Ray's workers killed."""
    return ["A Ray worker killed in the evaluations, and one in the trainings.", *workers_killed(folder)]


def disk(folder: Path, given: argparse.Namespace) -> list[str]:
    """A disk that is full."""
    wrong, free = disk_full(folder, given.disks, given.seed)
    return [
        f"{len(free)} searches on a disk of 30 MiB with {', '.join(map(str, sorted(free)))} KiB free (seed {given.seed}).",
        *wrong,
    ]


def files(folder: Path, given: argparse.Namespace) -> list[str]:
    """Broken files."""
    done = fuzz(folder, given.inputs, given.seed, given.seconds)
    kinds = Counter((path, what.partition(" (nas")[2].rstrip(")") or what[:60]) for _, path, _, what in done.wrong)
    first = {}
    for number, path, command, what in done.wrong:
        first.setdefault(
            (path, what.partition(" (nas")[2].rstrip(")") or what[:60]), f"input {number}, `nas {command}`: {what[:200]}"
        )
    return [
        f"{done.codes.total()} broken files (seed {done.seed}): {_listed(done.inputs)}; exit codes: {_listed(done.codes)}.",
        *(f"{path}: {count} times: {first[path, what]}" for (path, what), count in kinds.most_common()),
    ]


def _listed(counts: Mapping[object, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=str))


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[str]]] = {
    part.__name__: part for part in (kills, server, workers, disk, files)
}


def main() -> int:
    """Try the parts that are named, by default all; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Of {', '.join(PARTS)}; by default all.")
    for name, default in (("kills", 60), ("ray-every", 6), ("disks", 8), ("inputs", 10_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="For broken files: then no more of them are tried.")
    given = parser.parse_args()
    found = {}
    for name in given.parts or PARTS:
        folder = Path(tempfile.mkdtemp(prefix=f"nas-faults-{name}-"))
        found[name] = PARTS[name](folder, given)
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.write("\n".join(found[name]) + "\n\n")
        sys.stdout.flush()
    wrong = sum(len(lines) - 1 for lines in found.values())
    text = [
        f"# Faults\n\n{wrong} of what was tried went wrong.\n\n    python -m tests.faults {shlex.join(sys.argv[1:])}".rstrip()
    ]
    for name, (tried, *lines) in found.items():
        text.append(f"## {PARTS[name].__doc__}\n\n{tried} " + ("Nothing was wrong." if not lines else "Wrong:\n"))
        text += ["\n".join(f"- {' '.join(line.split())}" for line in lines)] if lines else []
    PAGE.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
