"""whittle's part, in an environment of its own (see README.md): `python reports/whittle/peer.py MODEL_DIR WORK ARM METHOD…`

Searches the sub-networks of a Llama by whittle and writes the best of its front as Hugging Face folders. WORK has the `texts.npz`
of `python -m reports.whittle RUN WORK`. An arm says from which weights: the checkpoint's (`zero_shot`), those after whittle's
super-network training (`sandwich`), or the checkpoint's with dimensions, neurons and groups of heads in the order of whittle's
importance scores, by which layers are left out, too (`ordered`). A second call goes on: proposals follow from the seed and from
losses, and those in `evaluations.csv` are not measured again.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from datasets import Dataset
from litgpt import Config
from litgpt.pretrain import get_lr
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file, save_file
from syne_tune.config_space import choice
from torch import Tensor
from whittle.convert import convert_subnet_to_litgpt
from whittle.importance.block_importance import compute_block_importance
from whittle.importance.embd_size import compute_importance_embd
from whittle.importance.intermediate_size import compute_importance_intermediate_size
from whittle.importance.num_heads import compute_importance_head_groups
from whittle.importance.utils import sort_keys_by_score
from whittle.models.gpt import GPT
from whittle.models.gpt.extract import extract_current_sub_network
from whittle.sampling.random_sampler import RandomSampler
from whittle.search.multi_objective import get_pareto_optimal
from whittle.search.search import multi_objective_search
from whittle.search.search_spaces import SmallSearchSpace
from whittle.training_strategies import SandwichStrategy

SIZES, DENSE = ("n_embd", "n_layers", "heads", "intermediate_size"), (576, 30, 9, 1536)
EVALUATIONS, SEED, RATE, CACHE_TOKENS = 120, 0, 3e-4, 8 * 4096
LOW, HIGH, BANDS = 0.55, 0.95, 4
"""Exported is the least loss of the front in each of so many equal bands of memory, as parts of the dense model's."""


class Space(SmallSearchSpace):  # type: ignore[misc]
    """whittle's small space, but for numbers of heads that do not divide among the query groups, which it refuses. `layers` are
    in the order of their importance, if they are left out by it."""

    def __init__(self, config: Config, layers: list[int] | None) -> None:
        super().__init__(config)
        self.layers, groups = layers, config.n_query_groups
        self.config_space["heads"] = choice(list(range(groups, config.n_head + 1, groups)))

    def cast(self, config: dict[str, int]) -> dict[str, Any]:
        """The arguments of `set_sub_network`."""
        names = ("n_embd", "n_layers", "num_heads", "intermediate_size")
        sizes = {f"sub_network_{name}": config[key] for name, key in zip(names, SIZES, strict=True)}
        return sizes | ({"sampled_layer_indices": sorted(self.layers[: config["n_layers"]])} if self.layers else {})


def read_model(folder: Path, seq: int) -> GPT:
    """The super-network of SmolLM2-135M with the weights in a folder."""
    model, weights = GPT(config := Config.from_name("SmolLM2-135M")), dict[str, Tensor]()
    copy_weights_hf_llama(config, {}, weights, load_file(folder / "model.safetensors"))
    model.load_state_dict(weights)
    return tied(model, seq)


def tied(model: GPT, seq: int) -> GPT:
    """The model with one Parameter as embedding and output head, for sequences of `seq` tokens."""
    model.config.tie_embeddings = True
    model.tie_weights()
    model.max_seq_length = seq
    return model


def train_sandwich(model: GPT, space: Space, batches: Tensor) -> None:
    """Each batch trains the largest, the smallest and two random sub-networks: whittle's default strategy."""
    strategy = SandwichStrategy(sampler=RandomSampler(space, seed=SEED), loss_function=chunked_cross_entropy, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = get_lr(RATE, step, 0, len(batches), RATE / 10)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = strategy(model, rows[:, :-1], rows[:, 1:], scale_loss=1 / strategy.random_samples)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {len(batches)}: {loss:.3f}", flush=True)


def order(model: GPT, rows: Tensor, work: Path) -> tuple[GPT, list[int]]:
    """The model with its dimensions in the order of their importance on some rows, and the layers in theirs."""
    Dataset.from_dict({"text": [""]}).save_to_disk(work / "rows")  # whittle reads a data set, and tokenizes it
    tokenizer = MagicMock(pad_token="", return_value=SimpleNamespace(input_ids=rows.reshape(1, -1)))  # they are tokens already
    switches = [module for module in model.modules() if hasattr(module, "compute_importance")]
    for module in switches:
        module.compute_importance = True
    given = {"model": model, "max_length": rows.shape[1], "batch_size": 1, "num_batches": len(rows)}
    given |= {"tokenizer": tokenizer, "dataset_path": str(work / "rows")}
    scores = (compute_importance_embd, compute_importance_intermediate_size, compute_importance_head_groups)
    orders = [sort_keys_by_score(score(objective="norm", **given)) for score in scores]  # its default
    layers = sort_keys_by_score(compute_block_importance(**given))
    for module in switches:
        module.compute_importance = False
    names = ("sampled_embd_indices", "sampled_intermediate_indices", "sampled_query_group_indices")
    model.set_sub_network(**dict(zip(names, orders, strict=True)))
    return tied(extract_current_sub_network(model), model.max_seq_length), layers


def prepare(arm: str, model: GPT, texts: dict[str, Tensor], path: Path) -> tuple[GPT, Space]:
    """The super-network of an arm and its space; what was made of the model is kept at the path."""
    if not path.exists():
        model, layers = (
            order(model, texts["batches"][:2].flatten(0, 1)[:, :-1], path.parent) if "ordered" in arm else (model, None)
        )
        if "sandwich" in arm:
            train_sandwich(model, Space(model.config, layers), texts["batches"])
        torch.save({"model": model.state_dict(), "layers": layers}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    return model.eval(), Space(model.config, saved["layers"])


def memory_bytes(full: Config, width: int, layers: int, heads: int, neurons: int) -> int:
    """Weights and KV cache in 2 bytes a number."""
    kv = full.n_query_groups * full.head_size
    layer = 2 * width * (heads * full.head_size + kv) + 3 * width * neurons + 2 * width + 2 * kv * CACHE_TOKENS
    return 2 * (full.padded_vocab_size * width + width + layers * layer)


@torch.no_grad()
def loss_of(model: GPT, windows: Tensor) -> float:
    """The mean loss of the current sub-network over windows `(windows, seq + 1)` in nats a token, in bfloat16 autocast."""
    losses = []
    for row in windows:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(row[None, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), row[1:]))
    return torch.stack(losses).mean().item()


def export(model: GPT, arguments: dict[str, Any], source: Path, to: Path) -> None:
    """Write a sub-network as a Hugging Face folder of a Llama, by whittle's conversion."""
    found, weights = convert_subnet_to_litgpt(model, arguments), dict[str, Tensor]()
    copy_weights_llama(found.config, weights, found.state_dict())
    del weights["lm_head.weight"]  # it is the embedding
    c, data = found.config, json.loads((source / "config.json").read_text())
    data |= {"hidden_size": c.n_embd, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.n_layer}
    data |= {"num_attention_heads": c.n_head, "num_key_value_heads": c.n_query_groups, "head_dim": c.head_size}
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tokenizer.json", to)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(data, indent=2) + "\n")


def search(arm: str, method: str, model: GPT, space: Space, windows: Tensor, table: Path) -> dict[tuple[int, ...], float]:
    """Search an arm by a method of whittle's; the losses of all sub-networks of the arm in the table, to which it adds."""
    rows = list(csv.reader(table.open())) if table.exists() else []
    known = {tuple(map(int, row[3:7])): float(row[8]) for row in rows if row[0] == arm}
    done, number = sum(row[:2] == [arm, method] for row in rows), itertools.count()
    head = [] if rows else [("arm", "method", "number", *SIZES, "memory_bytes", "loss_nats_per_token")]

    def objective(config: dict[str, int]) -> tuple[float, float]:
        sizes = tuple(config[name] for name in SIZES)
        if sizes not in known:
            model.set_sub_network(**space.cast(config))
            known[sizes] = loss_of(model, windows)
        size = memory_bytes(model.config, *sizes)
        if (n := next(number)) >= done:
            with table.open("a", newline="") as file:
                row = (arm, method, n, *sizes, size, f"{known[sizes]:.6f}")
                csv.writer(file, lineterminator="\n").writerows([*head, row])
                head.clear()
        return known[sizes], float(size)

    np.random.seed(SEED)  # local search draws its start from there
    multi_objective_search(objective, space.config_space, method, EVALUATIONS, seed=SEED, verbose=False)
    return known


def main(source: Path, work: Path, arm: str, methods: list[str]) -> None:
    """Search an arm by each method, and export of what was found."""
    with np.load(work / "texts.npz") as file:
        texts = {name: torch.from_numpy(file[name]) for name in file.files}
    model, space = prepare(arm, read_model(source, texts["windows"].shape[1] - 1), texts, work / f"{arm}.pt")
    for method in methods:
        known = search(arm, method, model, space, texts["windows"], work / "evaluations.csv")
    parts = {sizes: memory_bytes(model.config, *sizes) / memory_bytes(model.config, *DENSE) for sizes in known}
    there = [sizes for sizes, part in parts.items() if LOW < part < HIGH]
    members = get_pareto_optimal(np.array([(known[sizes], parts[sizes]) for sizes in there]).reshape(-1, 2))
    best = dict[int, tuple[int, ...]]()
    for sizes in sorted((s for s, member in zip(there, members, strict=True) if member), key=lambda s: known[s]):
        best.setdefault(int(BANDS * (parts[sizes] - LOW) / (HIGH - LOW)), sizes)
    for sizes in best.values():
        name = "-".join(map(str, (arm, *sizes)))
        print(f"{name}: {parts[sizes]:.1%} of the memory, {known[sizes]:.3f} nats a token")
        export(model, space.cast(dict(zip(SIZES, sizes, strict=True))), source, work / "found" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
