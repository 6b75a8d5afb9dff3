"""The command `check`: what kind of file each is, and whether it is right.

Owns the kinds of files, told by their keys. A new kind is a row of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click

from ..config import Document, build, read_yaml
from ..errors import UserError
from ..sharing.label import label
from ..sharing.memory import MemorySpec
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from .sharing import shape_in
from .show import Terminal, json_option, print_json, set_option


class _Request(NamedTuple):
    """A file that was read, and the model file that it is checked for."""

    document: Document
    path: Path
    model: str | None
    settings: tuple[str, ...] = ()


class _Kind(NamedTuple):
    """A kind of file: the keys that tell it from the kinds after it, and what a right one says; `says` raises UserError."""

    name: str
    keys: frozenset[str]
    says: Callable[[_Request], str]


def _trial(asked: _Request) -> str:
    from ..search.launch import check_unread
    from ..search.trial import Trial, read_trial
    from ..search.trial_file import TrialFile

    document = read_trial(asked.path, asked.settings)
    if keys := document.missing():
        build(TrialFile, document)
        return f"for you to give: {' '.join(f'--set {key}=VALUE' for key in keys)}"
    trial = Trial.load(asked.path, settings=asked.settings)
    check_unread(trial)
    return f"{trial.file.search.evaluations} evaluations, {trial.search_summary}"


def _comparison(asked: _Request) -> str:
    from ..search.compare import read_compare

    file, configs = read_compare(asked.path)
    return f"{len(configs)} configs at {len(file.learning_rates)} learning rates, {file.train.steps} steps"


def _space(asked: _Request) -> str:
    """What a space can reach; of one that names no model, with that of `--model`."""
    space = SearchSpace.from_document(asked.document, shape_in(asked.model))
    reach = space.size(MemorySpec())
    space.require_reachable(reach)
    open_to_any = f"of any model; with {space.shape.words}, "
    return open_to_any * ("model" not in asked.document.data) + reach.summary()


def _model(asked: _Request) -> str:
    return shape_in(str(asked.path)).words


def _sharing(asked: _Request) -> str:
    if asked.model is None:
        raise UserError("a sharing file is right only for a model", where=str(asked.path), hint="add --model M.yaml")
    config = SharingConfig.load(shape_in(asked.model), asked.path)
    return f"{label(config)} ({config.hash})"


KINDS = (
    _Kind("trial", frozenset({"space"}), _trial),
    _Kind("trial", frozenset({"supernet"}), _trial),
    _Kind("comparison", frozenset({"learning_rates"}), _comparison),
    _Kind("search space", frozenset({"choices"}), _space),
    _Kind("model", frozenset({"hidden_size"}), _model),
    _Kind("sharing config", frozenset({"num_hidden_layers"}), _sharing),
)
"""The first whose keys a file has is what it is."""


def _kind_of(asked: _Request) -> _Kind:
    """Raises UserError for a file of no kind."""
    keys = set(asked.document.data) if isinstance(asked.document.data, dict) else set()
    for kind in KINDS:
        if kind.keys <= keys:
            return kind
    told = {kind.name: " and ".join(f"{key}:" for key in sorted(kind.keys)) for kind in reversed(KINDS)}
    every = ", ".join(f"a {name} ({keys})" for name, keys in reversed(told.items()))
    raise UserError("of no kind that is known by its keys", where=str(asked.path), hint=f"write {every}")


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--model", "model_path", metavar="M.yaml", help="The model that sharing files, and spaces that name none, are checked for."
)
@click.option("--plan", is_flag=True, help="Of trials: what each stage of the search will take, timed on its workers.")
@set_option
@json_option
def check(files: tuple[str, ...], model_path: str | None, plan: bool, settings: tuple[str, ...], as_json: bool) -> None:
    """Say whether FILES are right, or why not: trials, spaces, comparisons, models, sharing."""
    rows: list[dict[str, Any]] = []
    for file in files:
        asked = _Request(read_yaml(Path(file)), Path(file), model_path, settings)
        kind = _kind_of(asked)
        if kind.name != "trial" and (settings or plan):
            option = "--set" if settings else "--plan"
            raise UserError(f"is a {kind.name}, and {option} is for trials", where=file, hint="leave it out")
        rows.append({"file": file, "kind": kind.name, "says": kind.says(asked)})
        if plan and kind.name == "trial":
            from ..search.launch import planned
            from ..search.trial import Trial

            with planned(Trial.load(asked.path, settings=settings), Terminal()) as ready:
                rows[-1]["plan"] = list(map(asdict, ready.budget))
    if as_json:
        return print_json(rows)
    for row in rows:
        click.echo(f"{row['file']}: a {row['kind']}: {row['says']}")
