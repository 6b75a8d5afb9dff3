"""A tabular benchmark of fine-tuned sharing: the loss of sharing configs of a pretrained model before and after fine-tuning.

    python -m reports.fine_tuned MODEL_DIR TEXT_TRAIN TEXT_EVAL --to reports/fine_tuned [--setting real|small] [--limit-minutes N]
        [--rate 1e-3 --config HASH …]

`TO/SETTING` gets five files. `settings.json` says what the tables depend on. `single_decisions.csv` has the zero-shot loss of
each decision alone, on the training text. `configs.json` has each config's canonical form by its hash, in the order of work,
and `configs.csv` its memory. `losses.csv` has a row for each config, seed and step of evaluation, on the evaluation text. A
second call resumes: only a training whose last row is not in the table is done. With `--rate` only some configs are trained, at
other learning rates than the setting's, and `rates.csv` has their rows.

Each config starts from the dense model's weights and is distilled from it: the loss is the cross-entropy with the dense model's
probabilities over the whole vocabulary. The dense model is its own teacher. At half of the steps the learning rate is still high.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from nas.data import DataSpec, eval_sequences, load_corpus, train_batches
from nas.export.load import load_export
from nas.files import write_text
from nas.model import attention
from nas.model.decoder import Decoder
from nas.model.supernet import Supernet, standalone
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.sharing_config import SharingConfig
from nas.training.evaluation import NotFinite, losses_by_sequence
from nas.training.loop import Backward, Trainer, TrainSpec

from .configs import Draw, append_row, read_table

MEMORY = ("memory_bytes", "weight_bytes", "kv_cache_bytes")
DRAWN = ("hash", "bin", "noise", "memory_fraction", *MEMORY)
MEASURED = ("loss_nats_per_token", "standard_error", "seconds", "cpu_seconds", "eval_losses")
"""The standard error is over the evaluation sequences, whose losses are `eval_losses`. Seconds are of training alone, so far."""
PASS = 2**25
"""Logits of one pass at most: a sequence at a time for a vocabulary of 49,152 tokens, a batch for one of 256."""

LOSSES = ("hash", *MEMORY, "step", "tokens", "seed", *MEASURED)
RATES = ("learning_rate", *LOSSES)


@dataclass(frozen=True)
class Setting:
    """Where memory is measured, how a config is trained, sequences of `train.seq` tokens evaluated, and configs in each bin."""

    memory: MemorySpec
    train: TrainSpec
    eval_sequences: int
    per_bin: int


SETTINGS = {  # for a pretrained model of some 100 million parameters, and for one of a few layers, trained beforehand
    "real": Setting(MemorySpec(4096, 8), TrainSpec(60, batch=2, seq=512, learning_rate=3e-4), eval_sequences=16, per_bin=4),
    "small": Setting(MemorySpec(1024, 1), TrainSpec(100, batch=16, seq=128, learning_rate=1e-3), eval_sequences=64, per_bin=13),
}


def use_idle_processors() -> None:
    """Compute with a thread for each processor that the last minute's load leaves idle, at least one: threads that share
    processors with other work wait for one another."""
    others = max(round(os.getloadavg()[0] - torch.get_num_threads()), 0)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - others))


def distillation(model: Decoder, dense: Decoder, known: dict[int, Tensor]) -> Backward:
    """Adds the gradients of each batch in turn, in passes of `PASS` logits at most, which takes less memory. `known` keeps the
    dense model's final hidden states `(batch, seq, hidden)` by step for the next config, which sees the same batches; bfloat16 is
    what autocast gives the output head, so the probabilities are exact."""
    steps = itertools.count()

    def backward(rows: Tensor) -> Tensor:
        step, total = next(steps), torch.zeros(())
        if step not in known:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                known[step] = dense.hidden(dense.embed(rows[:, :-1])).bfloat16()
        count = max(1, PASS // (rows[0].numel() * dense.shape.vocab_size))
        for row, hidden in zip(rows.split(count), known[step].split(count), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                target = dense.logits(hidden).float().softmax(-1)
                logits = model(row[:, :-1]).float()
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1)) * (len(row) / len(rows))
            loss.backward()
            total += loss.detach()
        return total

    return backward


def read_dense(folder: Path) -> Supernet:
    """The dense model in a folder, in float32, as the weights that every config inherits."""
    dense = load_export(folder).model
    net = Supernet(dense.shape, torch.Generator()).requires_grad_(False)
    net.bank.load_state_dict(dense.state_dict())
    return net


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in its folder: the dense model, as the weights that every config inherits, and the texts."""

    folder: Path
    setting: Setting
    net: Supernet
    tokens: Tensor
    sequences: Tensor

    def configs(self) -> list[SharingConfig]:
        """Those in `configs.json`, in its order; without it they are drawn, by losses on as much training text as a batch has."""
        path, table, spec = self.folder / "configs.json", self.folder / "configs.csv", self.setting.train
        if not path.exists():
            draw, sequences = Draw(self.net.shape, self.setting.memory), eval_sequences(self.tokens, spec.seq, spec.batch)
            decisions = draw.single_decisions(
                self.folder / "single_decisions.csv",
                lambda config: losses_by_sequence(self.net.subnet(config), sequences, 1).mean().item(),
            )
            drawn = dict(draw.all(decisions, self.setting.per_bin, seed=0))
            table.unlink(missing_ok=True)
            for row in drawn.values():
                append_row(table, DRAWN, row)
            write_text(path, json.dumps({config.hash: config.to_data() for config in drawn}, indent=1) + "\n")
        return [SharingConfig.from_data(self.net.shape, data) for data in json.loads(path.read_text()).values()]

    def run(self, deadline: float) -> None:
        """Train what the table has not: every config with seed 0, then the first half of them with seed 1."""
        configs, path = self.configs(), self.folder / "losses.csv"
        done = {(row["hash"], int(row["seed"]), int(row["step"])) for row in read_table(path)}
        for seed, count in enumerate((len(configs), (len(configs) + 1) // 2)):
            known: dict[int, Tensor] = {}
            for config in configs[:count]:
                if (config.hash, seed, self.setting.train.steps) not in done and time.monotonic() < deadline:
                    for row in self.train(config, seed, known):
                        print(*(f"{name}={row[name]}" for name in LOSSES[:-1]), flush=True)
                        if (config.hash, seed, row["step"]) not in done:
                            append_row(path, LOSSES, row)

    def run_rates(self, rates: Sequence[float], hashes: Sequence[str]) -> None:
        """Train some configs at other learning rates, what `rates.csv` has not."""
        path = self.folder / "rates.csv"
        done = {(row["hash"], float(row["learning_rate"]), int(row["step"])) for row in read_table(path)}
        for config in (one for one in self.configs() if one.hash in hashes):
            known: dict[int, Tensor] = {}
            for rate in rates:
                spec = replace(self.setting.train, learning_rate=rate)
                if (config.hash, rate, spec.steps) not in done:
                    rows = list(replace(self, setting=replace(self.setting, train=spec)).train(config, 0, known))
                    for row in rows:
                        append_row(path, RATES, row | {"learning_rate": rate})
                    print(f"{config.hash} at {rate:g}: {rows[-1]['loss_nats_per_token']}", flush=True)

    def train(self, config: SharingConfig, seed: int, known: dict[int, Tensor]) -> Iterator[dict[str, object]]:
        """Rows of a training before it, after half and all steps; one that diverges ends with a last row of NaN."""
        model, spec = standalone(self.net.subnet(config)), self.setting.train
        head = measure(self.net.shape, config, self.setting.memory).to_data() | {"hash": config.hash, "seed": seed}
        trainer = Trainer(model, spec, torch.Generator().manual_seed(seed))
        batches = train_batches(self.tokens, spec.batch, spec.seq, trainer.generator)
        steps, seconds, cpu_seconds = trainer.run(batches, distillation(model, self.net.bank, known)), 0.0, 0.0
        for step in (0, spec.steps // 2, spec.steps):
            begin, cpu_begin = time.monotonic(), time.process_time()
            try:
                while trainer.step < step:
                    use_idle_processors()
                    next(steps)
            except NotFinite:
                yield head | {"step": spec.steps, "tokens": spec.tokens} | dict.fromkeys(MEASURED, math.nan)
                return
            seconds, cpu_seconds = seconds + time.monotonic() - begin, cpu_seconds + time.process_time() - cpu_begin
            losses = losses_by_sequence(model, self.sequences, 1).double()
            mean, error = losses.mean().item(), losses.std().item() / math.sqrt(len(losses))
            measured = *(round(x, 6) for x in (mean, error, seconds, cpu_seconds)), " ".join(f"{loss:.5f}" for loss in losses)
            yield head | {"step": step, "tokens": step * spec.batch * spec.seq} | dict(zip(MEASURED, measured, strict=True))


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text_train", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("text_eval", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), required=True, help="the folder of the tables")
@click.option("--setting", "name", type=click.Choice(list(SETTINGS)), default="real", show_default=True)
@click.option("--limit-minutes", type=float, default=math.inf, help="start no training after so many minutes")
@click.option("--rate", "rates", type=float, multiple=True, help="train the configs of --config at this rate instead")
@click.option("--config", "hashes", multiple=True, help="by its hash")
def main(
    model_dir: Path,
    text_train: Path,
    text_eval: Path,
    to: Path,
    name: str,
    limit_minutes: float,
    rates: Sequence[float],
    hashes: Sequence[str],
) -> None:
    """Fine-tune sharing configs of the model in MODEL_DIR on TEXT_TRAIN, and evaluate them on TEXT_EVAL."""
    deadline, folder, setting = time.monotonic() + 60 * limit_minutes, to / name, SETTINGS[name]
    files, path = {"model": model_dir / "model.safetensors", "train": text_train, "eval": text_eval}, folder / "settings.json"
    sums = {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items()}
    settings = json.dumps({"sha256": sums, "setting": asdict(setting)}, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() != settings:
        raise click.ClickException(f"{folder} holds tables of another model, text or setting; give another folder with --to")
    path.write_text(settings)
    use_idle_processors()
    net = read_dense(model_dir)
    data = DataSpec(str(text_train), str(text_eval), tokenizer=str(model_dir / "tokenizer.json"))
    corpus = load_corpus(data, net.shape.vocab_size, Path())
    sequences = eval_sequences(corpus.eval, setting.train.seq, setting.eval_sequences)
    usual, attention.PLAIN_UP_TO = attention.PLAIN_UP_TO, setting.train.seq  # heads of width 64: reports/bench_attention.md
    try:
        benchmark = Benchmark(folder, setting, net, corpus.train, sequences)
        benchmark.run_rates(rates, hashes) if rates else benchmark.run(deadline)
    finally:
        attention.PLAIN_UP_TO = usual


if __name__ == "__main__":
    main()
