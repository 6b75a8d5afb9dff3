"""How well estimators order sharing configs by their loss after fine-tuning, on a table of `reports.fine_tuned`.

    python -m reports.fine_tuned_ranking MODEL_DIR TEXT_TRAIN [--setting small|real] [--seeds N] [--budget 0.1] [--only NAME …]

MODEL_DIR and TEXT_TRAIN are those of the table. Every supernet starts as the dense model, is distilled from it, and takes
`budget` of the tokens that fine-tuning every config of the table once takes, splits included. A short fine-tuning
takes its part of them for each config alone. No estimator sees the evaluation text: losses are measured on a part of TEXT_TRAIN
on which nothing is trained. `SETTING/estimates.csv` has what each estimator that is trained says of each config, and one that is
in it is not trained again; `README.md` has the scores. Without MODEL_DIR and TEXT_TRAIN the page is made anew from the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch import Tensor

from nas.config import plain
from nas.data import DataSpec, eval_sequences, load_corpus
from nas.export import read_config
from nas.files import write_text
from nas.report.tables import Row, markdown_table
from nas.search.candidates import Predictor, features
from nas.search.context import Context, read_base_model
from nas.search.progress import Silent
from nas.search.run import Run
from nas.search.supernets import Supernets, train_supernets
from nas.search.trial import Trial
from nas.search.trial_file import EvaluateSpec, FinalSpec, SupernetSpec, TrialFile
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.splitting import SplitSpec
from nas.tracking import Tracker, TrackingSpec
from nas.training.evaluation import losses_by_sequence
from nas.workers import RunSpec, executor

from ..fine_tuned.__main__ import SETTINGS, Benchmark, read_dense
from ..fine_tuned.configs import Draw, append_row, read_table
from ..grid import Numbers
from ..ground_truth.agreement import agreement, quartiles
from ..ranking.scores import Score, spread

HERE, TABLES = Path(__file__).parent, Path(__file__).parents[1] / "fine_tuned"
ESTIMATES = ("estimator", "seed", "tokens", "hash", "loss_nats_per_token")
COUNTS, DRAWS = (8, 24), 20  # fine-tunings that a predictor is fitted to, and how often they are drawn
COMMON = 16  # configs that every leaf of a split supernet is asked for, to set their losses off against one another
MEASURES = {
    "τ": ("tau", ".2f"),
    "τ in quartiles": ("tau_within", ".2f"),
    "top 10%": ("top_overlap", ".0%"),
    "regret, 1": ("regret_1", ".1%"),
    "regret, 10": ("regret_10", ".1%"),
}


UNSPLIT = SplitSpec("none")


@dataclass(frozen=True)
class Kind:
    """A supernet that starts as the dense model and is distilled from it; a row of `SUPERNETS`. `part` is of the budget."""

    strategy: str = "dense_biased"
    learning_rate: float = 1e-3
    split: SplitSpec = UNSPLIT
    part: float = 1.0


def _split(method: str, splits: int, configs: str = "uniform") -> SplitSpec:
    return SplitSpec(method, splits=splits, batches=8, configs=configs)


SUPERNETS = {
    "zero-shot": Kind(part=0.0),
    "dense-biased": Kind(),
    "dense-biased, rate 3e-4": Kind(learning_rate=3e-4),
    "dense-biased, a quarter of the tokens": Kind(part=0.25),
    "near the front": Kind("near_front"),
    "dense-biased, rate 1e-4": Kind(learning_rate=1e-4),
    "near the front, rate 3e-4": Kind("near_front", learning_rate=3e-4),
    "near the front, rate 1e-4": Kind("near_front", learning_rate=1e-4),
    "sandwich": Kind("sandwich"),
    "uniform": Kind("uniform"),
    "dense-biased, gradient split 2": Kind(split=_split("gradient-matching", 1)),
    "dense-biased, gradient split 2 near the front": Kind(split=_split("gradient-matching", 1, "near_front")),
    "dense-biased, random split 2": Kind(split=_split("random", 1)),
    "dense-biased, gradient split 4": Kind(split=_split("gradient-matching", 2)),
    "dense-biased, random split 4": Kind(split=_split("random", 2)),
    "dense-biased, gradient split 8": Kind(split=_split("gradient-matching", 3)),
    "dense-biased, random split 8": Kind(split=_split("random", 3)),
    "dense-biased, rate 3e-4, gradient split 2": Kind(learning_rate=3e-4, split=_split("gradient-matching", 1)),
    "dense-biased, rate 3e-4, gradient split 4": Kind(learning_rate=3e-4, split=_split("gradient-matching", 2)),
    "dense-biased, rate 3e-4, random split 4": Kind(learning_rate=3e-4, split=_split("random", 2)),
    "near the front, rate 3e-4, gradient split 4": Kind("near_front", 3e-4, _split("gradient-matching", 2)),
    "near the front, rate 3e-4, random split 4": Kind("near_front", 3e-4, _split("random", 2)),
}
SHORT = {"short fine-tuning, 5% of the steps": 0.05, "short fine-tuning, 10% of the steps": 0.1}
"""The part of a config's own fine-tuning, with a schedule of its own, after which its loss is the estimate."""

PAIRS = "sum of single decisions and of pairs"
HALVING = "successive halving: 5% of the steps, then 10% of the better half"
FIRST = ("zero-shot", "dense-biased, rate 3e-4", "dense-biased, rate 3e-4, gradient split 4", PAIRS, *SHORT)
"""Estimates that a predictor has as its first feature."""

SUBNETS = {"sandwich": 4}
"""Subnets that a step runs, where it is not one."""


@dataclass(frozen=True)
class Table:
    """A table of `reports.fine_tuned`: configs, their memory, and their losses by seed and step, `(configs,)` each."""

    setting: str
    configs: tuple[SharingConfig, ...]
    memory: Numbers
    losses: Mapping[tuple[int, int], Numbers]  # by seed and step; NaN where a config was not trained
    singles: Mapping[str, float]
    space: Draw

    @staticmethod
    def read(setting: str, shape: ModelShape, trained: bool = True) -> Table:
        """The configs that were `trained` to the end with seed 0, or all that are to be."""
        folder, steps = TABLES / setting, SETTINGS[setting].train.steps
        rows = read_table(folder / "losses.csv")
        known = {(row["hash"], int(row["seed"]), int(row["step"])): float(row["loss_nats_per_token"]) for row in rows}
        data = json.loads((folder / "configs.json").read_text())
        wanted = (h for h in data if not trained or np.isfinite(known.get((h, 0, steps), np.nan)))
        configs = tuple(SharingConfig.from_data(shape, data[h]) for h in wanted)
        memory = {row["hash"]: float(row["memory_bytes"]) for row in read_table(folder / "configs.csv")}
        losses = {
            (seed, step): np.array([known.get((config.hash, seed, step), np.nan) for config in configs])
            for seed in (0, 1)
            for step in (0, steps // 2, steps)
        }
        singles = {
            row["decision"]: float(row["loss_increase_nats_per_token"]) for row in read_table(folder / "single_decisions.csv")
        }
        found = np.array([memory[config.hash] for config in configs])
        return Table(setting, configs, found, losses, singles, Draw(shape, SETTINGS[setting].memory))

    @property
    def truth(self) -> Numbers:
        """The loss after all steps, the mean over the seeds that there are."""
        return np.nanmean([self.losses[seed, SETTINGS[self.setting].train.steps] for seed in (0, 1)], axis=0)

    @property
    def tokens(self) -> int:
        """That fine-tuning every config once takes."""
        return len(self.configs) * SETTINGS[self.setting].train.tokens

    def decisions(self) -> list[list[tuple[str, Any]]]:
        """Of each config, the decisions by which it differs from dense, with their options."""
        least, taken = self.space.space.least_sharing(), [self.space.space.encode(config) or {} for config in self.configs]
        return [[(name, option) for name, option in each.items() if option != least[name]] for each in taken]

    def additive(self) -> Numbers:
        """Of each config, the sum of what its decisions cost alone, measured on training text."""
        return np.array([sum(self.singles.get(f"{n}={option}", 0.0) for n, option in each) for each in self.decisions()])

    def halved(self, short: Numbers, longer: Numbers) -> Numbers:
        """The losses after a short fine-tuning; of the better half of each quartile of memory, those after a longer one, with the
        mean difference of the two added."""
        better = np.concatenate([group[np.argsort(short[group])[: len(group) // 2]] for group in quartiles(self.memory)])
        found = short.copy()
        found[better] = longer[better] + (short - longer)[better].mean()
        return found


@dataclass(frozen=True)
class Estimating:
    """Supernets to be trained for a table, from a model and a text."""

    table: Table
    model: Path
    text: Path
    budget: float

    @property
    def data(self) -> DataSpec:
        """The training text, of which a part is for evaluation, by the model's tokenizer."""
        return DataSpec(str(self.text), tokenizer=str(self.model / "tokenizer.json"))

    def trial(self, kind: Kind, seed: int) -> Trial:
        """The trial whose supernet this is, with as many steps as its part of the budget has."""
        spec, memory = SETTINGS[self.table.setting].train, SETTINGS[self.table.setting].memory
        batch = max(spec.batch // 2, 1)
        tokens = self.budget * kind.part * self.table.tokens
        steps = int(tokens / (batch * spec.seq * SUBNETS.get(kind.strategy, 1)))
        supernet = SupernetSpec(steps, batch, spec.seq, kind.learning_rate, strategy=kind.strategy)
        return Trial(
            TrialFile(
                name="fine_tuned_ranking",
                space={},
                from_=str(self.model),
                seed=seed,
                data=self.data,
                memory=memory,
                supernet=supernet,
                split=kind.split,
                final=FinalSpec(0, spec.batch, spec.seq),
                evaluate=EvaluateSpec(windows=SETTINGS[self.table.setting].eval_sequences),
                run=RunSpec(workers=0),
                tracking=TrackingSpec(enabled=False),
            ),
            self.table.space.space,
            Path(),
        )

    def run(self, kind: Kind, seed: int, folder: Path) -> tuple[dict[str, Numbers], int]:
        """What a supernet says of every config, and of a split one also calibrated; and the tokens that it took."""
        trial = self.trial(kind, seed)
        corpus = load_corpus(trial.file.data, trial.space.shape.vocab_size, Path())
        folder.mkdir(parents=True, exist_ok=True)
        with Tracker(trial.file.tracking, folder, trial.file.name) as tracker, executor(trial.file.run) as work:
            base = read_base_model(trial, corpus)
            nets = train_supernets(Context(Run(folder), trial, corpus, Silent(), tracker, work, base))
        windows = eval_sequences(corpus.eval, trial.file.final.seq, trial.file.evaluate.windows, corpus.bos)
        return self._ask(nets, trial, windows), nets.spent

    def short(self, part: float, seed: int) -> tuple[dict[str, Numbers], int]:
        """The loss of every config after a part of its fine-tuning; and the tokens that all took."""
        spec = SETTINGS[self.table.setting]
        spec = replace(spec, train=replace(spec.train, steps=max(round(part * spec.train.steps), 1)))
        net, corpus = read_dense(self.model), load_corpus(self.data, self.table.space.shape.vocab_size, Path())
        windows = eval_sequences(corpus.eval, spec.train.seq, spec.eval_sequences, corpus.bos)
        benchmark, known = Benchmark(Path(), spec, net, corpus.train, windows), dict[int, Tensor]()
        losses = [[*benchmark.train(config, seed, known)][-1]["loss_nats_per_token"] for config in self.table.configs]
        return {"": np.array(losses, dtype=np.float64)}, spec.train.tokens * len(losses)

    def pairs(self) -> tuple[dict[str, Numbers], int]:
        """Of each config, what its decisions cost alone and what each two of them cost more together, zero-shot; no tokens."""
        net, corpus, spec = read_dense(self.model), load_corpus(self.data, self.table.space.shape.vocab_size, Path()), SETTINGS
        windows = eval_sequences(corpus.eval, spec[self.table.setting].train.seq, spec[self.table.setting].eval_sequences)

        @cache
        def loss(*decided: tuple[str, Any]) -> float:
            return losses_by_sequence(net.subnet(self.table.space.config(dict(decided))), windows).mean().item()

        def cost(decided: Sequence[tuple[str, Any]]) -> float:
            alone = {one: loss(one) - loss() for one in decided}
            more = (loss(one, other) - loss() - alone[one] - alone[other] for one, other in combinations(decided, 2))
            return sum(alone.values()) + sum(more)

        return {"": np.array([cost(each) for each in self.table.decisions()])}, 0

    def _ask(self, nets: Supernets, trial: Trial, windows: object) -> dict[str, Numbers]:
        def loss(leaf: str, config: SharingConfig) -> float:
            found = losses_by_sequence(nets.nets[leaf].eval().subnet(config), windows, autocast=trial.file.final.autocast)  # type: ignore[arg-type]
            return found.mean().item()

        leaves = [nets.tree.route(trial.space, config) for config in self.table.configs]
        own = np.array([loss(leaf, config) for leaf, config in zip(leaves, self.table.configs, strict=True)])
        if len(nets.nets) == 1:
            return {"": own}
        every = np.linspace(0, len(leaves) - 1, COMMON).round().astype(int)
        level = {leaf: float(np.mean([loss(leaf, self.table.configs[n]) for n in every])) for leaf in nets.nets}
        return {"": own, ", calibrated": own - np.array([level[leaf] for leaf in leaves])}


def scores(table: Table, estimates: Path) -> Iterator[Score]:
    """Every estimator's score on a table. A predictor is scored on the configs that it was not fitted to."""
    truth, steps, shape = table.truth, SETTINGS[table.setting].train.steps, table.space.shape

    def score(name: str, tokens: float, *found: Numbers) -> Score:
        return Score(name, tokens, tuple(agreement(table.memory, truth, one) for one in found))

    both = np.isfinite(table.losses[1, steps])
    if both.sum() > 8:
        one, other = (table.losses[seed, steps][both] for seed in (0, 1))
        yield Score("one seed, by the other", table.tokens, (agreement(table.memory[both], other, one),))
    yield score("half of the tokens", table.tokens / 2, table.losses[0, steps // 2])
    rows = features(shape, table.configs, table.space.memory)
    yield score("memory bytes", 0, -table.memory)
    yield score("weight bytes", 0, -rows[:, 0])
    yield score("sum of single decisions", 0, table.additive())
    known: dict[str, dict[str, dict[str, float]]] = {}
    tokens: dict[str, int] = {}
    for row in read_table(estimates) if estimates.exists() else ():
        known.setdefault(row["estimator"], {}).setdefault(row["seed"], {})[row["hash"]] = float(row["loss_nats_per_token"])
        tokens[row["estimator"]] = int(row["tokens"])
    trained = {}
    for name, seeds in known.items():
        whole = [mine for mine in seeds.values() if all(config.hash in mine for config in table.configs)]
        if whole:
            trained[name] = [np.array([mine[config.hash] for config in table.configs]) for mine in whole]
            yield score(name, tokens[name], *trained[name])
    if all(name in trained for name in SHORT):
        once, more = ((trained[name][0], tokens[name]) for name in SHORT)
        yield score(HALVING, once[1] + more[1] / 2, table.halved(once[0], more[0]))
    first: dict[str, tuple[Numbers, int]] = {"": (-rows[:, 0], 0), "single decisions": (table.additive(), 0)}
    first |= {name: (trained[name][0], tokens[name]) for name in FIRST if name in trained}
    for name, (losses, before) in first.items():  # the predictor's first feature is not penalised
        columns = np.column_stack([-losses, rows]) if name else rows
        for count in COUNTS:
            if count <= len(table.configs) // 2:
                found = []
                for draw in range(DRAWS):
                    fitted = spread(table.memory, count, np.random.default_rng(draw))
                    rest = np.setdiff1d(np.arange(len(truth)), fitted)
                    guess = Predictor.fit(columns[fitted], table.losses[0, steps][fitted])(columns[rest])
                    found.append(agreement(table.memory[rest], truth[rest], guess))
                of = f"predictor of {count} fine-tunings" + (f", first feature: {name}" if name else "")
                yield Score(of, count * table.tokens / len(truth) + before, tuple(found))


def score_rows(found: Sequence[Score], all_tokens: int) -> list[Row]:
    """One row an estimator: the mean of each measure, ± the standard deviation over seeds or draws."""

    def cell(score: Score, name: str, form: str) -> str:
        deviation = score.deviation(name)
        return f"{score.mean(name):{form}}" + (f" ± {deviation:{form}}" if deviation else "")

    return [
        {"estimator": one.estimator, "tokens": f"{one.tokens / all_tokens:.0%}"}
        | {words: cell(one, name, form) for words, (name, form) in MEASURES.items()}
        | {"runs": str(len(one.agreements))}
        for one in found
    ]


def page(settings: Mapping[str, Table]) -> str:
    """The page, from the tables."""
    head = (HERE / "findings.md").read_text().rstrip()
    lines = [head, "", "Made by `python -m reports.fine_tuned_ranking`.", ""]
    for name, table in settings.items():
        spec = SETTINGS[name].train
        lines += [
            f"## {name}: {table.space.shape.num_hidden_layers} layers of width {table.space.shape.hidden_size}, "
            f"{len(table.configs)} configs",
            "",
            f"Each config is distilled from the dense model for {spec.tokens:,} tokens. Losses after it deviate by "
            f"{table.truth.std():.3f} nats over configs. Tokens are a part of those that fine-tuning every config once takes.",
            "",
            markdown_table(score_rows(list(scores(table, HERE / name / "estimates.csv")), table.tokens)).rstrip(),
            "",
        ]
    return "\n".join(lines)


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.argument("text_train", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--setting", type=click.Choice(list(SETTINGS)), default="small", show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--budget", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="of the tokens of all fine-tunings")
@click.option("--only", multiple=True, type=click.Choice([*SUPERNETS, *SHORT, PAIRS]), help="train these alone")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs/fine_tuned_ranking"), show_default=True)
def main(
    model_dir: Path | None, text_train: Path | None, setting: str, seeds: int, budget: float, only: tuple[str, ...], runs: Path
) -> None:
    """Train supernets as estimators of the losses in a table of fine-tuned configs, score them, and write the page."""
    if model_dir and text_train:
        shape = read_config(model_dir)[0]
        table, path = Table.read(setting, shape, trained=False), HERE / setting / "estimates.csv"
        path.parent.mkdir(exist_ok=True)
        (path.parent / "shape.json").write_text(json.dumps(plain(shape), indent=1) + "\n")
        done = {(row["estimator"], int(row["seed"])) for row in read_table(path)}
        for seed in range(seeds):
            for name in only or (*SUPERNETS, *SHORT, PAIRS):
                if (name, seed) in done or (seed and name in ("zero-shot", PAIRS)):
                    continue
                work = Estimating(table, model_dir, text_train, budget)
                folder = runs / setting / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
                if name == PAIRS:
                    found, tokens = work.pairs()
                elif name in SHORT:
                    found, tokens = work.short(SHORT[name], seed)
                else:
                    found, tokens = work.run(SUPERNETS[name], seed, folder)
                for suffix, losses in sorted(found.items(), reverse=True):
                    for config, loss in zip(table.configs, losses, strict=True):
                        row = (name + suffix, seed, tokens, config.hash, round(float(loss), 6))
                        append_row(path, ESTIMATES, dict(zip(ESTIMATES, row, strict=True)))
                click.echo(f"{name}, seed {seed}: {tokens:,} tokens")
    shapes = {path.parent.name: ModelShape(**json.loads(path.read_text())) for path in sorted(HERE.glob("*/shape.json"))}
    write_text(HERE / "README.md", page({name: Table.read(name, shape) for name, shape in shapes.items()}))
    click.echo(HERE / "README.md")


if __name__ == "__main__":
    main()
