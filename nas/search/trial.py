"""What a search is asked to do: a trial's YAML file, validated once.

Owns `Trial` and its parts that no lower room owns. A resolved trial (`to_data`) names no other file but the text's, and loading
it again gives an equal trial.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from ..config import Document, Ge, OneOf, PositiveInt, Seed, Strict, build, plain, read_yaml
from ..data import CORPORA, TOKENIZERS, DataSpec
from ..errors import UserError, did_you_mean, shown
from ..export import read_config
from ..sharing.memory import MemorySpec
from ..sharing.objectives import DEFAULT, OBJECTIVES, QUALITY, TASK, parse_limits, require_objectives, tighter
from ..sharing.shape import ModelShape
from ..sharing.space import SearchSpace
from ..splitting import SplitSpec
from ..tracking import TrackingSpec
from ..training.evaluation import Weights
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


@dataclass(frozen=True)
class Trial:
    """A valid trial: the file, its space with the trial's limits, and the folder that its paths are relative to."""

    file: TrialFile
    space: SearchSpace
    base: Path

    @staticmethod
    def load(path: Path, base: Path | None = None, settings: Sequence[str] = ()) -> Trial:
        """The trial in a YAML file, with `settings` of the command line in place of its own (`Document.with_settings`); relative
        paths resolve against `base`, its folder by default. Raises UserError.

        The base model is read only for a shape that the space does not name: a finished run does not need it any more.
        """
        document, base = read_trial(path, settings), base or path.parent
        document.require_complete()
        file = _completed(build(TrialFile, document), document)
        space = _limited(_space(file, document, base), file.limits, document)
        file = _with_sampler(_with_lengths(file, document, space.shape), document, space)
        trial = Trial(file, space, base)
        lengths: dict[tuple[str, ...], int] = {(key, "seq"): seq for key, seq in trial.lengths.items()}
        lengths[("memory", "context")] = trial.file.memory.context
        lengths |= {("other_memory", str(n), "context"): spec.context for n, spec in enumerate(trial.file.other_memory)}
        require_lengths(lengths, document, space.shape)
        measured = any(OBJECTIVES[name].measure for name in trial.objectives)
        if measured and trial.file.other_memory:
            message = "has fronts of objectives that follow from configs, and one of these is measured"
            hint = "leave out the other settings, or the objective"
            raise UserError(message, where=document.where(("other_memory",)), hint=hint)
        if measured and trial.file.search.sampler == "surrogate":
            message = "the surrogate proposes configs by objectives that follow from them, and one of these is measured"
            raise UserError(message, where=document.where(("search", "sampler")), hint="use tpe")
        return trial

    @property
    def base_model(self) -> Path | None:
        return self.base / self.file.from_ if self.file.from_ else None

    @property
    def tasks(self) -> list[Path]:
        return [self.base / name for name in self.file.final.tasks]

    @property
    def has_base_model(self) -> bool:
        """Whether the search starts from a dense model: one in a folder, or one that the run trains first."""
        return bool(self.file.from_ or self.file.dense)

    @property
    def trainings(self) -> dict[str, TrainSpec]:
        """The settings of trainings, by the stage's key."""
        specs = {"final": self.file.final, "supernet": self.file.supernet, "dense": self.file.dense}
        return {key: spec for key, spec in specs.items() if spec}

    @property
    def lengths(self) -> dict[str, int]:
        return {key: spec.seq for key, spec in self.trainings.items()}

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is minimised or maximised, perplexity the last."""
        return *(name for name in self.file.objectives if name != QUALITY), QUALITY

    @property
    def front_objectives(self) -> tuple[str, ...]:
        """Those of the fine-tuned front: the same, and the score that `final.objective` names."""
        score = self.file.final.objective
        return (*self.objectives[:-1], score, QUALITY) if score else self.objectives

    @property
    def memories(self) -> list[MemorySpec]:
        """Where memory is measured: the first steers the search, each has a front."""
        return [self.file.memory, *self.file.other_memory]

    @property
    def measured(self) -> tuple[str, ...]:
        """The objectives, and what else is limited, that are measured."""
        return tuple(name for name in dict.fromkeys((*self.objectives, *self.space.limits)) if OBJECTIVES[name].measure)

    @property
    def evaluator(self) -> str:
        return self.file.search.evaluator or ("predictor" if self.file.predictor else "supernet")

    @property
    def supernet(self) -> SupernetSpec:
        assert self.file.supernet is not None
        return self.file.supernet

    @property
    def split(self) -> SplitSpec:
        assert self.file.split is not None
        return self.file.split

    @property
    def predictor(self) -> PredictorSpec:
        assert self.file.predictor is not None
        return self.file.predictor

    @property
    def proxy_training(self) -> TrainSpec:
        """How each config is trained that the predictor is fitted to: as the models of the front are, but for fewer steps."""
        return replace(train_spec(self.file.final), steps=self.predictor.steps or max(self.file.final.steps // 4, 1))

    @property
    def distills(self) -> bool:
        """Whether the base model is the teacher of the models of the front."""
        return self.has_base_model and self.file.final.distill is not False

    @property
    def inherits(self) -> bool:
        """Whether the models of the front start from the weights that they were evaluated with."""
        return self.file.final.start == "inherited" if self.file.final.start else self.has_base_model

    @property
    def weights(self) -> Weights:
        if not self.inherits:
            return "retrained"
        return "fine_tuned" if self.file.final.steps else "zero_shot"

    @property
    def search_summary(self) -> str:
        if self.evaluator not in ("predictor", "supernet"):
            return f"evaluated by {self.evaluator}"
        if self.evaluator == "predictor":
            return f"predicted from {self.predictor.configs} trained for {self.proxy_training.tokens:,} tokens each"
        if self.has_base_model and not self.supernet.steps:
            return "on the base model's own weights"
        trained = f"on a supernet of {self.supernet.steps} steps by the {self.supernet.strategy} strategy"
        return trained if self.split.method == "none" else f"{trained}, split by {self.split.method}"

    @property
    def final_summary(self) -> str:
        kind = self.weights.replace("_", "-")
        if not self.file.final.steps:
            return f"measured as they are, {kind}"
        teacher = " on the base model's probabilities" if self.distills else ""
        each = "each" if self.file.final.allocation == "equal" else "on average, by what each loses,"
        return f"{kind} for {self.file.final.tokens:,} tokens {each}{teacher}"

    def extended(self, evaluations: int | str | None, candidates: int | str | None) -> Trial:
        """The trial with more evaluations and candidates: `+200` adds so many, `400` is the number in all. Raises UserError."""
        search, final = self.file.search, self.file.final
        given = (("evaluations", evaluations, search.evaluations), ("candidates", candidates, final.candidates))
        more, chosen = (_grown(*each) for each in given)
        if (more, chosen) == (search.evaluations, final.candidates):
            hint = "give more: --evaluations +200, --candidates +4"
            raise UserError(f"the run has {more} evaluations and {chosen} candidates", where=self.file.name, hint=hint)
        search = replace(search, evaluations=more, began_with=search.planned)
        return replace(self, file=replace(self.file, search=search, final=replace(final, candidates=chosen)))

    def to_data(self) -> dict[str, Any]:
        """Plain data of the whole trial: the space written out, limits in bytes, paths absolute."""
        data = plain(self.file)
        limits = {name: limit if isinstance(limit, int) else str(limit) for name, limit in self.space.limits.items()}
        space = self.file.space if isinstance(self.file.space, dict) else read_yaml(self.base / self.file.space).data
        data["space"] = {"model": plain(self.space.shape), **space, "limits": limits}
        data["limits"] = {}
        data["data"] |= {key: self._absolute(data["data"][key]) for key in ("text", "eval_text", "test_text", "tokenizer")}
        data["from"] = self._absolute(data["from"])
        data["final"]["tasks"] = [self._absolute(name) for name in data["final"]["tasks"]]
        return data

    def _absolute(self, text: str | None) -> str | None:
        path = self.base / text if text else None
        return str(path.resolve()) if path and path.exists() and text not in NAMED else text


def _grown(name: str, given: int | str | None, had: int) -> int:
    """What a number of the trial's becomes. Raises UserError for what is none, and for less than there is."""
    match = re.fullmatch(r"(\+?)(\d{1,9})", str(had if given is None else given))
    if not match:
        raise UserError(f"{shown(repr(given))} is no number", where=f"--{name}", hint="write +200, or 400 for so many in all")
    number = int(match[2]) + (had if match[1] else 0)
    if number < had:
        hint = "what was measured is kept; give more"
        raise UserError(f"the run has {had} {name} already", where=f"--{name} {given}", hint=hint)
    return number


PATHS = ("from", "space", "data.text", "data.eval_text", "data.test_text", "data.tokenizer")  # the keys that hold paths
NAMED = (*CORPORA, *TOKENIZERS)  # their values that are no paths


def read_trial(path: Path, settings: Sequence[str] = ()) -> Document:
    """A trial's file with the command line's settings, whose paths are relative to the working directory. Raises UserError."""
    found = []
    for setting in settings:
        key, _, value = setting.partition("=")
        named = key in PATHS and value not in NAMED and Path(value).exists()
        found.append(f"{key}={Path(value).resolve()}" if named else setting)
    return _with_one_memory(read_yaml(path).with_settings(found))


def _with_one_memory(document: Document) -> Document:
    """A trial's file with a list of `memory` settings as the first and `other_memory`."""
    data = document.data
    settings = data.get("memory") if isinstance(data, dict) else None
    if not isinstance(settings, list) or "other_memory" in data:
        return document
    if not settings:
        raise UserError("names no setting", where=document.where(("memory",)), hint="such as [{context: 1024}]")
    return _MemoryList(data | {"memory": settings[0], "other_memory": settings[1:]}, document.name, document.lines)


class _MemoryList(Document):
    """A trial with a list of memory settings, whose entries have their places in the list."""

    def where(self, path: tuple[Hashable, ...]) -> str:
        if path[:1] == ("memory",) and len(path) > 1:
            path = ("memory", "0", *path[1:])
        if path[:1] == ("other_memory",):
            path = ("memory", *(int(str(n)) + 1 for n in path[1:2]), *path[2:])
        return super().where(path)


SEQ = 1024
"""Tokens a sequence from a checkpoint, where none are given and the model can have as many: with 128 a model that was trained on
longer ones is measured by its first tokens, which it predicts worst."""


def _with_lengths(file: TrialFile, document: Document, shape: ModelShape) -> TrialFile:
    """The file with sequences as long as the base model's, or `SEQ`, where it names no length."""

    def long(section: str) -> dict[str, Any]:
        return {} if _gives(document, section, "seq") else {"seq": min(SEQ, shape.max_position_embeddings)}

    if file.from_ is None:
        return file
    supernet = replace(file.supernet, **long("supernet")) if file.supernet else None
    return replace(file, final=replace(file.final, **long("final")), supernet=supernet)


def require_lengths(lengths: Mapping[tuple[str, ...], int], document: Document, shape: ModelShape) -> None:
    """Raise UserError for a file's key whose tokens are more than a model's `max_position_embeddings`."""
    longest = shape.max_position_embeddings
    for key, tokens in lengths.items():
        if tokens > longest:
            message = f"{tokens} tokens are more than the model's max_position_embeddings={longest}"
            raise UserError(message, where=document.where(key), hint=f"use {longest} or less")


def train_spec(spec: TrainSpec) -> TrainSpec:
    """The training itself of a stage's settings: workers need no module of the search to read it."""
    return TrainSpec(**{f.name: getattr(spec, f.name) for f in fields(TrainSpec)})


def _completed(file: TrialFile, document: Document) -> TrialFile:
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


def _with_sampler(file: TrialFile, document: Document, space: SearchSpace) -> TrialFile:
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
    given = parse_limits(limits, lambda name: document.where(("limits", name)))
    tightest = {name: tighter(name, given.get(name, limit), limit) for name, limit in space.limits.items()}
    return replace(space, limits={**given, **tightest})
