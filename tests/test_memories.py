"""Memory at several settings: one search with a front for each, and the front of a finished run at any other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from searches import SHAPE, SUPERNET, search, write_trial
from test_runs import invoke
from test_search import EARLY
from test_tracking import children, client_of

from nas.errors import UserError
from nas.pareto import first_fronts
from nas.pareto import front as pareto_front
from nas.presets import presets
from nas.search.candidates import select_best_of_bands
from nas.search.fronts import front_at
from nas.search.run import Run
from nas.search.trial import Trial
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.objectives import OBJECTIVES, plan_values
from nas.training.evaluation import Evaluation

HERE, THERE = MemorySpec(context=64), MemorySpec(context=16, batch=32)


def memory_of(e: Evaluation, spec: MemorySpec) -> int:
    return measure(SHAPE, e.config, spec).memory_bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search at two settings, with early stopping, tracked beside the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        memory = [{"context": 64}, {"context": 16, "batch": 32}]
        return search(tmp_path_factory.mktemp("memories"), SUPERNET, memory=memory, final=EARLY, tracking={})[0]


@pytest.mark.parametrize("kind", ["supernet_run", "from_run"])
def test_a_finished_run_has_its_front_at_any_setting(kind: str, request: pytest.FixtureRequest) -> None:
    done, spec = request.getfixturevalue(kind), replace(THERE, dtype="float32")
    front, where = front_at(done, {"context": 16, "batch": 32, "dtype": "float32"})
    assert where == spec
    before = {(e.config, e.seed): e for e in done.front().evaluations}
    points = [(memory_of(e, spec), e.validation_perplexity) for e in front.evaluations]
    assert [m.point for m in front.members] == [points[i] for i in pareto_front(points)]
    for e in front.evaluations:
        assert e.memory == measure(done.trial().space.shape, e.config, spec)
        assert e.losses == before[e.config, e.seed].losses
    assert front_at(done, {})[0] == done.front() == front.at(SHAPE, done.trial().file.memory)
    words = ("front", done.folder, "--context", 16, "--batch", 32, "--dtype", "float32")
    data = json.loads(invoke(*words, "--json"))
    assert data["memory"] == {"context": 16, "batch": 32, "dtype": "float32"}
    assert [row["memory_bytes"] for row in data["front"]] == [m.memory_bytes for m in front.members]
    assert "memory  at 16 tokens × 32, float32" in invoke(*words)
    middle = sorted(m.memory_bytes for m in front.configs)[len(front.configs) // 2]
    picked = json.loads(invoke(*words, "--pick", f"memory_bytes<={middle}", "--json"))
    assert picked["hash"] == front.pick(f"memory_bytes<={middle}").config.hash
    with pytest.raises(UserError, match="--context: 2049 tokens are more than the model's max_position_embeddings=2048"):
        front_at(done, {"context": 2049})


def test_the_first_setting_steers_and_every_row_has_the_bytes_of_each(run: Run, supernet_run: Run) -> None:
    assert run.trial().memories == [HERE, THERE]
    for mine, theirs in zip(run.searched(), supernet_run.searched(), strict=True):
        there = measure(SHAPE, mine.config, THERE)
        own = {"memory_bytes_at_16x32": there.memory_bytes, "kv_cache_bytes_at_16x32": there.kv_cache_bytes}
        assert replace(mine, seconds=0) == replace(theirs, seconds=0, values=own)
    (spec,) = run.trial().file.other_memory
    assert run.front().pick("memory_bytes_at_16x32<=1GiB") in run.front().evaluations
    front, _ = front_at(run, {"context": spec.context, "batch": spec.batch})
    for m in front.configs:
        assert m.memory_bytes == m.value("memory_bytes") == m.first.values["memory_bytes_at_16x32"] == memory_of(m.first, THERE)


def test_candidates_are_of_each_settings_front_and_so_is_what_goes_on(run: Run) -> None:
    searched, named = run.searched(), {config for _, config in presets(SHAPE)}
    chosen = set(named)
    for spec in (HERE, THERE):
        chosen |= set(select_best_of_bands([e.at(SHAPE, spec) for e in searched], EARLY["candidates"] // 2, chosen))
    by_hash = {e.config.hash: e for e in searched}
    paused = [{path.parent.name.partition("-")[0]: path for path in run.folder.glob(f"paused-{n}/*/result.json")} for n in (1, 2)]
    assert {by_hash[key].config for key in paused[0]} - named == chosen - named
    assert len(chosen - named) == EARLY["candidates"]
    losses = {key: json.loads(path.read_text())["loss_nats_per_token"] for key, path in paused[0].items()}
    keys, count = list(losses), math.ceil(len(losses) / 2)
    kept = {
        keys[i]
        for spec in (HERE, THERE)
        for i in first_fronts([(memory_of(by_hash[key], spec), losses[key]) for key in keys], count)
    }
    assert set(paused[1]) == kept


def test_pages_reports_and_mlflow_have_each_front(run: Run, tmp_path: Path) -> None:
    for name in ("front.png", "front.html", "front-16x32.png", "front-16x32.html"):
        assert (run.folder / name).stat().st_size > 10_000
    client, link = client_of(run.folder)
    assert {"front.html", "front-16x32.html"} <= {file.path for file in client.list_artifacts(link.run_id)}
    assert all("memory_bytes_at_16x32" in child.data.metrics for child in children(run.folder))
    assert f"also    nas front {run.argument} --context 16 --batch 32" in invoke("front", run.folder)
    page = Path(invoke("report", run.folder, "--to", tmp_path).strip())
    assert "## Front at 16 tokens × 32" in page.read_text()
    assert (page.parent / "front-16x32.png").exists()


def test_an_objective_at_a_setting_is_a_row_of_its_name() -> None:
    for _, config in presets(SHAPE):
        plan = config.resolve(SHAPE)
        names = [name for name, row in OBJECTIVES.items() if row.in_closed_form]
        there = plan_values(SHAPE, plan, HERE, [f"{name}_at_16x32" for name in names])
        assert list(there.values()) == list(plan_values(SHAPE, plan, THERE, names).values())
    for name in ("perplexity_at_16x32", "memory_bytes_at_0x1", "memory_bytes_at_16", "bytes_at_1x1", "peak_memory_bytes_at_1x1"):
        assert name not in OBJECTIVES


def test_settings_that_a_trial_cannot_have_are_refused_with_their_line(tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(UserError) as caught:
            Trial.load(write_trial(tmp_path, SUPERNET, **changes))
        return str(caught.value)

    first, other = {"context": 64}, {"context": 16, "batch": 32}
    assert "16 tokens × 32, float16: another setting differs" in refused(memory=[first, other | {"dtype": "float16"}])
    assert "another setting differs from the first" in refused(memory=[first, other, first])
    long = refused(memory=[first, {"context": 4096}])
    assert "trial.yaml:" in long
    assert "other_memory.0.context: 4096 tokens are more than the model's max_position_embeddings=2048" in long
    assert "memory.contxt: unknown key; did you mean context?" in refused(memory=[{"contxt": 64}, other])
    assert "batch: 0 is too small; use 1 or more" in refused(memory=[first, {"batch": 0}])
    speed = ["decode_tokens_per_second", "perplexity"]
    assert "one of these is measured; leave out the other settings" in refused(memory=[first, other], objectives=speed)
    assert "memory: " in refused(memory=[])
    three = ["memory_bytes", "memory_bytes_at_16x32", "perplexity"]
    trial = Trial.load(write_trial(tmp_path, SUPERNET, objectives=three, limits={"memory_bytes_at_16x32": "150KiB"}))
    assert trial.objectives == tuple(three)
    configs = [config for _, config in presets(SHAPE)]
    within = [config for config in configs if trial.space.meets_limits(config, HERE)]
    assert within == [c for c in configs if measure(SHAPE, c, THERE).memory_bytes <= 150 * 2**10]
    assert 0 < len(within) < len(configs)
