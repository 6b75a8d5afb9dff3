"""Compare a search's front with everybody else's, and write the page: `python -m reports.contest`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from nas.cli import main
from nas.workers import executor

from ..grid import Request, program
from .benchmark import load
from .leaderboard import FIGURE, TITLE, draw, page

HERE = Path(__file__).parent


@program(HERE / "contest.yaml")
def contest(asked: Request) -> str:
    """Compare a search's front with published schemes, random configs and smaller dense models, all trained alike.

    Stop it when you like: the same command goes on from the table.
    """
    benchmark = load(asked.path, asked)
    with executor(benchmark.file.run) if asked.train else nullcontext():  # one for all
        leaderboards = benchmark.run(asked)
    draw(leaderboards, asked.to / FIGURE)
    return str(asked.write_page(TITLE, "contest", page(leaderboards)))


if __name__ == "__main__":
    main(contest)
