"""Whole searches on tiny real models, and every promise about a run's folder; one road of each kind is on real Ray."""

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny as models
import torch
import yaml
from commands import refused, said, told
from searches import FROM, PREDICTOR, SUPERNET, results, search, write_trial

from nas.config import format_bytes
from nas.data import load_corpus
from nas.errors import UserError
from nas.export import Provenance
from nas.export.measure import EvalSettings, eval_export
from nas.model.supernet import Supernet
from nas.pareto import first_fronts, hypervolume, reference_point
from nas.pareto import front as pareto_front
from nas.report.page import front_page
from nas.search.candidates import Predictor, best_seen, features, select_best_of_bands, shrink_to_observed
from nas.search.context import Context
from nas.search.evaluators import EVALUATORS, Evaluator, PredictorEvaluator, SupernetEvaluator
from nas.search.front import LIMIT_OF, PICKS
from nas.search.jobs import STATE, StandaloneTraining, SupernetTraining, train_standalone, train_supernet
from nas.search.launch import Launch, resume, start
from nas.search.loop import SearchLoop, Study
from nas.search.progress import Silent
from nas.search.publish import export_run
from nas.search.run import NOTED, Run
from nas.search.samplers import SAMPLERS
from nas.search.supernets import Supernets, leaf_schedules
from nas.search.trial import Trial
from nas.search.trial_file import SearchSpec, train_spec
from nas.sharing.label import label
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.splitting import SplitSpec, SplitTree
from nas.tracking import Link, Tracker, TrackingSpec
from nas.tracking.store import connect
from nas.training.evaluation import ADDED, Losses
from nas.training.loop import TrainSpec
from nas.workers import RunSpec, Session
from nas.workers.executor import InProcess

FEW = {**SUPERNET["final"], "presets": False}  # models of a front
EACH_RUN = pytest.mark.parametrize("kind", ["predictor_run", "supernet_run", "from_run"])


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def copy_of(run: Run, folder: Path, *lost: str) -> Run:
    """An untracked copy of a run without some of its files."""
    copy = Run(Path(shutil.copytree(run.folder, folder / run.name, ignore=shutil.ignore_patterns("tracking.json", *lost))))
    data = copy.trial().to_data() | {"tracking": {"enabled": False}}
    (copy.folder / "trial.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return copy


# ---- a finished run of each kind


@EACH_RUN
def test_a_finished_run_keeps_its_promises(kind, request):
    """The front is of models that were trained alike, no config is evaluated twice, and resuming changes nothing."""
    run = request.getfixturevalue(kind)
    front, journal = run.front(), list(run.journal().read())
    assert len({e.weights for e in front.evaluations}) == len({e.tokens for e in front.evaluations}) == 1
    points = [m.point for m in front.configs]
    assert [m.point for m in front.members] == [points[i] for i in pareto_front(points)]
    hashes = [entry["hash"] for entry in journal]
    assert len(hashes) == len(set(hashes))
    assert {entry["weights"] for entry in journal} == {EVALUATORS[run.trial().evaluator].weights}
    named = {entry["name"]: entry["hash"] for entry in journal if entry["name"]}
    assert {*named} >= {"dense", "mqa", "cla-2"}
    assert {name: front.pick(name).config.hash for name in named} == named
    before = files_of(run.folder)
    assert resume(run, Silent()) == front
    assert files_of(run.folder) == before


@EACH_RUN
def test_the_resolved_trial_is_the_trial(kind, request):
    run = request.getfixturevalue(kind)
    assert yaml.safe_load((run.folder / "trial.yaml").read_text()) == run.trial().to_data()
    written = Trial.load(run.folder.parent.parent / "trial.yaml")
    assert run.trial().space.options == written.space.options
    made = run.read_json("run.json")
    own = {"from", "from_sha256", "from_perplexity"} if written.base_model else set()
    assert set(made) == {*NOTED, "text_tokens", "hardware"} | own
    assert made["versions"]["torch"] == torch.__version__


def test_ray_gives_what_this_process_gives(supernet_run, tmp_path):
    """To the last digit; the order in which evaluations end is the only difference."""
    again, front = search(tmp_path, SUPERNET, run={"workers": 2})
    assert results(front) == results(supernet_run.front())
    assert [replace(e, seconds=0) for e in again.searched()] == [replace(e, seconds=0) for e in supernet_run.searched()]


def test_picks_are_of_the_front_and_within_their_limits(supernet_run):
    front = supernet_run.front()
    assert front.pick("knee") in front.knee.evaluations
    assert front.pick("lowest-perplexity").validation_perplexity == min(m.point[1] for m in front.configs)
    assert front.pick("smallest").memory.memory_bytes == min(m.memory_bytes for m in front.configs)
    assert front.pick("dense").config == front.pick(front.pick("dense").config.hash).config
    for m in front.configs:
        names = (m.first.config.hash, m.config_label, *m.names)
        assert {front.pick(name).config for name in names} == {m.first.config}, names
    assert {row["label"] for row in front.to_data()["front"]} == {m.config_label for m in front.members}
    refused(lambda: front.pick("denze"), "did you mean dense")
    for limit, name in LIMIT_OF.items():
        sizes = sorted({getattr(m.first.memory, name) for m in front.configs})
        for size in sizes:
            fitting = [m.point[1] for m in front.configs if getattr(m.first.memory, name) <= size]
            assert front.pick(f"{limit}={size}").validation_perplexity == min(fitting)
        with pytest.raises(UserError, match=f"{limit}={sizes[0]}$"):
            front.pick(f"{limit}={sizes[0] - 1}")


def test_a_front_keeps_the_losses_of_its_windows(supernet_run, tmp_path):
    """In the folder, so that a finished run compares what it measured; a run that has none shows what it can."""
    front, file = supernet_run.front(), supernet_run.trial().file
    for e in front.evaluations:
        assert len(e.windows) == file.evaluate.final_windows
        assert statistics.fmean(e.windows) == pytest.approx(e.losses.loss_nats_per_token, rel=1e-6)
    rows = {row["hash"]: row for key in ("front", "dominated") for row in front.to_data()[key]}
    for m in front.members[1:]:
        less, row = m.less(front.panel.neighbour(m)), rows[m.first.config.hash]
        assert (row["loss_vs_neighbour_nats_per_token"], row["within_noise"]) == (less.mean, less.is_noise)
        assert row["neighbour"] == front.panel.neighbour(m).config_label
    old = Run(tmp_path / "runs" / "old")
    shutil.copytree(supernet_run.folder, old.folder)
    for path in old.folder.glob("final/*/result.json"):
        result = json.loads(path.read_text())
        del result["test"]["window_losses"]
        path.write_text(json.dumps(result))
    assert not old.front().panel.is_paired
    assert "within_noise" not in old.front().to_data()["front"][0]
    printed = said("front", "old", "--runs", tmp_path / "runs")
    assert "±" in printed
    assert "neighbour" not in printed


def test_a_runs_models_are_described_and_compared_by_label(supernet_run, tmp_path):
    front, name, runs = supernet_run.front(), supernet_run.name, ("--runs", supernet_run.folder.parent)
    for m in front.configs:
        found = told("describe", f"{name}:{m.config_label}", *runs)
        assert found.items() >= (m.first.memory.to_data() | {"hash": m.first.config.hash, "label": label(m.first.config)}).items()
    searched = next(e.config for e in supernet_run.searched() if e.config not in {m.first.config for m in front.configs})
    layers = told("describe", f"{name}:{searched.hash}", *runs)["config"]["layers"]
    assert layers.keys() == {str(i) for i, layer in enumerate(searched.layers) if layer}
    refused(lambda: said("describe", f"{name}:nothing", *runs), f"{name}:nothing: no such model; ")
    (tmp_path / "mine.yaml").write_text(searched.to_yaml())
    shape, drawn = supernet_run.trial().space.shape, tmp_path / "both.svg"
    for other in ("dense", str(tmp_path / "mine.yaml"), f"{name}:{searched.hash}"):
        pair = (f"{name}:smallest", other)
        both = told("diff", *pair, *runs)
        one, two = (SharingConfig.from_data(shape, both[side]["config"]) for side in "ab")
        differ = {i: (dict(a), dict(b)) for i, (a, b) in enumerate(zip(one.layers, two.layers, strict=True)) if a != b}
        assert {i: (row["a"], row["b"]) for row in both["differences"] for i in row["layers"]} == differ
        assert (both["a"]["hash"], both["b"]["hash"]) == (front.pick("smallest").config.hash, two.hash)
        for names in (pair, pair[::-1]):
            text = said("diff", *names, "--to", drawn, *runs)
            assert all(format_bytes(both[side]["memory_bytes"]) in text for side in "ab")
        assert drawn.read_text().count("bytes by part") == 2
    one, two = front.configs[0], front.configs[-1]
    pair, less = [f"{name}:{m.first.config.hash}" for m in (one, two)], two.less(one)
    assert less is not None
    assert told("diff", *pair, *runs)["loss_b_less_a"]["mean"] == pytest.approx(less.mean)
    assert f"perplexity of B beside A: {less.ratio:+.1%} ± {less.ratio_standard_error:.1%}" in said("diff", *pair, *runs)
    assert "the two are one config" in said("diff", f"{name}:knee", f"{name}:knee", *runs)


@pytest.mark.parametrize("kind", ["supernet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("predictor", "from"))])
def test_no_choice_sees_the_test_text_and_figures_are_of_it_alone(kind, tmp_path):
    """With another test text the journal, early stops, candidates, weights and picks are the same; with another validation text
    the figures of whatever is trained in both are."""
    for name, line in (("validation", "{} bottles"), ("cats", "{} grey cats"), ("prime", "Is {} a prime?"), ("other", ") {} (")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{line.format(n)}\n" for n in range(300)))
    trial = {"supernet": SUPERNET, "predictor": PREDICTOR, "from": FROM}[kind]

    def searched(validation, test, **final):
        data = {**trial["data"], "eval_text": f"{validation}.txt", "test_text": f"{test}.txt"}
        run, front = search(tmp_path, trial, name=f"{validation}-{test}", data=data, final=EARLY | final)
        picks = [pick for pick in PICKS if "=" not in pick] + [f"max-memory={e.memory.memory_bytes}" for e in front.evaluations]
        choices = {
            "journal": [{**entry, "seconds": 0} for entry in run.journal().read()],
            "converted": [replace(e, seconds=0) for e in run.converted()],
            "early stops": sorted(str(path.relative_to(run.folder)) for path in run.folder.glob("paused-*/*/result.json")),
            "weights": {(e.config.hash, e.seed): run.weights(e).read_bytes() for e in front.evaluations},
            "members": [m.first.config for m in front.members],
            "picks": [(e.config, e.seed, e.validation_perplexity) for e in map(front.pick, picks)],
        }
        return choices, results(front)

    choices, front = searched("validation", "cats")
    same, other = searched("validation", "prime")
    assert choices == same
    assert front.keys() == other.keys()
    assert all(front[key] != other[key] for key in front)
    if kind != "from":  # whose trainings start from weights that the validation text chose
        _, third = searched("other", "cats", early_stopping=None)
        both = front.keys() & third.keys()
        assert both
        assert {key: front[key] for key in both} == {key: third[key] for key in both}


def test_a_run_of_an_earlier_version_is_read_and_is_not_gone_on_with(supernet_run, tmp_path):
    """Its rows name no part of the text, and it kept one evaluation text."""
    old = copy_of(supernet_run, tmp_path, "test.txt")

    def without(row):
        return {key: value for key, value in row.items() if key not in ADDED}

    front = old.read_json("front.json")
    rows = {name: [without(row) for row in front[name]] for name in ("front", "dominated")}
    old.write_json("front.json", front | rows)
    old.write("journal.jsonl", "".join(json.dumps(without(row)) + "\n" for row in old.journal().read()))
    made = old.read_json("run.json")
    del made["text_tokens"]
    made["hardware"] = {"machine": "Linux-6.1-x86_64-with-glibc2.36"}
    old.write_json("run.json", made)
    assert old.provenance()["hardware"] == {"machine": "Linux"}, "a page does not say which kernel"
    read = old.front()
    assert results(read) == results(supernet_run.front())
    assert read.pick("lowest-perplexity").losses.perplexity == min(m.perplexity for m in read.configs)
    assert "evaluation text" in front_page(read.evaluations)
    export_run(old, "knee", tmp_path / "out")
    assert "on held-out evaluation text" in " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert resume(old, Silent()) == read
    (old.folder / "front.json").unlink()
    refused(lambda: resume(old, Silent()), "begun by a version that chose and reported on one text")


def test_a_picked_model_leaves_with_its_own_weights_and_says_where_it_is_from(supernet_run, tmp_path):
    evaluation = export_run(supernet_run, "knee", tmp_path / "out")
    settings = EvalSettings(seq=16, eval_sequences=8, memory=supernet_run.trial().file.memory)
    measured = eval_export(tmp_path / "out", supernet_run.folder / "test.txt", settings)
    assert measured.losses.loss_nats_per_token == pytest.approx(evaluation.losses.loss_nats_per_token, rel=1e-3)
    assert measured.measured_kv_cache_bytes == evaluation.memory.kv_cache_bytes
    assert measured.measured_weight_bytes == evaluation.memory.weight_bytes
    assert Provenance.load(tmp_path / "out") == Provenance("tiny", "tiny")
    tracked = copy_of(supernet_run, tmp_path)
    Link("sqlite:////somewhere/mlflow.db", "1", "f" * 32).save(tracked.folder)
    export_run(tracked, "knee", tmp_path / "tracked")
    wanted = Provenance("tiny", "tiny", "tiny", "f" * 32, "sqlite:////somewhere/mlflow.db")
    assert Provenance.load(tmp_path / "tracked") == wanted


def test_a_run_with_the_tokenizer_of_version_0_1_is_exported_as_it_was_and_resumes_if_it_names_it(tmp_path):
    """Its `bytes` had 256 symbols, as `bytes256` has now."""
    space = SUPERNET["space"] | {"model": SUPERNET["space"]["model"] | {"vocab_size": 256}}
    run, front = search(tmp_path, PREDICTOR, space=space, data=SUPERNET["data"] | {"tokenizer": "bytes256"}, final=FEW)
    path, wanted = run.folder / "trial.yaml", json.loads((run.folder / "tokenizer.json").read_text())
    now = path.read_text()
    path.write_text(now.replace("tokenizer: bytes256", "tokenizer: bytes"))
    export_run(run, "knee", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == wanted
    assert wanted["added_tokens"] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None
    (run.folder / "front.json").unlink()
    refused(lambda: resume(run, Silent()), "a model made by version 0.1 has `data: {tokenizer: bytes256}`")
    path.write_text(now)
    assert results(resume(run, Silent())) == results(front)


def test_a_run_is_found_and_guarded(supernet_run, tmp_path):
    copy = copy_of(supernet_run, tmp_path)
    before = files_of(copy.folder)
    refused(lambda: start(Launch(write_trial(tmp_path, SUPERNET), tmp_path), Silent()), "nas resume")
    assert files_of(copy.folder) == before
    begun = copy_of(supernet_run, tmp_path / "begun", "front.json")
    ray = write_trial(tmp_path, SUPERNET, run={"workers": 2})
    with pytest.MonkeyPatch.context() as patch, begun.locked():
        patch.setattr("nas.search.launch.executor", None)  # it is said before Ray, or any other work, begins
        patch.setattr("nas.search.launch.load_corpus", None)
        refused(lambda: resume(begun, Silent()), "another process")
        refused(lambda: start(Launch(ray, begun.folder.parent, overwrite=True), Silent()), "another process")
    refused(lambda: Run.find("tinny", tmp_path), "did you mean tiny")


@EACH_RUN
def test_a_run_goes_on_where_it_stopped_to_the_very_front(kind, request, tmp_path):
    """Without half of its journal and half of what was trained; nothing is done twice."""
    run = request.getfixturevalue(kind)
    copy = copy_of(run, tmp_path, "front.json")
    lines = copy.journal().path.read_text().splitlines(keepends=True)
    copy.journal().path.write_text("".join(lines[: len(lines) // 2]))
    for part in ("final", "predictor", "converted"):
        for path in sorted((copy.folder / part).glob("*"))[::2]:
            shutil.rmtree(path)
    kept = {path: path.stat().st_mtime_ns for path in copy.folder.rglob("result.json")}
    assert results(resume(copy, Silent())) == results(run.front())
    assert {e.config for e in copy.searched()} == {e.config for e in run.searched()}
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in copy.folder.rglob("result.json")}.items()


def test_a_training_that_a_signal_ends_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    tokens, spec = np.arange(600, dtype=np.int32) % 64, TrainSpec(steps=6, batch=2, seq=8)
    dense, windows = SharingConfig.dense(models.MHA), tokens[:18].reshape(2, 9).astype(np.int64)
    job = StandaloneTraining(models.MHA, dense, spec, 0, tokens, windows)
    folders = [tmp_path / name for name in ("whole", "ended")]
    for folder in folders:
        folder.mkdir()
    whole = train_standalone(job, Session(folders[0]))

    def end(metrics):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("nas.search.jobs.REPORT_SECONDS", 0.0)
    before = signal.signal(signal.SIGTERM, lambda *given: sys.exit(143))
    with pytest.raises(SystemExit, match="143"):
        train_standalone(job, Session(folders[1], end))
    signal.signal(signal.SIGTERM, before)
    (state,) = folders[1].glob("checkpoint-*/fit.pt")
    assert 0 < torch.load(state, weights_only=True)["step"] < 6
    again = train_standalone(job, Session(folders[1]))
    assert again["window_losses"] == whole["window_losses"]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_to_the_very_front_of_an_undisturbed_one(from_run, tmp_path):
    """Killed at one moment of each stage."""
    trial, folder = write_trial(tmp_path, FROM), tmp_path / "runs" / from_run.name

    def found(pattern: str) -> int:
        return len(list(folder.glob(pattern)))

    moments = [
        lambda: found("supernet/0.0/result.json") or found("converted/*/result.json") >= 3,
        lambda: found("supernet/1.*/result.json"),
        lambda: (folder / "journal.jsonl").exists() and (folder / "journal.jsonl").read_bytes().count(b"\n") >= 5,
        lambda: found("final/*/result.json") >= 2,
    ]
    done: dict[Path, int] = {}
    for n, moment in enumerate(moments):
        words = ["resume", from_run.name] if n else ["search", str(trial)]
        code = "import torch; torch.set_num_threads(1); from nas.cli import main; main()"  # as many as the undisturbed run's
        command = [sys.executable, "-c", code, *words]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while not moment():
            time.sleep(0.01)  # the command needs the processor
            assert process.poll() is None or moment(), process.stderr.read().decode()
        process.kill()
        process.wait()
        done = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} | done
    assert results(resume(Run(folder), Silent())) == results(from_run.front())
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    journal = [(e["number"], e["hash"]) for e in Run(folder).journal().read()]
    assert len(set(journal)) == len(journal)
    assert sorted(journal) == sorted((e["number"], e["hash"]) for e in from_run.journal().read())


# ---- the predictor


def test_a_predicted_search_is_fitted_to_as_many_proxy_trainings_as_its_trial_says(predictor_run):
    """What is predicted is what the fit to their losses gives, of a config's own loss a part."""
    run, trial, seen = predictor_run, predictor_run.trial(), predictor_run.searched()
    trained = {path.parent.name: json.loads(path.read_text()) for path in (run.folder / "predictor").glob("*/result.json")}
    assert len(trained) == 8
    assert {result["tokens"] for result in trained.values()} == {2 * 2 * 16}
    assert not (run.folder / "supernet").exists()
    assert not list((run.folder / "predictor").rglob("*.safetensors")), "their weights are not kept"
    assert max(e.number for e in seen) < trial.file.search.evaluations, "a dry run is not in the journal"
    losses = {key: trained[key]["loss_nats_per_token"] for key in sorted(trained)}
    configs = {e.config.hash: e.config for e in seen}
    rows = features(trial.space.shape, [configs[key] for key in losses], trial.file.memory)
    fitted = Predictor.fit(rows, np.array(list(losses.values())))
    own = np.array([losses.get(e.config.hash, np.nan) for e in seen])
    assert len(losses) == np.isfinite(own).sum(), "what was trained is among what was seen"
    wanted = shrink_to_observed(fitted(features(trial.space.shape, [e.config for e in seen], trial.file.memory)), own)
    assert [e.losses.loss_nats_per_token for e in seen] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert seen[0].losses.perplexity_standard_error == pytest.approx(seen[0].losses.perplexity * fitted.error, rel=1e-4)


def test_what_a_trial_leaves_out_follows_from_the_rest(tmp_path):
    trial = Trial.load(write_trial(tmp_path, SUPERNET, supernet=None, split=None))
    assert trial.evaluator == "predictor"
    for steps, proxy in ((3, 1), (60, 15)):
        longer = replace(trial, file=replace(trial.file, final=replace(trial.file.final, steps=steps)))
        assert longer.proxy_training.steps == proxy
    for split, method in ((None, "none"), ({}, "gradient-matching"), ({"method": "random"}, "random")):
        assert Trial.load(write_trial(tmp_path, SUPERNET, split=split)).split.method == method


def test_a_predictor_that_is_no_better_than_the_mean_says_what_helps(predictor_run):
    """Losses that rise with what a model keeps, which the predictor excludes, beside losses that fall with it."""
    ctx = context(predictor_run.folder, predictor_run.trial(), predictor_run)
    configs = list(dict.fromkeys(models.configs(ctx.trial.space.shape, 12)))
    rows = features(ctx.trial.space.shape, configs, ctx.trial.file.memory)
    for losses, says in ((rows.sum(1), True), (-rows.sum(1), False)):
        fitted = PredictorEvaluator(ctx, dict(zip(configs, losses.tolist(), strict=True)))
        assert ("predictor.steps" in fitted.summary) == says


class BytesEvaluator(Evaluator):
    """The fewer bytes the worse: no training at all."""

    weights = "predicted"
    spent = 0

    @classmethod
    def train(cls, ctx):
        return cls(ctx)

    def workers(self):
        return nullcontext(self.evaluate)

    def evaluate(self, proposals):
        for one in proposals:
            loss = 1e6 / self.ctx.memory(one.config).memory_bytes
            yield one, self.ctx.evaluation(one.config, Losses(loss, loss, 0.0), self.weights, 0, number=one.number)

    def select(self, seen, count, trained):
        return [e.config for e in seen if e.config not in trained][:count]


def test_a_new_evaluator_is_a_row_of_the_table(tmp_path, monkeypatch):
    spec = {**SMALL, "search": {**SMALL["search"], "evaluator": "bytes"}, "supernet": None, "split": None}
    refused(lambda: search(tmp_path, SUPERNET, **spec), "search.evaluator: unknown evaluator")
    monkeypatch.setitem(EVALUATORS, "bytes", BytesEvaluator)
    run, front = search(tmp_path, SUPERNET, **spec)
    assert len(front.configs) == 2
    assert {e.tokens for e in run.searched()} == {0}


# ---- the study


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals_depend_on_the_seed_and_on_what_was_told_alone(sampler, tmp_path):
    space = Trial.load(write_trial(tmp_path, SUPERNET)).space
    spec = SearchSpec(evaluations=40, batch=10, sampler=sampler)

    def hashes(seed: int) -> list[str]:
        study, found = Study(space, spec, seed), []
        study.enqueue([space.encode(space.largest()) or {}])
        for _ in range(4):
            batch = study.ask(10)
            found += [one.config.hash for one in batch]
            for one in batch:
                study.tell(one.number, (len(one.config.to_yaml()), float(int(one.config.hash, 16) % 97)))
        return found

    assert hashes(0) == hashes(0)
    assert hashes(0) != hashes(1)
    assert hashes(0)[0] == space.largest().hash


def test_every_seed_proposes() -> None:
    """Seeds of a trial go up to 2**63 - 1, those of numpy's generators up to 2**32 - 1."""
    space = models.whole_space(models.MHA, models.FEW)
    for sampler, seed in product(SAMPLERS, (4295, 2**63 - 1)):
        assert len(Study(space, SearchSpec(sampler=sampler), seed).ask(3)) == 3


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
            for one in study.ask(24):
                points.append(point(one.config))
                study.tell(one.number, points[-1])
        return hypervolume(points, middle)

    mine, chance = ([volume(name, seed) for seed in range(4)] for name in (sampler, "random"))
    assert statistics.fmean(mine) > statistics.fmean(chance)


# ---- the search on a supernet


def context(folder: Path, trial: Trial, run: Run | None = None) -> Context:
    corpus = load_corpus(trial.file.data, trial.space.shape.vocab_size, trial.base)
    tracker = Tracker(TrackingSpec(enabled=False), folder, "tiny")
    return Context(run or Run.create(folder, trial, corpus, {}), trial, corpus, Silent(), tracker, InProcess(RunSpec(workers=0)))


def search_loop(ctx: Context, supernet: Supernet) -> SearchLoop:
    evaluator = SupernetEvaluator(ctx, Supernets(SplitTree(), {"0": supernet}, {}, {"0": 0}, 0))
    with evaluator.workers() as evaluate:
        loop = SearchLoop(ctx, evaluate)
        loop.run()
    return loop


def test_a_config_whose_loss_is_not_finite_fails_and_the_search_goes_on(tmp_path, monkeypatch):
    trial = Trial.load(write_trial(tmp_path, SUPERNET))
    supernet = Supernet(trial.space.shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        supernet.bank.get_submodule("layers.3.mlp.up_proj").weight.fill_(torch.nan)
    logged = []
    monkeypatch.setattr(Tracker, "log_failures", lambda self, failed: logged.append(dict(failed)))
    monkeypatch.setattr(Tracker, "log_artifact", lambda self, path: logged.append(path.read_text()))
    monkeypatch.setattr("nas.search.loop.REFRESH", 0.0)
    ctx = context(tmp_path / "run", trial)
    loop = search_loop(ctx, supernet)
    pages = [entry for entry in logged if isinstance(entry, str)]
    assert loop.failed in logged  # with reasons, as soon as they are known
    assert len(pages) > 1
    assert all("the search so far" in page for page in pages)

    def uses_it(config):
        return any(layer.owner("mlp.up_proj") == 3 for layer in config.resolve(trial.space.shape).layers)

    assert loop.found
    assert loop.failed
    assert not any(map(uses_it, loop.found))
    assert all(uses_it(config) and "nan" in reason for config, reason in loop.failed.items())
    entries = [entry for entry in ctx.run.journal().read() if "failure" in entry]
    assert {entry["hash"] for entry in entries} == {config.hash for config in loop.failed}


def test_configs_beyond_a_limit_are_not_evaluated(tmp_path):
    free = Trial.load(write_trial(tmp_path, SUPERNET))
    limit = free.space.size(free.file.memory).most["memory_bytes"] * 2 // 3
    trial = Trial.load(write_trial(tmp_path, SUPERNET, limits={"memory_bytes": limit}))
    loop = search_loop(context(tmp_path / "run", trial), Supernet(trial.space.shape, torch.Generator().manual_seed(0)))
    assert loop.found
    assert all(e.memory.memory_bytes <= limit for e in loop.found.values())


def test_logged_hypervolumes_share_one_reference_point_also_after_a_resume(tmp_path):
    """One that moved with what was found would make the series grow without the front getting better."""

    class Recorder(Tracker):
        def log_series(self, name: str, value: float, step: int) -> None:
            series[-1].append(value)

    trial = Trial.load(write_trial(tmp_path, SUPERNET))
    supernet = Supernet(trial.space.shape, torch.Generator().manual_seed(0))
    ctx = context(tmp_path / "run", trial)
    ctx = replace(ctx, tracker=Recorder(TrackingSpec(enabled=False), tmp_path / "run", "tiny"))
    series: list[list[float]] = []
    for _ in range(2):
        series.append([])
        found = sorted(search_loop(ctx, supernet).found.values(), key=lambda e: e.number)
    assert series[0] == series[1] == sorted(series[0])
    first = [e.point for e in found if e.number < max(trial.file.search.batch, len(ctx.presets))]
    assert series[0][-1] == hypervolume([e.point for e in found], reference_point(first))


def test_a_split_search_trains_no_more_steps_than_an_unsplit_one():
    for method in ("none", "random", "gradient-matching"):
        for splits in (1, 2, 3):
            split, steps = SplitSpec(method=method, splits=splits), 240
            leaves, before, spent = ["0"], {}, 0
            for stage in range(len(split.stages(steps))):
                if stage:
                    leaves = [f"{leaf}-{n}" for leaf in leaves for n in (0, 1)]
                found = leaf_schedules(split, steps, stage, leaves, before)
                spent += sum(one.until - one.begun for one in found)
                before = {one.leaf: (one.until, Path(one.leaf)) for one in found}
            assert steps - 2 * len(leaves) * len(split.stages(steps)) <= spent <= steps
            assert all(one.until == one.whole for one in found)


class Disordered(InProcess):
    """Ends work in another order than it was given in, as busy workers do."""

    def pool(self, *given):
        @contextmanager
        def shuffled():
            with InProcess.pool(self, *given) as pool:
                run = pool.run
                yield SimpleNamespace(all_ready=True, run=lambda tasks: run(random.sample(list(tasks), len(list(tasks)))))

        return shuffled()

    def _train(self, trainings, report, end):
        left = random.sample(list(trainings.left.items()), len(trainings.left))
        super()._train(replace(trainings, left=dict(left)), report, end)


EARLY = {**SUPERNET["final"], "steps": 5, "candidates": 4, "early_stopping": {"grace": 1, "reduction": 2}}


@pytest.mark.parametrize("kind", ["supernet", pytest.param("predictor", marks=pytest.mark.slow)])
def test_numbers_do_not_depend_on_the_order_in_which_work_ends(kind, tmp_path, monkeypatch):
    trial = {**{"supernet": SUPERNET, "predictor": PREDICTOR}[kind], "final": {**EARLY, "presets": False}}
    run, front = search(tmp_path, trial, name="one")
    monkeypatch.setattr("nas.workers.InProcess", Disordered)
    again, other = search(tmp_path, trial, name="other")
    assert results(other) == results(front)
    assert [replace(e, seconds=0) for e in again.searched()] == [replace(e, seconds=0) for e in run.searched()]
    assert {e.config for e in front.evaluations} < {e.config for e in run.searched()}


def test_early_stopping_leaves_the_first_fronts_and_what_it_leaves_is_trained_as_ever(tmp_path):
    spec = {**EARLY, "presets": False, "candidates": 9}
    run, front = search(tmp_path, SUPERNET, name="early", final=spec)
    _, whole = search(tmp_path, SUPERNET, name="whole", final={**spec, "early_stopping": None})
    tried = {e.config: e for e in whole.evaluations}
    for step, before in ((1, set(tried)), (2, None), (4, None)):
        found = run.folder.glob(f"paused-{step}/*/result.json")
        paused = {path.parent.name.partition("-")[0]: json.loads(path.read_text()) for path in found}
        configs = [config for config in tried if config.hash in paused]
        assert before is None or set(configs) == before
        points = [(tried[c].point[0], paused[c.hash]["loss_nats_per_token"]) for c in configs]
        going_on = {configs[i] for i in first_fronts(points, math.ceil(len(points) / 2))}
    assert {e.config for e in front.evaluations} == going_on
    assert len(going_on) < len(tried)
    assert all(replace(e, seconds=0) == replace(tried[e.config], seconds=0) for e in front.evaluations)
    assert not list(run.folder.glob("paused-*/*/fit.pt"))


def test_a_leaf_that_was_not_cut_goes_on_with_subnets_of_its_own(tmp_path):
    """Two stages of it are one: the second neither draws the first's subnets again nor sees its batches again."""
    trial = Trial.load(write_trial(tmp_path, SUPERNET))
    corpus, memory = load_corpus(trial.file.data, trial.space.shape.vocab_size, trial.base), trial.file.memory
    for strategy in ("uniform", "fair"):
        job = SupernetTraining(
            space=SplitTree().space_of(trial.space, "0", memory),
            memory=memory,
            spec=replace(train_spec(trial.supernet), steps=6),
            strategy=strategy,
            distill=False,
            seed=0,
            tokens=corpus.train.numpy(),
            until=6,
        )
        folders = [tmp_path / strategy / name for name in ("whole", "first", "second")]
        states = [folder / STATE for folder in folders]
        jobs = job, replace(job, until=3), replace(job, start=states[1])
        for folder, one in zip(folders, jobs, strict=True):
            folder.mkdir(parents=True)
            train_supernet(one, Session(folder))
        whole, second = (torch.load(states[n], weights_only=True) for n in (0, 2))
        assert whole["extra"] == second["extra"]
        assert all(torch.equal(weight, second["model"][name]) for name, weight in whole["model"].items())


def test_each_sub_supernet_has_its_own_series(from_run):
    link = Link.load(from_run.folder)
    series = {name for name in connect(link.uri).get_run(link.run_id).data.metrics if name.startswith("supernet_loss")}
    assert series == {f"supernet_loss_nats_per_token{leaf}" for leaf in ("", "_0-0", "_0-1")}


def test_candidates_are_the_best_of_each_band_of_memory(supernet_run, from_run):
    """Of bands with as many configs each or, of a base model, of bands equal in bytes."""
    searched = supernet_run.searched()
    known = {e.config for e in searched if e.name}
    eligible = [e for e in searched if e.config not in known]
    for count in (1, 2, 3, 5, 100):
        chosen = select_best_of_bands(searched, count, known)
        assert len(chosen) == len(set(chosen)) == min(count, len(eligible))
        assert not known & set(chosen)
        assert min(eligible, key=lambda e: e.losses.loss_nats_per_token).config in chosen
    seen = list(best_seen([*from_run.converted(), *from_run.searched()]).values())
    sizes = [e.memory.memory_bytes for e in seen]
    for count in (1, 3, 5):
        chosen, width = select_best_of_bands(seen, count, scale=float), (max(sizes) - min(sizes)) / count
        for n in range(count):
            band = [e for e in seen if int((e.memory.memory_bytes - min(sizes)) / width) == n]
            assert not band or min(band, key=lambda e: e.losses.loss_nats_per_token).config in chosen


SMALL = {
    "search": {"evaluations": 8, "batch": 4, "presets": False},
    "final": {**SUPERNET["final"], "candidates": 2, "presets": False},
}
KINDS = {
    "none": {"split": {"method": "none"}, "search": {**SMALL["search"], "sampler": "tpe"}},
    "exhaustive": {"split": {"method": "exhaustive"}, "search": {**SMALL["search"], "sampler": "nsga3"}},
    "random": {"split": {"method": "random", "splits": 2}, "supernet": {**SUPERNET["supernet"], "strategy": "uniform"}},
    "restart": {
        "split": {"splits": 2, "batches": 1, "restart": True},
        "supernet": {**SUPERNET["supernet"], "strategy": "fair", "distill": True},
    },
    "seeds": {"split": {"method": "none"}, "final": {**SMALL["final"], "seeds": 2}},
    "asha": {"split": {"method": "none"}, "final": {**SMALL["final"], "steps": 8, "early_stopping": {"grace": 2}}},
    "untrained": {"split": {"method": "none"}, "supernet": {**SUPERNET["supernet"], "steps": 0}},
    "bpe": {"data": {"text": "python", "max_bytes": 60_000, "tokenizer": "bpe"}},
    "from, on the text": {"final": {**SMALL["final"], "distill": False}, "supernet": {**SUPERNET["supernet"], "distill": False}},
    "from, two seeds": {"final": {**SMALL["final"], "seeds": 2}, "split": {"method": "none"}},
    "from, restart": {"split": {"splits": 1, "batches": 1, "batch": 1, "restart": True}},
    "from, supernet untrained": {"supernet": {**SUPERNET["supernet"], "steps": 0}},
    "from, not fine-tuned": {"final": {**SMALL["final"], "steps": 0}},
    "from, nothing but sharing": {"space": {"choices": {"kv": {"layers": [1]}}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_search_reaches_its_front(kind, tmp_path):
    based = kind.startswith("from")
    run, found = search(tmp_path, FROM if based else SUPERNET, **{**SMALL, **KINDS[kind]})
    assert found.members
    assert run.front() == found
    assert {e.seed for e in found.evaluations} == ({0, 1} if "seeds" in kind else {0})
    if based:
        assert found.weights == ("zero_shot" if "not fine-tuned" in kind else "fine_tuned")
        assert any(e.config.is_dense for e in found.evaluations)
        return
    assert len({e.tokens for e in found.evaluations}) == 1
    leaves = {e.supernet for e in run.searched()}
    assert leaves == {"0"} if "none" in str(KINDS[kind].get("split")) else all(leaf.startswith("0-") for leaf in leaves)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root becomes another user")
def test_a_user_without_a_name_and_a_home_searches_and_only_tokens_are_written_to_a_home(tmp_path):
    """As in a container of `docker run --user 12345`; the capability lets it execute a Python that lies in root's home."""
    read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    nobody = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *read]
    short = {"search": {"evaluations": 3}, "final": SUPERNET["final"] | {"presets": False}, "run": {"workers": 1}, "tracking": {}}
    runs, home = Path(tempfile.mkdtemp()), tmp_path / "home"
    trial = write_trial(runs, SUPERNET, **short)  # its folder is open to others, as the test's is not
    home.mkdir()
    for folder in (runs, home):
        folder.chmod(0o777)
    for one in (home, tmp_path / "none"):
        command = [sys.executable, "-m", "nas", "search", str(trial), "--name", one.name, "--runs", str(runs)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(one), "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([*nobody, *command], env=environment, cwd=runs, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert str(one) not in done.stderr
    assert [path.relative_to(home).as_posix() for path in (*home.iterdir(), *home.glob("*/*"))] == [".cache", ".cache/nas"]
    shutil.rmtree(runs)
