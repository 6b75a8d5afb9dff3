"""A search for several settings of memory, the front of a finished run at any other, and a run that is extended."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import refused, said, told
from searches import SHAPE, SUPERNET, results, search, write_trial
from test_search import EARLY, copy_of
from test_tracking import children, client_of

import nas
from nas.errors import UserError
from nas.pareto import first_fronts
from nas.pareto import front as pareto_front
from nas.presets import presets
from nas.search.candidates import select_best_of_bands
from nas.search.front import Front
from nas.search.fronts import front_at
from nas.search.launch import extend, resume
from nas.search.progress import Silent
from nas.search.run import Journal, Run
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
    data = told(*words)
    assert data["memory"] == {"context": 16, "batch": 32, "dtype": "float32"}
    assert [row["memory_bytes"] for row in data["front"]] == [m.memory_bytes for m in front.members]
    assert "memory  at 16 tokens × 32, float32" in said(*words)
    middle = sorted(m.memory_bytes for m in front.configs)[len(front.configs) // 2]
    picked = told(*words, "--pick", f"memory_bytes<={middle}")
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
    assert f"also    nas front {run.argument} --context 16 --batch 32" in said("front", run.folder)
    page = Path(said("report", run.folder, "--to", tmp_path).strip())
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


def test_an_objective_at_a_setting_is_searched_by_and_limited(tmp_path: Path) -> None:
    three = ["memory_bytes", "memory_bytes_at_16x32", "perplexity"]
    limits, memory = {"memory_bytes_at_16x32": "150KiB"}, [{"context": 64}, {"context": 16, "batch": 32}]
    trial = Trial.load(write_trial(tmp_path, SUPERNET, objectives=three, limits=limits, memory=memory))
    assert trial.objectives == tuple(three)
    configs = [config for _, config in presets(SHAPE)]
    within = [config for config in configs if trial.space.meets_limits(config, HERE)]
    assert within == [c for c in configs if measure(SHAPE, c, THERE).memory_bytes <= 150 * 2**10]
    assert 0 < len(within) < len(configs)


def trained(run: Run) -> dict[Path, int]:
    """Every training of a run, with the time at which it ended."""
    return {path.relative_to(run.folder): path.stat().st_mtime_ns for path in run.folder.rglob("result.json")}


def searched(run: Run) -> list[Evaluation]:
    """What a search evaluated; it may have been faster."""
    return [replace(e, seconds=0) for e in run.searched()]


def stop_at(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """Ctrl-C once a search has appended so many entries to its journal."""
    append, left = Journal.append, iter(range(entries))

    def stopping(journal: Journal, entry: dict[str, object]) -> None:
        append(journal, entry)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stopping)


@pytest.mark.parametrize("kind", ["predictor_run", pytest.param("supernet_run", marks=pytest.mark.slow), "from_run"])
def test_an_extended_run_is_the_longer_run_and_does_nothing_twice(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It evaluates what a search of so many evaluations does, where proxies and single decisions are planned for as many; its
    front has that one's models, and its own of before. It is stopped in the middle, and resumed."""
    run = request.getfixturevalue(kind)
    more, longer = copy_of(run, tmp_path / "more"), copy_of(run, tmp_path / "longer", "front.json", "journal.jsonl")
    before, journal = trained(more), more.journal().path.read_text()
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            extend(more, Silent(), "+13", "+2")
    refused(lambda: more.front(), "the run has not finished")
    front = resume(more, Silent())

    data = longer.trial().to_data()
    data["search"] |= {"evaluations": 37, "began_with": 24}
    data["final"]["candidates"] = 4
    (longer.folder / "trial.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    whole = resume(longer, Silent())
    assert searched(more) == searched(longer)
    assert len(searched(more)) > len(run.searched())
    assert results(front) == results(run.front()) | results(whole)
    assert len(results(front)) > len(results(run.front()))
    assert more.journal().path.read_text().startswith(journal)
    assert before.items() <= trained(more).items()
    recorded = yaml.safe_load((more.folder / "trial.yaml").read_text())
    assert recorded == data | {"name": recorded["name"]}
    assert more.command().endswith(f"\nnas extend {more.argument} --evaluations 37 --candidates 4")
    assert run.command() == run.provenance()["command"]


def test_a_run_that_stopped_early_is_extended_too_and_what_was_stopped_stays_so(tmp_path: Path) -> None:
    run, front = search(tmp_path, SUPERNET, final={**EARLY, "presets": False})
    before = trained(run)
    paused = {path.parent.name for path in run.folder.glob("paused-1/*/result.json")}
    stopped = paused - {path.parent.name for path in run.folder.glob("final/*/result.json")}
    again = nas.open_run(str(run.folder)).extend(candidates=8).front.found
    assert stopped
    assert results(front).items() <= results(again).items()
    assert before.items() <= trained(run).items()
    assert not stopped & {path.parent.name for path in run.folder.glob("final/*/result.json")}
    assert len(list(run.folder.glob("paused-1/*/result.json"))) > len(paused)


def test_mlflow_has_one_run_of_it_and_what_it_says_now(from_run: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(from_run.folder.parent, tmp_path / "runs")) / from_run.name)
    front = extend(run, Silent(), "+13", "+2")
    client, link = client_of(run.folder)
    found = client.search_runs([link.experiment_id], "tags.kind = 'search'")
    assert [one.info.run_id for one in found] == [link.run_id]
    assert found[0].info.status == "FINISHED"
    assert found[0].data.tags["extended"] == "to 37 evaluations, 4 candidates"
    series = [point.step for point in client.get_metric_history(link.run_id, "hypervolume")]
    assert sorted(series)[-1] == 37
    rows = {row["hash"]: row for row in (*front.to_data()["front"], *front.to_data()["dominated"])}
    told = {child.data.params["hash"]: child.data.params for child in children(run.folder)}
    assert told.keys() == rows.keys()
    for name in ("neighbour", "within_noise"):
        wanted = {key: None if row[name] is None else str(row[name]) for key, row in rows.items()}
        assert {key: params.get(name) for key, params in told.items()} == wanted


def test_what_cannot_be_extended_is_refused_before_anything_is_changed(supernet_run: Run, tmp_path: Path) -> None:
    run = copy_of(supernet_run, tmp_path)
    for words, says in (
        ([], "the run has 24 evaluations and 2 candidates"),
        (["--evaluations", "+0"], "the run has 24 evaluations and 2 candidates"),
        (["--evaluations", "23"], "--evaluations 23: the run has 24 evaluations already"),
        (["--candidates=-1"], "--candidates: '-1' is no number; write +200"),
        (["--evaluations", "many"], "--evaluations: 'many' is no number"),
    ):
        refused(lambda words=words: said("extend", run.folder, *words), says)
    data = run.trial().to_data()
    data["data"]["max_bytes"] = 50_000
    (run.folder / "trial.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    refused(lambda: extend(run, Silent(), "+13"), "the text is not the one this run began with")
    with run.locked(), pytest.raises(UserError, match="another process works on this run"):
        extend(run, Silent(), "+13")
    assert run.front() == supernet_run.front()


def test_commands_print_the_front_also_where_the_machine_is_another(supernet_run: Run, tmp_path: Path) -> None:
    """The run was begun on a cluster that is gone: given workers stand in place of the trial's, which stays as it was."""
    run = copy_of(supernet_run, tmp_path)
    begun = run.trial().to_data() | {"run": {"workers": 3, "address": "gone:1"}}
    (run.folder / "trial.yaml").write_text(yaml.safe_dump(begun, sort_keys=False))
    shown = said("extend", run.folder, "--candidates", "+1", "--workers", 0, "--json")
    found = Front.from_data(run.trial().space.shape, json.loads(shown[shown.index("{") :]))
    assert results(found) == results(run.front())
    assert len(found.configs) == len(supernet_run.front().configs) + 1
    extended = run.trial()
    assert (extended.file.run.workers, extended.file.run.address) == (3, "gone:1")
    (run.folder / "front.json").unlink()
    shown = said("resume", run.folder, "--workers", 0, "--json")
    assert results(Front.from_data(extended.space.shape, json.loads(shown[shown.index("{") :]))) == results(found)
    assert run.trial() == extended
