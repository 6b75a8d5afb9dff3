"""A search from a trained model: it begins as the model, is measured before it is trained, and what is reported is fine-tuned."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from nas.search.origin import read_base_model
from nas.search.published import export_run, write_run_report
from test_checkpoint import Made, theirs
from test_search import TINY, results

from nas.cli import nas
from nas.config import build, parse_yaml, plain
from nas.data import eval_sequences, load_corpus
from nas.data.tokenizer import bytes_json, encode_bytes
from nas.errors import UserError
from nas.export import ModelCard, export, load_export
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import Supernet, standalone
from nas.pretrained.conversions import METHODS, PretrainedModel, fine_tune, init_from_pretrained
from nas.pretrained.conversions.initialise import dictionary, fewer_columns
from nas.search.conversions import SIZES, size_grid
from nas.search.final import Front, choose, zero_shot
from nas.search.jobs import read_model, read_supernet
from nas.search.launch import Launch, check, plan, resume, start
from nas.search.loop import changes
from nas.search.progress import Silent
from nas.search.run import Run
from nas.search.trial import Trial, TrialFile
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import DOWN_PROJ, FFN
from nas.sharing.primitives import PRIMITIVES
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.tracking.spec import Link
from nas.tracking.store import Search
from nas.training.distillation import distillation_backward
from nas.training.evaluation import Evaluation, measure_losses
from nas.training.loop import TrainSpec
from nas.training.strategies import SupernetStep

SHAPE = ModelShape(vocab_size=256, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24)
CHOICES = {
    "tie": {"sources": "previous"},
    "kv": {"sources": "previous"},
    "kv_heads": {"options": [4, 2, 1]},
    "intermediate": {"options": [24, 12]},
    "delta": {"options": ["own", 2]},
}
FROM = {
    **{key: value for key, value in TINY.items() if key != "data"},
    "name": "from",
    "from": "dense",
    "space": {"choices": CHOICES},
    "data": {"text": "python", "max_bytes": 60_000},
}


def dense_folder(folder: Path, shape: ModelShape = SHAPE, seed: int = 0, layers: list[dict[str, Any]] | None = None) -> Path:
    """A model whose every weight matters, exported as a checkpoint would be."""
    config = SharingConfig.make(shape, layers) if layers else SharingConfig.dense(shape)
    model = init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    return export(model, config, bytes_json(), folder, ModelCard())


def trial_in(folder: Path, **changes: Any) -> Path:
    """The tiny trial beside its checkpoint, whole sections replaced; those that are None are left out."""
    if not (folder / "dense").exists():
        dense_folder(folder / "dense")
    path = folder / "trial.yaml"
    data = {key: value for key, value in {**FROM, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Front]:
    """A finished run from a checkpoint."""
    folder = tmp_path_factory.mktemp("from")
    return start(Launch(trial_in(folder, tracking={}), folder / "runs"), Silent())


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Front]:
    """A finished run without any training: neither of the supernet, nor of what was found."""
    folder = tmp_path_factory.mktemp("untrained")
    none = {"supernet": {**TINY["supernet"], "steps": 0}, "final": {**TINY["final"], "steps": 0}}
    return start(Launch(trial_in(folder, **none), folder / "runs"), Silent())


def dense_at(run: Run) -> Decoder:
    """The run's checkpoint."""
    return load_export(Path(run.read_json("run.json")["from"])).model


def loss(run: Run, model: Decoder, count: int) -> float:
    """Of a model on so many of the run's evaluation windows."""
    windows = eval_sequences(encode_bytes((run.folder / "eval.txt").read_bytes()), run.trial().file.final.seq, count)
    return measure_losses(model, windows).loss_nats_per_token


def same(one: Decoder, other: Decoder) -> bool:
    """Bit by bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


# --- the supernet begins as the checkpoint


def dense_of(shape: ModelShape) -> PretrainedModel:
    return PretrainedModel(standalone(tiny.supernet(shape).subnet(SharingConfig.dense(shape))), tiny.tokens(shape, 4, 9))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", tiny.SHAPES)
def test_the_dense_subnet_computes_what_the_checkpoint_does(name: str, narrow: bool) -> None:
    """Whatever the supernet keeps beside; bit by bit, unless neurons are put in order."""
    shape = tiny.SHAPES[name]
    dense, net = dense_of(shape), Supernet(shape, torch.Generator().manual_seed(1), tiny.extras(shape))
    init_from_pretrained(net, dense, narrow)
    rows = tiny.tokens(shape)
    ours, theirs = tiny.logits(net.subnet(SharingConfig.dense(shape)), rows), tiny.logits(dense.model, rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-4 * narrow, atol=1e-5 * narrow)


NOTHING_LOST: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "delta": ([{}, {"ffn": 0, "delta": 2}, {}, {}], {}),
    "head of its own": ([{}, {}, {}, {}], {"tie_word_embeddings": False}),
    "step vectors": ([{}, {}, {}, {}], {"step_embedding": True}),
    "wider FFN": ([{"intermediate": 60}, {}, {}, {}], {}),
    "as many atoms as layers": ([{"factor": "dictionary 4 at 0 for q down"}] * 4, {}),
    "basis of full rank": ([{"factor": "basis 32 at 0 for q gate"}] * 4, {}),
    "embedding of nearly full rank": ([{}, {}, {}, {}], {"embedding_rank": 31}),
}


@pytest.mark.parametrize("name", NOTHING_LOST)
def test_weights_beyond_a_dense_models_begin_as_what_loses_nothing(name: str) -> None:
    """Those that can begin so: a delta adds nothing to what is shared, enough atoms or ranks make the matrices themselves."""
    shape, (layers, whole) = tiny.MHA, NOTHING_LOST[name]
    config, dense = SharingConfig.make(shape, layers, **whole), dense_of(shape)
    if "embedding_rank" in whole:
        with torch.no_grad():
            dense.model.embed_tokens.weight[:, -1] = dense.model.embed_tokens.weight[:, 0]  # so that one column is too many
    wanted = {"delta": SharingConfig.make(shape, [{}, {"ffn": 0}, {}, {}])}.get(name, SharingConfig.dense(shape))
    said = [(0, *pair) for pair in config.model_choices] + [(i, *pair) for i, layer in enumerate(config.layers) for pair in layer]
    sizes = {
        weight: size for i, choice, value in said for weight, size in PRIMITIVES[choice].supernet_parameters(shape, i, value)
    }
    net = Supernet(shape, torch.Generator().manual_seed(1), sizes)
    init_from_pretrained(net, dense)
    rows = tiny.tokens(shape)
    ours, theirs = (tiny.logits(net.subnet(c), rows) for c in (config, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def lost(matrices: torch.Tensor, found: torch.Tensor) -> float:
    return (matrices - found).square().sum().item()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_a_dictionary_is_the_nearest_of_its_size_and_its_first_atoms_of_theirs(size: int) -> None:
    matrices = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    atoms, mixes = dictionary(list(matrices), size)
    values = torch.linalg.svdvals(matrices.flatten(1))
    for few in range(1, size + 1):
        mixed = torch.einsum("ls,soi->loi", mixes[:, :few], atoms[:few])
        assert lost(matrices, mixed) == pytest.approx(values[few:].square().sum().item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_fewer_columns_of_an_embedding_are_the_nearest(rank: int) -> None:
    embedding = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    factored, projection = fewer_columns(embedding, rank)
    values = torch.linalg.svdvals(embedding)
    for few in range(1, rank + 1):
        found = factored[:, :few] @ projection[:, :few].T
        assert lost(embedding, found) == pytest.approx(values[few:].square().sum().item(), rel=1e-4, abs=1e-4)


def test_a_narrow_ffn_has_the_neurons_that_matter_most_however_they_lay() -> None:
    shape, dense = tiny.MHA, dense_of(tiny.MHA)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # some neurons matter much, most hardly
        for i in range(4):
            dense.model.part(i, DOWN_PROJ).weight.mul_(torch.rand(48, generator=generator) ** 3)
    dense = PretrainedModel(dense.model, dense.calibration)
    narrow = SharingConfig.make(shape, [{"intermediate": 12}] * 4)
    shuffled, order = Decoder(shape, dense.model.plan), torch.randperm(48, generator=torch.Generator().manual_seed(0))
    weights = dict(dense.weights)
    for i in range(4):
        for slot in FFN:
            name = f"layers.{i}.{slot}.weight"
            weights[name] = weights[name].index_select(int(slot == DOWN_PROJ), order)
    shuffled.load_state_dict(weights)
    found = []
    for model in (dense.model, shuffled):
        net = Supernet(shape, torch.Generator().manual_seed(1))
        init_from_pretrained(net, PretrainedModel(model, dense.calibration), narrow=True)
        found.append(tiny.logits(net.subnet(narrow), tiny.tokens(shape)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    plainly = Supernet(shape, torch.Generator().manual_seed(1))
    init_from_pretrained(plainly, dense)
    wanted, windows = dense.model, tiny.tokens(shape, 16, 9, seed=5)
    errors = [
        (tiny.logits(model.subnet(narrow), windows) - tiny.logits(wanted, windows)).square().mean() for model in (net, plainly)
    ]
    assert errors[0] < errors[1]


# --- what it learns from


SPEC = TrainSpec(steps=2, batch=2, seq=8, learning_rate=1e-2, autocast=False)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn() -> None:
    dense, net = dense_of(tiny.MHA), Supernet(tiny.MHA, torch.Generator().manual_seed(1))
    init_from_pretrained(net, dense)
    step = SupernetStep(
        net, SPEC, lambda rng: [SharingConfig.dense(tiny.MHA)], random.Random(), dense.model.requires_grad_(False)
    )
    step(tiny.tokens(tiny.MHA, 2, 9))
    assert max(weight.grad.abs().max().item() for weight in net.parameters() if weight.grad is not None) < 1e-6


def test_every_subnet_learns_from_the_checkpoint_as_a_model_alone_would() -> None:
    dense, net, rows = dense_of(tiny.MHA), tiny.supernet(tiny.MHA, seed=3), tiny.tokens(tiny.MHA, 2, 9)
    configs = [SharingConfig.dense(tiny.MHA), SharingConfig.make(tiny.MHA, [{}, {"tie": 0}, {"kv": 0}, {}])]
    step = SupernetStep(net, SPEC, lambda rng: [*configs, configs[1]], random.Random(), dense.model.requires_grad_(False))
    step(rows)
    found = {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}
    net.zero_grad(set_to_none=True)
    for config, share in zip(configs, (1 / 3, 2 / 3), strict=True):
        before = {name: 0 if weight.grad is None else weight.grad.clone() for name, weight in net.named_parameters()}
        distillation_backward(net.subnet(config), dense.model, SPEC)(rows)
        for name, weight in net.named_parameters():
            if weight.grad is not None:
                weight.grad = before[name] + share * (weight.grad - before[name])
    assert step.subnets == 2
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert all(weight.grad is None for weight in dense.model.parameters())


# --- which conversions are tried


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [SHAPE, tiny.GQA, tiny.SHAPES["one-layer"], replace(SHAPE, num_hidden_layers=22)])
def test_few_sizes_of_each_method_are_tried_the_usual_first(name: str, shape: ModelShape) -> None:
    method, tried = METHODS[name], size_grid(METHODS[name], shape)
    assert len(tried) == len(set(tried)) <= SIZES
    for size in tried:
        assert method.read_size(shape, "x".join(map(str, size))) == size
    if tried:
        assert tried[0] == method.usual(shape)
    assert method.penalty is None or not tried


# --- a whole search


@pytest.mark.slow
def test_the_front_is_of_healed_models_and_the_checkpoint_is_among_them(finished: tuple[Run, Front]) -> None:
    run, found = finished
    assert {e.weights for e in found.evaluations} == {"fine_tuned"} == {found.weights}
    assert len({e.tokens for e in found.evaluations}) == 1
    assert SharingConfig.dense(SHAPE) in {e.config for e in found.evaluations}
    assert run.front() == found
    for e in found.evaluations:
        model = read_model(SHAPE, e.config, run.weights(e))
        assert loss(run, model, 8) == pytest.approx(e.losses.loss_nats_per_token, rel=1e-5)


@pytest.mark.slow
def test_the_checkpoint_as_it_came_is_reported(finished: tuple[Run, Front]) -> None:
    run, _ = finished
    made = run.read_json("run.json")
    assert math.log(made["from_perplexity"]) == pytest.approx(loss(run, dense_at(run), 8), rel=1e-5)


@pytest.mark.slow
def test_the_resolved_trial_is_the_trial(finished: tuple[Run, Front]) -> None:
    run, _ = finished
    data = yaml.safe_load((run.folder / "trial.yaml").read_text())
    assert Path(data["from"]).is_absolute()
    assert Path(data["data"]["tokenizer"]) == Path(data["from"]) / "tokenizer.json"
    assert data["space"]["model"]["hidden_size"] == SHAPE.hidden_size
    assert run.trial().to_data() == data
    assert run.trial().space.options == Trial.load(run.folder.parent.parent / "trial.yaml").space.options


@pytest.mark.slow
def test_conversions_are_measured_as_they_are_with_weights_of_their_own(finished: tuple[Run, Front]) -> None:
    run, _ = finished
    found = run.converted()
    assert {e.weights for e in found} == {"converted"}
    assert {e.tokens for e in found} == {0}
    assert {"dense", "kvsharer-1", "drop-1", "drop-2", "basis-2x8"} <= {e.supernet for e in found}
    assert not any(e.supernet.startswith("headwise-post") for e in found)  # it trains first
    assert [e.supernet for e in found if e.config == SharingConfig.dense(SHAPE)] == ["dense"]
    for e in found:
        assert loss(run, read_model(SHAPE, e.config, run.weights(e)), 4) == pytest.approx(e.losses.loss_nats_per_token, rel=1e-5)
    (dense,) = [e for e in found if e.supernet == "dense"]
    assert same(read_model(SHAPE, dense.config, run.weights(dense)), dense_at(run))


def best_seen(run: Run, config: SharingConfig) -> Evaluation:
    return min((e for e in (*run.converted(), *run.searched()) if e.config == config), key=lambda e: e.losses.perplexity)


@pytest.mark.slow
def test_candidates_of_either_kind_begin_with_the_weights_that_they_were_seen_with(untrained: tuple[Run, Front]) -> None:
    run, found = untrained
    net, _ = read_supernet(run.trial().space, run.folder / "supernet" / "start.pt")
    origins = Counter()
    for e in found.evaluations:
        best = best_seen(run, e.config)
        converted = best.weights == "converted"
        begun = read_model(SHAPE, e.config, run.weights(best)) if converted else standalone(net.subnet(e.config))
        assert same(read_model(SHAPE, e.config, run.weights(e)), begun)
        origins[best.weights] += 1
    assert min(origins["converted"], origins["inherited"]) > 0
    assert any("-converted" in e.name for e in found.evaluations) or origins["converted"] > 1


@pytest.mark.slow
def test_without_training_the_search_sees_the_checkpoint_itself(untrained: tuple[Run, Front]) -> None:
    run, found = untrained
    assert {e.weights for e in found.evaluations} == {"zero_shot"}
    assert {e.tokens for e in (*found.evaluations, *run.searched())} == {0}
    assert [path.name for path in (run.folder / "supernet").iterdir()] == ["start.pt"]
    assert not list(run.folder.glob("split-*"))
    (dense,) = [e for e in run.searched() if e.config == SharingConfig.dense(SHAPE)]
    (came,) = [e for e in run.converted() if e.supernet == "dense"]
    assert dense.losses.loss_nats_per_token == pytest.approx(came.losses.loss_nats_per_token, rel=1e-4)
    (reference,) = [e for e in found.evaluations if e.config == SharingConfig.dense(SHAPE)]
    assert reference.losses.perplexity == pytest.approx(run.read_json("run.json")["from_perplexity"], rel=1e-4)


@pytest.mark.slow
def test_the_checkpoint_and_each_decision_alone_are_asked_first(untrained: tuple[Run, Front]) -> None:
    """As many as half of the search has room for, beside the published schemes."""
    run, _ = untrained
    space, dense = run.trial().space, SharingConfig.dense(SHAPE)
    alone = changes(space, dense)
    assert next(iter(alone)) == dense
    setting = {name: options[0] for name, options in space.options.items()} | alone[dense]
    for config, assignment in alone.items():
        assert space.encode(config) is not None
        assert sum(setting[name] != value for name, value in assignment.items()) == (config != dense)
    first = [e for e in run.searched() if e.config in alone]
    assert len(first) >= min(len(alone), run.trial().file.search.evaluations // 2)
    assert not changes(space, SharingConfig.make(SHAPE, [{}, {"heads": "0=0.1"}, {}, {}]))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 5])
def test_candidates_are_the_best_of_bands_equal_in_bytes(finished: tuple[Run, Front], count: int) -> None:
    seen = list(zero_shot([*finished[0].converted(), *finished[0].searched()]).values())
    chosen = choose(seen, count, scale=float)
    sizes = {e.config: e.memory.memory_bytes for e in seen}
    width = (max(sizes.values()) - min(sizes.values())) / count
    for n in range(count):
        band = [e for e in seen if int((sizes[e.config] - min(sizes.values())) / width) == n]
        best = min(band, key=lambda e: e.losses.loss_nats_per_token, default=None)
        assert best is None or best.config in chosen


@pytest.mark.slow
def test_healing_is_training_on_the_checkpoints_probabilities(finished: tuple[Run, Front]) -> None:
    """To the very weights that a training of the same start, teacher and batches leads to."""
    run, found = finished
    file, corpus = run.trial().file, load_corpus(run.trial().file.data, 256, run.folder)
    spec = TrainSpec(**{name: getattr(file.final, name) for name in TrainSpec.__dataclass_fields__})
    e = next(e for e in found.evaluations if e.config != SharingConfig.dense(SHAPE))
    best = best_seen(run, e.config)
    start = run.weights(best) if best.weights == "converted" else run.folder / "start" / f"{e.config.hash}.safetensors"
    model = read_model(SHAPE, e.config, start)
    for _ in fine_tune(model, spec, corpus.train, torch.Generator().manual_seed(e.seed), dense_at(run)):
        pass
    fine_tuned = read_model(SHAPE, e.config, run.weights(e)).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, fine_tuned[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_picked_model_leaves_with_the_checkpoints_tokenizer_and_says_where_it_is_from(
    finished: tuple[Run, Front], tmp_path: Path
) -> None:
    run, _ = finished
    evaluation = export_run(run, "knee", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == (
        Path(run.read_json("run.json")["from"]) / "tokenizer.json"
    ).read_text()
    assert loss(run, load_export(tmp_path / "out").model, 8) == pytest.approx(evaluation.losses.loss_nats_per_token, rel=1e-5)
    readme = (tmp_path / "out/README.md").read_text()
    assert "begun as those of `dense`" in readme
    assert f"Begun with weights of a trained model, and trained for {evaluation.tokens:,} tokens since" in readme


@pytest.mark.slow
def test_what_people_see_says_that_models_were_healed_and_from_what(finished: tuple[Run, Front], tmp_path: Path) -> None:
    run, found = finished
    table = CliRunner().invoke(nas, ["front", str(run.folder)])
    assert "every fine-tuned model, by memory; from" in " ".join(table.output.split())
    assert {
        row["weights"] for row in json.loads(CliRunner().invoke(nas, ["front", str(run.folder), "--json"]).output)["front"]
    } == {"fine_tuned"}
    page = write_run_report(run, tmp_path).read_text()
    for words in ("**Healed weights.**", "**Inherited weights.**", "**Converted weights.**", "from_perplexity"):
        assert words in page
    assert (run.folder / "fine_tuned.csv").is_file()
    assert "retrained" not in page + table.output + (run.folder / "front.html").read_text().split("<body>")[1].split("plotly")[0]
    search = Search.resume(Link.load(run.folder))
    kinds = Counter(child.data.tags["kind"] for child in search.children())
    assert kinds["front"] == len(found.members)
    assert kinds["front"] + kinds["preset"] + kinds["fine_tuned"] == len(found.configs)
    note = search.client.get_run(search.link.run_id).data.tags["mlflow.note.content"]
    assert "**from**" in note
    assert "fine-tuned for 128 tokens each on the checkpoint's probabilities" in note


def copied(run: Run, folder: Path, **changes: Any) -> Run:
    """A copy of a run, with changes to its trial."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("tracking.json"))
    data = yaml.safe_load((folder / "trial.yaml").read_text())
    (folder / "trial.yaml").write_text(yaml.safe_dump(data | {"tracking": {"enabled": False}} | changes, sort_keys=False))
    return Run(folder)


@pytest.mark.slow
def test_a_finished_run_does_not_need_its_checkpoint_any_more(untrained: tuple[Run, Front], tmp_path: Path) -> None:
    run = copied(untrained[0], tmp_path / "run", **{"from": str(tmp_path / "gone")})
    assert run.front() == untrained[1] == resume(run, Silent())
    export_run(run, "smallest", tmp_path / "out")
    write_run_report(run, tmp_path / "reports")


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_checkpoint(untrained: tuple[Run, Front], tmp_path: Path) -> None:
    other = dense_folder(tmp_path / "dense", seed=1)
    run = copied(untrained[0], tmp_path / "run", **{"from": str(other)})
    (run.folder / "front.json").unlink()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match="the checkpoint is not the one this run began with; put the old weights back"):
        resume(run, Silent())
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
def test_limits_hold_for_conversions_and_for_the_checkpoint(finished: tuple[Run, Front], tmp_path: Path) -> None:
    dense = measure(SHAPE, SharingConfig.dense(SHAPE), MemorySpec(context=64)).memory_bytes
    trial = trial_in(
        tmp_path,
        limits={"memory_bytes": dense * 3 // 4},
        supernet={**TINY["supernet"], "steps": 0},
        final={**TINY["final"], "steps": 0, "presets": False},
    )
    run, found = start(Launch(trial, tmp_path / "runs"), Silent())
    assert all(e.memory.memory_bytes <= dense * 3 // 4 for e in found.evaluations)
    assert any(e.memory.memory_bytes > dense * 3 // 4 for e in run.converted())


SMALL = {"evaluations": 8, "batch": 4, "presets": False}
KINDS: dict[str, dict[str, Any]] = {
    "on the text": {"final": {**TINY["final"], "distill": False}, "supernet": {**TINY["supernet"], "distill": False}},
    "two seeds": {"final": {**TINY["final"], "seeds": 2, "presets": False}, "split": {"method": "none"}},
    "restart": {"split": {"splits": 1, "batches": 1, "batch": 1, "restart": True}},
    "supernet untrained": {"supernet": {**TINY["supernet"], "steps": 0}},
    "not fine-tuned": {"final": {**TINY["final"], "steps": 0, "presets": False}},
    "nothing but sharing": {"space": {"choices": {"kv": {"layers": [1]}}}, "final": {**TINY["final"], "presets": False}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_search_from_a_checkpoint_reaches_its_front(kind: str, tmp_path: Path) -> None:
    run, found = start(Launch(trial_in(tmp_path, **{"search": SMALL, **KINDS[kind]}), tmp_path / "runs"), Silent())
    assert found.weights == ("zero_shot" if kind == "not fine-tuned" else "fine_tuned")
    assert SharingConfig.dense(SHAPE) in {e.config for e in found.evaluations}
    assert run.front() == found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_search_begins_with_a_folder_of_transformers(family: str, tmp_path: Path) -> None:
    """In bfloat16 and in shards; the dense subnet computes what the folder's own model does."""
    folder = Made(family, tied=family == "gemma", shards=True, dtype="bfloat16").write(tmp_path / "theirs")
    choices = {"tie": {}, "kv": {}, "kv_heads": {}, "intermediate": {}, "drop": {}}
    changes = {"from": "theirs", "memory": {"context": 32}, "search": SMALL, "space": {"choices": choices}}
    changes["final"] = {**TINY["final"], "presets": False}
    run, _ = start(Launch(trial_in(tmp_path, **changes), tmp_path / "runs"), Silent())
    shape = run.trial().space.shape
    net, _ = read_supernet(run.trial().space, run.folder / "supernet" / "start.pt")
    rows = tiny.tokens(tiny.MHA, 2, 20)
    with torch.no_grad():
        wanted = theirs(folder)(rows).logits
    torch.testing.assert_close(tiny.logits(net.subnet(SharingConfig.dense(shape)), rows), wanted, rtol=1e-3, atol=1e-3)
    evaluation = export_run(run, "lowest-perplexity", tmp_path / "out")
    assert evaluation.weights == "fine_tuned"
    assert loss(run, load_export(tmp_path / "out").model, 8) == pytest.approx(evaluation.losses.loss_nats_per_token, rel=1e-5)


@pytest.mark.slow
def test_a_killed_search_from_a_checkpoint_goes_on_to_the_very_front_of_an_undisturbed_one(
    finished: tuple[Run, Front], tmp_path: Path
) -> None:
    trial, folder = trial_in(tmp_path), tmp_path / "runs" / "from"
    code = "import torch; torch.set_num_threads(1); from nas.cli import main; main()"

    def results_in(name: str) -> int:
        return len(list((folder / name).glob("*/result.json")))

    moments = [
        lambda: results_in("converted") >= 3,
        lambda: (folder / "supernet" / "start.pt").exists(),
        lambda: (folder / "journal.jsonl").exists() and (folder / "journal.jsonl").read_bytes().count(b"\n") >= 5,
        lambda: results_in("final") >= 2,
    ]
    done: dict[Path, int] = {}
    for n, moment in enumerate(moments):
        words = ["search", str(trial)] if n == 0 else ["resume", "from"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        give_up = time.monotonic() + 240
        while not moment():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < give_up, f"moment {n} never came"
            time.sleep(0.02)
        process.kill()
        process.wait()
        done = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} | done
    front = resume(Run(folder), Silent())
    assert results(front) == results(finished[1])
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())


# --- mistakes


MODEL = plain(SHAPE)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such folder": ({"from": "dence"}, "from: .*dence: no such folder; give a folder that"),
    "no such folder, of a space with a model": (
        {"from": "dence", "space": {"model": MODEL, "choices": {}}},
        "dence: no such folder",
    ),
    "not text": ({"from": 3}, "trial.yaml:.*: from: 3 will not do; use text"),
    "another depth": (
        {"space": {"model": {**MODEL, "num_hidden_layers": 5}, "choices": {}}},
        "model.num_hidden_layers: is 5, and 4 in dense; leave the space's `model:` out",
    ),
    "another base of positions": (
        {"space": {"model": {**MODEL, "rope_theta": 5e5}, "choices": {}}},
        r"model.rope_theta: is 500000.0, and 10000.0 in dense",
    ),
    "a model that shares": ({"from": "shares"}, "shares: it shares already .* convert the dense model it comes from"),
    "another tokenizer": (
        {"data": {**FROM["data"], "tokenizer": "other.json"}},
        "data.tokenizer: other.json is not the tokenizer of dense; leave it out",
    ),
    "no checkpoint and no model": ({"from": None}, "model is missing; add `model:`"),
    "no checkpoint and no training": (
        {**TINY, "from": None, "final": {**TINY["final"], "steps": 0}},
        "final.steps: 0 is too few; use 1 or more, or a checkpoint",
    ),
    "no checkpoint to learn from": (
        {**TINY, "from": None, "final": {**TINY["final"], "distill": True}},
        "final.distill: there is no model to learn from; name a checkpoint",
    ),
    "rows that are too long": ({"final": {**TINY["final"], "seq": 4096}}, "4096 tokens are more than the model's"),
    "a broken choice": ({"space": {"choices": {"kv_heads": {"options": [3]}}}}, "3 does not divide num_attention_heads=4"),
}
SEEN_BY_CHECK = MISTAKES.keys() - {"another tokenizer", "rows that are too long"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_written(name: str, tmp_path: Path) -> None:
    changes, said = MISTAKES[name]
    dense_folder(tmp_path / "shares", layers=[{}, {"tie": 0}, {}, {}])
    other = json.loads(bytes_json())
    other["model"]["vocab"] = {symbol: 255 - n for symbol, n in other["model"]["vocab"].items()}
    (tmp_path / "other.json").write_text(json.dumps(other))
    trial = trial_in(tmp_path, **changes)
    for words in (["search", str(trial), "--runs", str(tmp_path / "runs")], ["check", str(trial)]):
        if words[0] == "check" and name not in SEEN_BY_CHECK:
            continue
        found = CliRunner().invoke(nas, words)
        assert isinstance(found.exception, UserError), found.output
        assert re.search(said, str(found.exception)), str(found.exception)
        assert "\n" not in str(found.exception)
    assert not (tmp_path / "runs").exists()


def test_a_right_trial_is_said_to_be_right(tmp_path: Path) -> None:
    found = CliRunner().invoke(nas, ["check", str(trial_in(tmp_path))])
    seen = "on a supernet of 8 steps by the even rule, split by gradient-matching"
    assert found.output.strip().endswith(f"a trial: 24 evaluations, {seen}")


def test_keys_that_python_keeps_for_itself_are_read_and_written(tmp_path: Path) -> None:
    data = yaml.safe_load(trial_in(tmp_path).read_text())
    file = build(TrialFile, parse_yaml(yaml.safe_dump(data), "t.yaml"))
    assert file.from_ == "dense"
    assert plain(file)["from"] == "dense"
    assert build(TrialFile, parse_yaml(yaml.safe_dump(plain(file)), "t.yaml")) == file
    with pytest.raises(UserError, match=r"t.yaml:\d+: from_: unknown key; did you mean from\?"):
        build(TrialFile, parse_yaml(yaml.safe_dump({**data, "from_": "dense"}), "t.yaml"))


def test_the_plan_says_what_the_search_is_from(tmp_path: Path) -> None:
    trial = Trial.load(trial_in(tmp_path))
    corpus, reach = check(trial)
    lines = plan(trial, corpus, reach, read_base_model(trial, corpus))
    (line,) = [line for line in lines if line.startswith("from ")]
    assert re.fullmatch(r"from    .*dense: 4 layers of width 16, perplexity [\d.]+ on the evaluation text", line)
