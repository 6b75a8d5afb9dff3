"""What a search is asked to do: a trial's YAML file, validated once.

A resolved trial (`to_data`) names no other file but the text's, and loading it again gives an equal trial.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Document, build, plain, read_yaml
from ..data import CORPORA, TOKENIZERS
from ..errors import UserError, did_you_mean, shown
from ..export import read_config
from ..sharing.memory import MemorySpec
from ..sharing.objectives import OBJECTIVES, QUALITY, parse_limits, tighter
from ..sharing.shape import ModelShape
from ..sharing.space import SearchSpace
from ..splitting import SplitSpec
from ..training.evaluation import Weights
from ..training.loop import TrainSpec
from .trial_file import PredictorSpec, SupernetSpec, TrialFile, completed, from_checkpoint, train_spec, with_sampler


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
        file = completed(build(TrialFile, document), document)
        space = _limited(_space(file, document, base), file.limits, document)
        file = with_sampler(from_checkpoint(file, document, space.shape), document, space)
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


def require_lengths(lengths: Mapping[tuple[str, ...], int], document: Document, shape: ModelShape) -> None:
    """Raise UserError for a file's key whose tokens are more than a model's `max_position_embeddings`."""
    longest = shape.max_position_embeddings
    for key, tokens in lengths.items():
        if tokens > longest:
            message = f"{tokens} tokens are more than the model's max_position_embeddings={longest}"
            raise UserError(message, where=document.where(key), hint=f"use {longest} or less")


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
