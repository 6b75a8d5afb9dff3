"""The command `new`: a starter search space and trial, copied out of the installed package.

Owns where the shipped trials and spaces lie: beside the code in a wheel, at the root of a checkout.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from ..errors import UserError, did_you_mean

PACKAGE = Path(__file__).parents[1]


def shipped_trials() -> dict[str, Path]:
    """Name and file of every trial that comes with this package and names a search space."""
    found = (PACKAGE / "shipped" / "trials", PACKAGE.parent / "trials")
    folder = next(path for path in found if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if _space_of(path.read_text(encoding="utf-8"))}


def _space_of(trial: str) -> str | None:
    """The path of the space that a trial's text names."""
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
