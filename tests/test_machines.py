"""Trainings on machines that do not see the driver's disk. Whole searches on them are in `tests.faults`."""

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import apart

from nas.training.evaluation import NotFinite
from nas.workers import Failure, Job, RunSpec, Session, disk, mirror, train_all
from nas.workers.cluster import cluster, ray
from nas.workers.executor import unheard
from nas.workers.work import read_result

pytestmark = pytest.mark.service
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def far(settings: dict[str, Any], session: Session) -> dict[str, Any]:
    """Eight steps, each with a checkpoint, by workers that read what the settings name, and leave weights."""
    files = {name: path for name, path in settings.items() if isinstance(path, Path)}
    inside = sorted(path.relative_to(files["model"]).as_posix() for path in files["model"].rglob("*") if path.is_file())
    begun = int((session.checkpoint / "step").read_text()) if session.checkpoint else 0
    for step in range(begun + 1, 9):
        time.sleep(settings["sleep"])
        session.ranks.average(torch.nn.Linear(1, 1), torch.ones(()))
        if session.leads:
            made = Path(tempfile.mkdtemp(dir=session.folder))
            (made / "step").write_text(str(step))
            session.keep(made)
            session.report({"step": step, "steps": 8})
    if settings["fails"]:
        raise NotFinite("the loss is nan")
    (session.folder / "weights").write_bytes(files["file"].read_bytes() + files["empty"].read_bytes())
    places = {"session": str(session.folder)} | {name: str(path) for name, path in files.items()}
    return {"begun": begun, "inside": inside, "places": places}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Settings of `far` that name files of the driver's folder, in which a run is, too."""
    for name in ("model/config", "model/part/weights", "model/.git/large"):
        path = tmp_path / "driver" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "driver/empty").touch()
    (tmp_path / "driver/file").write_bytes(os.urandom(20 * 2**20 + 1))
    (tmp_path / "driver/run").mkdir()
    return {name: tmp_path / "driver" / name for name in ("file", "empty", "model", "missing")} | {"sleep": 0, "fails": False}


def require_copies(found: Any, given: dict[str, Any], key: str, cache: Path) -> None:
    """A training read copies of everything, and the driver's folder has what it left."""
    assert not isinstance(found, Failure), found
    folder = given["file"].parent / "run" / key
    assert read_result(folder) == found
    assert (folder / "weights").read_bytes() == given["file"].read_bytes()
    assert found["inside"] == ["config", "part/weights"]
    places = dict(found["places"])
    assert places.pop("missing") == str(given["missing"])
    assert [name for name, place in places.items() if not place.startswith(f"{cache}/")] == []
    assert not list((cache / "trainings").iterdir())


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fetched(cache: Path) -> dict[str, Any]:
    """What was fetched, with what tells it from another copy."""
    return {path.name: (path.parent.name, path.stat().st_ctime_ns) for path in (cache / "fetched").glob("*/*")}


@pytest.fixture
def local() -> Iterator[None]:
    with cluster(RunSpec(workers=1)):
        yield


def test_a_worker_that_does_not_see_the_drivers_disk_has_copies(
    local: None, tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the worker, and an actor stands for the driver's disk; its death ends no training."""
    cache, run = tmp_path / "cache", tmp_path / "driver/run"
    monkeypatch.setenv("NAS_CACHE", str(cache))
    shown = ray.remote(disk.Disk).options(max_restarts=-1, max_task_retries=-1).remote()
    left = {"one": given, "two": given, "nan": given | {"fails": True}, "later": given}
    work = mirror.Anywhere(far, left, run, RunSpec(), disk=shown, mark=tmp_path / "unseen")
    for key in left:
        (run / key).mkdir()
    (run / "one" / "making-torn").mkdir()

    def fail(key: str, latest: dict[str, Any]) -> None:
        if latest["step"] == 5:
            ray.kill(shown, no_restart=False)
            raise ValueError("lost")

    assert work.run("one", fail) == Failure("ValueError: lost")
    assert files_of(run) == ["one/checkpoint-5/step"]
    require_copies(one := work.run("one", unheard), given, "one", cache)
    assert one["begun"] == 5  # type: ignore[index]
    first = fetched(cache)
    require_copies(work.run("two", unheard), given, "two", cache)
    assert work.run("nan", unheard) == read_result(run / "nan") == Failure("NotFinite: the loss is nan", permanent=True)
    assert fetched(cache) == first
    assert sorted(first) == ["empty", "file", "model"]
    assert files_of(run) == ["nan/result.json", "one/result.json", "one/weights", "two/result.json", "two/weights"]
    assert not (run / "one" / "making-torn").exists()

    # What was not used for a day goes when something else is fetched, unless somebody has it.
    model = next((cache / "fetched").glob("*/model")).parent
    for path in (cache / "fetched").glob("*.lock"):
        os.utime(path, (0, 0))
    given["empty"].write_text("other")
    with model.with_suffix(".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert not isinstance(work.run("later", unheard), Failure)
    again = fetched(cache)
    assert {name: again[name] == copy for name, copy in first.items()} == {"file": True, "model": True, "empty": False}
    assert len(list((cache / "fetched").glob("*/*"))) == 3
    ray.kill(shown)


@pytest.mark.slow
def test_machines_that_share_no_disk_train_also_where_they_vanish_and_come_back(tmp_path: Path, given: dict[str, Any]) -> None:
    """Trainings go on from the state that was sent last; what they read is fetched once, also for two workers together."""
    from ray.cluster_utils import Cluster

    cache, run, before = tmp_path / "machine/cache", tmp_path / "driver/run", dict[str, Any]()

    def watch(key: str, latest: dict[str, Any]) -> None:
        if latest.get("step") == 4 and not before:
            machine.go()
            before.update(fetched(cache))
            machine.come()

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    spec = RunSpec(workers=2, address=nodes.address)
    jobs = [Job(f"job{n}", given | {"sleep": 0.3, "fails": n == 2}) for n in range(3)]
    try:
        with apart(nodes.address, tmp_path / "driver", tmp_path / "machine") as machine, cluster(spec):
            results = train_all(jobs, far, run, spec, on_progress=watch)
            results |= train_all([Job("both", given)], far, run, replace(spec, workers_per_training=2))
    finally:
        nodes.shutdown()
    assert results.pop("job2") == Failure("NotFinite: the loss is nan", permanent=True)
    for key, found in results.items():
        require_copies(found, given, key, cache)
    assert max(found["begun"] for found in results.values()) >= 4  # type: ignore[index]
    assert fetched(cache) == before
    assert sorted(before) == ["empty", "file", "model"]
    left = [f"{key}/{name}" for key in ("both", "job0", "job1") for name in ("result.json", "weights")]
    assert files_of(run) == [*left, "job2/result.json"]
