"""What every test starts from: one thread, property tests that draw the same examples each time, and one place for the copies
that transformers makes of an exported folder's code."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from pathlib import Path

    from exports import Exports

    from nas.search.run import Run

# Read when transformers is imported; what was imported from one place is not found in another, so it is one for all tests.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="nas-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NAS_CACHE"] = tempfile.mkdtemp(prefix="nas-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests begin, too
for _name in ("HF_MODULES_CACHE", "NAS_CACHE"):
    atexit.register(shutil.rmtree, os.environ[_name], ignore_errors=True)

torch.set_num_threads(1)
settings.register_profile(
    "nas",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nas")


SERVICES = {
    *("test_budget", "test_cli", "test_compare", "test_convert", "test_docs", "test_export", "test_formats"),
    *("test_memories", "test_objectives", "test_reports", "test_runs", "test_search", "test_search_files", "test_search_from"),
    *("test_tracking", "test_trainers", "test_ui", "test_workers"),
}
"""Files whose tests start Ray, MLflow, a browser, a trainer or another process, or search: `make quick` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SERVICES or "faults" in item.path.parts:
            item.add_marker(pytest.mark.service)


# Finished runs, one of each kind of search, made once for all test processes. They are read only: a test that would change one
# copies it.


@pytest.fixture(scope="session")
def predictor_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search by a predictor; untracked."""
    return _finished(tmp_path_factory, "predictor")


@pytest.fixture(scope="session")
def supernet_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search on a supernet that gradient matching split; untracked."""
    return _finished(tmp_path_factory, "supernet")


@pytest.fixture(scope="session")
def from_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search from a checkpoint, tracked in the database beside the run."""
    return _finished(tmp_path_factory, "from")


@pytest.fixture(scope="session")
def from_predictor_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search from a checkpoint by a predictor; untracked."""
    return _finished(tmp_path_factory, "from_predictor")


def _finished(factory: pytest.TempPathFactory, kind: str) -> Run:
    import searches

    from nas.search.run import Run

    trials = {"predictor": searches.PREDICTOR, "supernet": searches.SUPERNET, "from": searches.FROM | {"tracking": {}}}
    trial = (trials | {"from_predictor": searches.FROM_PREDICTOR})[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = searches.made_once(factory, kind, lambda folder: searches.search(folder, trial))
    return Run(folder / "runs" / trial["name"])


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """`exports(name, tied=True)`: a config of `exports.CONFIGS`, exported; each once a session."""
    from exports import Exports

    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def rhyme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that a small model learns in a few steps."""
    from exports import rhyme

    return rhyme(tmp_path_factory.mktemp("text") / "rhyme.txt")
