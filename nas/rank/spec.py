"""What a ground truth is: the file that says which configs are trained alone, how, on which texts, and how often.

Owns `TruthFile` and the choice of configs. How they are trained is `truth`'s.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Document, Strict, build, read_yaml
from ..data import Corpus, DataSpec, eval_windows, load_corpus
from ..errors import UserError, did_you_mean
from ..search.context import published
from ..search.predicted import by_bins, in_turns
from ..sharing.memory import MemorySpec
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..training.loop import TrainSpec
from ..workers import RunSpec

DRAWS = 4_000
"""Configs drawn evenly, of which each bin of memory takes its share."""


@dataclass(frozen=True)
class TruthFile(Strict):
    """A ground truth as its YAML file has it.

    `configs` are drawn at random, as many from each of `bins` bins of memory (equal in ratio), besides every preset that the
    space can express. Each is trained alone with each of `seeds` seeds on each of `texts`, and evaluated on `windows` windows
    at `points` (fractions of the steps, ascending, the last 1), each time with its weights averaged over the last `average` of
    the steps so far.
    """

    name: str
    space: str
    train: TrainSpec
    texts: dict[str, DataSpec]
    configs: int = 32
    bins: int = 8
    seeds: int = 4
    points: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    average: float = 0.2
    windows: int = 256
    seed: int = 0
    memory: MemorySpec = field(default_factory=MemorySpec)
    run: RunSpec = field(default_factory=RunSpec)

    def __post_init__(self) -> None:
        for name, least in {"configs": 1, "bins": 1, "seeds": 2, "windows": 2}.items():
            if getattr(self, name) < least:
                raise UserError(f"{getattr(self, name)} is too few", where=name, hint=f"use {least} or more")
        if not self.texts:
            raise UserError("names no text", where="texts", hint="write texts: {python: {text: python}}")
        points = self.points
        if not points or points != sorted(set(points)) or points[0] <= 0 or points[-1] != 1:
            raise UserError(f"{points} do not ascend to 1", where="points", hint="use fractions such as [0.25, 0.5, 1.0]")
        if not 0 < self.average <= 1:
            raise UserError(f"{self.average} is no part of a training", where="average", hint="use a fraction, such as 0.2")
        if self.train.lr_decay_fraction:
            message = "a rate that falls makes the points before the last no trainings of their own"
            raise UserError(message, where="train.lr_decay_fraction", hint="write lr_decay_fraction: 0")

    @property
    def steps(self) -> list[int]:
        """The steps after which a training is evaluated, ascending."""
        return [max(round(point * self.train.steps), 1) for point in self.points]


@dataclass(frozen=True)
class TruthPlan:
    """A ground truth that can be carried out: its configs in the order in which they are trained, with a preset's name or ``.

    `texts` are those that are asked for; `corpora` has them, or is empty where nothing is to be trained.
    """

    file: TruthFile
    space: SearchSpace
    configs: Mapping[SharingConfig, str]
    texts: Sequence[str]
    corpora: Mapping[str, Corpus]

    @staticmethod
    def load(path: Path, only: Collection[str] = (), at: Mapping[str, str] | None = None, train: bool = True) -> TruthPlan:
        """The truth in a YAML file, with all its texts, or `only` some; `at` gives the paths of texts that lie elsewhere.

        Without `train` no text is looked at. Raises UserError.
        """
        document = read_yaml(path)
        file, space = read_file(document, path.parent)
        texts = asked_for(document, file.texts, only, at or {})
        corpora = load_texts(document, texts, space.shape.vocab_size, at or {}) if train else {}
        for corpus in corpora.values():
            for tokens in (corpus.eval, corpus.train):
                eval_windows(tokens, file.train.seq, 1)
        return TruthPlan(file, space, drawn(file, space), list(texts), corpora)

    def at(self, workers: int | None, address: str | None) -> TruthPlan:
        """The same, run with so many workers, or on that cluster."""
        run = self.file.run
        run = replace(run, workers=workers or run.workers, address=address or run.address)
        return replace(self, file=replace(self.file, run=run))


def asked_for(
    document: Document, texts: Mapping[str, DataSpec], only: Collection[str], at: Collection[str]
) -> dict[str, DataSpec]:
    """Of a file's texts `only` some, or all. Raises UserError for a text, there or in `at`, that it does not have."""
    for name in (*only, *at):
        if name not in texts:
            message, where = f"no text is called {name}", document.where(("texts",))
            raise UserError(message, where=where, hint=did_you_mean(name, texts))
    return {name: spec for name, spec in texts.items() if not only or name in only}


def load_texts(document: Document, texts: Mapping[str, DataSpec], vocab_size: int, at: Mapping[str, str]) -> dict[str, Corpus]:
    """Texts that a file names, relative to the file; `at` says where those lie that lie elsewhere, each with its evaluation text
    beside it. Raises UserError."""
    corpora = {}
    for name, spec in texts.items():
        here = Path(document.name).parent
        if name in at:
            beside = spec.eval_text and str(Path(at[name]).parent / spec.eval_text)
            here, spec = Path(), replace(spec, text=at[name], eval_text=beside)
        try:
            corpora[name] = load_corpus(spec, vocab_size, here)
        except UserError as error:
            raise UserError(error.message, where=document.where(("texts", name)), hint=error.hint) from None
    return corpora


def read_file(document: Document, base: Path) -> tuple[TruthFile, SearchSpace]:
    """A truth's file, and its space; its texts are not looked at. Raises UserError."""
    file = build(TruthFile, document)
    return file, SearchSpace.load(base / file.space)


def drawn(file: TruthFile, space: SearchSpace) -> dict[SharingConfig, str]:
    """The configs to be known, presets and random ones in turns; random ones from the bins in turns.

    So any first part of them is spread over the memory as the whole is.
    """
    rng = random.Random(file.seed)
    named = published(space)
    found = dict.fromkeys(space.sample(rng) for _ in range(DRAWS))
    chosen = [config for config in by_bins(space, file.memory, found, file.bins) if config not in named][: file.configs]
    listed = list(named)
    rng.shuffle(listed)
    return {config: named.get(config, "") for config in in_turns(chosen, listed)}
