"""Objectives are the user's: three of them through a whole search, limits and picks by them, and how some are measured."""

import shutil
from pathlib import Path

import pytest
import tiny
from commands import said, told
from searches import FROM, PREDICTOR, SHAPE, results, search, write_trial

from nas.errors import UserError
from nas.model.decoder import Decoder
from nas.pareto import front as pareto_front
from nas.report.measured import panels
from nas.report.tables import front_table
from nas.search import jobs
from nas.search.launch import resume
from nas.search.progress import Silent
from nas.search.publish import write_run_report
from nas.search.run import Run
from nas.search.trial import Trial
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.objectives import DEFAULT, OBJECTIVES, QUALITY, plan_values
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.tracking import Link
from nas.tracking.store import connect
from nas.tracking.view import view_state
from nas.training import measured
from nas.training.measured import ModelAtWork, measure_objectives, sample

NAMES = ("flops_per_token", "perplexity", "decode_tokens_per_second")
FIRST, MEASURED = "flops_per_token", "decode_tokens_per_second"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search by three objectives of which one is measured, tracked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(measured, "ENOUGH", -1.0)
        return search(tmp_path_factory.mktemp("objectives"), PREDICTOR, objectives=list(NAMES), tracking={})[0]


def test_a_front_of_three_objectives_is_what_nothing_dominates(run: Run) -> None:
    found = run.front()
    points = [(m.value(FIRST), -m.value(MEASURED), m.point[-1]) for m in found.configs]
    assert [m.point for m in found.members] == [points[i] for i in pareto_front(points)]
    assert len({e.costs[0] for e in run.searched()}) > 3


def test_a_config_is_measured_once_and_its_figures_are_in_every_row(run: Run) -> None:
    entries = list(run.speeds().read())
    known = run.measured()
    assert len(entries) == len(known)
    evaluations = (*run.front().evaluations, *run.searched())
    assert {e.config.hash for e in evaluations} <= set(known), "a predictor's dry run measures others"
    for e in evaluations:
        assert e.costs == (e.memory.flops_per_token, -known[e.config.hash][MEASURED])
        assert e.values == {name: known[e.config.hash][name] for name in (MEASURED, f"{MEASURED}_spread")}
        assert e.values[MEASURED] > 0 <= e.values[f"{MEASURED}_spread"]
        assert known[e.config.hash]["device"] == "cpu"


def test_bounds_pick_the_lowest_perplexity_within_all_of_them(run: Run) -> None:
    found = run.front()
    for m in found.configs:
        bounds = {name: m.value(name) for name in (FIRST, "memory_bytes", "unique_params")}
        fitting = [o.point[-1] for o in found.configs if all(o.value(name) <= limit for name, limit in bounds.items())]
        picked = found.pick(",".join(f"{name} <= {limit:.15g}" for name, limit in bounds.items()))
        assert picked.point[-1] == min(fitting)
    fastest = max(m.value(MEASURED) for m in found.configs)
    assert found.pick(f"memory_bytes<=1GiB,{MEASURED}>={fastest}").value(MEASURED) == fastest
    most = max(m.value("weight_bytes") for m in found.configs)
    assert found.pick(f"weight_bytes>={most / 1024:.15g}KiB").memory.weight_bytes == most
    assert found.pick("smallest").costs[0] == min(m.point[0] for m in found.configs)
    wrong = {
        "perplexity<=0.5": "no retrained model has perplexity of 0.5 or less; the smallest is perplexity<=",
        "perplexity<=1e9,kv_cache_bytes<=1": "kv_cache_bytes of 1 or less; the smallest is kv_cache_bytes<=",
        f"{MEASURED}>=1e9": f"of 1e\\+09 or more; the largest is {MEASURED}>=",
        "prefill_tokens_per_second>=1": "is no objective of this run",
        "memory<=3": "did you mean memory_bytes",
        "memory_bytes<=many": "write it as 300MiB",
        "flops_per_token<=many": "is no number above 0",
        "memory_bytes<=3MiB,": "write it as memory_bytes<=300MiB",
    }
    for pick, says in wrong.items():
        with pytest.raises(UserError, match=says):
            found.pick(pick)


def test_tables_pages_and_pictures_show_every_objective(run: Run, tmp_path: Path) -> None:
    found = run.front()
    words = [OBJECTIVES[name].words for name in NAMES]
    assert {"memory", *words} <= set(front_table(found.evaluations)[0])
    page = write_run_report(run, tmp_path)
    assert all(word in page.read_text() for word in words)
    with_values = tiny.read_csv(SHAPE, (page.parent / "evaluations.csv").read_text())
    values = {e.config.hash: e.values for e in (*found.evaluations, *run.searched())}
    assert all(e.values == values[e.config.hash] for e in with_values)
    assert f"{OBJECTIVES[FIRST].words}, MFLOP" in (run.folder / "front.html").read_text()
    assert "operations for a token against perplexity" in (run.folder / "front.html").read_text()
    assert "by operations for a token" in said("front", run.folder)
    assert panels(found.evaluations)[0].all[0].place[0] == found.configs[0].value(FIRST) / 1e6


def test_a_new_limit_on_any_of_them_is_answered(run: Run) -> None:
    least = min(measure(SHAPE, e.config, MemorySpec(context=64)).kv_read_bytes_per_token for e in run.searched())
    assert told("front", run.folder, "--limit", f"kv_read_bytes_per_token={least}")["kv_read_bytes_per_token"] <= least


def test_mlflow_has_every_objective_in_its_rows_and_its_view(run: Run) -> None:
    link = Link.load(run.folder)
    assert link
    client = connect(link.uri)
    rows = client.search_runs([link.experiment_id], f"tags.mlflow.parentRunId = '{link.run_id}'")
    assert len(rows) == len(run.front().configs)
    assert all({*NAMES, f"{MEASURED}_spread"} <= set(row.data.metrics) for row in rows)
    view = view_state("search", [], run.trial().objectives)
    assert view["orderByKey"] == f"metrics.`{FIRST}`"
    assert [c["xaxis"]["key"] for c in view["compareRunCharts"] if c["type"] == "SCATTER"] == [FIRST, MEASURED]
    assert f"metrics.`{MEASURED}`" in view["selectedColumns"]
    series = client.get_metric_history(link.run_id, "hypervolume")
    assert [one.value for one in series] == sorted(one.value for one in series)
    assert series[-1].value > 0


def test_a_run_goes_on_without_measuring_again(run: Run, tmp_path: Path) -> None:
    """Nothing is done again but the front, and it is the same to the last digit."""
    copy = Run(tmp_path / run.name)
    shutil.copytree(run.folder, copy.folder)
    for name in ("front.json", "tracking.json", "tracking.jsonl"):
        (copy.folder / name).unlink()
    trial = copy.folder / "trial.yaml"
    trial.write_text(trial.read_text().replace("enabled: true", "enabled: false"))
    before = {name: (copy.folder / name).read_bytes() for name in ("measured.jsonl", "journal.jsonl")}
    assert results(resume(copy, Silent())) == results(run.front())
    assert {name: (copy.folder / name).read_bytes() for name in before} == before
    assert copy.front() == run.front()


def test_a_limit_on_what_is_measured_leaves_configs_out_before_they_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by its bytes; configs that cannot be measured fail, with their reason in the journal."""

    def by_bytes(shape: ModelShape, config: SharingConfig, spec: MemorySpec, names: tuple[str, ...]) -> dict[str, float]:
        size = measure(shape, config, spec).memory_bytes
        if size % 3 == 0:
            raise MemoryError("too large")
        return dict.fromkeys(names, 1000000.0 / size)

    monkeypatch.setattr(jobs, "measure_objectives", by_bytes)
    dense = measure(SHAPE, SharingConfig.dense(SHAPE), MemorySpec(context=64)).memory_bytes
    limits = {MEASURED: str(1e6 / dense * 1.25), "prefill_tokens_per_second": 1}
    untrained = {"supernet": {"steps": 0}, "split": None, "final": {"steps": 0, "candidates": 2}, "search": {"evaluations": 12}}
    changed, front = search(tmp_path, FROM, limits=limits, **untrained)
    entries = list(changed.journal().read())
    assert {e["hash"] for e in entries if "failure" in e} == {
        SharingConfig.from_data(SHAPE, e["config"]).hash for e in entries if "too large" in e.get("failure", "")
    }
    found = [*changed.searched(), *changed.converted(), *front.evaluations]
    assert found
    assert all(e.values[MEASURED] >= 1e6 / dense * 1.25 for e in (*changed.searched(), *front.evaluations))
    assert any(speed.get(MEASURED, 1e9) < 1e6 / dense * 1.25 for speed in changed.measured().values()), "some were too slow"
    assert any("failure" in speed for speed in changed.measured().values())


class Clock:
    """A workload that takes the time that it says."""

    spec = MemorySpec(context=32, batch=4)

    def prefill_seconds(self) -> float:
        return 0.5

    def decode_seconds(self) -> float:
        return 0.25

    def peak_bytes(self) -> float:
        return 7.0


def test_measured_rows_are_rates_of_all_sequences() -> None:
    found = {name: row.measure(Clock()) for name, row in OBJECTIVES.items() if row.measure}
    assert found == {"decode_tokens_per_second": 16, "prefill_tokens_per_second": 256, "peak_memory_bytes": 7}


def test_a_model_at_work_holds_its_weights_and_its_cache_and_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the peak is a count of bytes: the same each time, and no less than what stays."""
    monkeypatch.setattr(measured, "ENOUGH", -1.0)
    spec = MemorySpec(context=64, batch=2)
    configs = [[{}] * 4, [{"kv_heads": 1}] * 4, [{}, *[{"tie": 0}] * 3], [{}, *[{"kv": 0}] * 3], [{"window": 8}] * 4]
    names = [name for name, row in OBJECTIVES.items() if row.measure]
    peaks = []
    for layers in configs:
        config = SharingConfig.make(SHAPE, layers)
        found, memory = measure_objectives(SHAPE, config, spec, names), measure(SHAPE, config, spec)
        assert found["peak_memory_bytes_spread"] == 0
        assert found.keys() == {end for name in names for end in (name, f"{name}_spread")}
        assert all(value > 0 for name, value in found.items() if name in names)
        assert memory.memory_bytes <= found["peak_memory_bytes"] <= memory.memory_bytes + 20 * 2 * 64 * 256 * 4
        peaks.append(found["peak_memory_bytes"])
    assert min(peaks[1:4]) < peaks[0]
    assert peaks[0] == measure_objectives(SHAPE, SharingConfig.dense(SHAPE), spec, names)["peak_memory_bytes"]


def test_a_measurement_is_warmed_up_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter(range(100))
    assert sample(lambda: float(next(taken))) == [float(n) for n in range(2, 11)], "two warm up, nine count"
    monkeypatch.setattr(measured, "ENOUGH", -1.0)
    assert len(sample(lambda: float(next(taken)))) == 3, "of what takes long"


def test_a_decoded_token_reads_a_full_cache_and_leaves_it() -> None:
    work = ModelAtWork(Decoder(SHAPE, SharingConfig.dense(SHAPE).resolve(SHAPE)), MemorySpec(context=12, batch=3))
    assert [work.cache.length, work.cache.bytes] == [11, 11 * 3 * 4 * 2 * SHAPE.hidden_size * 4]
    assert work.decode_seconds() > 0
    assert work.cache.length == 11
    alone = ModelAtWork(work.model, MemorySpec(context=1))
    assert alone.decode_seconds() > 0, "no token is before it"


def test_perplexity_is_the_last_objective(tmp_path: Path) -> None:
    assert Trial.load(write_trial(tmp_path, PREDICTOR)).objectives == DEFAULT
    mixed = Trial.load(write_trial(tmp_path, PREDICTOR, objectives=[QUALITY, "unique_params"]))
    assert mixed.objectives == ("unique_params", QUALITY)


def test_every_row_in_closed_form_has_its_value_of_a_plan() -> None:
    plan = SharingConfig.dense(SHAPE).resolve(SHAPE)
    values = plan_values(SHAPE, plan, MemorySpec(), list(OBJECTIVES))
    assert set(values) == {name for name, row in OBJECTIVES.items() if row.in_closed_form}
    assert all(OBJECTIVES[name].show(value) and value > 0 for name, value in values.items())
