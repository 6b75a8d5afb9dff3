"""MLflow's database beside the runs: made whole or not at all.

Owns how an SQLite database comes to be. MLflow makes its tables in place, over seconds; a process that is killed meanwhile, or
two processes at once, leave a database that MLflow refuses for ever. So it is made under another name, by one process, and
renamed.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path

from ..errors import UserError
from ..files import locked
from .spec import artifact_folder, database_file

log = logging.getLogger("nas.tracking")


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
