"""Where a search is tracked: the trial's `tracking:` key, and what a run folder remembers of it.

Owns `TrackingSpec`, what is known of an address, and a folder's two files: its `Link`, and the `Outbox` of what is to be written
to MLflow. An entry is a line of JSON with everything that its writing needs, times included, so that it can be written at any
later moment; how far they are written is in the link. What is written is `nas.tracking.store`'s.

Owns, too, how an SQLite database comes to be. MLflow makes its tables in place, over seconds; a process that is killed meanwhile,
or two processes at once, leave a database that MLflow refuses for ever. So it is made under another name, by one process, and
renamed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from ..config import Document, Ge, Le, Strict, build, read_json
from ..errors import UserError
from ..files import cut_torn_line, locked, write_text

log = logging.getLogger("nas.tracking")

LINK_FILE = "tracking.json"
NOWHERE = "none"  # an address that tracks nothing

SQLITE = "sqlite:///"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"


@dataclass(frozen=True)
class TrackingSpec(Strict):
    """A trial's `tracking:`: MLflow's address and experiment. `uri` defaults to MLFLOW_TRACKING_URI, and that to a database
    beside the run folders; `experiment` to the trial's name."""

    uri: str | None = None
    experiment: str | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.uri is not None:
            _require_address(self.uri, "tracking.uri")

    @staticmethod
    def said(uri: str | None) -> TrackingSpec:
        """Where a person says: an address, `none` for nowhere, or None for the default. Raises UserError."""
        return TrackingSpec(enabled=False) if uri == NOWHERE else TrackingSpec(uri)

    def of_run(self, folder: Path, said: str | None, command: str) -> TrackingSpec:
        """Where a run's folder with this spec goes on being tracked: as is said. The folder, which may be a stranger's, does not
        choose: its own address must be MLFLOW_TRACKING_URI, or the database beside it, or be said to `command`. Raises UserError.
        """
        default, runs = TrackingSpec.said(said), folder.resolve().parent
        if said is None and self.enabled:
            require_same(self.resolve(runs), default.resolve(runs), folder, command)
        return replace(self, uri=default.uri, enabled=self.enabled and default.enabled)

    @property
    def known(self) -> bool:
        """Whether the trial or the environment names an address."""
        return bool(self.uri or os.environ.get("MLFLOW_TRACKING_URI"))

    def resolve(self, runs: Path) -> str:
        """The address to use, given the folder that holds the run folders; an SQLite file's path made absolute."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{runs / DATABASE}"
        _require_address(uri, "MLFLOW_TRACKING_URI")
        database = database_file(uri)
        return f"{SQLITE}{database.resolve()}" if database else uri


def _require_address(uri: str, where: str) -> None:
    """Raise UserError for a file store, which MLflow 3 does not write, and for anything else that is no address."""
    if "://" not in uri or uri.startswith("file:"):
        hint = f"write http://HOST:PORT or sqlite:///{uri.removeprefix('file://') or 'runs'}/{DATABASE}"
        raise UserError(f"{uri!r} is not an MLflow address", where=where, hint=hint)


def require_same(tracked_at: str, default: str, folder: Path, command: str) -> None:
    """Raise UserError unless a folder was tracked at the default address, or moved with its database; the hint is a command."""
    was, now = database_file(tracked_at), database_file(default)
    moved = was and now and not os.path.exists(was) and now.exists()
    if tracked_at != default and not moved:
        where = without_password(tracked_at)
        hint = f"say so if it is yours: {command} {shlex.quote(str(folder))} --tracking {shlex.quote(where)}"
        raise UserError(f"was tracked at {where}", where=str(folder), hint=hint)


def without_password(uri: str) -> str:
    """An address as it may be shown."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def database_file(uri: str) -> Path | None:
    """The file of an SQLite address, None for any other address."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def is_server(uri: str) -> bool:
    """Whether an address is a server's, which has a page and keeps artifacts itself."""
    return uri.startswith(("http:", "https:"))


def artifact_folder(uri: str, runs: Path) -> Path | None:
    """Where artifacts go: beside an SQLite file, else among the run folders; None if a server decides it."""
    if is_server(uri):
        return None
    database = database_file(uri)
    return (database.parent if database else runs).resolve() / ARTIFACTS


@dataclass(frozen=True)
class Link(Strict):
    """A run's place in MLflow, kept in its folder: what is written to, how far, and what `nas ui` opens.

    `models` maps a model's `kind:hash:seed` to the id of its own run. `sent` is the offset in the outbox behind the last entry
    that MLflow has acknowledged.
    """

    uri: str
    experiment_id: str
    run_id: str
    models: dict[str, str] = field(default_factory=dict)
    sent: Annotated[int, Ge(0), Le(2**62)] = 0

    def model(self, hash: str) -> str | None:
        """The id of the run of a config's model; None if it has none."""
        return next((run_id for key, run_id in self.models.items() if f":{hash}:" in key), None)

    @property
    def view(self) -> str:
        """The key of the search's own view among the experiment's shared views."""
        return f"search-{self.run_id[:12]}"

    def view_url(self, base: str) -> str:
        """The page of the search's own view: columns, charts, and no run but this search's."""
        query = f"viewStateShareKey={quote(self.view)}&workflowType=machine_learning&compareRunsMode=CHART"
        return f"{base.rstrip('/')}/#/experiments/{self.experiment_id}/runs?{query}"

    def save(self, folder: Path) -> None:
        write_text(folder / LINK_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> Link | None:
        """The link in a run folder, None if it was never tracked. Raises UserError."""
        path = folder / LINK_FILE
        if not os.path.lexists(path):
            return None
        hint = "delete it: the run is found again in MLflow when it is written to"
        return build(Link, Document(read_json(path, hint), str(path)))


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
        if self.path.exists():
            with self.path.open("r+b") as file:
                cut_torn_line(file)

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
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or "op" not in entry:
            raise UserError("a line is no entry", where=str(self.path), hint="delete that line, or copy the run again")
        return entry

    def last_steps(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry, _ in self.read():
            if entry["op"] == "point":
                found[entry["name"]] = max(entry["step"], found.get(entry["name"], -1))
        return found


def prepare_database(uri: str) -> None:
    """Make sure that the SQLite database of an address is there and whole; any other address is left alone.

    A half-made database is renamed, with a warning. One of an older MLflow is upgraded in a copy, and the original kept. Raises
    UserError for another program's, or a newer MLflow's.
    """
    database = database_file(uri)
    if not database:
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.with_name(f".{database.name}.lock")):
        if database.exists() and database.stat().st_size and not _is_current(database):
            _require_mlflows(database)
            _replace(database)
        if not database.exists() or not database.stat().st_size:
            part = database.with_name(f".{database.name}.part")
            part.unlink(missing_ok=True)
            _migrate(part, database)
            part.replace(database)  # whole once it has its name


def _require_mlflows(database: Path) -> None:
    """Raise UserError for a database of another program's: MLflow makes the table of experiments first."""
    tables = set[str]()
    with closing(sqlite3.connect(database)) as read, suppress(sqlite3.DatabaseError):
        tables = {name for (name,) in read.execute("select name from sqlite_master where type = 'table'")}
    if tables - {"alembic_version"} and "experiments" not in tables:
        raise UserError("is not MLflow's but another program's database", where=str(database), hint="give MLflow another file")


def _replace(database: Path) -> None:
    """Set a database aside that MLflow cannot open; an upgraded copy takes its place if there can be one."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    aside = database.with_name(f"{database.stem}-{now}{database.suffix}")
    part = database.with_name(f".{database.name}.part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(part)) as copy:
        try:
            source.backup(copy)
            revision = copy.execute("select version_num from alembic_version").fetchall()
        except sqlite3.DatabaseError:
            revision = []
    upgraded = False
    if revision:
        try:
            _migrate(part, database)
            upgraded = True
        except Exception as error:  # whatever a half-made database makes of MLflow's migrations
            part.unlink(missing_ok=True)
            if "Can't locate revision" in str(error):
                message, hint = "is of a newer MLflow than the installed one", "upgrade mlflow, or give another address"
                raise UserError(message, where=str(database), hint=hint) from None
    database.replace(aside)
    if upgraded:
        part.replace(database)
        log.warning("MLflow's database %s was upgraded; the original is %s", database, aside.name)
    else:
        part.unlink(missing_ok=True)
        log.warning("MLflow's database %s was half-made; it is %s now, and a new one is begun", database, aside.name)


def _migrate(path: Path, database: Path) -> None:
    """Make MLflow's tables, or bring them up to date, in a file that will be the database. Raises what MLflow raises."""
    from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = f"sqlite:///{path}"
    if path.exists():
        engine = create_sqlalchemy_engine(uri)
        try:
            _upgrade_db(engine)
        finally:
            engine.dispose()
    store = SqlAlchemyStore(uri, str(artifact_folder(f"sqlite:///{database}", database.parent)))
    store.engine.dispose()
    SqlAlchemyStore._engine_map.pop(uri, None)  # the next database of this name is another file


BUSY = 30.0  # seconds given to whoever is writing a database


def _is_current(database: Path) -> bool:
    """Whether a database has all tables of the installed MLflow, at its newest revision. Raises UserError for one that cannot be
    read now: renaming it would take it away from whoever is writing it."""
    from mlflow.store.db.utils import _all_tables_exist, _get_latest_schema_revision, _get_schema_version
    from sqlalchemy import create_engine
    from sqlalchemy.exc import DBAPIError

    engine = create_engine(f"sqlite:///{database}", connect_args={"timeout": BUSY})
    try:
        return bool(_all_tables_exist(engine) and _get_schema_version(engine) == _get_latest_schema_revision())
    except DBAPIError as error:
        if is_damaged(error):
            return False
        hint = "try again when no other program writes it"
        raise UserError(f"cannot be read: {error.orig}", where=str(database), hint=hint) from None
    finally:
        engine.dispose()


def is_damaged(error: Exception) -> bool:
    """Whether SQLite cannot read its file."""
    return "malformed" in str(error) or "not a database" in str(error)
