"""The commands about a search: `new`, `search`, `resume`, `extend`, `front`, `ui`, `sync`, `report`, and `compare`.

Owns where the shipped trials and spaces lie: beside the code in a wheel, at the root of a checkout.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UserError, did_you_mean
from ..files import require_no_links
from ..sharing.label import READING, label
from ..sharing.memory import MemorySpec
from ..sharing.objectives import OBJECTIVES
from ..sharing.shape import DTYPE_BYTES
from .show import Terminal, json_option, print_json, print_view, runs_option, set_option

if TYPE_CHECKING:
    from ..search.front import Front
    from ..search.fronts import Fronts
    from ..search.run import Run


tracking_option = click.option(
    "--tracking", metavar="URI", help="MLflow's address, if it is neither MLFLOW_TRACKING_URI nor beside the run."
)
"""Of commands on a run's folder, which does not choose an address: it may be a stranger's."""


workers_option = click.option(
    "--workers", type=click.IntRange(0), help="Processes at work at once, in place of the trial's; 0: in this one, no Ray."
)
address_option = click.option(
    "--address", help="A Ray cluster to join, in place of the one it began on; `local`: one that is started here."
)


@click.command()
@click.argument("trial", type=click.Path(path_type=Path), metavar="TRIAL.yaml")
@click.option("--name", help="The run's name; by default the trial's.")
@click.option("--address", help="A Ray cluster to join (host:6379, or auto); by default a local one is started.")
@workers_option
@click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
@click.option("--dry-run", "dry", is_flag=True, help="Stop after the plan: nothing is trained or written.")
@set_option
@runs_option
@json_option
def search(trial: Path, as_json: bool, runs: str, dry: bool, **said: Any) -> None:
    """Search, train the best, and print their front.

    Everything is checked before anything is trained, and a plan is printed: what the space can reach, and what each stage will
    take of tokens, operations, memory, disk and time. Stop it when you like: `nas resume` goes on.
    """
    from ..search.launch import Launch, dry_run, start

    if dry:
        found = dry_run(Launch(trial, Path(runs), **said), Terminal())
        return print_json(list(map(asdict, found))) if as_json else None
    run, front = start(Launch(trial, Path(runs), **said), Terminal())
    _show(run, front, as_json)


@click.command()
@click.argument("run")
@address_option
@workers_option
@tracking_option
@runs_option
@json_option
def resume(run: str, runs: str, as_json: bool, **said: Any) -> None:
    """Go on with RUN after a crash, a kill or a power cut: nothing lost, nothing done twice."""
    from ..search.launch import resume as go_on
    from ..search.run import Run

    found = Run.find(run, Path(runs))
    _show(found, go_on(found, Terminal(), **said), as_json)


@click.command()
@click.argument("run")
@click.option("--evaluations", metavar="+N", help="Evaluations more; without +, the number in all.")
@click.option("--candidates", metavar="+N", help="Candidates more; without +, the number in all.")
@address_option
@workers_option
@tracking_option
@runs_option
@json_option
def extend(run: str, runs: str, as_json: bool, **said: Any) -> None:
    """Go on with RUN, finished or stopped, to more evaluations and candidates, from all that was measured.

    Candidates are chosen anew, and only those that are not trained yet are trained; models of before stay. Stop it when you like:
    `nas resume` goes on.
    """
    from ..search.launch import extend as go_on
    from ..search.run import Run

    found = Run.find(run, Path(runs))
    _show(found, go_on(found, Terminal(), **said), as_json)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN…")
@click.option("--pick", help="One model only: knee, 'memory_bytes<=300MiB', and whatever else `nas export` takes.")
@click.option("--limit", "limits", multiple=True, metavar="memory_bytes=120MiB", help="The best config within another limit.")
@click.option("--context", type=click.IntRange(1), help="Cached tokens of a sequence, in place of the trial's.")
@click.option("--batch", type=click.IntRange(1), help="Sequences, in place of the trial's.")
@click.option("--dtype", type=click.Choice(list(DTYPE_BYTES)), help="Of weights and cache, in place of the trial's.")
@runs_option
@json_option
def front(names: tuple[str, ...], pick: str | None, limits: tuple[str, ...], runs: str, as_json: bool, **memory: Any) -> None:
    """The front of RUN as a table: its objectives, and the presets beside it. Of several runs, the front of all their models.

    With --context, --batch or --dtype, the front of the same models with their memory at that: nothing is trained or measured.

    With --limit, the config within it that has the least loss in the search, or should have it by all that was evaluated.
    """
    from ..search.fronts import Fronts, front_at
    from ..search.run import Run

    found, given = [Run.find(name, Path(runs)) for name in names], {k: v for k, v in memory.items() if v is not None}
    if limits and (pick or given or len(found) > 1):
        hint = "use --pick 'memory_bytes<=120MiB' with several runs"
        raise UserError("asks what one run's search evaluated, and takes no other option", where="--limit", hint=hint)
    if limits:
        return _show_within(found[0], limits, as_json)
    fronts = Fronts.of(found, given) if len(found) > 1 else None
    one, spec = (fronts.front, None) if fronts else front_at(found[0], given)
    if pick:
        return _show_pick(fronts.runs if fronts else {"": found[0]}, one, pick, as_json)
    if fronts is None:
        return _show(found[0], one, as_json, spec if given else None)
    _show_fronts(fronts, as_json)


def _show_pick(runs: dict[str, Run], front: Front, pick: str, as_json: bool) -> None:
    """A model of a run, or of the one among several that it says it is of."""
    from ..report.tables import front_table, terminal_table

    evaluation = front.pick(pick)
    run = runs[evaluation.run]
    if as_json:
        return print_json({"run": run.name} | evaluation.to_data())
    rows = dict(zip((m.first.config.hash + m.first.run for m in front.configs), front_table(front.evaluations), strict=True))
    row = rows[evaluation.config.hash + evaluation.run]
    following = f"next    nas export {run.argument} --pick {evaluation.config.hash} --to DIR"
    print_view(terminal_table([row], f"{pick}: {front.kind}"), following)


def _show_fronts(fronts: Fronts, as_json: bool) -> None:
    if as_json:
        return print_json(fronts.to_data())
    from ..report.tables import CERTAINTY, front_table, terminal_table
    from ..report.write import HYPERVOLUMES

    found = fronts.front
    title = f"{len(fronts.runs)} runs: the {found.kind} models that no other dominates, by {found.order}"
    note = " ".join((READING, *([CERTAINTY] if found.panel.is_paired else [])))
    print_view(terminal_table(front_table(found.evaluations, keep="front"), title, note))
    names = " ".join(run.argument for run in fronts.runs.values())
    following = f"next    nas report {names} · nas export RUN --pick NAME --to DIR"
    lines = (_text_line(found), f"memory  at {fronts.memory.words}, {fronts.memory.dtype}", following)
    print_view(terminal_table(fronts.table(), "", HYPERVOLUMES), *found.panel.noise(), *lines)


def _show_within(run: Run, limits: tuple[str, ...], as_json: bool) -> None:
    from ..search.fronts import best_within, parse_limit

    answer = best_within(run, dict(map(parse_limit, limits)))
    path = run.write(f"within/{answer.config.hash}.yaml", answer.config.to_yaml())
    if as_json:
        return print_json(answer.to_data() | {"sharing": str(path)})
    loss = f"{answer.loss_nats_per_token:.3f}" + ("" if answer.evaluated else f" ± {answer.error:.3f}")
    click.echo(f"config  {label(answer.config)}: {path}")
    click.echo("memory  " + ", ".join(f"{name} {OBJECTIVES[name].show(value)}" for name, value in answer.values.items()))
    click.echo(f"loss    {loss} nats a token in the search, {'evaluated there' if answer.evaluated else 'expected'}")


def _show(run: Run, front: Front, as_json: bool, elsewhere: MemorySpec | None = None) -> None:
    """A run's front, as it was searched, or with its memory elsewhere."""
    if as_json:
        head = {"run": run.name, "folder": str(run.folder)} | ({"memory": asdict(elsewhere)} if elsewhere else {})
        return print_json(head | front.to_data())
    from ..report.tables import CERTAINTY, front_table, terminal_table

    title = f"{run.name}: every {front.kind} model, by {front.order}{_begun(run)}"
    note = " ".join((READING, *([CERTAINTY] if front.panel.is_paired else [])))
    table = terminal_table(front_table(front.evaluations), title, note)
    files = [f"figure  {run.folder / 'front.png'}", f"page    {run.folder / 'front.html'}"]
    for other in run.trial().file.other_memory:
        files.append(f"also    nas front {run.argument} --context {other.context} --batch {other.batch}")
    if elsewhere:
        files = [f"memory  at {elsewhere.words}, {elsewhere.dtype}"]
    text, following = _text_line(front), f"next    nas export {run.argument} --pick knee --to DIR · nas ui {run.argument}"
    print_view(table, *front.panel.noise(), text, *files, following)


def _text_line(front: Front) -> str:
    """Which text the figures are of."""
    from ..report.measured import CHOSEN_BY_VALIDATION

    panel = front.panel
    return f"text    perplexity is of the {panel.text}{f'; {CHOSEN_BY_VALIDATION}' * panel.chosen_by_validation}"


def _begun(run: Run) -> str:
    """The checkpoint that a run is from, in a few words."""
    made = run.provenance()
    return f"; from {made['from']}, whose perplexity is {made['from_perplexity']:.4g}" if "from" in made else ""


@click.command()
@click.argument("run")
@tracking_option
@runs_option
def sync(run: str, tracking: str | None, runs: str) -> None:
    """Write to MLflow what it has not taken yet of RUN, or of a training's folder of checkpoints.

    The folder does not choose the address: it may be a stranger's.
    """
    from ..search.run import Run
    from ..tracking import sync as write
    from ..tracking import tracked

    folder = Path(run) if tracked(Path(run)) else Run.find(run, Path(runs)).folder
    require_no_links(folder)
    click.echo(f"{write(folder, tracking)} entries written")


@click.command()
@click.argument("run")
@click.option("--port", default=0, help="0 takes a free one.")
@tracking_option
@runs_option
def ui(run: str, port: int, tracking: str | None, runs: str) -> None:
    """Open MLflow's UI on RUN's own view; Ctrl-C ends it."""
    from ..search.run import Run
    from ..tracking import ui as opened
    from ..tracking import wait

    with opened(Run.find(run, Path(runs)).folder, port, tracking) as url:
        click.echo(url)
        wait()


@click.command()
@click.argument("run")
@click.option("--port", default=0, help="0 takes a free one.")
@runs_option
def dashboard(run: str, port: int, runs: str) -> None:
    """Open optuna-dashboard on RUN's search; it follows one that is at work. Ctrl-C ends it."""
    from ..search.dashboard import dashboard as opened
    from ..search.run import Run
    from ..tracking import wait

    with opened(Run.find(run, Path(runs)), port) as url:
        click.echo(url)
        wait()


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN…")
@click.option(
    "--to", "directory", default="reports", show_default=True, type=click.Path(path_type=Path), help="The folder to write into."
)
@runs_option
def report(names: tuple[str, ...], directory: Path, runs: str) -> None:
    """Write RUN's table and figure, with where they come from, into reports/; of several runs, all fronts on one page."""
    from ..search.fronts import Fronts
    from ..search.publish import write_run_report
    from ..search.run import Run

    found = [Run.find(name, Path(runs)) for name in names]
    click.echo(Fronts.of(found).write_report(directory) if len(found) > 1 else write_run_report(found[0], directory))


COLUMNS = ("name", "weights", "cache", "memory", "perplexity", "vs dense", "front", "rate")
"""What of the page's table a terminal has room for."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.yaml")
@click.option("--to", type=click.Path(path_type=Path), help="Also write the page, its table and its figure into this folder.")
@click.option("--name", help="The comparison's name; by default the file's.")
@click.option("--address", help="A Ray cluster to join (host:6379, or auto); by default a local one is started.")
@click.option("--workers", type=click.IntRange(1), help="Processes at work at once, in place of the file's.")
@click.option("--overwrite", is_flag=True, help="Replace a comparison of the same name.")
@runs_option
@json_option
def compare(file: Path, to: Path | None, as_json: bool, runs: str, **said: Any) -> None:
    """Train the published schemes alone, on equal terms, and print how they compare.

    Each is trained at every learning rate of FILE and shown at its best. Stop it when you like: the same command goes on.
    """
    from ..search.compare import compare as carry_out
    from ..search.launch import Launch

    run, comparison = carry_out(Launch(file, Path(runs), **said), Terminal(), to)
    if as_json:
        rows = [row.to_data() for row in comparison.rows]
        return print_json({"run": run.name, "folder": str(run.folder), "rows": rows, "failed": dict(comparison.failed)})
    from ..report.compare import FIGURE, PAGE, compared_table
    from ..report.tables import terminal_table

    rows = [{name: row[name] for name in COLUMNS} for row in compared_table(comparison.rows)]
    folder = to or run.folder
    print_view(terminal_table(rows, comparison.title), f"page    {folder / PAGE}", f"figure  {folder / FIGURE}")


PACKAGE = Path(__file__).parents[1]


def shipped_trials() -> dict[str, Path]:
    """Name and file of every trial that comes with this package and names a search space."""
    found = (PACKAGE / "shipped" / "trials", PACKAGE.parent / "trials")
    folder = next(path for path in found if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if _space_of(path.read_text(encoding="utf-8"))}


def _space_of(trial: str) -> str | None:
    found = re.search(r"^space: *(\S+)", trial, re.MULTILINE)
    return found.group(1) if found else None


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--example", default="quickstart", show_default=True, help="The shipped trial to copy; `list` names them.")
def new(directory: Path, example: str) -> None:
    """Write a search space and a trial into DIR, to be edited and launched with `nas search`."""
    trials = shipped_trials()
    if example == "list":
        return click.echo("\n".join(trials))
    if example not in trials:
        raise UserError(f"no shipped trial is called {example}", where="--example", hint=did_you_mean(example, trials))
    text = trials[example].read_text(encoding="utf-8")
    space = str(_space_of(text))
    files = {
        directory / "space.yaml": (trials[example].parent / space).read_text(encoding="utf-8"),
        directory / "trial.yaml": text.replace(f"space: {space}", "space: space.yaml", 1),
    }
    for path in files:
        if path.exists():
            raise UserError("exists already", where=str(path), hint="give an empty or a new folder")
    directory.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
        click.echo(path)
    click.echo(f"next    nas check {directory / 'trial.yaml'} · nas search {directory / 'trial.yaml'}")
