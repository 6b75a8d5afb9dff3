"""A search from a trained model: it begins as the model, is measured before it is trained, and what is reported is healed."""

from __future__ import annotations

import json
import random
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
from test_search import TINY, results

from nas.cli import nas
from nas.convert import METHODS, Dense, start_bank
from nas.convert.bank import dictionary, fewer_columns
from nas.data import bits_per_byte
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.evaluate import measure_losses
from nas.export import Card, export, load_export
from nas.loading import build, parse_yaml, plain
from nas.model import Decoder, init_weights
from nas.plan import FFN
from nas.primitives import PRIMITIVES
from nas.search.conversions import SIZES, ladder
from nas.search.final import Front
from nas.search.launch import Launch, resume, start
from nas.search.progress import Silent
from nas.search.published import export_run, write_run_report
from nas.search.run import Run
from nas.search.trial import Trial, TrialFile
from nas.search.work import read_model, read_supernet
from nas.shape import ModelShape
from nas.sharing import SharingConfig
from nas.supernet import Supernet, dense_config, standalone
from nas.training import SupernetStep, TrainSpec, distilled_backward, taught

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
    config = SharingConfig.make(shape, layers) if layers else dense_config(shape)
    model = init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    return export(model, config, bytes_json(), folder, Card())


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
    return start(Launch(trial_in(folder), folder / "runs"), Silent())


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Front]:
    """A finished run without any training: neither of the supernet, nor of what was found."""
    folder = tmp_path_factory.mktemp("untrained")
    none = {"supernet": {**TINY["supernet"], "steps": 0}, "final": {**TINY["final"], "steps": 0}}
    return start(Launch(trial_in(folder, **none), folder / "runs"), Silent())


def origin(run: Run) -> Decoder:
    return load_export(Path(run.read_json("run.json")["from"])).model


# --- the supernet begins as the checkpoint


def dense_of(shape: ModelShape) -> Dense:
    return Dense(standalone(tiny.supernet(shape).subnet(dense_config(shape))), tiny.tokens(shape, 4, 9))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", tiny.SHAPES)
def test_the_dense_subnet_computes_what_the_checkpoint_does(name: str, narrow: bool) -> None:
    """Whatever the supernet keeps beside; bit by bit, unless neurons are put in order."""
    shape = tiny.SHAPES[name]
    dense, net = dense_of(shape), Supernet(shape, torch.Generator().manual_seed(1), tiny.extras(shape))
    start_bank(net, dense, narrow)
    rows = tiny.tokens(shape)
    ours, theirs = tiny.logits(net.subnet(dense_config(shape)), rows), tiny.logits(dense.model, rows)
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
    wanted = {"delta": SharingConfig.make(shape, [{}, {"ffn": 0}, {}, {}])}.get(name, dense_config(shape))
    said = [(0, *pair) for pair in config.whole] + [(i, *pair) for i, layer in enumerate(config.layers) for pair in layer]
    sizes = {weight: size for i, choice, value in said for weight, size in PRIMITIVES[choice].bank(shape, i, value)}
    net = Supernet(shape, torch.Generator().manual_seed(1), sizes)
    start_bank(net, dense)
    rows = tiny.tokens(shape)
    ours, theirs = (tiny.logits(net.subnet(c), rows) for c in (config, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
