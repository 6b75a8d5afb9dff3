"""A search from a base model: it starts as the model, is measured before it is trained, and what is reported is fine-tuned."""

import math
import platform
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import searches
import tiny
import torch
import yaml
from commands import refused, said, told
from searches import FROM, FROM_PREDICTOR, PREDICTOR, SHAPE, SUPERNET, write_dense, write_trial
from test_checkpoint import Made, theirs
from test_search import copy_of
from test_tracking import children

from nas.config import build, parse_yaml, plain
from nas.data import eval_sequences, load_corpus
from nas.errors import UserError
from nas.export import load_export
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import Supernet, standalone
from nas.pretrained.conversions import METHODS, PretrainedModel, fine_tune, init_from_pretrained
from nas.pretrained.conversions.initialise import dictionary, fewer_columns
from nas.report.front import labels
from nas.report.tables import front_table
from nas.search import evaluators, supernets
from nas.search.budget import Budget
from nas.search.candidates import best_seen
from nas.search.context import Context, presets_in, read_base_model
from nas.search.convert import SIZES, conversions_of, size_grid
from nas.search.evaluators import SupernetEvaluator
from nas.search.jobs import STATE, ConvertedWeights, InheritedWeights, Start, read_model, read_supernet
from nas.search.launch import check, resume, summary
from nas.search.loop import neighbours
from nas.search.progress import Silent
from nas.search.publish import export_run, write_run_report
from nas.search.run import Run
from nas.search.samplers import SAMPLERS
from nas.search.trial import Trial
from nas.search.trial_file import TPE_HOLDS, TrialFile, train_spec
from nas.sharing.distribution import single_decisions, sums_of_single_decisions
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import DOWN_PROJ, FFN
from nas.sharing.primitives import PRIMITIVES
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SingleDecision
from nas.tracking.spec import Link
from nas.tracking.store import connect
from nas.training.evaluation import Evaluation, measure_losses
from nas.workers import RESULT

DENSE = SharingConfig.dense(SHAPE)
UNTRAINED = {"supernet": {**SUPERNET["supernet"], "steps": 0}, "final": {**SUPERNET["final"], "steps": 0}}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run without any training: neither of the supernet, nor of the candidates."""
    return searches.search(tmp_path_factory.mktemp("untrained"), FROM, **UNTRAINED)[0]


def test_conversions_are_fine_tuned_alike_if_asked_for(tmp_path: Path, untrained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them but those that lose too much before."""
    losses = sorted(e.losses.loss_nats_per_token for e in untrained.converted())
    monkeypatch.setattr(evaluators, "HORIZON", losses[len(losses) // 2] - losses[0])
    final = {**UNTRAINED["final"], "presets": False, "conversions": True}
    run, front = searches.search(tmp_path, FROM, **UNTRAINED | {"final": final})
    works = {e.config for e in run.converted() if e.losses.loss_nats_per_token <= losses[len(losses) // 2]}
    every = {e.config for e in run.converted()}
    assert 1 < len(works) < len(every)
    assert works | {DENSE} == every & {m.first.config for m in front.configs}


def base_of(run: Run) -> Decoder:
    return load_export(Path(run.read_json("run.json")["from"])).model


def loss(run: Run, model: Decoder, count: int, part: str = "test") -> float:
    """Of a model on so many windows of the run's test text, or of its validation text."""
    file = run.trial().file
    corpus = load_corpus(file.data, run.trial().space.shape.vocab_size, run.folder)
    windows = eval_sequences(getattr(corpus, part), file.final.seq, count)
    return measure_losses(model, windows).loss_nats_per_token


def same(one: Decoder, other: Decoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


# --- the supernet is initialised as the base model


def dense_of(shape: ModelShape) -> PretrainedModel:
    return PretrainedModel(standalone(tiny.supernet(shape).subnet(SharingConfig.dense(shape))), tiny.tokens(shape, 4, 9))


def test_the_dense_subnet_computes_what_the_base_model_does() -> None:
    """Whatever the supernet keeps beside; bit by bit, unless neurons are put in order."""
    for shape in tiny.SHAPES.values():
        for narrow in (False, True):
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


def test_weights_beyond_a_dense_models_are_initialised_as_what_loses_nothing() -> None:
    """Those that can begin so: a delta adds nothing to what is shared, enough atoms or ranks make the matrices themselves."""
    for name, (layers, whole) in NOTHING_LOST.items():
        check_nothing_lost(name, layers, whole)


def check_nothing_lost(name: str, layers: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    shape = tiny.MHA
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


def test_a_dictionary_is_the_nearest_of_its_size_and_its_first_atoms_of_theirs() -> None:
    matrices = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrices.flatten(1))
    for size in (1, 2, 3, 4, 6):
        atoms, mixes = dictionary(list(matrices), size)
        for few in range(1, size + 1):
            mixed = torch.einsum("ls,soi->loi", mixes[:, :few], atoms[:few])
            assert lost(matrices, mixed) == pytest.approx(values[few:].square().sum().item(), rel=1e-4, abs=1e-4)


def test_fewer_columns_of_an_embedding_are_the_nearest() -> None:
    embedding = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(embedding)
    for rank in (1, 3, 6):
        factored, projection = fewer_columns(embedding, rank)
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
    found = [tiny.logits(model.subnet(narrow), windows) for model in (net, plainly)]
    errors = [(logits - tiny.logits(wanted, windows)).square().mean() for logits in found]
    assert errors[0] < errors[1]


# --- which conversions are tried


def test_few_sizes_of_each_method_are_tried_the_usual_first() -> None:
    for shape in (SHAPE, tiny.GQA, tiny.SHAPES["one-layer"], replace(SHAPE, num_hidden_layers=22)):
        for method in METHODS.values():
            tried = size_grid(method, shape)
            assert len(tried) == len(set(tried)) <= SIZES
            assert all(method.read_size(shape, "x".join(map(str, size))) == size for size in tried)
            assert not tried or tried[0] == method.usual(shape)
            assert method.penalty is None or not tried


# --- a whole search


def test_the_front_is_of_fine_tuned_models_and_the_base_model_is_among_them(from_run: Run) -> None:
    found, made = from_run.front(), from_run.read_json("run.json")
    assert {e.weights for e in found.evaluations} == {"fine_tuned"} == {found.weights}
    assert DENSE in {e.config for e in found.evaluations}
    for e in found.evaluations:
        model = read_model(SHAPE, e.config, from_run.weights(e))
        assert loss(from_run, model, 8) == pytest.approx(e.losses.loss_nats_per_token, rel=1e-5)
    assert math.log(made["from_perplexity"]) == pytest.approx(loss(from_run, base_of(from_run), 8), rel=1e-5)


def test_conversions_are_measured_as_they_are_with_weights_of_their_own(from_run: Run) -> None:
    found = from_run.converted()
    assert {e.weights for e in found} == {"converted"}
    assert {e.tokens for e in found} == {0}
    assert {"dense", "kvsharer-1", "drop-1", "drop-2", "basis-2x8"} <= {e.supernet for e in found}
    assert not any(e.supernet.startswith("headwise-post") for e in found)  # it trains first
    assert [e.supernet for e in found if e.config == DENSE] == ["dense"]
    for e in found:
        model = start_of(from_run, e)(e.config)
        assert loss(from_run, model, 4, "validation") == pytest.approx(e.losses.loss_nats_per_token, rel=1e-5)
        assert e.supernet != "dense" or same(model, base_of(from_run))
    assert {path.name for path in (from_run.folder / "converted").rglob("*") if path.is_file()} == {"result.json"}


def start_of(run: Run, e: Evaluation) -> Start:
    """What makes the weights that were evaluated; it is made here, and the run's own is its `candidates`'."""
    trial = run.trial()
    if e.weights == "inherited":
        return InheritedWeights(trial.space, run.folder / "supernet" / "start.pt")
    corpus = load_corpus(trial.file.data, 257, run.folder)
    base = read_base_model(trial, corpus)
    assert base is not None
    calibration = base.pretrained(trial, corpus).calibration.numpy()
    return ConvertedWeights(base.folder, conversions_of(SHAPE)[e.supernet], calibration)


def seen_best(run: Run, config: SharingConfig) -> Evaluation:
    return best_seen([*run.converted(), *run.searched()])[config]


def test_candidates_of_either_kind_start_from_the_weights_that_they_were_evaluated_with(untrained: Run) -> None:
    kinds = Counter[str]()
    for e in untrained.front().evaluations:
        best = seen_best(untrained, e.config)
        assert same(read_model(SHAPE, e.config, untrained.weights(e)), start_of(untrained, best)(e.config))
        kinds[best.weights] += 1
    assert min(kinds["converted"], kinds["inherited"]) > 0


def test_names_say_what_a_conversion_made_wherever_models_are_shown(from_run: Run, from_predictor_run: Run) -> None:
    """Of a preset's config, too; by a predictor every model that a conversion gives starts from it."""
    for run in (from_run, from_predictor_run):
        front, found, space = run.front(), run.converted(), run.trial().space
        presets = presets_in(space)
        own = {e.config: e if run is from_predictor_run else seen_best(run, e.config) for e in best_seen(found).values()}
        for e in found:
            said, preset = e.name.split(" = ")[0], presets.get(e.config, e.supernet)
            assert said == ("dense" if e.config == DENSE else f"{e.supernet}-converted")
            assert e.name == said if preset == e.supernet else e.name == f"{said} = {preset}"
        for e in front.evaluations:
            best = own.get(e.config)
            assert e.name == (best.name if best and best.weights == "converted" else presets.get(e.config, ""))
            assert not e.name or front.pick(presets.get(e.config, e.name)).config == e.config
        made = {m.label for m in front.configs if m.names and "-converted" in m.names[0]}
        assert any(" = " in name for name in made)
        assert made <= {row["name"] for row in front_table(front.evaluations)}
        assert all(any(name.partition(" = ")[0] in text for text in labels(front.panel)) for name in made)
    assert {m.label for m in from_run.front().configs if m.names} <= {child.info.run_name for child in children(from_run.folder)}


def test_without_training_the_search_evaluates_the_base_model_itself(untrained: Run) -> None:
    found = untrained.front()
    assert {e.weights for e in found.evaluations} == {"zero_shot"}
    assert {e.tokens for e in (*found.evaluations, *untrained.searched())} == {0}
    assert [path.name for path in (untrained.folder / "supernet").iterdir()] == ["start.pt"]
    assert not list(untrained.folder.glob("split-*"))
    (dense,) = [e for e in untrained.searched() if e.config == DENSE]
    (came,) = [e for e in untrained.converted() if e.supernet == "dense"]
    assert dense.losses.loss_nats_per_token == pytest.approx(came.losses.loss_nats_per_token, rel=1e-4)
    (final,) = [e for e in found.evaluations if e.config == DENSE]
    assert (final.part, dense.part, came.part) == ("test", "validation", "validation")
    assert final.losses.perplexity == pytest.approx(untrained.read_json("run.json")["from_perplexity"], rel=1e-4)


def test_what_each_option_costs_alone_is_measured_once_for_draws_near_the_front(tmp_path: Path) -> None:
    """On the base model's weights; the supernet and the split draw by it, and a search that goes on does not measure again."""
    near = {
        "supernet": {**SUPERNET["supernet"], "strategy": "near_front"},
        "split": {"splits": 1, "batches": 1, "configs": "near_front"},
    }
    near |= {"final": UNTRAINED["final"], "search": {**SUPERNET["search"], "evaluations": 4}}
    run, front = searches.search(tmp_path, FROM, **near)
    rows = run.read_json("single_decisions.json")["single_decisions"]
    space, memory = run.trial().space, run.trial().file.memory
    decisions = [(one.decision, one.option) for one in single_decisions(space, memory)]
    assert [(row["decision"], row["option"]) for row in rows] == decisions
    (config, row), dense = next(zip(single_decisions(space, memory).values(), rows, strict=True)), DENSE
    net, _ = read_supernet(space, run.folder / "supernet" / "start.pt")
    count = run.trial().file.evaluate.windows
    losses = [loss(run, net.subnet(one).eval(), count, "validation") for one in (config, dense)]
    assert row["loss_increase"] == pytest.approx(losses[0] - losses[1], abs=1e-3)
    (run.folder / "front.json").unlink()
    shutil.rmtree(run.folder / "supernet" / "1.0-0")
    (run.folder / "single_decisions.json").touch()
    before = (run.folder / "single_decisions.json").stat().st_mtime_ns
    assert searches.results(resume(run, Silent())) == searches.results(front)
    assert (run.folder / "single_decisions.json").stat().st_mtime_ns == before


def test_a_new_limit_is_answered_from_a_finished_run(untrained: Run) -> None:
    """By a config that meets it and is no worse than the best that was evaluated within it; one that none meets is refused."""
    sizes = sorted(e.memory.memory_bytes for e in untrained.searched())
    limit = (sizes[0] + sizes[-1]) // 2
    command = ("front", untrained.name, "--runs", untrained.folder.parent, "--limit")
    found = told(*command, f"memory_bytes={limit}")
    config = SharingConfig.load(SHAPE, Path(found["sharing"]))
    within = [e.losses.loss_nats_per_token for e in untrained.searched() if e.memory.memory_bytes <= limit]
    assert config.hash == found["hash"]
    assert measure(SHAPE, config, untrained.trial().file.memory).memory_bytes == found["memory_bytes"] <= limit
    assert found["loss_nats_per_token"] + found["error"] <= min(within)
    assert found["evaluated"] == (config in {e.config for e in untrained.searched()})
    assert f"{found['loss_nats_per_token']:.3f}" in said(*command, f"memory_bytes={limit}")
    refused(lambda: said(*command, "memory=3"), "memory_bytes")
    refused(lambda: said(*command, "memory_bytes=12"), "no config of this space has memory_bytes of 12")


def test_the_base_model_and_single_decisions_are_proposed_first(untrained: Run) -> None:
    """As many as the sampler's part of the search has room for; the base model is the first of them."""
    space, spec = untrained.trial().space, untrained.trial().file.search
    single = neighbours(space, DENSE)
    assert next(iter(single)) == DENSE
    setting = {name: options[0] for name, options in space.options.items()} | single[DENSE]
    for config, assignment in single.items():
        assert space.encode(config) is not None
        assert sum(setting[name] != value for name, value in assignment.items()) == (config != DENSE)
    first = [e for e in untrained.searched() if e.config in single]
    assert len(first) >= min(len(single), int(spec.evaluations * SAMPLERS[spec.sampler].single))
    assert not neighbours(space, SharingConfig.make(SHAPE, [{}, {"heads": "0=0.1"}, {}, {}]))


def test_configs_that_no_fine_tuning_mends_are_no_candidates(from_run: Run) -> None:
    """However small they are."""
    broken, *works = sorted(from_run.searched(), key=lambda e: e.memory.memory_bytes)
    broken = replace(broken, losses=replace(broken.losses, loss_nats_per_token=12.0))
    evaluator = cast(SupernetEvaluator, SimpleNamespace(ctx=SimpleNamespace(base_model=True)))
    chosen = SupernetEvaluator.select(evaluator, [broken, *works], 3, ())
    assert len(chosen) == 3
    assert broken.config not in chosen
    evaluator = cast(SupernetEvaluator, SimpleNamespace(ctx=SimpleNamespace(base_model=None)))
    assert broken.config in SupernetEvaluator.select(evaluator, [broken, *works], len(works) + 1, ())


def test_fine_tuning_is_training_on_the_base_models_probabilities(from_run: Run) -> None:
    """To the very weights that a training of the same start, teacher and batches leads to."""
    file, corpus = from_run.trial().file, load_corpus(from_run.trial().file.data, 257, from_run.folder)
    best_of = {e.config: seen_best(from_run, e.config) for e in from_run.front().evaluations if e.config != DENSE}
    e = next(e for e in from_run.front().evaluations if e.config in best_of and best_of[e.config].weights == "converted")
    best = best_of[e.config]
    model, generator = start_of(from_run, best)(e.config), torch.Generator().manual_seed(e.seed)
    for _ in fine_tune(model, train_spec(file.final), corpus.train, generator, base_of(from_run)):
        pass
    fine_tuned = read_model(SHAPE, e.config, from_run.weights(e)).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, fine_tuned[name], rtol=1e-3, atol=1e-4)


def test_models_of_the_front_start_from_scratch_or_from_what_was_evaluated_as_the_trial_says(tmp_path: Path) -> None:
    """Seen by a training that moves no weight by more than 1e-6."""
    still = {**SUPERNET["final"], "presets": False, "steps": 1, "learning_rate": 1e-9}
    run, front = searches.search(tmp_path, FROM, **UNTRAINED | {"final": still | {"start": "scratch"}})
    assert front.weights == "retrained"
    for e in front.evaluations:
        scratch = init_weights(Decoder(SHAPE, e.config.resolve(SHAPE)), torch.Generator().manual_seed(e.seed))
        close(read_model(SHAPE, e.config, run.weights(e)), scratch)
    changes = {"name": "inherited", "split": {"method": "none"}, "final": still | {"start": "inherited"}}
    run, front = searches.search(tmp_path, SUPERNET, **changes)
    assert front.weights == "fine_tuned"
    (state,) = (run.folder / "supernet").rglob(STATE)
    for e in front.evaluations:
        close(read_model(SHAPE, e.config, run.weights(e)), InheritedWeights(run.trial().space, state)(e.config))


def test_a_predictor_is_fitted_to_short_fine_tunings_and_to_what_decisions_cost_alone(
    from_predictor_run: Run, tmp_path: Path
) -> None:
    run, front = from_predictor_run, from_predictor_run.front()
    assert front.weights == "fine_tuned"
    assert {e.weights for e in run.searched()} == {"predicted"}
    trial = run.trial()
    rows = run.read_json("single_decisions.json")["single_decisions"]
    space = replace(trial.space, measured=tuple(SingleDecision(**row) for row in rows))
    for e in run.searched()[:20]:
        alone = {(row["decision"], row["option"]): row["loss_increase"] for row in rows}
        decided = space.encode(e.config)
        assert decided is not None
        wanted = sum(alone.get(pair, 0.0) for pair in decided.items())
        assert sums_of_single_decisions(space, [e.config]) == [pytest.approx(wanted)]
    (key, *_) = sorted(path.name for path in (run.folder / "predictor").iterdir())
    config = next(e.config for e in run.searched() if e.config.hash == key)
    state = run.folder / "supernet" / "start.pt"
    converted = {e.config for e in run.converted()}
    model = InheritedWeights(trial.space, state)(config)
    file, corpus = trial.file, load_corpus(trial.file.data, 257, run.folder)
    if config not in converted:
        for _ in fine_tune(model, trial.proxy_training, corpus.train, torch.Generator().manual_seed(0), base_of(run)):
            pass
        found = run.read_json(f"predictor/{key}/{RESULT}")["loss_nats_per_token"]
        assert loss(run, model, file.evaluate.windows, "validation") == pytest.approx(found, rel=1e-4)
    again = copy_of(run, tmp_path, "front.json", "final", "journal.jsonl")
    assert searches.results(resume(again, Silent())) == searches.results(front)


def test_a_predictor_is_fitted_to_configs_near_the_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is hopeless alone is in no proxy training, and no config of it is a candidate."""

    def losses(ctx: Context, start: Path, configs: list[SharingConfig]) -> dict[SharingConfig, float]:
        return {config: 9.0 if few_heads(config) else 2.0 for config in configs}

    monkeypatch.setattr(supernets, "_losses", losses)
    final = {**FROM_PREDICTOR["final"], "presets": False}
    run, front = searches.search(tmp_path, FROM_PREDICTOR, final=final, predictor={"configs": 8, "steps": 2, "rounds": 1})
    trained = {path.name for path in (run.folder / "predictor").iterdir()}
    proxies = [e.config for e in run.searched() if e.config.hash in trained]
    assert len(proxies) > 4
    assert not any(map(few_heads, proxies))
    assert any(map(few_heads, (e.config for e in run.searched())))
    assert not any(few_heads(m.first.config) for m in front.configs)


def few_heads(config: SharingConfig) -> bool:
    """Whether a layer has fewer KV heads than the base model's."""
    return any(layer.k_heads < SHAPE.num_key_value_heads for layer in config.resolve(SHAPE).layers)


def test_steps_are_divided_by_what_configs_lose(tmp_path: Path) -> None:
    """In the mean they are those of the trial, and a resumed run divides them alike."""
    final = {**SUPERNET["final"], "steps": 6, "candidates": 4, "presets": False, "allocation": "by_loss"}
    run, front = searches.search(tmp_path, FROM, supernet=UNTRAINED["supernet"], final=final)
    seen, per_step = best_seen([*run.searched(), *run.converted()]), final["batch"] * final["seq"]
    lost = {e.config: seen[e.config].losses.loss_nats_per_token for e in front.evaluations}
    steps = {e.config: e.tokens // per_step for e in front.evaluations}
    assert len(set(steps.values())) > 1
    assert sum(steps.values()) == pytest.approx(6 * len(steps), abs=len(steps) / 2)
    assert sorted(steps.values()) == [steps[config] for config in sorted(steps, key=lambda config: (lost[config], steps[config]))]
    (run.folder / "front.json").unlink()
    shutil.rmtree(run.folder / "final" / f"{DENSE.hash}-0")
    assert searches.results(resume(run, Silent())) == searches.results(front)


def close(one: Decoder, other: Decoder) -> None:
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=0, atol=1e-6)


def test_an_exported_model_has_the_base_models_tokenizer_and_says_where_it_is_from(from_run: Run, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard as HubCard

    evaluation = export_run(from_run, "knee", tmp_path / "out")
    base = Path(from_run.read_json("run.json")["from"])
    assert (tmp_path / "out/tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    exported = load_export(tmp_path / "out").model
    assert loss(from_run, exported, 8) == pytest.approx(evaluation.losses.loss_nats_per_token, rel=1e-5)
    readme = (tmp_path / "out/README.md").read_text()
    read = {result.metric_type: result for result in HubCard(readme).data.eval_results}
    losses = evaluation.losses
    assert read["perplexity"].dataset_split == "test"
    for name in ("perplexity", "perplexity_standard_error"):
        assert read[name].metric_value == getattr(losses, name)
    assert "`dense`" in readme
    assert f"{evaluation.tokens:,} tokens" in readme


def test_what_people_see_says_that_models_were_fine_tuned_and_from_what(from_run: Run, tmp_path: Path) -> None:
    found = from_run.front()
    table = said("front", from_run.folder)
    assert "every fine-tuned model, by memory; from" in " ".join(table.split())
    assert {row["weights"] for row in told("front", from_run.folder)["front"]} == {"fine_tuned"}
    page = write_run_report(from_run, tmp_path).read_text()
    assert "from_perplexity" in page
    assert f"nas search trial.yaml --runs=runs\nnas report {from_run.name}\n" in page
    rows = dict(re.findall(r"^\| (\w+) +\| (.*?) +\|$", page.partition("Where the figures come from")[2], re.M))
    assert (rows["trial"], rows["from"]) == (from_run.name, "dense")
    assert re.fullmatch(rf"machine {platform.system()}, processor \S+, cores \d+, memory \S+ .iB, gpus .+", rows["hardware"])
    assert str(from_run.folder.parent) not in page
    assert (from_run.folder / "fine_tuned.csv").is_file()
    shown = (from_run.folder / "front.html").read_text().split("<body>")[1].split("plotly")[0]
    assert "retrained" not in page + table + shown
    assert "fine_tuned weights" not in page + shown
    link = Link.load(from_run.folder)
    assert link is not None
    client = connect(link.uri)
    models = client.search_runs([link.experiment_id], f"tags.mlflow.parentRunId = '{link.run_id}'")
    kinds = Counter(model.data.tags["kind"] for model in models)
    assert kinds["front"] == len(found.members)
    assert kinds["front"] + kinds["preset"] + kinds["fine_tuned"] == len(found.configs)
    note = client.get_run(link.run_id).data.tags["mlflow.note.content"]
    assert "**from**" in note
    assert "fine-tuned for 128 tokens each on the base model's probabilities" in note


def with_base(run: Run, base: Path) -> Run:
    """The run with another base model."""
    data = yaml.safe_load((run.folder / "trial.yaml").read_text()) | {"from": str(base)}
    (run.folder / "trial.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return run


def test_a_finished_run_does_not_need_its_base_model_any_more(untrained: Run, tmp_path: Path) -> None:
    run = with_base(copy_of(untrained, tmp_path), tmp_path / "gone")
    assert run.front() == untrained.front() == resume(run, Silent())
    export_run(run, "smallest", tmp_path / "out")
    write_run_report(run, tmp_path / "reports")


def test_a_run_does_not_go_on_with_another_base_model(untrained: Run, tmp_path: Path) -> None:
    run = with_base(copy_of(untrained, tmp_path, "front.json"), write_dense(tmp_path / "dense", seed=1))

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}

    before = files()
    refused(lambda: resume(run, Silent()), "not the one this run began with; put the old weights back")
    assert files() == before


def test_limits_hold_for_conversions_and_for_the_base_model(tmp_path: Path) -> None:
    limit = measure(SHAPE, DENSE, MemorySpec(context=64)).memory_bytes * 3 // 4
    final = {**UNTRAINED["final"], "presets": False}
    run, found = searches.search(tmp_path, FROM, limits={"memory_bytes": limit}, **{**UNTRAINED, "final": final})
    assert all(e.memory.memory_bytes <= limit for e in found.evaluations)
    assert any(e.memory.memory_bytes > limit for e in run.converted())


FINAL = {**SUPERNET["final"], "presets": False}
SMALL = {"evaluations": 8, "batch": 4, "presets": False}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_search_begins_with_a_folder_of_transformers(family: str, tmp_path: Path) -> None:
    """In bfloat16 and in shards; the dense subnet computes what the folder's own model does."""
    folder = Made(family, tied=family == "gemma", shards=True, dtype="bfloat16").write(tmp_path / "theirs")
    choices = {"tie": {}, "kv": {}, "kv_heads": {}, "intermediate": {}, "drop": {}}
    changes = {"from": "theirs", "memory": {"context": 32}, "search": SMALL, "space": {"choices": choices}, "final": FINAL}
    run, _ = searches.search(tmp_path, FROM, **changes)
    shape = run.trial().space.shape
    net, _ = read_supernet(run.trial().space, run.folder / "supernet" / "start.pt")
    rows = tiny.tokens(tiny.MHA, 2, 20)
    with torch.no_grad():
        wanted = theirs(folder)(rows).logits
    torch.testing.assert_close(tiny.logits(net.subnet(SharingConfig.dense(shape)), rows), wanted, rtol=1e-3, atol=1e-3)
    evaluation = export_run(run, "lowest-perplexity", tmp_path / "out")
    assert evaluation.weights == "fine_tuned"
    exported = load_export(tmp_path / "out").model
    kept = torch.float32 if family == "gemma" else torch.bfloat16  # what was measured is as rounded as what is written
    assert exported.embed_tokens.weight.dtype == kept
    assert loss(run, exported.float(), 8) == pytest.approx(evaluation.losses.loss_nats_per_token, rel=1e-5)


def test_a_run_takes_no_more_disk_than_was_said_before(from_run: Run, untrained: Run) -> None:
    for run, files in ((from_run, 4), (untrained, 1)):
        trial = run.trial()
        corpus = load_corpus(trial.file.data, 257, run.folder)
        base = read_base_model(trial, corpus)
        assert base is not None
        *stages, final = Budget(trial, base.dtype).stages()
        before, models = sum(stage.disk_bytes for stage in stages), final.disk_bytes
        found = {part: sum(path.stat().st_size for path in (run.folder / part).rglob("*.*t*")) for part in ("supernet", "final")}
        assert 0.5 * before < found["supernet"] < before + 2**16 * files  # half a KiB for each tensor
        assert found["final"] < models + 2**15 * len(list((run.folder / "final").iterdir()))
        assert not list(run.folder.rglob("making-*"))


# --- the base model may be trained by the run itself

TRAINS_DENSE = FROM | {
    "name": "dense",
    "from": None,
    "dense": {"steps": 6, "batch": 2, "seq": 16},
    "space": {"model": plain(SHAPE), **FROM["space"]},
}


def test_a_search_that_trains_its_base_model_is_the_search_from_that_model(tmp_path: Path) -> None:
    """The same numbers as of a trial that names the checkpoint; and a resumed run's, whose base model is not trained again. Only
    their default lengths and learning rates are others."""
    alike = {key: {**spec, "learning_rate": 0.003} for key, spec in (("final", FINAL), ("supernet", SUPERNET["supernet"]))}
    run, front = searches.search(tmp_path, TRAINS_DENSE, **alike)
    dense, *stages, _ = Budget(Trial.load(tmp_path / "trial.yaml")).stages()  # the disk that was said before
    written = sum(path.stat().st_size for name in ("dense", "supernet") for path in (run.folder / name).rglob("*.*t*s"))
    assert dense.disk_bytes < written < 1.3 * (dense.disk_bytes + sum(stage.disk_bytes for stage in stages))
    checkpoint = run.folder / "dense" / "checkpoint"
    trained = load_export(checkpoint).model
    assert not list((run.folder / "dense").glob("seed-*/model.safetensors"))  # it is not kept twice
    _, other = searches.search(tmp_path, FROM | {"from": str(checkpoint)}, **alike)
    assert searches.results(front) == searches.results(other)
    assert front.weights == "fine_tuned"

    copy = copy_of(run, tmp_path / "copy", "front.json", "final", "supernet", "journal.jsonl")
    (copy.folder / "dense" / "checkpoint" / "README.md").write_text("kept")
    assert searches.results(resume(copy, Silent())) == searches.results(front)
    assert (copy.folder / "dense" / "checkpoint" / "README.md").read_text() == "kept"

    export_run(run, "lowest-perplexity", tmp_path / "export")
    assert "Initialised from a dense model that it trained for 192 tokens." in (tmp_path / "export" / "README.md").read_text()
    assert same(trained, load_export(checkpoint).model)


def test_keys_that_python_keeps_for_itself_are_read_and_written(tmp_path: Path) -> None:
    data = yaml.safe_load(write_trial(tmp_path, FROM).read_text())
    file = build(TrialFile, parse_yaml(yaml.safe_dump(data), "t.yaml"))
    assert file.from_ == "dense"
    assert plain(file)["from"] == "dense"
    assert build(TrialFile, parse_yaml(yaml.safe_dump(plain(file)), "t.yaml")) == file
    with pytest.raises(UserError, match=r"t.yaml:\d+: from_: unknown key; did you mean from\?"):
        build(TrialFile, parse_yaml(yaml.safe_dump({**data, "from_": "dense"}), "t.yaml"))


def test_the_summary_says_what_the_search_is_from(tmp_path: Path) -> None:
    path = write_trial(tmp_path, FROM)
    trial = Trial.load(path)
    corpus, size = check(trial)
    (line,) = [line for line in summary(trial, corpus, size, read_base_model(trial, corpus)) if line.startswith("from ")]
    assert re.fullmatch(r"from    .*dense: 4 layers of width 16, perplexity [\d.]+ on the test text", line)
    assert said("check", path).strip().endswith(f"a trial: 24 evaluations, {trial.search_summary}")


def test_a_search_from_a_base_model_draws_near_the_front_unless_the_trial_says_otherwise(tmp_path: Path) -> None:
    split = {"splits": 1}
    for trial, given, wanted in (
        (FROM, {}, ("near_front", "near_front", "surrogate")),
        (TRAINS_DENSE, {}, ("near_front", "near_front", "surrogate")),
        (SUPERNET, {}, ("dense_biased", "uniform", "tpe")),
        (FROM, {"strategy": "uniform", "configs": "uniform", "sampler": "tpe"}, ("uniform", "uniform", "tpe")),
    ):
        keys = {"supernet": "strategy", "split": "configs", "search": "sampler"}
        sections = {"supernet": trial["supernet"], "split": split, "search": {"evaluations": 8}}
        told = {name: sections[name] | ({key: given[key]} if given else {}) for name, key in keys.items()}
        file = Trial.load(write_trial(tmp_path, trial, **told)).file
        assert file.supernet is not None
        assert file.split is not None
        assert (file.supernet.strategy, file.split.configs, file.search.sampler) == wanted
    measured = {"objectives": ["decode_tokens_per_second", "perplexity"]}  # which the surrogate cannot predict
    assert Trial.load(write_trial(tmp_path, FROM, **measured)).file.search.sampler == "tpe"


def test_no_search_begins_with_a_sampler_that_its_decisions_and_evaluations_are_too_many_for(tmp_path: Path) -> None:
    """TPE's time grows with both. The surrogate comes before it where it can; a sampler that a trial names stays."""
    measured = {"objectives": ["decode_tokens_per_second", "perplexity"]}
    few, many = ({"search": {"evaluations": count}} for count in (8, TPE_HOLDS))
    for trial, changes, wanted in (
        (SUPERNET, few, "tpe"),
        (PREDICTOR, few, "surrogate"),
        (PREDICTOR, few | measured, "tpe"),
        (PREDICTOR, many | measured, "nsga2"),
        (PREDICTOR, {"search": {"evaluations": TPE_HOLDS, "sampler": "tpe"}}, "tpe"),
        (SUPERNET, many, "nsga2"),
        (FROM, many | measured, "nsga2"),
    ):
        path = write_trial(tmp_path, trial, **changes)
        found = Trial.load(path)
        assert found.file.search.sampler == wanted
        path.write_text(yaml.safe_dump(found.to_data() | {"search": plain(found.file.search) | {"evaluations": 9}}))
        assert Trial.load(path).file.search.sampler == wanted, "a run that goes on keeps its own"
