"""Which sharing configs are fine-tuned: combinations of single decisions that cost little loss for the bytes they save.

Owns the space of decisions, the table of single decisions, the draw of configs from it, and how tables are kept on disk.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.config import parse_yaml
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace

BINS, HIGHEST, LOWEST = 12, 0.95, 0.40  # bins of equal width, and their ends as fractions of the dense model's memory
NOISES = (0.0, 0.3, 0.6, 1.0)  # of Gumbel noise on the logarithm of loss per byte; the configs of a bin take them in turn
DRAWS, MORE = 50, 0.05
HOPELESS_NATS = 2.0  # a decision that alone increases the loss by more is left out
SINGLES = ("decision", "hash", "memory_bytes", "memory_bytes_saved", "loss_nats_per_token", "loss_increase_nats_per_token")
Decisions = list[tuple[str, Any, float]]  # name, option, and the logarithm of the loss increase per byte saved


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV table; a last line that was cut short is removed from the file."""
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Write one row through to the disk, after the column names if it is the first."""
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


class Draw:
    """A layer may tie to the layer below, share its FFN or KV cache, have fewer KV heads, or drop its attention, FFN or both."""

    def __init__(self, shape: ModelShape, memory: MemorySpec) -> None:
        heads = [n for n in range(shape.num_key_value_heads, 0, -1) if shape.num_key_value_heads % n == 0]
        choices = {name: {"sources": "adjacent"} for name in ("tie", "ffn", "kv")}
        data = {**choices, "kv_heads": {"options": heads}, "drop": {"options": ["own", "attn", "ffn", "both"]}}
        self.space = SearchSpace.from_document(parse_yaml(str({"choices": data}), "space"), shape)
        self.shape, self.memory, self.dense = shape, memory, SharingConfig.dense(shape)
        self.dense_bytes = self.bytes(self.dense)

    def bytes(self, config: SharingConfig) -> int:
        """Weights and KV cache."""
        return measure(self.shape, config, self.memory).memory_bytes

    def config(self, decided: Mapping[str, Any]) -> SharingConfig:
        """The config of some decisions, all others as in the dense model; one that another closes is ignored."""
        return self.space.decode(lambda name, options: decided[name] if decided.get(name) in options else options[0])[0]

    def single_decisions(self, path: Path, loss_of: Callable[[SharingConfig], float]) -> Decisions:
        """The decisions worth drawing from. Those that the table at `path` has not are evaluated alone and appended to it."""
        known, found = {row["decision"]: row for row in read_table(path)}, []
        alone = [(name, option) for name, options in self.space.options.items() for option in options[1:]]
        for name, option in [("dense", None), *alone]:
            label, config = name if option is None else f"{name}={option}", self.config({name: option})
            if label not in known:
                loss, size = round(loss_of(config), 6), self.bytes(config)
                increase = round(loss - float(known["dense"][SINGLES[4]]), 6) if known else 0.0
                row = (label, config.hash, size, self.dense_bytes - size, loss, increase)
                known[label] = dict(zip(SINGLES, map(str, row), strict=True))
                append_row(path, SINGLES, known[label])
            saved, increase = int(known[label][SINGLES[3]]), float(known[label][SINGLES[5]])
            if saved > 0 and increase <= HOPELESS_NATS:
                found.append((name, option, math.log(max(increase, 0.0) + 1e-3) - math.log(saved)))
        return found

    def one(self, decisions: Decisions, goal: float, noise: float, rng: np.random.Generator) -> SharingConfig:
        """Adds decisions in the order of noisy loss per byte until memory is at most `goal` bytes; without noise it is greedy."""
        config, chosen = self.dense, dict[str, Any]()
        for i in np.argsort([cost + noise * rng.gumbel() for _, _, cost in decisions]):
            if self.bytes(config) <= goal:
                break
            larger = {decisions[i][0]: decisions[i][1]} | chosen
            other = self.config(larger)
            if self.bytes(other) < self.bytes(config):
                config, chosen = other, larger
        return config

    def all(self, decisions: Decisions, per_bin: int, seed: int) -> Iterator[tuple[SharingConfig, dict[str, Any]]]:
        """Dense and `per_bin` configs of each bin, each with its bin (0 for dense), noise and memory. The order of work takes a
        config of each bin in turn, so that any prefix covers the range. Where a draw gives no new config of the bin, the next has
        a little more noise; a bin that `DRAWS` of them do not reach gets fewer."""
        rng, found = np.random.default_rng(seed), {self.dense: (0, 0.0)}
        for turn in range(per_bin * BINS):
            noise, number = NOISES[turn // BINS % len(NOISES)], 7 * turn % BINS
            high, low = ((HIGHEST - (HIGHEST - LOWEST) * n / BINS) * self.dense_bytes for n in (number, number + 1))
            for more in range(DRAWS):
                louder = round(noise + MORE * more, 3)
                config = self.one(decisions, rng.uniform(low, high), louder, rng)
                if config not in found and low < self.bytes(config) <= high:
                    found[config] = number + 1, louder
                    break
        for config, (number, noise) in found.items():
            drawn = {"bin": number, "noise": noise, "memory_fraction": round(self.bytes(config) / self.dense_bytes, 4)}
            yield config, drawn | {"hash": config.hash} | measure(self.shape, config, self.memory).to_data()
