"""Tiny trials of each kind of search, and how a finished run of each is made once for all tests.

Every trial does its work in this process (`run: {workers: 0}`), which gives what Ray gives to the last digit.
"""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nas.data.tokenizer import bytes_json
from nas.export import ModelCard, export
from nas.model.decoder import Decoder, init_weights
from nas.search.front import Front
from nas.search.launch import Launch, start
from nas.search.progress import Silent
from nas.search.run import Run
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig

SHAPE = ModelShape(vocab_size=257, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24)

SUPERNET: dict[str, Any] = {
    "name": "tiny",
    "space": {
        "model": {
            "vocab_size": 257,
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
"""On the weights of a supernet that gradient matching splits in two."""

PREDICTOR = SUPERNET | {"supernet": None, "split": None, "predictor": {"configs": 8, "steps": 2, "rounds": 2}}
"""By a predictor."""

FROM = SUPERNET | {
    "name": "from",
    "from": "dense",
    "space": {
        "choices": {
            "tie": {"sources": "previous"},
            "kv": {"sources": "previous"},
            "kv_heads": {"options": [4, 2, 1]},
            "intermediate": {"options": [24, 12]},
            "delta": {"options": ["own", 2]},
        }
    },
}
"""From a checkpoint."""

FROM_PREDICTOR = FROM | {"supernet": None, "split": None, "predictor": PREDICTOR["predictor"]}
"""From a checkpoint, by a predictor."""


def write_trial(folder: Path, trial: dict[str, Any], **changes: Any) -> Path:
    """A trial as a file, whole sections replaced, those that are None left out; beside its checkpoint if it is from one."""
    data = {key: value for key, value in {**trial, **changes}.items() if value is not None}
    if data.get("from") == "dense" and not (folder / "dense").exists():
        write_dense(folder / "dense")
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def write_dense(folder: Path, shape: ModelShape = SHAPE, seed: int = 0, layers: list[dict[str, Any]] | None = None) -> Path:
    """A model whose every weight matters, exported as a checkpoint would be."""
    config = SharingConfig.make(shape, layers) if layers else SharingConfig.dense(shape)
    model = init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    return export(model, config, bytes_json(), folder, ModelCard())


def search(folder: Path, trial: dict[str, Any], **changes: Any) -> tuple[Run, Front]:
    """A search from start to end in a folder."""
    return start(Launch(write_trial(folder, trial, **changes), folder / "runs"), Silent())


def results(front: Front) -> dict[tuple[str, int], tuple[float, float]]:
    """What two fronts that are the same have in common, to the last digit."""
    return {(e.config.hash, e.seed): (e.losses.perplexity, e.bits_per_byte) for e in front.evaluations}


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test process to ask for it fills, and that the others wait for."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / f"shared-{name}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "done").touch()
    return folder
