"""What is to be written to MLflow, on disk: one line of JSON for each entry, in the order of events.

Owns the file `tracking.jsonl` in a run's folder. An entry is plain data with everything that its writing needs, times included,
so that it can be written at any later moment. How far the entries are written is in the folder's `Link`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

OUTBOX_FILE = "tracking.jsonl"

Entry = dict[str, Any]


class Outbox:
    """The entries of one run. One process appends to it; any may read it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / OUTBOX_FILE
        self._lock = threading.Lock()

    def append(self, op: str, **fields: Any) -> None:
        """Add an entry. It is in the file before this returns."""
        line = json.dumps({"op": op} | fields) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def repair(self) -> None:
        """Cut off a last line that a crash left torn."""
        text = self.path.read_bytes() if self.path.exists() else b""
        if text and not text.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)

    def read(self, offset: int = 0) -> Iterator[tuple[Entry, int]]:
        """The entries behind an offset, each with the offset behind it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield self._entry(line), offset

    def _entry(self, line: bytes) -> Entry:
        """Raises UserError."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or "op" not in entry:
            raise UserError("a line is no entry", where=str(self.path), hint="delete that line, or copy the run again")
        return entry

    def last_steps(self) -> dict[str, int]:
        """The last step of each series."""
        found: dict[str, int] = {}
        for entry, _ in self.read():
            if entry["op"] == "point":
                found[entry["name"]] = max(entry["step"], found.get(entry["name"], -1))
        return found
