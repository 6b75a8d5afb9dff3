"""The commands about what a ranking and a search are worth: `truth`, `rank`, `samplers`, `contest`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from .show import Terminal, json_option, print_json, print_view, runs_option

Command = TypeVar("Command", bound=Callable[..., Any])


def _places(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=PATH`, each."""
    pairs = [text.partition("=") for text in given]
    wrong = next((text for text, pair in zip(given, pairs, strict=True) if not (pair[0] and pair[2])), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} is not NAME=PATH")
    return {name: path for name, _, path in pairs}


def _texts(command: Command) -> Command:
    """The options that say which of a file's texts, and where they lie."""
    only = click.option("--only", multiple=True, help="Of the file's texts, this one; may be given again.")
    where = click.option(
        "--text", "places", multiple=True, callback=_places, metavar="NAME=PATH", help="Where a text (and its eval_text) lies."
    )
    return only(where(command))


_truth = click.option("--truth", "folder", required=True, type=click.Path(path_type=Path), help="The folder of `nas truth`.")


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.yaml")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The folder of the table, which is gone on with.")
@_texts
@click.option("--workers", type=click.IntRange(1), help="Processes at work at once, in place of the file's.")
@click.option("--address", help="A Ray cluster to join (host:6379, or auto); by default a local one is started.")
@runs_option
@json_option
def truth(
    file: Path,
    to: Path,
    only: tuple[str, ...],
    places: dict[str, str],
    workers: int | None,
    address: str | None,
    runs: str,
    as_json: bool,
) -> None:
    """Train a sample of a small space's configs alone, with several seeds: the truth that rankings are measured by.

    Stop it when you like: the same command goes on from the table.
    """
    from ..rank.spec import TruthPlan
    from ..rank.truth import TRUTH, entries, make_truth

    plan = TruthPlan.load(file, only, places).at(workers, address)
    rows = make_truth(plan, to, Path(runs) / plan.file.name, Terminal())
    done = len({row.training for row in rows})
    if as_json:
        return print_json({"table": str(to / TRUTH), "trainings": done, "rows": len(rows)})
    click.echo(f"{to / TRUTH}: {done} trainings known, {len(list(entries(plan)))} of them of these texts asked for")


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.yaml")
@_truth
@click.option("--to", type=click.Path(path_type=Path), help="Write the page into this file.")
@click.option("--train/--no-train", default=True, show_default=True, help="Train what has not been trained; or score what has.")
@_texts
@runs_option
@json_option
def rank(
    file: Path,
    folder: Path,
    to: Path | None,
    train: bool,
    only: tuple[str, ...],
    places: dict[str, str],
    runs: str,
    as_json: bool,
) -> None:
    """Score estimators of a config's loss on a ground truth: byte counts, short trainings, predictors, supernets.

    Supernets are trained with the tokens that FILE allows; what they say is kept beside the truth. Stop it when you like: the
    same command goes on.
    """
    from ..rank.carry import carry_out
    from ..rank.page import page, score_rows
    from ..report.tables import terminal_table

    sections, truth_tokens = carry_out(file, folder, Path(runs), only, places, Terminal() if train else None)
    if to:
        words = "".join(f" --only {name}" for name in only) + " --no-train" * (not train)
        command = f"nas rank {file} --truth {folder} --to {to}{words}"
        to.write_text(page(command, sections, truth_tokens), encoding="utf-8")
    if as_json:
        return print_json([{"text": s.known.text} | score.to_data() for s in sections for score in s.scores])
    for section in sections:
        rows = score_rows(section.scores, truth_tokens)
        spared = ("runs", "regret, 1", "regret, 10", "regret in quartiles, 1", "top 10%")
        print_view(terminal_table(rows, f"{section.known.text}: {len(section.known.hashes)} configs", spared))


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="TRUTH.yaml")
@_truth
@click.option("--to", type=click.Path(path_type=Path), help="Write the page into this file.")
@click.option("--seeds", type=click.IntRange(1), default=20, show_default=True, help="Searches of each kind.")
@click.option("--tying", type=click.IntRange(0), default=0, help="Seeds of Dynamic Layer Tying, which trains; on disk once done.")
@_texts
@runs_option
@json_option
def samplers(
    file: Path,
    folder: Path,
    to: Path | None,
    seeds: int,
    tying: int,
    only: tuple[str, ...],
    places: dict[str, str],
    runs: str,
    as_json: bool,
) -> None:
    """Compare the samplers of `nas search` on a ground truth as a lookup: how good a front, after how many evaluations."""
    from ..rank.carry import read_known
    from ..rank.samplers import KINDS, Lookup, compare_samplers, sampler_rows, samplers_page
    from ..rank.tying import run_tying
    from ..report.tables import terminal_table

    plan, knowns = read_known(file, folder, only, places, bool(tying))
    sections = {}
    for known in knowns:
        lookup, work = Lookup.of(plan, known), Path(runs) / f"{plan.file.name}-tying"
        tied = run_tying(plan, known.text, tying, work, Terminal()) if tying else []
        with Terminal().stage(f"search on {known.text}", seeds * len(KINDS), "searches") as bar:
            found = list(compare_samplers(lookup, seeds, tell=bar.update))
        sections[known.text] = lookup, lookup.surrogate.held_out(), found, tied
    if to:
        words = "".join(f" --only {name}" for name in only)
        command = f"nas samplers {file} --truth {folder} --seeds {seeds} --tying {tying}{words} --to {to}"
        to.write_text(samplers_page(command, sections), encoding="utf-8")
    if as_json:
        return print_json([{"text": text} | asdict(one) for text, (_, _, found, _) in sections.items() for one in found])
    for text, (lookup, _, found, tied) in sections.items():
        spared = ("48 evaluations", "192 evaluations", "5 evaluations", "96 evaluations")
        print_view(terminal_table(sampler_rows(lookup, found, tied), text, spared))


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.yaml")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The folder of the table and the page.")
@_texts
@runs_option
@json_option
def contest(file: Path, to: Path, only: tuple[str, ...], places: dict[str, str], runs: str, as_json: bool) -> None:
    """Hold a search's front against published schemes, random configs and smaller dense models, all trained alike.

    Stop it when you like: the same command goes on from the table.
    """
    from ..rank.contest import Contest, hold
    from ..report.contest import contest_rows, model_rows, write_contest
    from ..report.tables import terminal_table
    from ..workers.cluster import cluster

    held = Contest.load(file, only, places)
    with cluster(held.file.run):
        standings = hold(held, to, Path(runs) / held.file.name, Terminal())
    words = "".join(f" --only {name}" for name in only)
    write_contest(to, f"nas contest {file} --to {to}{words}", standings)
    if as_json:
        return print_json([{"text": s.text} | row for s in standings for row in (*contest_rows(s), *model_rows(s))])
    for standing in standings:
        print_view(terminal_table(contest_rows(standing), standing.text))
