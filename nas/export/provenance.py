"""Where a folder comes from, for programs: the search it was found by, and where MLflow has it.

Owns `provenance.json`. What a person reads of it is the card's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ..config import Document, Strict, build
from ..errors import UserError

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Provenance(Strict):
    """A search's run and trial by name, and in MLflow its experiment, parent run and address, and the model's own run; empty if
    they are not there."""

    run: str
    trial: str
    experiment: str = ""
    run_id: str = ""
    tracking_uri: str = ""
    model_run_id: str = ""

    @property
    def server(self) -> str:
        """MLflow's address without a password, if it is one that other people can reach; else empty."""
        return _without_password(self.tracking_uri) if self.tracking_uri.startswith(("http:", "https:")) else ""

    def save(self, folder: Path) -> None:
        """Write it into a folder that goes to other people: an address loses its user and password."""
        data = asdict(self) | {"tracking_uri": _without_password(self.tracking_uri)}
        (folder / PROVENANCE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Provenance | None:
        """What a folder says, None if it says nothing. Raises UserError."""
        path = folder / PROVENANCE
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"is not JSON ({error})", where=str(path), hint="delete it, or export the model again") from None
        return build(Provenance, Document(data, str(path)))


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri
