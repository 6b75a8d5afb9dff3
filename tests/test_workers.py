"""Both executors: what tasks and trainings are promised, on real Ray also while processes and machines die."""

import math
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nas.config import build as load_spec
from nas.config import parse_yaml
from nas.errors import RunFailed, UserError
from nas.training.evaluation import NotFinite
from nas.workers import Executor, Failure, Job, RunSpec, Session, Task, executor, train_all, work
from nas.workers.cluster import OUT_OF_MEMORY, cluster, place, ray, session_folder, workers_summary
from nas.workers.pool import RayPool
from tests.faults.processes import is_alive, wait_for

SPEC = RunSpec(workers=2, retries=2)

# A worker cannot import a test module: what is sent from here goes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    with cluster(RunSpec(workers=4)):  # room for the pool that stays open, and for what a test starts beside it
        yield


@pytest.fixture(scope="module", params=[SPEC, RunSpec(workers=0)], ids=["ray", "in process"])
def each(request: pytest.FixtureRequest, local: None) -> Iterator[Executor]:
    with executor(request.param) as found:
        yield found


# ---- settings, and addresses where no cluster is (before any cluster is started here)


def test_settings_that_cannot_be_are_refused() -> None:
    for kind, text, where in (
        (RunSpec, "workers: -1", "t.yaml:1: workers: "),
        (RunSpec, "workers: 2\nretries: -1", "t.yaml:2: retries: "),
        (RunSpec, "gpus_per_worker: 1.5", "t.yaml:1: gpus_per_worker: "),
        (RunSpec, "worker: 2", "t.yaml:1: worker: "),
    ):
        with pytest.raises(UserError) as error:
            load_spec(kind, parse_yaml(text, "t.yaml"))
        assert str(error.value).startswith(where)


def test_threads_never_crowd_a_node() -> None:
    for workers in (1, 2, 3, 8, 100):
        for cpus in (0, 0.5, 1, 4):
            for cores in (1, 2, 7, 64):
                threads = RunSpec(workers=workers, cpus_per_worker=cpus).threads(cores)
                assert threads >= 1
                assert threads in (1, cpus) or workers * threads <= cores


def test_ray_is_not_imported_before_it_is_needed() -> None:
    """Not by the room, nor by work that is done in this process."""
    code = """
import pathlib, sys, nas.workers as w
assert not {"ray", "torch"} & set(sys.modules)
with w.executor(w.RunSpec(workers=0)) as executor:
    job = w.Job("one", 1)
    assert executor.train([job], lambda n, session: {"n": n}, pathlib.Path(sys.argv[1]))["one"]["n"] == 1
sys.exit("ray" in sys.modules)
"""
    with tempfile.TemporaryDirectory() as folder:
        assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0


def test_an_address_without_a_cluster_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.workers.cluster.PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes calls and never answers
        for address in ("127.0.0.1:1", f"127.0.0.1:{server.getsockname()[1]}", "somewhere", "ray://head:10001"):
            with pytest.raises(UserError, match=r"^run.address: .*; ") as error, cluster(RunSpec(address=address)):
                pass
            assert "\n" not in str(error.value)
            assert not ray.is_initialized()


def test_a_cluster_clears_up_after_one_that_was_killed_and_leaves_the_living_alone() -> None:
    code = "import time, nas.workers.cluster as c\nwith c.session_folder() as path: print(path, flush=True); time.sleep(999)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        other_folder = Path(other.stdout.readline().strip())
        with session_folder() as mine:
            folders = [other_folder, Path(mine)]
            assert all(folder.is_dir() for folder in folders)
        assert other_folder.is_dir()
        other.kill()
    with session_folder():
        assert not any(folder.exists() for folder in folders)


LOCAL = """
import os, threading, time, click, psutil, nas.workers.cluster as c
from nas.cli import main
from nas.workers import RunSpec

def work():
    with c.cluster(RunSpec(workers=1, address="local")):
        mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
        ports = [place for one in mine for place in one.net_connections("tcp") if place.status == "LISTEN"]
        print(len(ports), {"127.0.0.1" in place.laddr.ip for place in ports}, flush=True)
        what = os.environ["WHAT"]
        raylet = next(one for one in mine if one.name() == "raylet")
        later = threading.Timer(3, psutil.Process().terminate)  # while it waits
        {"none": lambda: None, "raylet": raylet.kill, "term": later.start}[what]()
        while what != "none":
            c.ray.wait([c.ray.remote(lambda: time.sleep(600)).remote()], timeout=0.5)

main(click.Command("work", callback=work))
"""


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("raylet", 1, "error: Ray failed: its raylet ended; the same command, or `nas resume RUN`, goes on"),
        pytest.param("none", 0, "", marks=pytest.mark.slow),
        pytest.param("term", 143, "terminated; a search continues", marks=pytest.mark.slow),
    ],
)
def test_a_local_cluster_needs_no_home_listens_on_loopback_and_ends_in_one_line(
    what: str, code: int, line: str, tmp_path: Path
) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "WHAT": what}
    environment.pop("RAY_AUTH_MODE", None)
    argv = ["bash", "-c", f"trap '' INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(LOCAL)}"]  # as in the background
    found = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], check=False)
    said = found.stderr.lstrip()  # click ends the line on which a terminal shows ^C
    assert (found.returncode, said.count("\n")) == (code, bool(line)), said
    assert said.startswith(line)
    count, on_loopback = found.stdout.split(maxsplit=1)
    assert int(count) > 3
    assert on_loopback == "{True}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_is_tried_once_more_and_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(**given: Any) -> None:
        tries.append(given)
        raise RuntimeError("The current node timed out during startup.\nSee the logs.")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RunFailed, match=r"^Ray does not start: The current node timed out during startup.; "), cluster(SPEC):
        pass
    assert len(tries) == 2


@pytest.mark.slow
def test_a_start_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.workers.cluster.START_LIMIT", 1.0)

    def hang(_temp_dir: str, **given: Any) -> None:
        child = subprocess.run([sys.executable, "-c", "import time; time.sleep(600)", _temp_dir], check=False)
        raise RuntimeError(f"ended by {child.returncode}")

    monkeypatch.setattr(ray, "init", hang)
    with pytest.raises(RunFailed, match="Ray does not start: ended by -9"), cluster(SPEC):
        pass


def test_a_worker_that_fits_nowhere_is_told(local: None) -> None:
    for need in ({"gpus_per_worker": 64}, {"cpus_per_worker": 1000}):
        with pytest.raises(UserError, match=r"^run: .*at most 4 cpus_per_worker"), cluster(RunSpec(**need)):
            pass


def test_the_plan_says_what_workers_compute_on(local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers_summary(SPEC) == "2 workers on CPUs"
    there = [{"CPU": 4.0, "GPU": 1.0, "accelerator_type:H100": 1.0}]
    monkeypatch.setattr("nas.workers.cluster.alive_nodes", lambda: there)
    assert workers_summary(SPEC) == "2 workers with 1/2 of a GPU each (1 there: H100)"
    assert workers_summary(RunSpec(workers=1)) == "1 worker with a GPU each (1 there: H100)"
    assert place(SPEC).gpus_per_worker == 0.5
    auto = RunSpec(workers=4, workers_per_training="auto")
    monkeypatch.setattr("nas.workers.pool.alive_nodes", lambda: [{"CPU": 4.0, "GPU": 4.0}])
    with executor(auto) as work:
        assert [work.together(trainings, 8) for trainings in (1, 2, 3)] == [4, 2, 1]
    with executor(RunSpec(workers=0)) as work:
        assert work.summary.startswith("this process on ")


# ---- tasks


class Seat:
    """A worker's place in a simulation: it does what it was given one after the other."""

    ready = True

    def __init__(self) -> None:
        self.given: dict[int, float] = {}
        self.begun = 0.0

    def give(self, index: int, seconds: float) -> None:
        self.given[index] = seconds

    def clear(self) -> None:
        self.given.clear()

    @property
    def end(self) -> float:
        return self.begun + next(iter(self.given.values()), math.inf)


def test_workers_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is simulated: the longest tasks are begun first, and the last wait for no worker while one is idle."""
    rng = random.Random(0)
    for workers, count in ((8, 24), (64, 256), (256, 1024), (2, 24)):
        pool = RayPool[float, float](RunSpec(workers=workers), make, None)
        seats = [Seat() for _ in range(workers)]
        pool._slots = list[Any](seats)

        def wait(*given: Any, seats: list[Seat] = seats) -> Iterator[tuple[int, float]]:
            seat = min(seats, key=lambda one: one.end)
            now, index = seat.end, next(iter(seat.given))
            del seat.given[index]
            seat.begun = now
            for one in seats:
                one.begun = one.begun if one.given else now
            yield index, now

        monkeypatch.setattr(pool, "_wait", wait)
        costs = [rng.lognormvariate(0, 0.4) for _ in range(count)]
        tasks = [Task(n, cost * rng.uniform(0.9, 1.1), cost) for n, cost in enumerate(costs)]
        found = list(pool.run(tasks))
        assert sorted(task.key for task, _ in found) == list(range(count))
        work, wall = sum(task.data for task in tasks), max(end for _, end in found if isinstance(end, float))
        assert work / workers / wall > 0.93


def make(payload: Any, weights: dict[str, torch.Tensor]) -> Callable[[Any], Any]:
    """An evaluator that does as its task says."""

    def evaluate(data: dict[str, Any]) -> Any:
        time.sleep(data.get("sleep", 0))
        return ORDERS[data["do"]](data, payload, weights)

    return evaluate


def stop(data: dict[str, Any], payload: Any, weights: Any) -> str:
    """The process is halted, and killed a moment later."""
    mark = Path(data["mark"])
    if not mark.exists():
        mark.touch()
        subprocess.Popen(["/bin/sh", "-c", f"sleep 2; kill -KILL {os.getpid()}"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return "alive"


def die_once(data: dict[str, Any], payload: Any, weights: Any) -> str:
    mark = Path(data["mark"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def raise_(data: dict[str, Any], payload: Any, weights: Any) -> None:
    raise data["error"]


ORDERS: dict[str, Callable[..., Any]] = {
    "square": lambda data, payload, weights: data["x"] ** 2,
    "look": lambda data, payload, weights: (payload, weights, torch.get_num_threads()),
    "address": lambda data, payload, weights: (os.getpid(), _mapped(weights["large"])),
    "raise": raise_,
    "die": lambda data, payload, weights: os.kill(os.getpid(), signal.SIGKILL),
    "die once": die_once,
    "stop": stop,
    "exhaust": lambda data, payload, weights: torch.zeros(2**50),
    "lambda": lambda data, payload, weights: threading.Lock(),
    "where": lambda data, payload, weights: ray.get_runtime_context().get_node_id(),
}


def _mapped(tensor: torch.Tensor) -> tuple[str, int]:
    """The file behind a tensor's memory (its inode; 0 is a process's own memory), and where in that file the tensor begins."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode, *_ = line.split()
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= tensor.data_ptr() < high:
            return inode, int(offset, 16) + tensor.data_ptr() - low
    raise AssertionError("not in memory")


def squares(count: int, **data: Any) -> list[Task[Any]]:
    return [Task(f"task-{n}", {"do": "square", "x": n, **data}) for n in range(count)]


PAYLOAD = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(1))
WEIGHTS = {
    "large": torch.randn(512, 1024),
    "half": torch.randn(3, 5).bfloat16(),
    "scalar": torch.tensor(7),
    "turned": torch.randn(4, 6).T,
    "grad": torch.randn(2, requires_grad=True),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(scope="module")
def pool(each: Executor) -> Iterator[Any]:
    with each.pool(make, PAYLOAD, WEIGHTS) as pool:
        yield pool


def results_of(pool: Any, tasks: list[Task[Any]]) -> list[Any]:
    """In the order of the tasks."""
    found = {task.key: result for task, result in pool.run(tasks)}
    return [found[task.key] for task in tasks]


def test_every_task_has_its_result_once(pool: Any) -> None:
    results = list(pool.run(squares(50)))
    assert sorted((task.data["x"], result) for task, result in results) == [(n, n**2) for n in range(50)]
    assert list(pool.run([])) == []


def test_weights_arrive_as_they_were_and_every_worker_reads_the_same_bytes(pool: Any, each: Executor) -> None:
    ((payload, arrived, threads),) = results_of(pool, [Task("look", {"do": "look"})])
    assert payload.equal(PAYLOAD)
    assert threads == (SPEC.threads(len(os.sched_getaffinity(0))) if each.spec.workers else torch.get_num_threads())
    for name, weight in WEIGHTS.items():
        torch.testing.assert_close(arrived[name], weight.detach(), rtol=0, atol=0)
    places: dict[int, Any] = {}
    while len(places) < max(each.spec.workers, 1):
        places |= dict(results_of(pool, [Task(n, {"do": "address", "sleep": 0.1}) for n in range(8)]))
    assert len(set(places.values())) == 1
    assert (next(iter(places.values()))[0] != "0") == bool(each.spec.workers)


def test_a_failed_task_says_why_and_the_next_goes_on(pool: Any, each: Executor) -> None:
    for data, reason, permanent in (
        ({"do": "raise", "error": NotFinite("the loss is nan")}, "NotFinite: the loss is nan", True),
        ({"do": "raise", "error": ValueError("first\nsecond")}, "ValueError: first", False),
        ({"do": "raise", "error": MemoryError()}, "out of memory: MemoryError", False),
        ({"do": "raise", "error": torch.OutOfMemoryError("CUDA out of memory. Tried")}, "out of memory: CUDA", False),
        ({"do": "exhaust"}, "out of memory: ", False),
        *([({"do": "lambda"}, "TypeError: cannot pickle", False)] if each.spec.workers else []),
    ):
        failure, result = results_of(pool, [Task("bad", data), Task("good", {"do": "square", "x": 3})])
        assert isinstance(failure, Failure)
        assert failure.reason.startswith(reason)
        assert "\n" not in failure.reason
        assert (failure.permanent, result) == (permanent, 9)


@pytest.mark.slow
def test_the_tasks_of_a_killed_worker_are_done_again(local: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    deadly = [Task(f"dies {n}", {"do": "die once", "mark": str(tmp_path / str(n))}) for n in range(2)]
    tasks = [*squares(5, sleep=0.02), *deadly, Task("always", {"do": "die"})]
    with RayPool(SPEC, make, None) as pool:
        results = results_of(pool, tasks)
    assert results == [0, 1, 4, 9, 16, "alive", "alive", Failure("its worker died 3 times: its process was killed, or crashed")]
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_worker_for_which_memory_was_short_pauses(
    local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program may have taken the memory, and give it back; tasks that wait cost a poll each half second."""
    monkeypatch.setattr("nas.workers.pool.failure_reason", lambda error: OUT_OF_MEMORY)
    monkeypatch.setattr("nas.workers.pool.PAUSE", 2.0)
    orders = [Task(n, {"do": "die once", "mark": str(tmp_path / f"mark{n // 2}")}) for n in range(4)]
    began, worked = time.monotonic(), time.process_time()
    with RayPool(RunSpec(workers=1), make, None) as pool:
        assert results_of(pool, orders) == ["alive"] * 4
    assert [record.args for record in caplog.records if "memory is short" in record.message] == [(2,), (8,)]
    assert time.monotonic() - began > 10
    assert time.process_time() - worked < 5


def test_a_worker_that_is_halted_and_then_killed_is_replaced(local: None, tmp_path: Path) -> None:
    with RayPool(SPEC, make, None) as pool:
        assert results_of(pool, [Task("halted", {"do": "stop", "mark": str(tmp_path / "mark")}), *squares(3)]) == [
            "alive",
            0,
            1,
            4,
        ]


def test_a_run_can_be_left(pool: Any) -> None:
    run = pool.run(squares(100, sleep=0.05))
    next(run)
    run.close()
    assert results_of(pool, squares(4)) == [0, 1, 4, 9]


def refuse(payload: str, weights: Any) -> Callable[[Any], Any]:
    if payload == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError(payload, where="here")


def test_what_build_raises_is_raised_on_entering(each: Executor) -> None:
    with pytest.raises(UserError, match="here: no such thing"), each.pool(refuse, "no such thing"):
        pass
    if each.spec.workers:
        with (
            pytest.raises(RunFailed, match=r"workers die as they start: .*killed"),
            RayPool(RunSpec(workers=1, retries=0), refuse, "die"),
        ):
            pass


# ---- trainings


def train(settings: dict[str, Any], session: Session) -> dict[str, Any]:
    """Eight steps, each with a checkpoint; what happens at which step is in the settings."""
    state = session.checkpoint
    begin = int((state / "step").read_text()) if state else 0
    _log(session.folder, f"begin {begin}")
    for step in range(begin + 1, 9):
        time.sleep(settings.get("sleep", 0))
        while step > 2 and "until" in settings and not Path(settings["until"]).exists():
            time.sleep(0.05)
        made = Path(tempfile.mkdtemp(dir=session.folder))
        (made / "step").write_text(str(step))
        session.keep(made)
        session.report({"step": step, "steps": 8, "perplexity": settings["perplexity"] + 1 / step})
        assert len(list(session.folder.glob("checkpoint*"))) == 1
        if settings.get("die at") == step and begin == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.get("raise at") == step:
            raise settings["error"]
    _log(session.folder, "end")
    return {"perplexity": settings["perplexity"]}


def _log(folder: Path, line: str) -> None:
    with (folder / "log").open("a") as file:
        file.write(line + "\n")


def logged(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def test_trainings_end_fail_and_go_on_each_by_itself(each: Executor, tmp_path: Path) -> None:
    """On Ray one of them loses its process midway, and its checkpoint is where it goes on."""
    deadly = {"die at": 5} if each.spec.workers else {}
    jobs = [
        Job("plain", {"perplexity": 4.0}),
        Job("killed", {"perplexity": 3.0, **deadly}),
        Job("nan", {"perplexity": 2.0, "raise at": 2, "error": NotFinite("the loss is nan")}),
        Job("bug", {"perplexity": 1.0, "raise at": 3, "error": ValueError("no")}),
    ]
    reports: list[tuple[str, dict[str, Any]]] = []
    done = {key: {"perplexity": loss} for key, loss in (("plain", 4.0), ("killed", 3.0))}
    results = each.train(jobs, train, tmp_path, on_progress=lambda key, latest: reports.append((key, latest)))
    assert list(results) == ["plain", "killed", "nan", "bug"]
    assert {key: results[key] for key in done} == done
    assert [results[key].reason for key in ("nan", "bug")] == ["NotFinite: the loss is nan", "ValueError: no"]  # type: ignore[union-attr]
    assert logged(tmp_path / "killed") == (["begin 0", "begin 5", "end"] if deadly else ["begin 0", "end"])
    for job in jobs:
        mine = [latest for key, latest in reports if key == job.key]
        steps = [latest["step"] for latest in mine if "step" in latest]
        assert steps == sorted(steps)
        assert ("failure" in mine[-1]) == (job.key in ("nan", "bug"))
    assert ("killed", {"step": 6, "steps": 8, "perplexity": 3 + 1 / 6}) in reports
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {f"{job.key}/log" for job in jobs} | {f"{key}/result.json" for key in ("plain", "killed", "nan")}
    assert left == kept | {"bug/checkpoint-3/step"}

    again = each.train(jobs, train, tmp_path)
    assert {key: again[key] for key in done} == done
    assert again["nan"] == Failure("NotFinite: the loss is nan", permanent=True)
    assert again["bug"] == {"perplexity": 1.0}  # past its third step there is nothing wrong with it
    assert [logged(tmp_path / key)[-2:] for key in ("nan", "bug")] == [["begin 0"], ["begin 3", "end"]]


def test_a_mailbox_that_is_killed_ends_no_training(local: None, tmp_path: Path) -> None:
    killed, seen = list[psutil.Process](), dict[str, int]()

    def kill(key: str, latest: dict[str, Any]) -> None:
        seen[key] = latest.get("step", seen.get(key, 0))
        if seen[key] == 2 and not killed:
            killed.extend(process for process, name in family(os.getpid()).items() if name.startswith("ray::_Mailbox"))
            killed[0].kill()

    jobs = [Job(f"job{n}", {"perplexity": 1.0, "sleep": 0.5}) for n in range(2)]
    assert train_all(jobs, train, tmp_path, SPEC, on_progress=kill) == {job.key: {"perplexity": 1.0} for job in jobs}
    assert len(killed) == 1
    assert max(seen.values()) > 4, "reports go on"


def test_states_are_saved_by_time_and_by_what_saving_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a twentieth of the time, nor more often than each half minute; the last one is kept."""
    for cost, most in ((0.1, 36_000 / 30), (10.0, 36_000 / 200)):
        clock, folder = [0.0], tmp_path / str(cost)
        folder.mkdir()
        monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda clock=clock: clock[0]))
        written: list[float] = []

        def write(made: Path, clock: list[float] = clock, written: list[float] = written, cost: float = cost) -> None:
            clock[0] += cost
            written.append(clock[0])
            (made / "at").write_text(str(clock[0]))

        with work.Saver(Session(folder), write, size=0) as saver:
            while clock[0] < 36_000:
                clock[0] += 1
                saver.step()
                saver._join()  # as fast a disk as one that needs no waiting
        assert 0.8 * most < len(written) <= most
        assert len(written) * cost <= 0.05 * clock[0]
        assert [(path.name, path.read_text()) for path in folder.rglob("at")] == [("at", str(written[-1]))]


def test_what_goes_wrong_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(Session, "keep", lambda session, folder: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"), work.Saver(Session(tmp_path), lambda folder: None, size=0) as saver:
        saver.step()


def patient(settings: dict[str, Any], session: Session) -> dict[str, Any]:
    """Goes on until it is to end; its state is the step."""
    step = int((session.checkpoint / "step").read_text()) if session.checkpoint else 0
    with work.Saver(session, lambda folder: (folder / "step").write_text(str(step)), size=0) as saver:
        for step in range(step + 1, settings["last"]):  # noqa: B020
            time.sleep(0.02)
            session.report({"step": step, "steps": settings["last"]})
            saver.step()
    return {"step": step}


def test_trainings_save_their_state_when_the_driver_is_to_end(each: Executor, tmp_path: Path) -> None:
    """By the driver's exception on Ray, by the signal in this process."""

    steps: dict[str, int] = {}

    def leave(key: str, latest: dict[str, Any]) -> None:
        steps[key] = latest.get("step", 0)
        if each.spec.workers and len(steps) == 2 and min(steps.values()) >= 5:
            raise KeyboardInterrupt
        if not each.spec.workers and steps[key] >= 5:
            os.kill(os.getpid(), signal.SIGINT)

    jobs = [Job(f"job{n}", {"last": 10**6}) for n in range(2)]
    with pytest.raises(KeyboardInterrupt):
        each.train(jobs, patient, tmp_path, on_progress=leave)
    begun = jobs if each.spec.workers else jobs[:1]
    saved = [int(next((tmp_path / job.key).glob("checkpoint-*/step")).read_text()) for job in begun]
    assert saved[0] >= 5
    assert not list(tmp_path.glob("*/result.json"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not work.WANTED.is_set()
    again = each.train([Job(job.key, {"last": 0}) for job in begun], patient, tmp_path)
    assert [again[job.key]["step"] for job in begun] == saved  # type: ignore[index]


def test_a_killed_driver_leaves_nothing_running_and_loses_nothing(tmp_path: Path) -> None:
    """The driver dies midway; called again, what had finished is not done again and what had begun goes on."""
    never = {"until": str(tmp_path / "never")}
    jobs = [Job(f"job{n}", {"perplexity": 1.0, **(never if n > 1 else {})}) for n in range(4)]
    run, file = tmp_path / "run", tmp_path / "driver.pkl"
    file.write_bytes(ray.cloudpickle.dumps((jobs, train, run, SPEC)))
    code = "import sys, pickle; from nas.workers import train_all; train_all(*pickle.load(open(sys.argv[1], 'rb')))"
    driver = subprocess.Popen([sys.executable, "-c", code, str(file)], stderr=subprocess.DEVNULL, start_new_session=True)
    assert wait_for(
        lambda: len(list(run.glob("*/result.json"))) >= 2 and bool(list(run.glob("job[23]/checkpoint-2"))),
        lambda: driver.poll() is None,
    )
    processes = family(driver.pid)
    assert any("raylet" in name for name in processes.values())
    driver.kill()
    driver.wait()
    # Two agents of Ray's, which do nothing, look up only once a minute whether they are needed.
    processes = {process: name for process, name in processes.items() if "Agent" not in name}
    assert wait_for(lambda: not any(map(is_alive, processes)))
    before = {job.key: logged(run / job.key) for job in jobs}
    Path(never["until"]).touch()
    results = train_all(jobs, train, run, SPEC)
    assert all(results[job.key] == {"perplexity": 1.0} for job in jobs)
    after = {job.key: logged(run / job.key) for job in jobs}
    assert all(lines.count("end") == 1 for lines in after.values())
    assert all(after[key] == before[key] for key in ("job0", "job1"))
    assert any("begin 2" in lines for lines in after.values())


def family(pid: int) -> dict[psutil.Process, str]:
    """A process's children and theirs, and what they are called."""
    return {child: child.cmdline()[0] for child in psutil.Process(pid).children(recursive=True) if child.cmdline()}
