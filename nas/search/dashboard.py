"""A run's search as an Optuna study, and optuna-dashboard on it.

Owns `optuna.journal` in the run's folder: it is made of the run's own journal, whenever it is wanted, and nothing else reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from ..config import reading
from ..errors import UserError
from ..sharing.label import label
from ..sharing.objectives import OBJECTIVES
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation
from .run import DAMAGED, Run

FILE = "optuna.journal"

EVERY = 2.0  # seconds between two looks at the journal of a run that is worked on


class RunStudy:
    """The study of a run's finished evaluations; objectives have their own directions, and failures say why."""

    def __init__(self, run: Run) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.run, self.trial, self._told = run, run.trial(), 0
        for name in (FILE, f"{FILE}.lock"):
            (run.folder / name).unlink(missing_ok=True)
        self.storage = JournalStorage(JournalFileBackend(str(run.folder / FILE)))
        directions = ["maximize" if OBJECTIVES[name].maximize else "minimize" for name in self.trial.objectives]
        self.study = optuna.create_study(storage=self.storage, study_name=run.name, directions=directions)
        self.study.set_metric_names(list(self.trial.objectives))
        self.update()

    def update(self) -> None:
        """Add what was evaluated since. Raises UserError for a damaged journal."""
        with reading(self.run.journal().path, DAMAGED):
            entries = list(self.run.journal().read())
            for entry in entries[self._told :]:
                self.study.add_trial(self._frozen(entry))
        self._told = len(entries)

    def _frozen(self, entry: dict[str, Any]) -> optuna.trial.FrozenTrial:
        space, names = self.trial.space, self.trial.objectives
        config = SharingConfig.from_data(space.shape, entry["config"])
        decided = space.encode(config) or {}
        said: dict[str, Any] = {"label": label(config), "hash": config.hash, "number": entry["number"]}
        failed = "failure" in entry
        if failed:
            said["failure"] = entry["failure"]
        evaluation = None if failed else Evaluation.from_data(space.shape, entry, names)
        return create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            values=[evaluation.value(name) for name in names] if evaluation else None,
            params={name: _plain(option) for name, option in decided.items()},
            distributions={name: CategoricalDistribution([*map(_plain, space.options[name])]) for name in decided},
            user_attrs=said,
        )


def _plain(option: Any) -> Any:
    """An option as Optuna's storages keep it."""
    return option if isinstance(option, bool | int | float | str) or option is None else str(option)


@contextmanager
def dashboard(run: Run, port: int = 0) -> Iterator[str]:
    """The address of optuna-dashboard on a run's study, on this machine alone, until the context ends; it follows a run that is
    worked on. `port` 0 takes a free one. Raises UserError where optuna-dashboard is not installed, or the port is taken."""
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        hint = "pip install 'nas-sharing[dashboard]'"
        raise UserError("optuna-dashboard is not installed", where="nas dashboard", hint=hint) from None
    study, ended = RunStudy(run), threading.Event()
    try:
        server = make_server("127.0.0.1", port, wsgi(study.storage), WSGIServer, _Quiet)
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error.strerror}", where="--port", hint="use another, or 0") from None

    def follow() -> None:
        while not ended.wait(EVERY):
            study.update()

    threads = [threading.Thread(target=work, daemon=True) for work in (server.serve_forever, follow)]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/dashboard/studies/{study.study._study_id}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        threads[1].join()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...
