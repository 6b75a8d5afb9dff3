"""A whole search on a tiny real model: real text, real Ray, and every promise about its run folder."""

import json
import random
import shutil
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny as models
import torch
import yaml
from nas.search.inherited import SupernetEvaluator
from nas.search.predicted import PredictorEvaluator
from nas.search.published import export_run

from nas.data import load_corpus
from nas.errors import UserError
from nas.export import Provenance
from nas.model.supernet import Supernet
from nas.pareto import front as pareto_front
from nas.pareto import hypervolume
from nas.presets import presets
from nas.search.context import Context
from nas.search.final import LIMIT_OF, Front, choose, reference
from nas.search.launch import Launch, resume, start
from nas.search.loop import Search
from nas.search.predictor import Predictor, features, shrink_to_observed
from nas.search.progress import Silent
from nas.search.run import Run
from nas.search.study import Study
from nas.search.supernets import Supernets, leaf_schedules
from nas.search.trial import SAMPLERS, SearchSpec, Trial
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.space import SearchSpace
from nas.splitting import SplitSpec, SplitTree
from nas.tracking import Link, Tracker, TrackingSpec
from nas.workers import RunSpec
from nas.workers.executor import InProcess

TINY = {
    "name": "tiny",
    "space": {
        "model": {
            "vocab_size": 256,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 24,
        },
        "choices": {
            "tie": {"sources": "previous"},
            "ffn": {"sources": "adjacent"},
            "kv": {"sources": "previous"},
            "kv_heads": {"options": [4, 2, 1]},
        },
    },
    "data": {"text": "python", "max_bytes": 60_000},
    "memory": {"context": 64},
    "supernet": {"steps": 8, "batch": 2, "seq": 16},
    "split": {"splits": 1, "batches": 1, "batch": 1},
    "search": {"evaluations": 24, "batch": 8},
    "evaluate": {"windows": 4, "final_windows": 8},
    "final": {"steps": 4, "batch": 2, "seq": 16, "candidates": 2},
    "run": {"workers": 0},
    "tracking": {"enabled": False},
}


def tiny(folder: Path, **changes: object) -> Path:
    """The tiny trial as a file, whole sections replaced."""
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


PREDICTED = {"supernet": None, "split": None, "predictor": {"configs": 8, "steps": 2, "rounds": 2}}
"""What makes the tiny trial one without a supernet."""


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """A finished run of a predicted search, and its front."""
    folder = tmp_path_factory.mktemp("predicted")
    return start(Launch(tiny(folder, **PREDICTED), folder / "runs"), Silent())


@pytest.mark.slow
def test_a_predicted_search_trains_no_supernet_and_as_many_configs_as_it_was_told(predicted):
    run, found = predicted
    learnt = [json.loads(path.read_text()) for path in (run.folder / "predictor").glob("*/result.json")]
    assert len(learnt) == 8
    assert {result["tokens"] for result in learnt} == {2 * 2 * 16}
    assert not (run.folder / "supernet").exists()
    assert not list((run.folder / "predictor").rglob("*.safetensors")), "they are learnt from and not kept"
    assert {e.weights for e in run.searched()} == {"predicted"}
    assert {e.weights for e in found.evaluations} == {"retrained"}
    assert [e.number for e in run.searched()] == sorted({e.number for e in run.searched()})
    assert max(e.number for e in run.searched()) < TINY["search"]["evaluations"], "a dry_run is not in the journal"


@pytest.mark.slow
def test_what_is_predicted_is_what_the_learnt_losses_tell(predicted):
    run, _ = predicted
    trial, seen = run.trial(), run.searched()
    losses = {}
    for path in (run.folder / "predictor").glob("*/result.json"):
        losses[path.parent.name] = json.loads(path.read_text())["loss_nats_per_token"]
    rng, configs = random.Random("0 predictor"), {}
    for config in (*(e.config for e in seen), *(trial.space.sample(rng) for _ in range(64)), *dict(presets_of(trial))):
        configs[config.hash] = config
    learnt = [configs[key] for key in sorted(losses)]
    fitted = Predictor.fit(
        features(trial.space.shape, learnt, trial.file.memory), np.array([losses[key] for key in sorted(losses)])
    )
    said = fitted(features(trial.space.shape, [e.config for e in seen], trial.file.memory))
    own = np.array([losses.get(e.config.hash, np.nan) for e in seen])
    said = shrink_to_observed(said, own)
    assert len(losses) == np.isfinite(own).sum(), "what was trained is among what was seen"
    assert [e.losses.loss_nats_per_token for e in seen] == pytest.approx(said.tolist(), abs=1e-6)
    assert seen[0].losses.perplexity_standard_error == pytest.approx(seen[0].losses.perplexity * fitted.error, rel=1e-4)


def presets_of(trial):
    return {config: name for name, config in presets(trial.space.shape)}


@pytest.mark.slow
def test_a_predicted_search_goes_on_where_it_stopped_and_learns_nothing_twice(predicted, tmp_path):
    run, found = predicted
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "runs" / "tiny")))
    (copy.folder / "front.json").unlink()
    lines = copy.journal().path.read_text().splitlines(keepends=True)
    copy.journal().path.write_text("".join(lines[: len(lines) // 2]))
    shutil.rmtree(copy.folder / "final")
    before = {path: path.stat().st_mtime_ns for path in (copy.folder / "predictor").rglob("result.json")}
    again = resume(copy, Silent())
    assert before == {path: path.stat().st_mtime_ns for path in (copy.folder / "predictor").rglob("result.json")}
    assert [m.point for m in again.configs] == [m.point for m in found.configs]
    assert [e.config for e in copy.searched()] == [e.config for e in run.searched()]


def test_a_search_that_names_neither_has_a_predictor(tmp_path):
    data = {key: value for key, value in TINY.items() if key not in ("supernet", "split")}
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(data))
    trial = Trial.load(path)
    assert trial.file.predictor is not None
    for steps, lesson in ((3, 1), (60, 15)):
        longer = replace(trial, file=replace(trial.file, final=replace(trial.file.final, steps=steps)))
        assert longer.lesson.steps == lesson


def test_a_supernet_is_split_only_where_a_trial_says_so(tmp_path):
    for split, method in ((None, "none"), ({}, "gradient-matching"), ({"method": "random"}, "random")):
        assert Trial.load(tiny(tmp_path, split=split)).split.method == method


def test_a_predictor_that_learnt_nothing_says_what_would_do():
    """Losses that rise with what a model keeps, which no predictor believes, beside losses that fall with it."""
    shape = models.MHA
    configs = list(dict.fromkeys(models.configs(shape, 12)))
    rows = features(shape, configs, MemorySpec(context=64))
    for losses, says in ((rows.sum(1), True), (-rows.sum(1), False)):
        learned = PredictorEvaluator(cast(Any, None), dict(zip(configs, losses, strict=True)), Predictor.fit(rows, losses))
        assert ("predictor.steps" in learned.words) == says


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"predictor": {"configs": 8}}, "not both"),
        ({"supernet": None, "split": None, "predictor": {"configs": 3}}, "3 is too small"),
        ({"supernet": None, "split": None, "predictor": {"configs": 8, "rounds": 3}}, "too few for 3 rounds"),
        ({"supernet": None, "split": None, "predictor": {"steps": 0}}, "0 is too small"),
        ({"supernet": None, "split": {"method": "random"}}, "no supernet to split"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_with_its_line(changes, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        Trial.load(tiny(tmp_path, **changes))
    assert "trial.yaml:" in str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its front."""
    folder = tmp_path_factory.mktemp("finished")
    return start(Launch(tiny(folder), folder / "runs"), Silent())


def test_front_is_the_retrained_ones_front(finished):
    run, found = finished
    assert all(e.weights == "retrained" for e in found.evaluations)
    points = [m.point for m in found.configs]
    assert [m.point for m in found.members] == [points[i] for i in pareto_front(points)]
    assert run.front() == found


def test_presets_are_searched_first_and_retrained_alike(finished):
    run, found = finished
    journal = list(run.journal().read())
    named = [entry["name"] for entry in journal if entry["name"]]
    assert {"dense", "mqa", "cla-2", "sequence-2", "mobillama"} <= set(named)
    assert set(named) == {e.name for e in found.presets}
    assert len({e.tokens for e in found.evaluations}) == 1


def test_every_config_is_evaluated_once(finished):
    run, _ = finished
    hashes = [entry["hash"] for entry in run.journal().read()]
    assert len(hashes) == len(set(hashes))
    assert all(entry["weights"] == "inherited" for entry in run.journal().read())


def test_going_on_with_a_finished_run_changes_nothing(finished):
    run, found = finished
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    assert resume(run, Silent()) == found
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}


def test_the_resolved_trial_is_the_trial(finished):
    run, _ = finished
    again = run.trial()
    assert Trial.load(run.folder / "trial.yaml").to_data() == again.to_data()
    assert again.space.options == Trial.load(run.folder.parent.parent / "trial.yaml").space.options


def test_provenance_names_what_figures_rest_on(finished):
    made = finished[0].read_json("run.json")
    assert set(made) == {"trial", "command", "seed", "versions", "commit", "text", "text_sha256", "hardware"}
    assert made["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("limit", LIMIT_OF)
def test_picks_within_a_limit_are_the_best_that_fit(finished, limit):
    _, found = finished
    sizes = sorted({getattr(m.first.memory, LIMIT_OF[limit]) for m in found.configs})
    for size in sizes:
        picked = found.pick(f"{limit}={size}")
        fitting = [m for m in found.configs if getattr(m.first.memory, LIMIT_OF[limit]) <= size]
        assert picked.losses.perplexity == min(m.perplexity for m in fitting)
    with pytest.raises(UserError, match=f"the smallest is {limit}={sizes[0]}"):
        found.pick(f"{limit}={sizes[0] - 1}")


def test_picks_by_name(finished):
    _, found = finished
    assert found.pick("knee") in found.knee.evaluations
    assert found.pick("lowest-perplexity").losses.perplexity == min(m.perplexity for m in found.configs)
    assert found.pick("smallest").memory.memory_bytes == min(m.memory_bytes for m in found.configs)
    assert found.pick("dense").config == found.pick(found.pick("dense").config.hash).config
    with pytest.raises(UserError, match="did you mean dense"):
        found.pick("denze")


def test_a_picked_model_leaves_with_its_own_weights(finished, tmp_path):
    from nas.export.measure import EvalSettings, eval_export

    run, _ = finished
    evaluation = export_run(run, "knee", tmp_path / "out")
    measured = eval_export(
        tmp_path / "out", run.folder / "eval.txt", EvalSettings(seq=16, windows=8, memory=run.trial().file.memory)
    )
    assert measured.losses.loss_nats_per_token == pytest.approx(evaluation.losses.loss_nats_per_token, rel=1e-3)
    assert measured.measured_kv_cache_bytes == evaluation.memory.kv_cache_bytes
    assert measured.measured_weight_bytes == evaluation.memory.weight_bytes


def test_a_picked_model_says_where_it_is_from(finished, tmp_path):
    run, _ = finished
    export_run(run, "knee", tmp_path / "untracked")
    assert Provenance.load(tmp_path / "untracked") == Provenance(run.name, "tiny")
    Link("sqlite:////somewhere/mlflow.db", "1", "f" * 32).save(run.folder)
    try:
        export_run(run, "knee", tmp_path / "tracked")
    finally:
        (run.folder / "tracking.json").unlink()
    wanted = Provenance(run.name, "tiny", "tiny", "f" * 32, "sqlite:////somewhere/mlflow.db")
    assert Provenance.load(tmp_path / "tracked") == wanted


def test_a_run_of_the_same_name_is_refused_and_left_alone(finished):
    run, found = finished
    with pytest.raises(UserError, match="nas resume"):
        start(Launch(run.folder.parent.parent / "trial.yaml", run.folder.parent), Silent())
    assert run.front() == found


def test_two_processes_cannot_work_on_one_run(finished):
    run, _ = finished
    with run.locked(), pytest.raises(UserError, match="another process"), run.locked():
        pass


def test_unknown_runs_are_refused_with_the_nearest(finished):
    run, _ = finished
    with pytest.raises(UserError, match="did you mean tiny"):
        Run.find("tinny", run.folder.parent)


def test_a_torn_journal_line_is_dropped_and_appending_goes_on(tmp_path):
    run = Run(tmp_path)
    run.journal().append({"number": 0})
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"number": 1, "ha')
    assert list(run.journal().read()) == [{"number": 0}]
    run.journal().append({"number": 2})
    assert list(run.journal().read()) == [{"number": 0}, {"number": 2}]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_asking_depends_on_the_seed_and_on_what_was_told_alone(sampler, tmp_path):
    space = Trial.load(tiny(tmp_path)).space
    spec = SearchSpec(evaluations=40, batch=10, sampler=sampler)

    def decode(seed: int) -> list[str]:
        study, hashes = Study(space, spec, seed), []
        study.enqueue([space.encode(space.largest()) or {}])
        for _ in range(4):
            batch = study.ask(10)
            hashes += [asked.config.hash for asked in batch]
            for asked in batch:
                study.tell(asked.number, (len(asked.config.to_yaml()), float(int(asked.config.hash, 16) % 97)))
        return hashes

    assert decode(0) == decode(0)
    assert decode(0) != decode(1)
    assert decode(0)[0] == space.largest().hash


@pytest.mark.slow
@pytest.mark.parametrize("sampler", sorted({*SAMPLERS} - {"random", "tpe"}))  # tpe is for fewer evaluations
def test_a_sampler_finds_more_than_random_search_does(sampler):
    """On losses to which every layer adds its own, 600 evaluations, the mean hypervolume over seeds."""
    space, rng = SearchSpace.load(Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"), random.Random(0)

    def point(config):
        loss = sum(random.Random(f"{i} {sorted(layer)}").random() for i, layer in enumerate(config.layers))
        return float(measure(space.shape, config, MemorySpec(context=512)).memory_bytes), loss

    drawn = [point(space.sample(rng)) for _ in range(200)]
    middle = statistics.median(x for x, _ in drawn), statistics.median(y for _, y in drawn)

    def volume(name, seed):
        study, points = Study(space, SearchSpec(sampler=name), seed), []
        for _ in range(25):
            for asked in study.ask(24):
                points.append(point(asked.config))
                study.tell(asked.number, points[-1])
        return hypervolume(points, middle)

    mine, chance = ([volume(name, seed) for seed in range(4)] for name in (sampler, "random"))
    assert statistics.fmean(mine) > statistics.fmean(chance)


def context(folder: Path, trial: Trial) -> Context:
    corpus = load_corpus(trial.file.data, trial.space.shape.vocab_size, trial.base)
    run = Run.create(folder, trial, corpus, {})
    return Context(
        run, trial, corpus, Silent(), Tracker(TrackingSpec(enabled=False), folder, "tiny"), InProcess(RunSpec(workers=0))
    )


@pytest.mark.slow
def test_a_config_whose_loss_is_not_finite_fails_and_the_search_goes_on(tmp_path):
    trial = Trial.load(tiny(tmp_path))
    supernet = Supernet(trial.space.shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        supernet.bank.get_submodule("layers.3.mlp.up_proj").weight.fill_(torch.nan)
    ctx = context(tmp_path / "run", trial)
    with SupernetEvaluator(ctx, Supernets(SplitTree(), {"0": supernet}, {"0": 0}, 0)) as judge:
        search = Search(ctx, judge)
        found = search.run()

    def uses_it(config):
        return any(layer.owner("mlp.up_proj") == 3 for layer in config.resolve(trial.space.shape).layers)

    assert found
    assert search.failed
    assert not any(uses_it(e.config) for e in found)
    assert all(uses_it(config) and "nan" in reason for config, reason in search.failed.items())
    entries = [entry for entry in ctx.run.journal().read() if "failure" in entry]
    assert {entry["hash"] for entry in entries} == {config.hash for config in search.failed}


@pytest.mark.slow
def test_configs_beyond_a_limit_are_not_evaluated(tmp_path):
    free = Trial.load(tiny(tmp_path))
    limit = free.space.size(free.file.memory).most["memory_bytes"] * 2 // 3
    trial = Trial.load(tiny(tmp_path, limits={"memory_bytes": limit}))
    supernet = Supernet(trial.space.shape, torch.Generator().manual_seed(0))
    ctx = context(tmp_path / "run", trial)
    with SupernetEvaluator(ctx, Supernets(SplitTree(), {"0": supernet}, {"0": 0}, 0)) as judge:
        found = Search(ctx, judge).run()
    assert found
    assert all(e.memory.memory_bytes <= limit for e in found)


def test_logged_hypervolumes_share_one_corner_also_after_a_resume(tmp_path):
    """A corner that moved with what was found would make the series grow without the front getting better."""

    class Recorder(Tracker):
        def log_series(self, name: str, value: float, step: int) -> None:
            series[-1].append(value)

    trial = Trial.load(tiny(tmp_path))
    supernet = Supernet(trial.space.shape, torch.Generator().manual_seed(0))
    recorder = Recorder(TrackingSpec(enabled=False), tmp_path / "run", "tiny")
    ctx = replace(context(tmp_path / "run", trial), tracker=recorder)
    series: list[list[float]] = []
    for _ in range(2):
        series.append([])
        with SupernetEvaluator(ctx, Supernets(SplitTree(), {"0": supernet}, {"0": 0}, 0)) as judge:
            found = Search(ctx, judge).run()
    assert series[0] == series[1] == sorted(series[0])
    first = [e for e in found if e.number < max(trial.file.search.batch, len(ctx.presets))]
    assert series[0][-1] == hypervolume([e.point for e in found], reference(first))


@pytest.mark.parametrize("method", ["none", "random", "gradient-matching"])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_a_split_search_trains_no_more_steps_than_an_unsplit_one(method, splits):
    split, steps = SplitSpec(method=method, splits=splits), 240
    leaves, before, spent = ["0"], {}, 0
    for stage in range(len(split.stages(steps))):
        if stage:
            leaves = [f"{leaf}-{n}" for leaf in leaves for n in (0, 1)]
        found = leaf_schedules(split, steps, stage, leaves, before)
        spent += sum(leg.until - leg.begun for leg in found)
        before = {leg.leaf: (leg.until, Path(leg.leaf)) for leg in found}
    assert steps - 2 * len(leaves) * len(split.stages(steps)) <= spent <= steps
    assert all(leg.until == leg.whole for leg in found)


def test_candidates_are_the_best_of_each_band_of_memory(finished):
    run, _ = finished
    searched = run.searched()
    known = {e.config for e in searched if e.name}
    for count in (1, 2, 3, 5, 100):
        chosen = choose(searched, count, known)
        fresh = [e for e in searched if e.config not in known]
        assert len(chosen) == len(set(chosen)) == min(count, len(fresh))
        assert not known & set(chosen)
        assert min(fresh, key=lambda e: e.losses.loss_nats_per_token).config in chosen


def results(front: Front) -> dict[str, tuple[float, float]]:
    return {e.config.hash: (e.losses.perplexity, e.bits_per_byte) for e in front.evaluations}


SMALL = {
    "search": {"evaluations": 8, "batch": 4, "presets": False},
    "final": {**TINY["final"], "candidates": 2, "presets": False},
}
KINDS = {
    "none": {"split": {"method": "none"}, "search": {**SMALL["search"], "sampler": "tpe"}},
    "exhaustive": {"split": {"method": "exhaustive"}, "search": {**SMALL["search"], "sampler": "nsga3"}},
    "random": {"split": {"method": "random", "splits": 2}, "supernet": {**TINY["supernet"], "strategy": "uniform"}},
    "restart": {
        "split": {"splits": 2, "batches": 1, "restart": True},
        "supernet": {**TINY["supernet"], "strategy": "fair", "distill": True},
    },
    "seeds": {"split": {"method": "none"}, "final": {**SMALL["final"], "seeds": 2}},
    "asha": {"split": {"method": "none"}, "final": {**SMALL["final"], "steps": 8, "early_stopping": {"grace": 2}}},
    "untrained": {"split": {"method": "none"}, "supernet": {**TINY["supernet"], "steps": 0}},
    "bpe": {"data": {"text": "python", "max_bytes": 60_000, "tokenizer": "bpe"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_search_reaches_its_front(kind, tmp_path):
    run, found = start(Launch(tiny(tmp_path, **{**SMALL, **KINDS[kind]}), tmp_path / "runs"), Silent())
    assert found.members
    assert {e.seed for e in found.evaluations} == ({0, 1} if kind == "seeds" else {0})
    assert len({e.tokens for e in found.evaluations}) == 1
    leaves = {e.supernet for e in run.searched()}
    assert leaves == {"0"} if "none" in str(KINDS[kind].get("split")) else all(leaf.startswith("0-") for leaf in leaves)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_very_front_of_an_undisturbed_one(finished, tmp_path):
    import subprocess
    import sys

    undisturbed, expected = finished
    trial = tiny(tmp_path)

    def begin(*words: str) -> subprocess.Popen[bytes]:
        code = "import torch; torch.set_num_threads(1); from nas.cli import main; main()"  # as many as the undisturbed run's
        return subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    def lines(pattern: str) -> int:
        return sum(path.read_bytes().count(b"\n") for path in (tmp_path / "runs" / "tiny").glob(pattern))

    moments = [
        lambda: (tmp_path / "runs/tiny/supernet/0.0").is_dir(),
        lambda: len(list((tmp_path / "runs/tiny/supernet").glob("1.*/result.json"))) >= 1,
        lambda: lines("journal.jsonl") >= 5,
        lambda: len(list((tmp_path / "runs/tiny/final").glob("*/result.json"))) >= 2,
    ]
    done: dict[str, list[str]] = {}
    for n, moment in enumerate(moments):
        process = begin("search", str(trial)) if n == 0 else begin("resume", "tiny")
        give_up = time.monotonic() + 120
        while not moment():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < give_up, f"moment {n} never came"
            time.sleep(0.02)
        process.kill()
        process.wait()
        for path in (tmp_path / "runs/tiny").rglob("result.json"):
            done.setdefault(str(path), []).append(path.stat().st_mtime_ns)
    front = resume(Run(tmp_path / "runs" / "tiny"), Silent())
    assert results(front) == results(expected)
    assert all(Path(path).stat().st_mtime_ns == time for path, (time, *_) in done.items())
    journal = [(e["number"], e["hash"]) for e in Run(tmp_path / "runs/tiny").journal().read()]
    assert len(set(journal)) == len(journal)
    assert sorted(journal) == sorted((e["number"], e["hash"]) for e in undisturbed.journal().read())


@pytest.mark.slow
def test_a_search_survives_the_loss_of_one_of_two_nodes(finished, tmp_path):
    from ray.cluster_utils import Cluster

    import nas.workers.cluster  # noqa: F401  (its settings come before Ray's own import)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    run = Run(tmp_path / "runs" / "tiny")

    def take_away() -> None:
        while sum(1 for _ in run.journal().read()) < 5:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    try:
        _, front = start(Launch(tiny(tmp_path), run.folder.parent, address=cluster.address), Silent())
    finally:
        cluster.shutdown()
    assert not thread.is_alive(), "the node was never taken away"
    assert {e.config for e in front.evaluations} == {e.config for e in finished[1].evaluations}
