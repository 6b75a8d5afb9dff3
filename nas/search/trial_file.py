"""A trial's YAML file: its sections, and what follows for the keys that it leaves open.

Owns the sections that no lower room owns. `nas.search.trial` reads the file with its space.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from ..config import Document, Ge, OneOf, PositiveInt, Seed, Strict
from ..data import DataSpec
from ..errors import UserError, shown
from ..sharing.memory import MemorySpec
from ..sharing.objectives import DEFAULT, OBJECTIVES, TASK, require_objectives
from ..sharing.shape import ModelShape
from ..sharing.space import SearchSpace
from ..splitting import SplitSpec
from ..tracking import TrackingSpec
from ..training.loop import TrainSpec
from ..training.strategies import STRATEGIES
from ..workers import RunSpec
from .samplers import SAMPLERS


def require_name(name: str, where: str = "name") -> None:
    """Raise UserError for a run's name that is no folder below the runs, such as `..`."""
    if name.startswith("~") or any(part in ("", ".", "..") or "\0" in part for part in name.split("/")):
        raise UserError(f"{shown(repr(name))} names no run", where=where, hint="use letters and digits, such as team/first")


@dataclass(frozen=True)
class SupernetSpec(TrainSpec):
    """How the supernet is trained: a `TrainSpec`, the strategy that draws each step's subnets, and whether the teacher is the
    largest subnet (in a search from a base model, the base model).

    From scratch the dense-biased strategy with distillation orders configs best (`reports/ranking`). From a base model
    `near_front` is the default: candidates that start from its weights have the best front (`reports/supernet_fronts`).
    """

    strategy: Annotated[str, OneOf(STRATEGIES)] = "dense_biased"
    distill: bool = True


@dataclass(frozen=True)
class PredictorSpec(Strict):
    """The proxy trainings that a predictor is fitted to: `configs` of them for `steps` each (by default a quarter of the final
    steps), in `rounds`. The first round is spread over the memory, later ones are where the front is predicted to be.

    More configs for a tenth of the steps each predict better on one text and much worse on another (`reports/ranking`).
    """

    configs: Annotated[int, Ge(4)] = 24
    steps: PositiveInt | None = None
    rounds: PositiveInt = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds > self.configs // 4:
            message = f"{self.configs} configs are too few for {self.rounds} rounds"
            raise UserError(message, where="predictor.rounds", hint="use 4 configs a round, or more")


@dataclass(frozen=True)
class EarlyStopping(Strict):
    """Successive halving by fronts of memory and validation loss.

    At steps `grace`, `grace * reduction`, … all trainings pause. The first fronts of memory and loss go on, each whole,
    until they are `1 / reduction` of the configs or more. So no config is stopped that is best for its memory.
    """

    grace: PositiveInt
    reduction: Annotated[int, Ge(2)] = 3

    def pauses(self, steps: int) -> list[int]:
        """The steps at which trainings of so many pause."""
        found, at = list[int](), self.grace
        while at < steps:
            found.append(at)
            at *= self.reduction
        return found


@dataclass(frozen=True)
class FinalSpec(TrainSpec):
    """How candidates, presets and, if asked for, the base model's `conversions` are trained, all alike, each with `seeds` seeds;
    early stopping may stop the worst.

    With `start: inherited`, the default of a search from a base model, each starts from the weights that it was evaluated with;
    with `scratch` from random ones. A base model is their teacher unless `distill` is false. `tasks` are files of lm-eval, on
    which the models of the front are scored, and `objective` is a score, `task.NAME.METRIC`, that the front has as an objective
    beside the search's two.

    `allocation: by_loss` divides the steps of all models by the square root of what each lost in the search, so that those that
    share more are trained longer. The default `equal` trains all alike, as a comparison of schemes must.
    """

    candidates: PositiveInt = 6
    seeds: PositiveInt = 1
    presets: bool = True
    conversions: bool = False
    early_stopping: EarlyStopping | None = None
    distill: bool | None = None
    allocation: Annotated[str, OneOf(("equal", "by_loss"))] = "equal"
    start: Annotated[str, OneOf(("inherited", "scratch"))] | None = None
    tasks: list[str] = field(default_factory=list)
    objective: str | None = None


@dataclass(frozen=True)
class SearchSpec(Strict):
    """How configs are proposed, `batch` of them at a time (NSGA's population), and evaluated.

    `evaluator` is a row of `nas.search.evaluators.EVALUATORS`; by default `predictor` or `supernet`, by the trial's keys. The
    default of `sampler` is `default_sampler`'s. What is planned ahead, proxy trainings and single decisions, is planned for
    `began_with` evaluations.
    """

    evaluations: PositiveInt = 200
    sampler: Annotated[str, OneOf(SAMPLERS)] = "tpe"
    batch: PositiveInt = 24
    presets: bool = True
    evaluator: str | None = None
    began_with: PositiveInt | None = None

    @property
    def planned(self) -> int:
        """The evaluations of the search as it began, before it was extended."""
        return self.began_with or self.evaluations


@dataclass(frozen=True)
class EvaluateSpec(Strict):
    """Number of fixed evaluation windows: of the validation text in the search, and of the validation and of the test text for
    the models of the front; and how many tokens of the training text conversions of a base model choose by."""

    windows: Annotated[int, Ge(2)] = 32
    final_windows: Annotated[int, Ge(2)] = 128
    calibration: PositiveInt = 4096


@dataclass(frozen=True)
class TrialFile(Strict):
    """A trial as its YAML file has it; `from` is the folder of the base model, a trained model that shares nothing. With `dense`
    the run trains that model itself, first.

    Configs are evaluated by a predictor, the default, or on the weights of a `supernet`, if there is one. The supernet is split
    only if there is a `split`, by gradient matching unless that says otherwise: no split orders configs better
    (`reports/ranking`).
    """

    name: str
    space: str | dict[str, Any]
    final: FinalSpec
    supernet: SupernetSpec | None = None
    predictor: PredictorSpec | None = None
    from_: str | None = None
    dense: TrainSpec | None = None
    seed: Seed = 0
    data: DataSpec = field(default_factory=DataSpec)
    memory: MemorySpec = field(default_factory=MemorySpec)
    other_memory: list[MemorySpec] = field(default_factory=list)
    objectives: list[str] = field(default_factory=lambda: list(DEFAULT))
    limits: dict[str, int | str] = field(default_factory=dict)
    split: SplitSpec | None = None
    search: SearchSpec = field(default_factory=SearchSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    run: RunSpec = field(default_factory=RunSpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_name(self.name)
        require_objectives(self.objectives)
        if self.final.objective:
            self._require_score(self.final.objective)
        for n, spec in enumerate(self.other_memory):
            if spec.dtype != self.memory.dtype or spec in (self.memory, *self.other_memory[:n]):
                message, where = "differs from the first setting in context and batch alone", f"other_memory.{n}"
                raise UserError(f"{spec.words}, {spec.dtype}: another setting {message}", where=where, hint="change those")

    def _require_score(self, name: str) -> None:
        """Raise UserError unless the front can have a score as its third objective."""
        where = "final.objective"
        if not name.startswith(TASK):
            raise UserError(f"{shown(repr(name))} is no task's score", where=where, hint=f"write it as {TASK}NAME.METRIC")
        if not self.final.tasks:
            raise UserError("there is no task to score models on", where=where, hint="name task files in `final.tasks`")
        if len(self.objectives) > 2:
            raise UserError("would be a fourth objective", where=where, hint="give two in `objectives`")


def train_spec(spec: TrainSpec) -> TrainSpec:
    """The training itself of a stage's settings: workers need no module of the search to read it."""
    return TrainSpec(**{f.name: getattr(spec, f.name) for f in fields(TrainSpec)})


def completed(file: TrialFile, document: Document) -> TrialFile:
    """The file with what follows from the rest: the evaluator and, of a base model, the tokenizer. Raises UserError for keys
    that exclude one another."""

    def wrong(message: str, hint: str, *key: str) -> UserError:
        return UserError(message, where=document.where(key), hint=hint)

    if file.dense and file.from_:
        raise wrong("a search has one base model: that of `from`, or one that it trains", "leave one of them out", "dense")
    if file.dense and file.dense.steps < 1:
        raise wrong(f"{file.dense.steps} is too few", "use 1 or more", "dense", "steps")
    based = bool(file.from_ or file.dense)
    if file.predictor and file.supernet and not based:
        raise wrong("a search from scratch has a predictor or a supernet", "leave the predictor out", "predictor")
    if file.supernet or based:
        file = replace(file, supernet=file.supernet or SupernetSpec(steps=0), split=file.split or SplitSpec("none"))
    elif file.split:
        hint = "leave the split out, or name a supernet: `supernet: {steps: 600}`"
        raise wrong("a search by a predictor has no supernet to split", hint, "split")
    else:
        file = replace(file, predictor=file.predictor or PredictorSpec())
    name_one = "a base model: `from: FOLDER`, or `dense: {steps: 1000}`"
    if file.final.start == "inherited" and not (file.supernet or based):
        raise wrong("a predictor has no weights to start from", f"name a supernet, or {name_one}", "final", "start")
    if file.final.steps < 1 and (file.final.start == "scratch" or not based):
        hint = "use 1 or more" + ("" if based else f", or {name_one}")
        raise wrong(f"{file.final.steps} is too few", hint, "final", "steps")
    if not based:
        if file.final.distill:
            raise wrong("there is no teacher", f"name {name_one}", "final", "distill")
        if file.final.conversions:
            raise wrong("there is no model to convert", f"name {name_one}", "final", "conversions")
    if file.final.allocation != "equal":
        if file.final.early_stopping:
            raise wrong("early stopping compares trainings of equal steps", "leave one of them out", "final", "allocation")
        if not based:
            raise wrong("steps are divided by what is lost against a base model", f"name {name_one}", "final", "allocation")
    if based and file.from_ and not _gives(document, "data", "tokenizer"):
        file = replace(file, data=replace(file.data, tokenizer=f"{file.from_}/tokenizer.json"))
    return _near_front(file, document) if based else file


def _gives(document: Document, section: str, key: str) -> bool:
    """Whether a file has a key in a section."""
    return key in ((document.data or {}).get(section) or {})


def _near_front(file: TrialFile, document: Document) -> TrialFile:
    """The file of a search from a base model: where it does not say otherwise, its supernet and its split draw configs near the
    front. A uniform draw shares so much at once that no front holds it (`reports/deep_samplers`)."""
    supernet, split = file.supernet, file.split
    assert supernet is not None
    assert split is not None
    if not _gives(document, "supernet", "strategy"):
        file = replace(file, supernet=replace(supernet, strategy="near_front"))
    if not _gives(document, "split", "configs"):
        file = replace(file, split=replace(split, configs="near_front"))
    return file


TPE_HOLDS = 10_000
"""The decisions times the evaluations up to which TPE is a default: a batch of 24 configs takes it some 0.25 s for each thousand
of them (`reports/scale.md`)."""


def with_sampler(file: TrialFile, document: Document, space: SearchSpace) -> TrialFile:
    """The file with the sampler that its space and evaluations are for, where it names none."""
    if _gives(document, "search", "sampler"):
        return file
    measured = any(OBJECTIVES[name].measure for name in file.objectives)
    decisions = sum(len(options) > 1 for options in space.options.values())
    sampler = default_sampler(decisions * file.search.evaluations, bool(file.from_ or file.dense), not file.supernet, measured)
    return replace(file, search=replace(file.search, sampler=sampler))


def default_sampler(size: int, based: bool, predicted: bool, measured: bool) -> str:
    """The sampler of a search of `size` decisions times evaluations that names none.

    The surrogate finds the best fronts from a base model (`reports/deep_samplers`) and by predicted losses (`reports/samplers`).
    It takes no objective that is `measured`, and was not tried on a supernet from scratch, whose losses do not grow with what is
    shared, as it supposes: there TPE is next, and NSGA-II beyond `TPE_HOLDS`.
    """
    if (based or predicted) and not measured:
        return "surrogate"
    return "nsga2" if size > TPE_HOLDS else "tpe"


SEQ = 1024
"""Tokens a sequence from a checkpoint, where none are given and the model can have as many: with 128 a model that was trained on
longer ones is measured by its first tokens, which it predicts worst."""


RATE = 3e-4
"""The learning rate of trainings from a checkpoint, where none is given: the best of four for SmolLM2-135M
(`reports/fine_tuned`). A model of width 64 likes more."""


def from_checkpoint(file: TrialFile, document: Document, shape: ModelShape) -> TrialFile:
    """The file of a search from a checkpoint: where it does not say otherwise, its sequences have `SEQ` tokens, or as many as the
    model can have, and its learning rate is `RATE`."""

    def usual(section: str) -> dict[str, Any]:
        found = {"seq": min(SEQ, shape.max_position_embeddings), "learning_rate": RATE}
        return {key: value for key, value in found.items() if not _gives(document, section, key)}

    if file.from_ is None:
        return file
    supernet = replace(file.supernet, **usual("supernet")) if file.supernet else None
    return replace(file, final=replace(file.final, **usual("final")), supernet=supernet)
