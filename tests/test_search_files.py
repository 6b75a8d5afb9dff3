"""Every search space and trial in the repository: it loads, is of the size that it states, and trains in a supernet."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from commands import refused, said

from nas.config import TO_GIVE
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.export import ModelCard, export
from nas.model.decoder import Decoder, init_weights
from nas.presets import presets
from nas.search.context import presets_in
from nas.search.jobs import new_supernet, read_supernet
from nas.search.launch import Launch, check, start, summary
from nas.search.progress import Silent
from nas.search.trial import Trial
from nas.sharing.primitives import PRIMITIVES
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import OWN, SearchSpace
from nas.splitting import SplitTree
from nas.training.loop import Trainer, TrainSpec
from nas.training.strategies import SubnetRandom, SupernetStep

ROOT = Path(__file__).parents[1]
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
TRIALS = sorted((ROOT / "trials").glob("*.yaml"))
SEARCHES = [path for path in TRIALS if re.search(r"^final:", path.read_text(), re.M)]
"""Trials that are searches; the other compares."""
SHAPE = ModelShape(vocab_size=257, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=176)
"""The model of spaces that name none."""

EACH_SPACE = pytest.mark.parametrize("path", SPACES, ids=[path.stem for path in SPACES])


TEXTS = {"text": str(ROOT / "nas"), "eval_text": str(ROOT / "README.md")}


def with_checkpoint(path: Path, folder: Path) -> Path:
    """A trial of the repository; one from a base model as a copy that names one, which is made."""
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    if "from" not in data:
        return path
    shape = replace(SHAPE, max_position_embeddings=max(SHAPE.max_position_embeddings, data["memory"]["context"]))
    model = init_weights(Decoder(shape, SharingConfig.dense(shape).resolve(shape)), torch.Generator().manual_seed(0))
    data["from"] = str(export(model, SharingConfig.dense(shape), bytes_json(), folder / "dense", ModelCard()))
    data["data"] |= {key: value for key, value in TEXTS.items() if data["data"].get(key) == TO_GIVE}
    data["space"] = str(path.parent / data["space"])
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(data, sort_keys=False))
    return copy


def test_spaces_and_trials_are_right_and_spaces_state_their_size(tmp_path: Path) -> None:
    for path in SPACES:
        size = said("check", path).partition("a search space: ")[2].strip()
        assert f"# Size: {size}.\n" in path.read_text(), path
    said("check", *(with_checkpoint(path, tmp_path) for path in TRIALS))


def test_every_primitive_can_be_searched_somewhere() -> None:
    asked = {name.rpartition(".")[2] for path in SPACES for name in SearchSpace.load(path, SHAPE).options}
    assert asked == PRIMITIVES.keys() - {"tie_word_embeddings", "active_experts"}


def test_every_preset_is_in_a_shipped_space() -> None:
    spaces = [SearchSpace.load(path, SHAPE) for path in SPACES]
    missing = [name for name, config in presets(SHAPE) if all(space.encode(config) is None for space in spaces)]
    assert not missing


@EACH_SPACE
def test_configs_of_a_space_train_in_its_supernet(path: Path) -> None:
    """Every weight that a config uses is there, and moves."""
    space, rng = SearchSpace.load(path, SHAPE), random.Random(path.stem)
    net = new_supernet(space, torch.Generator().manual_seed(0))
    spec = TrainSpec(steps=1, batch=2, seq=9)
    rows = tiny.tokens(space.shape, spec.batch, spec.seq + 1)
    for config in (space.largest(), *(space.sample(rng) for _ in range(4))):
        subnet = net.subnet(config)
        fit = Trainer(net, spec, torch.Generator())
        before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
        ((_, loss),) = fit.run(iter([rows]), SupernetStep(net, spec, lambda rng, config=config: [config], SubnetRandom()))
        assert math.isfinite(loss)
        own = {id(weight) for weight in subnet.parameters()}
        used = {name for name, weight in net.named_parameters() if id(weight) in own}
        pulled = {name for name, weight in net.named_parameters() if weight.grad is not None and weight.grad.any()}
        moved = {name for name, weight in net.named_parameters() if not torch.equal(weight, before[name])}
        assert pulled <= moved <= used
        assert len(pulled) > len(used) / 2


@EACH_SPACE
def test_a_leaf_goes_on_with_the_weights_of_the_whole_space(path: Path, tmp_path: Path) -> None:
    space = SearchSpace.load(path, SHAPE)
    net = new_supernet(space, torch.Generator().manual_seed(0))
    leaf = SplitTree().space_of(space, "0")
    assert new_supernet(leaf, torch.Generator().manual_seed(0)).state_dict().keys() == net.state_dict().keys()
    assert tiny.restrict(leaf, "norms", space.options["norms"][:1]).extra_parameters() == space.extra_parameters()
    Trainer(net, TrainSpec(steps=1), torch.Generator()).save(tmp_path / "fit.pt", tokens=7)
    read, tokens = read_supernet(space, tmp_path / "fit.pt")
    assert tokens == 7
    assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in read.state_dict().items())


def shortened(path: Path, folder: Path, **changes: Any) -> Path:
    """A trial of the repository on little text, with hardly a step of each stage."""
    data: dict[str, Any] = yaml.safe_load(path.read_text()) | changes
    data |= {
        "space": str(path.parent / data["space"]),
        "run": {"workers": 0},
        "tracking": {"enabled": False},
        "evaluate": {"windows": 2, "final_windows": 2},
    }
    data["data"]["max_bytes"] = 60_000
    data["memory"]["context"] = 64
    if "dense" in data:
        data["dense"] |= {"steps": 2, "batch": 2, "seq": 16}
    if "supernet" in data:
        data["supernet"] |= {"steps": 2, "batch": 2, "seq": 16}
        data["split"] |= {"batch": 1} | ({"batches": 1} if data["split"]["method"] != "none" else {})
    else:
        data["predictor"] |= {"configs": 4, "steps": 1, "rounds": 1}
    data["search"] |= {"evaluations": 8, "batch": 8, "presets": False}
    data["final"] |= {"steps": 2, "batch": 2, "seq": 16, "candidates": 2, "presets": False}
    short = folder / "trial.yaml"
    short.write_text(yaml.safe_dump(data, sort_keys=False))
    return short


def goes_through(path: Path, folder: Path, **changes: Any) -> None:
    run, front = start(Launch(shortened(with_checkpoint(path, folder), folder, **changes), folder / "runs"), Silent())
    assert front.members
    assert len(run.searched()) > 1
    assert {e.weights for e in run.searched()} == {"predicted" if run.trial().file.predictor else "inherited"}
    extras = Trial.load(folder / "trial.yaml").space.extra_parameters()
    assert extras or path.stem not in ("low_rank", "everything")


@pytest.mark.slow
def test_a_search_with_weights_beyond_a_dense_models_goes_through(tmp_path: Path) -> None:
    """The supernet's, its leaves' and the workers': all have them."""
    supernet = {"predictor": None, "supernet": {}, "split": {"method": "gradient-matching"}}
    goes_through(ROOT / "trials" / "low_rank.yaml", tmp_path, **supernet)


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in SEARCHES])
def test_every_trial_goes_through(name: str, tmp_path: Path) -> None:
    goes_through(ROOT / "trials" / f"{name}.yaml", tmp_path)


def test_trials_have_a_space_of_their_own_name(tmp_path: Path) -> None:
    assert len(SEARCHES) == len(TRIALS) - len(["zoo"])
    for path in SEARCHES:
        assert re.search(rf"^name: {path.stem}\nspace: \.\./search_spaces/{path.stem}\.yaml$", path.read_text(), re.M)
        assert Trial.load(with_checkpoint(path, tmp_path)).file.run.workers == 2


def test_what_a_trial_leaves_to_its_user_is_said_by_check_and_given_by_set(tmp_path: Path) -> None:
    path = ROOT / "trials" / "smollm2.yaml"
    lacking = "--set from=VALUE --set data.text=VALUE --set data.eval_text=VALUE"
    assert said("check", path).endswith(f"a trial: for you to give: {lacking}\n")
    refused(lambda: said("search", path, "--runs", tmp_path), "smollm2.yaml:", f"from: is for you to give; add {lacking}")
    base = Trial.load(with_checkpoint(path, tmp_path)).file.from_
    given = [f"from={base}", f"data.text={TEXTS['text']}", f"data.eval_text={TEXTS['eval_text']}", "final.candidates=3"]
    file = Trial.load(path, settings=given).file
    assert (file.from_, file.final.candidates, file.data.tokenizer) == (base, 3, f"{base}/tokenizer.json")
    options = [word for setting in given for word in ("--set", setting)]
    assert "96 evaluations" in said("check", path, *options)
    for wrong, pattern in {"name": "sets no key", "name.x=1": "sets no key", "final.stepps=1": "did you mean steps"}.items():
        with pytest.raises(UserError, match=pattern):
            Trial.load(path, settings=[*given, wrong])


def test_settings_take_the_place_of_whole_values(tmp_path: Path) -> None:
    """Of a mapping a list, and the other way round; where a list's entries are is not known of another value."""
    path = tmp_path / "trial.yaml"
    shape = "{vocab_size: 257, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 24}"
    space = f"space:\n  model: {shape}\n  choices: {{kv: {{sources: adjacent}}}}"
    rest = "data: {text: python}\nfinal: {steps: 4}"
    path.write_text(f"name: one\n{space}\nmemory:\n  context: 1024\n  batch: 2\n{rest}\n")
    file = Trial.load(path, settings=["memory=[{context: 64}, {context: 128, batch: 4}]"]).file
    assert [(spec.context, spec.batch) for spec in (file.memory, *file.other_memory)] == [(64, 1), (128, 4)]
    for setting, says in (
        ("memory=[]", "trial.yaml:5: memory: names no setting"),
        ("memory=[{context: 64}, {context: 64}]", "another setting differs"),
        ("final.steps=99999999999999999999999", "final.steps"),
    ):
        with pytest.raises(UserError, match=says):
            Trial.load(path, settings=[setting])
    path.write_text(path.read_text().replace("memory:\n  context: 1024\n  batch: 2", "memory: [{context: 64}, {context: 128}]"))
    for setting in ("memory.context=32", "memory.0.context=32"):
        with pytest.raises(UserError, match="give the whole list another value"):
            Trial.load(path, settings=[setting])
    assert Trial.load(path, settings=["memory={context: 32}"]).file.other_memory == []


def test_sequences_from_a_checkpoint_are_long_and_rates_low_unless_the_trial_says_otherwise(tmp_path: Path) -> None:
    path = with_checkpoint(ROOT / "trials" / "smollm2.yaml", tmp_path)
    for given, longest, wanted in (([], 2048, 1024), ([], 512, 512), (["final.seq=99", "supernet.seq=99"], 2048, 99)):
        config = tmp_path / "dense" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": longest}))
        file = Trial.load(path, settings=[*given, "memory.context=64"]).file
        assert file.supernet is not None
        assert (file.final.seq, file.supernet.seq) == (wanted, wanted)
        assert file.final.learning_rate == file.supernet.learning_rate == 3e-4
    file = Trial.load(path, settings=["final.learning_rate=0.01", "memory.context=64"]).file
    assert (file.final.learning_rate, file.supernet and file.supernet.learning_rate) == (0.01, 3e-4)
    scratch = Trial.load(ROOT / "trials" / "quickstart.yaml").file
    assert (scratch.final.seq, scratch.final.learning_rate) == (128, 1e-3)


def test_windows_that_are_never_full_are_said_before_anything_is_trained(tmp_path: Path) -> None:
    trial = Trial.load(shortened(ROOT / "trials" / "kv_sharing.yaml", tmp_path))
    corpus, size = check(trial)
    assert "sequences of 16 tokens are too short for windows of 64" in "\n".join(summary(trial, corpus, size))
    long = replace(trial, file=replace(trial.file, final=replace(trial.file.final, seq=65)))
    assert "note" not in "\n".join(summary(long, corpus, size))


def test_a_search_that_leaves_its_sampler_the_smaller_half_says_so(tmp_path: Path) -> None:
    trial = Trial.load(shortened(ROOT / "trials" / "weight_ties.yaml", tmp_path))
    corpus, size = check(trial)
    first = trial.predictor.configs + len(presets_in(trial.space))

    def said(evaluations: int) -> str:
        search = replace(trial.file.search, evaluations=evaluations, presets=True)
        return "\n".join(summary(replace(trial, file=replace(trial.file, search=search)), corpus, size))

    assert "leaves the sampler some 0:" in said(first - 1)
    assert f"leaves the sampler some {first - 1}: search.evaluations of {2 * first} or more" in said(2 * first - 1)
    assert "leaves" not in said(2 * first)


def test_the_rows_that_are_trained_on_are_longer_than_any_window(tmp_path: Path) -> None:
    """A window that no row is long enough for saves cache and seems to cost nothing."""
    for path in SEARCHES:
        trial = Trial.load(with_checkpoint(path, tmp_path))
        windows = {w for name, options in trial.space.options.items() if name.endswith(".window") for w in options}
        supernet = trial.file.supernet or trial.file.final
        assert max(windows - {OWN}, default=0) < min(trial.file.final.seq, supernet.seq)
