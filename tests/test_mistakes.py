"""Trials that cannot be: one line with the file and what would do, of `nas check` and of a search, before anything is written."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import refused, said
from searches import FROM, PREDICTOR, SHAPE, SUPERNET, write_dense, write_trial

from nas.config import plain
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.sharing.objectives import DEFAULT

ZOO = yaml.safe_load((Path(__file__).parents[1] / "trials" / "zoo.yaml").read_text())
MODEL, ONE, OTHER = plain(SHAPE), {"context": 64}, {"context": 16, "batch": 32}
DENSE = FROM | {"from": None, "dense": {"steps": 6, "batch": 2, "seq": 16}, "space": {"model": MODEL, **FROM["space"]}}
SPEED, FRONT = ["decode_tokens_per_second", "perplexity"], ["memory_bytes", "perplexity"]

Changes = Mapping[str, Any]
MISTAKES: list[tuple[dict[str, Any], list[tuple[Changes, str]]]] = [
    (
        SUPERNET,
        [
            ({"supernet.stepps": 3}, "supernet.stepps: unknown key; did you mean steps"),
            ({"supernett": {}}, "supernett: unknown key; did you mean supernet"),
            ({"supernet.steps": "many"}, "supernet.steps: "),
            ({"seed": 10**22}, "seed: 10000000000000000000000 is too large; use 9223372036854775807 or less"),
            ({"final": ...}, "final is missing"),
            ({"limits": {"memory_bytes": 100}}, "the smallest that can be met is"),
            ({"search.sampler": "nsga"}, "did you mean nsga"),
            ({"search.evaluator": "supernett"}, "did you mean supernet"),
            ({"supernet.strategy": "unfair"}, "did you mean fair"),
            ({"supernet.strategy": "even"}, "it is called dense_biased now"),
            ({"supernet.rule": "fair"}, "it is called strategy now"),
            ({"split.method": "gradients"}, "gradient-matching"),
            ({"split": {"method": "exhaustive", "decision": "layer_9.kv"}}, "split.decision: layer_9.kv is no decision"),
            ({"data.text": "nowhere.txt"}, "data.text: nowhere.txt does not exist"),
            ({"space": "nowhere.yaml"}, "no such file"),
            ({"space.choices.kv_heads.options": [3]}, "3 does not divide num_attention_heads=4"),
            ({"memory.context": 100_000}, "memory.context: 100000 tokens are more than the model's max_position_embeddings"),
            ({"space.model.vocab_size": 100}, "257"),
            ({"run": {"workers": -1}}, "run.workers: -1 is too small; use 0 or more"),
            ({"tracking": {"uri": "here"}}, "tracking.uri: 'here' is not an MLflow address; write http://"),
            ({"predictor": {"configs": 8}}, "trial.yaml:*: predictor: "),
            ({"final.steps": 0}, "final.steps: "),
            ({"final.distill": True}, "final.distill: "),
            ({"final.conversions": True}, "final.conversions: there is no model to convert"),
            ({"final.allocation": "by_loss"}, "final.allocation: steps are divided by what is lost against a base model"),
            ({"final.allocation": "by_memory"}, "final.allocation: "),
            ({"memory": [ONE, OTHER | {"dtype": "float16"}]}, "16 tokens × 32, float16: another setting differs"),
            ({"memory": [ONE, OTHER, ONE]}, "memory.2: 64 tokens × 1, bfloat16: another setting differs from the first"),
            ({"memory": [ONE, {"context": 4096}]}, "trial.yaml:*: memory.1.context: 4096 tokens are more than the model's"),
            ({"memory": [{"contxt": 64}, OTHER]}, "memory.0.contxt: unknown key; did you mean context?"),
            ({"memory": [ONE, {"batch": 0}]}, "batch: 0 is too small; use 1 or more"),
            ({"memory": [ONE, OTHER], "objectives": SPEED}, "one of these is measured; leave out the other settings"),
            ({"memory": []}, "memory: "),
        ],
    ),
    (
        PREDICTOR,
        [
            ({"predictor.configs": 3}, "trial.yaml:*: predictor.configs: "),
            ({"predictor.rounds": 3}, "trial.yaml:*: predictor.rounds: "),
            ({"predictor.steps": 0}, "trial.yaml:*: predictor.steps: "),
            ({"split": {"method": "random"}}, "trial.yaml:*: split: "),
            ({"final.start": "inherited"}, "final.start: a predictor has no weights to start from"),
            ({"objectives": ["memory_bytes", "weight_bytes"]}, "two or three objectives with perplexity among them"),
            ({"objectives": ["perplexity"]}, "such as"),
            ({"objectives": ["memory_bytes", *FRONT]}, "are not two or three"),
            ({"objectives": ["weights_bytes", "perplexity"]}, "did you mean weight_bytes"),
            ({"objectives": [*DEFAULT, "weight_bytes", "kv_cache_bytes"]}, "objectives: "),
            ({"objectives": SPEED, "search": {"sampler": "surrogate"}}, "one of these is measured; use tpe"),
        ],
    ),
    (
        FROM,
        [
            ({"from": "dence"}, "from: *dence: no such folder"),
            ({"from": "dence", "space": {"model": MODEL, "choices": {}}}, "dence: no such folder"),
            ({"from": 3}, "trial.yaml:*: from: "),
            ({"from": "shares"}, "shares: * convert the dense model it comes from"),
            ({"from": None}, "model is missing"),
            (
                {"final.allocation": "by_loss", "final.early_stopping": {"grace": 1}},
                "final.allocation: early stopping compares trainings of equal steps; leave one of them out",
            ),
            ({"space.model": {**MODEL, "num_hidden_layers": 5}}, "model.num_hidden_layers: is 5, and 4 in dense"),
            ({"space.model": {**MODEL, "rope_theta": 5e5}}, "model.rope_theta: is 500000.0, and 10000.0 in dense"),
            ({"final.steps": 0, "final.start": "scratch"}, "trial.yaml:*: final.steps: 0 is too few; use 1 or more"),
            ({"memory.context": 2049}, "memory.context: 2049 tokens are more than the model's max_position_embeddings=2048"),
            ({"final.steps": 0, "final.seq": 4096}, "final.seq: 4096 tokens"),
            ({"data.tokenizer": "bpe"}, "data.tokenizer: bpe is not the tokenizer of dense"),
            ({"data.tokenizer": "bytes256"}, "data.tokenizer: bytes256 is not the tokenizer of dense"),
        ],
    ),
    (
        DENSE,
        [
            ({"from": "dense"}, "trial.yaml:*: dense: a search has one base model"),
            ({"dense": {"steps": 0}}, "trial.yaml:*: dense.steps: 0 is too few"),
        ],
    ),
]
SEEN_BY_A_SEARCH_ALONE: list[tuple[dict[str, Any], list[tuple[Changes, str]]]] = [
    (SUPERNET, [({"data.max_bytes": 40}, "use a longer text")]),
    (
        FROM,
        [({"data.tokenizer": "other.json"}, "other.json is not the tokenizer of dense"), ({"final.seq": 4096}, "4096 tokens")],
    ),
    (DENSE, [({"dense": {"steps": 6, "seq": 4096}}, "4096 tokens are more than the model's")]),
]
"""What shows when files are read that `nas check` leaves alone."""


def changed(trial: Changes, changes: Changes) -> dict[str, Any]:
    """A trial with keys at dotted paths changed; `...` takes one away."""
    made = copy.deepcopy(dict(trial))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return made


def test_a_mistake_is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    write_dense(tmp_path / "shares", layers=[{}, {"tie": 0}, {}, {}])
    write_dense(tmp_path / "dense")
    other = json.loads(bytes_json())
    other["model"]["vocab"] = {symbol: 255 - n for symbol, n in other["model"]["vocab"].items()}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for table, is_checked in ((MISTAKES, True), (SEEN_BY_A_SEARCH_ALONE, False)):
        for trial, changes, words in ((trial, *row) for trial, rows in table for row in rows):
            file = write_trial(tmp_path, changed(trial, changes))
            line = refused(lambda file=file: said("search", file, "--runs", tmp_path / "runs"), *words.split("*"))
            if is_checked:
                assert refused(lambda file=file: said("check", file)) == line
    assert not (tmp_path / "runs").exists()


def test_a_comparison_is_checked_too(tmp_path: Path) -> None:
    for changes, words in (
        ({"memory.context": 9999}, "memory.context: 9999 tokens"),
        ({"train.seq": 9999}, "train.seq: 9999 tokens"),
        ({"data.text": "nowhere.txt"}, "data.text: nowhere.txt does not exist"),
    ):
        (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(changed(ZOO, changes)))
        refused(lambda: said("check", tmp_path / "zoo.yaml"), words)


def test_a_file_of_no_kind_is_told_every_kind(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=r"odd.yaml.* a trial \(space:\), .* a sharing config \(num_hidden_layers:\)"):
        said("check", tmp_path / "odd.yaml")
