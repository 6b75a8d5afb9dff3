"""Real Ray: what the pool and the trainings promise, also while processes and machines die."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from nas.config import build as load_spec
from nas.config import parse_yaml
from nas.errors import UserError
from nas.model.supernet import Supernet
from nas.presets import PRESETS
from nas.sharing.shape import ModelShape
from nas.training.evaluation import NotFinite, measure_losses
from nas.workers import EarlyStopping, Failure, RunSpec
from nas.workers.cluster import cluster, session_folder
from nas.workers.pool import DEPTH, Pool, Task
from nas.workers.quiet import ray
from nas.workers.trainings import Job, Session, train_all

SPEC = RunSpec(workers=2, retries=2)

# A worker cannot import a test module: what is sent from here goes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    with cluster(RunSpec(workers=4)):  # room for the pool that stays open, and for what a test starts beside it
        yield


# ---- settings, and addresses where no cluster is (before any cluster is started here)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (RunSpec, "workers: 0", "t.yaml:1: workers: 0 is too small; use 1 or more"),
        (RunSpec, "workers: 2\nretries: -1", "t.yaml:2: retries: -1 is too small; use 0 or more"),
        (
            RunSpec,
            "gpus_per_worker: 1.5",
            "t.yaml:1: gpus_per_worker: 1.5 cannot be reserved; use a whole number, or a part of one",
        ),
        (RunSpec, "worker: 2", "t.yaml:1: worker: unknown key; did you mean workers?"),
        (EarlyStopping, "grace: 0", "t.yaml:1: grace: 0 is too small; use 1 or more"),
        (EarlyStopping, "grace: 9\nreduction: 1", "t.yaml:2: reduction: 1 is too small; use 2 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: type, text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_spec(kind, parse_yaml(text, "t.yaml"))
    assert str(error.value) == said


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("cpus", [0, 0.5, 1, 4])
@pytest.mark.parametrize("cores", [1, 2, 7, 64])
def test_threads_never_crowd_a_node(workers: int, cpus: float, cores: int) -> None:
    threads = RunSpec(workers=workers, cpus_per_worker=cpus).threads(cores)
    assert threads >= 1
    assert threads in (1, cpus) or workers * threads <= cores


def test_ray_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, nas.workers; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def deaf() -> Iterator[str]:
    """The address of something that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "run.address: nothing answers at 127.0.0.1:1"),
        ("deaf", "is not Ray; name the cluster's head as host:port"),
        ("somewhere", "run.address: 'somewhere' is not an address; name the cluster's head as host:port"),
        ("ray://head:10001", "run.address: ray://head:10001 is Ray Client"),
    ],
)
def test_an_address_without_a_cluster_is_told_at_once(
    address: str, said: str, deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.workers.cluster.PATIENCE", 1.0)
    assert not ray.is_initialized()
    begin = time.monotonic()
    with pytest.raises(UserError) as error, cluster(RunSpec(address=address.replace("deaf", deaf))):
        pass
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 10
    assert not ray.is_initialized()


def test_a_cluster_clears_up_after_one_that_was_killed_and_leaves_the_living_alone() -> None:
    code = "import time, nas.workers.cluster as c\nwith c.session_folder() as path: print(path, flush=True); time.sleep(99)"
    folders = []
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


@pytest.mark.parametrize("need", [{"gpus_per_worker": 64}, {"cpus_per_worker": 1000}])
def test_a_worker_that_fits_nowhere_is_told(local: None, need: dict[str, Any]) -> None:
    with (
        pytest.raises(UserError, match=r"run: no machine has .* for a worker; at most 4 cpus_per_worker"),
        cluster(RunSpec(**need)),
    ):
        pass


# ---- the pool


def make(payload: Any, weights: dict[str, torch.Tensor]) -> Callable[[Any], Any]:
    """An evaluator that does as its task says."""

    def evaluate(data: dict[str, Any]) -> Any:
        time.sleep(data.get("sleep", 0))
        return ORDERS[data["do"]](data, payload, weights)

    return evaluate


def die_once(data: dict[str, Any], payload: Any, weights: Any) -> str:
    mark = Path(data["mark"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def raise_(data: dict[str, Any], payload: Any, weights: Any) -> None:
    raise data["error"]


def score(data: dict[str, Any], payload: torch.Tensor, weights: dict[str, torch.Tensor]) -> float:
    supernet = Supernet(SHAPE, torch.Generator(), EXTRAS)
    supernet.load_state_dict({name: weights[name] for name in supernet.state_dict()}, assign=True)
    return measure_losses(supernet.subnet(data["config"]), payload, autocast=False).perplexity


ORDERS: dict[str, Callable[..., Any]] = {
    "square": lambda data, payload, weights: data["x"] ** 2,
    "score": score,
    "look": lambda data, payload, weights: (payload, weights, torch.get_num_threads()),
    "address": lambda data, payload, weights: (os.getpid(), _mapped(weights["large"])),
    "raise": raise_,
    "die": lambda data, payload, weights: os.kill(os.getpid(), signal.SIGKILL),
    "die once": die_once,
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


SHAPE = ModelShape(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
EXTRAS = dict(tiny.extras(SHAPE))  # plain data, for workers cannot import `tiny`
SUPERNET = Supernet(SHAPE, torch.Generator().manual_seed(0), EXTRAS)
PAYLOAD = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(1))  # evaluation windows
WEIGHTS = SUPERNET.state_dict() | {
    "large": torch.randn(512, 1024),
    "half": torch.randn(3, 5).bfloat16(),
    "scalar": torch.tensor(7),
    "turned": torch.randn(4, 6).T,
    "grad": torch.randn(2, requires_grad=True),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(scope="module")
def pool(local: None) -> Iterator[Pool[Any, Any]]:
    with Pool(SPEC, make, PAYLOAD, WEIGHTS) as pool:
        yield pool


@pytest.mark.parametrize("ordered", [False, True])
def test_every_task_has_its_result_once(pool: Pool[Any, Any], ordered: bool) -> None:
    tasks = squares(50)
    results = list(pool.run(tasks, ordered))
    assert sorted((task.data["x"], result) for task, result in results) == [(n, n**2) for n in range(50)]
    assert not ordered or [task for task, _ in results] == tasks
    assert list(pool.run([])) == []


def test_weights_arrive_as_they_were_and_every_worker_reads_the_same_bytes(pool: Pool[Any, Any]) -> None:
    (_, (payload, arrived, threads)), *_ = pool.run([Task("look", {"do": "look"})])
    assert payload.equal(PAYLOAD)
    assert threads == SPEC.threads(len(os.sched_getaffinity(0)))
    for name, weight in WEIGHTS.items():
        torch.testing.assert_close(arrived[name], weight.detach(), rtol=0, atol=0)
    places = dict(result for _, result in pool.run([Task(n, {"do": "address", "sleep": 0.1}) for n in range(8)]))
    assert len(places) == SPEC.workers
    assert len(set(places.values())) == 1
    assert next(iter(places.values()))[0] != "0"


def test_tasks_are_asked_for_with_all_results_known_but_those_under_way(pool: Pool[Any, Any]) -> None:
    told = 0

    def ask() -> Iterator[Task[Any]]:
        for n in range(30):
            assert n - told <= DEPTH * SPEC.workers
            yield Task(n, {"do": "square", "x": n})

    for _ in pool.run(ask()):
        told += 1
    assert told == 30


def test_in_order_a_search_repeats_exactly(pool: Pool[Any, Any]) -> None:
    def search(seed: int) -> list[int]:
        rng, known = random.Random(seed), [1]

        def ask() -> Iterator[Task[Any]]:
            for n in range(20):
                yield Task(n, {"do": "square", "x": (sum(known) + n) % 97, "sleep": rng.random() / 50})

        known.extend(result for _, result in pool.run(ask(), ordered=True))
        return known

    assert search(0) == search(1)  # the seed decides only how long each task takes


@pytest.mark.parametrize(
    ("data", "reason", "permanent"),
    [
        ({"do": "raise", "error": NotFinite("the loss is nan")}, "NotFinite: the loss is nan", True),
        ({"do": "raise", "error": ValueError("first\nsecond")}, "ValueError: first", False),
        ({"do": "raise", "error": MemoryError()}, "out of memory: MemoryError", False),
        ({"do": "raise", "error": torch.OutOfMemoryError("CUDA out of memory. Tried")}, "out of memory: CUDA", False),
        ({"do": "exhaust"}, "out of memory: ", False),
        ({"do": "lambda"}, "TypeError: cannot pickle", False),
    ],
    ids=["nan", "exception", "memory", "gpu memory", "cpu memory", "unpicklable"],
)
def test_a_failed_task_says_why_and_the_next_goes_on(
    pool: Pool[Any, Any], data: dict[str, Any], reason: str, permanent: bool
) -> None:
    (_, failure), (_, result) = pool.run([Task("bad", data), Task("good", {"do": "square", "x": 3})], ordered=True)
    assert isinstance(failure, Failure)
    assert failure.reason.startswith(reason)
    assert "\n" not in failure.reason
    assert failure.permanent == permanent
    assert result == 9


@pytest.mark.slow
def test_the_tasks_of_a_killed_worker_are_done_again(
    pool: Pool[Any, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deadly = [Task(n, {"do": "die once", "mark": str(tmp_path / str(n))}) for n in range(2)]
    tasks = [*squares(5, sleep=0.02), *deadly, *squares(5, sleep=0.02), Task("always", {"do": "die"}), *squares(5)]
    results = list(pool.run(tasks))
    assert sorted(id(task) for task, _ in results) == sorted(map(id, tasks))
    by_task = {id(task): result for task, result in results}
    assert [by_task[id(task)] for task in deadly] == ["alive", "alive"]
    assert by_task[id(tasks[12])] == Failure("its worker died 3 times: its process was killed, or crashed")
    assert all(by_task[id(task)] == task.data["x"] ** 2 for task in tasks if task.data["do"] == "square")
    assert capfd.readouterr().out == ""


def test_a_run_can_be_left(pool: Pool[Any, Any]) -> None:
    run = pool.run(squares(100, sleep=0.05))
    next(run)
    run.close()
    assert [result for _, result in pool.run(squares(4), ordered=True)] == [0, 1, 4, 9]


def refuse(payload: str, weights: Any) -> Callable[[Any], Any]:
    if payload == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError(payload, where="here")


@pytest.mark.parametrize(("payload", "said"), [("no such thing", "here: no such thing"), ("die", "workers die as they start")])
def test_what_build_raises_is_raised_on_entering(local: None, payload: str, said: str) -> None:
    with pytest.raises(UserError, match=said), Pool(RunSpec(workers=1, retries=0), refuse, payload):
        pass


def test_subnets_on_mapped_weights_score_as_on_the_supernet_itself(pool: Pool[Any, Any]) -> None:
    configs = [preset.build(SHAPE) for preset in PRESETS.values() if preset.sizes(SHAPE)]
    here = [measure_losses(SUPERNET.subnet(config), PAYLOAD, autocast=False).perplexity for config in configs]
    there = [result for _, result in pool.run([Task(c.hash, {"do": "score", "config": c}) for c in configs], ordered=True)]
    assert there == pytest.approx(here, rel=1e-6)


# ---- trainings


def train(settings: dict[str, Any], session: Session) -> dict[str, Any]:
    """Eight steps, each with a checkpoint; what happens at which step is in the settings."""
    state = session.checkpoint
    begin = int((state / "step").read_text()) if state else 0
    _log(session.folder, f"begin {begin}")
    for step in range(begin + 1, 9):
        time.sleep(settings.get("sleep", 0))
        made = Path(tempfile.mkdtemp(dir=session.folder))
        (made / "step").write_text(str(step))
        session.report({"step": step, "steps": 8, "perplexity": settings["perplexity"] + 1 / step}, made)
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


@pytest.mark.slow
def test_trainings_end_fail_and_go_on_each_by_itself(local: None, tmp_path: Path) -> None:
    jobs = [
        Job("plain", {"perplexity": 4.0}),
        Job("killed", {"perplexity": 3.0, "die at": 5}),
        Job("nan", {"perplexity": 2.0, "raise at": 2, "error": NotFinite("the loss is nan")}),
        Job("bug", {"perplexity": 1.0, "raise at": 3, "error": ValueError("no")}),
    ]
    told: list[tuple[int, int, dict[str, Any]]] = []
    expected: dict[str, Any] = {
        "plain": {"perplexity": 4.0, "stopped_early": False},
        "killed": {"perplexity": 3.0, "stopped_early": False},
    }
    results = train_all(jobs, train, tmp_path, SPEC, on_progress=lambda *given: told.append(given))
    assert list(results) == ["plain", "killed", "nan", "bug"]
    assert {key: results[key] for key in expected} == expected
    assert [results[key].reason for key in ("nan", "bug")] == ["NotFinite: the loss is nan", "ValueError: no"]  # type: ignore[union-attr]
    assert logged(tmp_path / "killed") == ["begin 0", "begin 5", "end"]
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (4, 4)
    assert {"key": "killed", "step": 6, "steps": 8, "perplexity": 3 + 1 / 6} in [latest for _, _, latest in told]
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {f"{job.key}/log" for job in jobs} | {f"{key}/result.json" for key in ("plain", "killed", "nan")}
    assert left == kept | {"bug/checkpoint-3/step"}

    again = train_all(jobs, train, tmp_path, SPEC)
    assert {key: again[key] for key in expected} == expected
    assert again["nan"] == Failure("NotFinite: the loss is nan", permanent=True)
    assert again["bug"] == {"perplexity": 1.0, "stopped_early": False}  # past its third step there is nothing wrong with it
    assert [logged(tmp_path / key)[-2:] for key in ("plain", "nan", "bug")] == [
        ["begin 0", "end"],
        ["begin 0"],
        ["begin 3", "end"],
    ]


def test_early_stopping_ends_the_worst_and_says_so(local: None, tmp_path: Path) -> None:
    jobs = [Job(f"job{n}", {"perplexity": float(n)}) for n in (1, 5, 2, 6)]
    spec = RunSpec(workers=1)
    results = train_all(jobs, train, tmp_path, spec, EarlyStopping(grace=2, reduction=2))
    stopped = {key: result["stopped_early"] for key, result in results.items() if isinstance(result, dict)}
    assert stopped == {"job1": False, "job5": True, "job2": True, "job6": True}
    assert results["job5"] == {"step": 2, "steps": 8, "perplexity": 5.5, "stopped_early": True}
    assert [logged(tmp_path / job.key) for job in jobs] == [["begin 0", "end"], *[["begin 0"]] * 3]
    assert train_all(jobs, train, tmp_path, spec, EarlyStopping(grace=2, reduction=2)) == results


@pytest.mark.parametrize(
    "kind", [signal.SIGKILL, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (signal.SIGINT, signal.SIGTERM))]
)
def test_a_killed_driver_leaves_nothing_running_and_loses_nothing(tmp_path: Path, kind: signal.Signals) -> None:
    """The driver dies midway; called again, what had finished is not done again and what had begun goes on."""
    pause = 0.5 if kind == signal.SIGKILL else 5.0  # a driver that ends in its own way lets trainings go on for some seconds
    jobs = [Job(f"job{n}", {"perplexity": 1.0, "sleep": 0.0 if n < 2 else pause}) for n in range(4)]
    file = tmp_path / "driver.pkl"
    file.write_bytes(ray.cloudpickle.dumps((jobs, train, tmp_path / "run", SPEC)))
    code = "import sys, pickle; from nas.workers.trainings import train_all; train_all(*pickle.load(open(sys.argv[1], 'rb')))"
    driver = subprocess.Popen([sys.executable, "-c", code, str(file)], stderr=subprocess.DEVNULL, start_new_session=True)
    run = tmp_path / "run"
    wait_for(lambda: len(list(run.glob("*/result.json"))) >= 2 and list(run.glob("job[23]/checkpoint-[2-7]")))
    processes = family(driver.pid)
    assert any("raylet" in name for name in processes.values())
    os.killpg(driver.pid, kind) if kind == signal.SIGINT else driver.send_signal(kind)
    driver.wait(30)
    if kind == signal.SIGKILL:  # two agents of Ray's, which do nothing, look up only once a minute whether they are needed
        processes = {pid: name for pid, name in processes.items() if "Agent" not in name}
    wait_for(lambda: not any(map(alive, processes)))
    before = {job.key: logged(tmp_path / "run" / job.key) for job in jobs}
    results = train_all(jobs, train, tmp_path / "run", SPEC)
    assert all(results[job.key] == {"perplexity": 1.0, "stopped_early": False} for job in jobs)
    for key, lines in before.items():
        after = logged(tmp_path / "run" / key)
        assert after.count("end") == 1
        if "end" in lines:
            assert after == lines
    assert sum("end" in lines for lines in before.values()) >= 2
    assert any(line.startswith("begin") and line != "begin 0" for key in before for line in logged(tmp_path / "run" / key))


def wait_for(done: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def family(pid: int) -> dict[int, str]:
    """A process's children and theirs, and what they are called."""
    import psutil

    return {child.pid: child.cmdline()[0] for child in psutil.Process(pid).children(recursive=True) if child.cmdline()}


def alive(pid: int) -> bool:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


# ---- machines that go away


@pytest.mark.slow
def test_work_goes_on_when_a_machine_of_the_cluster_goes_away(tmp_path: Path) -> None:
    """Two nodes with one worker each; the second is cut off midway, a third comes, and is cut off while it trains."""
    ray.shutdown()
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1)
    spec = RunSpec(workers=2, address=nodes.address)
    tasks = [Task(n, {"do": "where", "sleep": 0.15}) for n in range(60)]
    seen: list[tuple[Any, Any]] = []
    try:
        with Pool(spec, make, None) as pool:
            for task, node in pool.run(tasks):
                seen.append((task.key, node))
                if len(seen) == 20:
                    nodes.remove_node(second, allow_graceful=False)
                if len(seen) == 25:
                    third = nodes.add_node(num_cpus=1)
            assert {node for _, node in seen[:20]} >= {second.node_id}
            # the worker comes back on the machine that came
            wait_for(lambda: len({node for _, node in pool.run(tasks[:4])}) == 2)
        assert not ray.is_initialized()
        cut: list[bool] = []

        def watch(done: int, total: int, latest: dict[str, Any]) -> None:
            if latest.get("step") == 4 and not cut:
                cut.append(nodes.remove_node(third, allow_graceful=False))

        jobs = [Job(f"job{n}", {"perplexity": 1.0, "sleep": 0.2}) for n in range(2)]
        results = train_all(jobs, train, tmp_path, spec, on_progress=watch)
    finally:
        nodes.shutdown()
    assert results == {job.key: {"perplexity": 1.0, "stopped_early": False} for job in jobs}
    begun = sorted((logged(tmp_path / job.key) for job in jobs), key=len)
    assert begun[0][0] == begun[1][0] == "begin 0"
    assert [len(lines) for lines in begun] == [2, 3]  # one was lost with its machine, and went on where it was
    assert sorted(key for key, _ in seen) == list(range(60))
    assert all(isinstance(node, str) for _, node in seen)
    assert {node for _, node in seen[-5:]} != {second.node_id}
