"""Tables of plain rows on disk: dataclasses of numbers and words as CSV, written whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError

Row = TypeVar("Row")
KINDS: dict[str, Any] = {"int": int, "float": float, "str": str}


def read_rows(path: Path, kind: type[Row], hint: str) -> list[Row]:
    """The rows of a table; none if there is none. Raises UserError, with a hint, for a table of anything else."""
    if not path.exists():
        return []
    columns = {f.name: KINDS[str(f.type)] for f in fields(kind)}  # type: ignore[arg-type]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise UserError(f"is no table of {', '.join(columns)}", where=str(path), hint=hint)
        return [kind(**{name: read(row[name]) for name, read in columns.items()}) for row in reader]


def write_rows(path: Path, rows: Sequence[Any], kind: type) -> None:
    """Write a table in the order given."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(kind)])
        writer.writerows(map(astuple, rows))
    part.replace(path)
