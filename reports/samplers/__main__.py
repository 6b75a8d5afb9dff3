"""Compare samplers on the tabular benchmark, and write the page: `python -m reports.samplers`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from nas.cli import main
from nas.report.tables import Row, markdown_table

from ..grid import Request, program, read_table, write_table
from ..ground_truth.table import read_tables
from ..ground_truth.training import load
from .searches import KINDS, SearchRow, Surrogate, search
from .tying import PRICES, TyingRow, run_tying

HERE = Path(__file__).parent
TABLE, TYING = "samplers.csv", "tying.csv"
EXPLAINED = """Each sampler of `nas search` proposes configs of the benchmark's space, 24 at a time, and is told memory and loss.
The loss is that of a surrogate, a predictor fitted to the benchmark's trainings (as NAS-Bench-301's, 2008.09777), with the
noise of one training. Shown is the hypervolume, by memory and the surrogate's perplexity without the noise, of the front of all
evaluations, as a part of the best that any search here found; ± is the standard deviation over seeds. What the surrogate does
not know of a config, no sampler can show that it finds."""


def sampler_rows(rows: Sequence[SearchRow], tying: TyingRow | None = None) -> list[Row]:
    """One row a sampler and start: the hypervolume after so many evaluations, as a part of the best that any found; and one for
    tying while training, if it was tried, whose every run is a training too."""
    best = max(row.hypervolume for row in rows)
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        by_count = found.setdefault((row.sampler, row.start), {})
        by_count.setdefault(row.evaluations, []).append(row.hypervolume / best)
    table = [
        {"sampler": sampler, "begins with": start} | {f"{count} evaluations": _cell(parts) for count, parts in by_count.items()}
        for (sampler, start), by_count in found.items()
    ]
    if tying:
        cells = dict.fromkeys(list(table[0])[2:], "")
        cells[f"{len(PRICES)} evaluations"] = f"{tying.hypervolume:.1%} ± {tying.hypervolume_deviation:.1%}"
        table.append({"sampler": "Dynamic Layer Tying", "begins with": "all tied"} | cells)
    return table


def _cell(parts: Sequence[float]) -> str:
    return f"{np.mean(parts):.1%} ± {np.std(parts, ddof=1):.1%}" if len(parts) > 1 else f"{parts[0]:.1%}"


def section(surrogate: Surrogate, rows: Sequence[SearchRow], tying: TyingRow | None) -> Iterator[str]:
    """One text's part of the page."""
    held_out = surrogate.held_out()
    yield from ("", f"## {surrogate.table.text}", "")
    yield (
        f"- {len(surrogate.table.hashes)} configs are known; predicted from the others, they are ordered with τ "
        f"{held_out.tau:.2f}, within quartiles of memory {held_out.tau_within:.2f}."
    )
    yield f"- {len({row.seed for row in rows})} seeds; one training's noise is {surrogate.noise:.4f} nats."
    if tying:
        yield (
            f"- Dynamic Layer Tying: {len(PRICES)} prices of memory, {tying.seeds} seeds; {tying.configs} different configs in "
            f"{tying.runs} runs. The models that were tied on the way are {tying.loss_off:+.3f} nats from their configs trained "
            f"alone (deviation {tying.loss_off_deviation:.3f}); the table counts the configs."
        )
    yield from ("", markdown_table(sampler_rows(rows, tying)).rstrip())


def run_searches(surrogate: Surrogate, seeds: int, asked: Request) -> list[SearchRow]:
    """Every sampler from every start with every seed on one text; those in the table are taken as they are."""
    path, text = asked.to / TABLE, surrogate.table.text
    rows = read_table(path, SearchRow)
    done = {(row.text, row.seed, row.sampler, row.start) for row in rows}
    wanted = [(text, seed, *kind) for seed, kind in itertools.product(range(seeds), KINDS)]
    left = [one for one in wanted if one not in done] if asked.train else []
    with asked.progress.stage(f"search on {text}", len(left), "searches") as stage:
        for n, (_, seed, sampler, start) in enumerate(left, 1):
            rows += search(surrogate, sampler, start, seed)
            write_table(path, rows, SearchRow)
            stage.update(n)
    return [row for row in rows if (row.text, row.seed, row.sampler, row.start) in set(wanted)]


@program(
    HERE.parent / "ground_truth" / "ground_truth.yaml",
    click.option("--seeds", type=click.IntRange(1), default=20, show_default=True, help="Searches of each kind."),
    click.option("--tying", type=click.IntRange(0), default=0, help="Seeds of Dynamic Layer Tying, which trains."),
    to=HERE,
)
def samplers(asked: Request, seeds: int, tying: int) -> str:
    """Compare the samplers of `nas search` on a tabular benchmark: how good a front, after how many evaluations."""
    truth = load(asked.path, replace(asked, train=bool(tying)))  # searches need no text
    lines = [EXPLAINED]
    for table in read_tables(asked.path.parent, truth):
        surrogate = Surrogate(truth, table)
        rows = run_searches(surrogate, seeds, asked)
        tied = {row.text: row for row in read_table(asked.to / TYING, TyingRow)}
        if tying:
            tied[table.text] = run_tying(surrogate, max(row.hypervolume for row in rows), tying, asked)
            write_table(asked.to / TYING, tied.values(), TyingRow)
        lines += section(surrogate, rows, tied.get(table.text))
    return str(asked.write_page("Samplers", "samplers", lines))


if __name__ == "__main__":
    main(samplers)
