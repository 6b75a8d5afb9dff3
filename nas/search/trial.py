"""What a search is asked to do: a trial's YAML file, validated once.

Owns `Trial` and its parts that no lower room owns. A resolved trial (`to_data`) names no other file but the text's, and loading
it again gives an equal trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from ..config import Document, Ge, OneOf, PositiveInt, Strict, build, parse_bytes, plain, read_yaml
from ..data import DataSpec
from ..errors import UserError, did_you_mean
from ..export import read_config
from ..sharing.memory import MemorySpec
from ..sharing.space import LIMITS, SearchSpace
from ..splitting import SplitSpec
from ..tracking import TrackingSpec
from ..training.evaluation import Weights
from ..training.loop import TrainSpec
from ..training.strategies import STRATEGIES
from ..workers import EarlyStopping, RunSpec

SAMPLERS = {
    "tpe": "TPE: the best front of some hundred evaluations",
    "nsga2": "NSGA-II: thousands of evaluations, in no time",
    "nsga3": "NSGA-III",
    "evolution": "regularised evolution, from the published schemes on",
    "random": "random search, the baseline",
}


@dataclass(frozen=True)
class SupernetSpec(TrainSpec):
    """How the supernet is trained: a `TrainSpec`, the strategy that draws each step's subnets, and distillation from the
    largest, or from the checkpoint that the search is from. The dense-biased strategy, distilled, orders configs best
    (`reports/ranking`)."""

    strategy: Annotated[str, OneOf(STRATEGIES)] = "dense_biased"
    distill: bool = True


@dataclass(frozen=True)
class PredictorSpec(Strict):
    """What the search learns from, in place of a supernet: `configs` trained alone for `steps` (a quarter of the final ones,
    unless told), in `rounds`: first spread over the memory, then where the front is by what is known so far.

    More configs for a tenth of the steps each tell more on one text and much less on another (`reports/ranking`).
    """

    configs: Annotated[int, Ge(4)] = 24
    steps: PositiveInt | None = None
    rounds: PositiveInt = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds > self.configs // 4:
            message = f"{self.configs} configs are too few for {self.rounds} rounds"
            raise UserError(message, where="predictor.rounds", hint="learn from 4 configs a round, or more")


@dataclass(frozen=True)
class FinalSpec(TrainSpec):
    """How candidates and presets are trained, alike, each with `seeds` seeds; ASHA may stop the worst.

    From scratch; in a search from a checkpoint from the weights that they have of it, on its probabilities, or on the text alone
    if `distill` is false.
    """

    candidates: PositiveInt = 6
    seeds: PositiveInt = 1
    presets: bool = True
    early_stopping: EarlyStopping | None = None
    distill: bool | None = None


@dataclass(frozen=True)
class SearchSpec(Strict):
    """How configs are proposed: `batch` of them at a time (NSGA's population), all asked before any is told.

    With the published schemes asked first, TPE finds the best front from 48 evaluations on (`reports/samplers`).
    """

    evaluations: PositiveInt = 200
    sampler: Annotated[str, OneOf(SAMPLERS)] = "tpe"
    batch: PositiveInt = 24
    presets: bool = True


@dataclass(frozen=True)
class EvaluateSpec(Strict):
    """How many fixed evaluation windows are used: in the search, and for the models of the front."""

    windows: Annotated[int, Ge(2)] = 32
    final_windows: Annotated[int, Ge(2)] = 128


@dataclass(frozen=True)
class TrialFile(Strict):
    """A trial as its YAML file has it; `from` is the folder of a trained model that shares nothing.

    The search sees its configs by a predictor, which is the default, or on the weights of a `supernet`, if there is one. It is
    split only if there is a `split`, and then by gradient matching unless that says otherwise: no split orders configs better
    (`reports/ranking`).
    """

    name: str
    space: str | dict[str, Any]
    final: FinalSpec
    supernet: SupernetSpec | None = None
    predictor: PredictorSpec | None = None
    from_: str | None = None
    seed: int = 0
    data: DataSpec = field(default_factory=DataSpec)
    memory: MemorySpec = field(default_factory=MemorySpec)
    limits: dict[str, int | str] = field(default_factory=dict)
    split: SplitSpec | None = None
    search: SearchSpec = field(default_factory=SearchSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    run: RunSpec = field(default_factory=RunSpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)


@dataclass(frozen=True)
class Trial:
    """A valid trial: the file, its space with the trial's limits, and the folder that its paths are relative to."""

    file: TrialFile
    space: SearchSpace
    base: Path

    @staticmethod
    def load(path: Path, base: Path | None = None) -> Trial:
        """The trial in a YAML file; relative paths resolve against `base`, its folder by default. Raises UserError.

        A checkpoint is looked at only for a shape that the space does not name: a finished run does not need it any more.
        """
        document, base = read_yaml(path), base or path.parent
        file = _completed(build(TrialFile, document), document)
        return Trial(file, _limited(_space(file, document, base), file.limits, document), base)

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the model that the search is from."""
        return self.base / self.file.from_ if self.file.from_ else None

    @property
    def supernet(self) -> SupernetSpec:
        """The supernet's training; there is one, where there is no predictor."""
        assert self.file.supernet is not None
        return self.file.supernet

    @property
    def split(self) -> SplitSpec:
        """How the supernet is split, where there is one."""
        assert self.file.split is not None
        return self.file.split

    @property
    def predictor(self) -> PredictorSpec:
        """What is learnt from; there is something, where there is no supernet."""
        assert self.file.predictor is not None
        return self.file.predictor

    @property
    def lesson(self) -> TrainSpec:
        """How each config is trained that the predictor learns from: as the models of the front are, but for fewer steps."""
        spec = train_spec(self.file.final)
        return replace(spec, steps=self.predictor.steps or max(spec.steps // 4, 1))

    @property
    def distills(self) -> bool:
        """Whether the models of the front are trained on the checkpoint's probabilities."""
        return bool(self.file.from_) and self.file.final.distill is not False

    @property
    def weights(self) -> Weights:
        """Where the weights of the front's models are from."""
        if not self.file.from_:
            return "retrained"
        return "fine_tuned" if self.file.final.steps else "zero_shot"

    def to_data(self) -> dict[str, Any]:
        """Plain data of the whole trial: the space written out, limits in bytes, paths absolute."""
        data = plain(self.file)
        data["space"] = {"model": plain(self.space.shape), **_space_data(self), "limits": dict(self.space.limits)}
        data["limits"] = {}
        data["data"] |= {key: self._absolute(data["data"][key]) for key in ("text", "eval_text", "tokenizer")}
        data["from"] = self._absolute(data["from"])
        return data

    def _absolute(self, text: str | None) -> str | None:
        path = self.base / text if text else None
        return str(path.resolve()) if path and path.exists() and text not in ("python", "bytes", "bpe") else text


def train_spec(spec: TrainSpec) -> TrainSpec:
    """What a stage's settings say of the training itself."""
    return TrainSpec(**{name: getattr(spec, name) for name in TrainSpec.__dataclass_fields__})


def _completed(file: TrialFile, document: Document) -> TrialFile:
    """The file with what follows from the rest: what the search learns from and, of a checkpoint, its tokenizer.

    Raises UserError for what only goes with a checkpoint, or only without one.
    """
    file = _learning(file, document)
    if file.from_ is None:
        if file.final.steps < 1:
            where = document.where(("final", "steps"))
            raise UserError(f"{file.final.steps} is too few", where=where, hint="use 1 or more, or a checkpoint: `from: FOLDER`")
        if file.final.distill:
            where = document.where(("final", "distill"))
            raise UserError("there is no model to learn from", where=where, hint="name a checkpoint: `from: FOLDER`")
        return file
    if "tokenizer" in (document.data.get("data") or {}):
        return file
    return replace(file, data=replace(file.data, tokenizer=f"{file.from_}/tokenizer.json"))


def _learning(file: TrialFile, document: Document) -> TrialFile:
    """The file with what its search learns from: a supernet or a predictor, and never both. Raises UserError."""
    if file.predictor and (file.supernet or file.from_):
        where, message = document.where(("predictor",)), "a search has a predictor or a supernet, not both"
        if file.from_:
            message = "a predictor learns from models trained from scratch, and this search is from a checkpoint"
        raise UserError(message, where=where, hint="leave the predictor out")
    if file.supernet or file.from_:
        return replace(file, supernet=file.supernet or SupernetSpec(steps=0), split=file.split or SplitSpec("none"))
    if file.split:
        where, message = document.where(("split",)), "a search that learns a predictor has no supernet to split"
        raise UserError(message, where=where, hint="leave the split out, or name a supernet: `supernet: {steps: 600}`")
    return replace(file, predictor=file.predictor or PredictorSpec())


def _space_data(trial: Trial) -> dict[str, Any]:
    raw = trial.file.space
    return dict(raw) if isinstance(raw, dict) else dict(read_yaml(trial.base / raw).data)


def _space(file: TrialFile, document: Document, base: Path) -> SearchSpace:
    found = _space_document(file, document, base)
    named = isinstance(found.data, dict) and "model" in found.data
    if named or file.from_ is None:
        return SearchSpace.from_document(found)
    try:
        return SearchSpace.from_document(found, read_config(base / file.from_)[0])
    except UserError as error:
        raise error if error.where.startswith(found.name) else error.at(document.where(("from",))) from None


def _space_document(file: TrialFile, document: Document, base: Path) -> Document:
    if isinstance(file.space, dict):
        return document.inside("space")
    path = base / file.space
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml"))
        hint = did_you_mean(path.name, near) if near else "give the path of a space, relative to the trial"
        raise UserError(f"{file.space}: no such file", where=document.where(("space",)), hint=hint)
    return read_yaml(path)


def _limited(space: SearchSpace, limits: Mapping[str, int | str], document: Document) -> SearchSpace:
    for name in limits:
        if name not in LIMITS:
            where = document.where(("limits", name))
            raise UserError("unknown limit", where=where, hint=did_you_mean(name, LIMITS))
    given = {name: parse_bytes(value, document.where(("limits", name))) for name, value in limits.items()}
    tightest = {name: min(given.get(name, limit), limit) for name, limit in space.limits.items()}
    return replace(space, limits={**given, **tightest})
