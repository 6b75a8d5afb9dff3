"""The package from Python: searches, their fronts, models and schemes, for scripts and notebooks.

Owns no work of its own: every function is one call of the room that does it. `import nas` gives the functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .presets import preset
from .sharing.memory import MemorySpec
from .sharing.shape import ModelShape
from .sharing.sharing_config import SharingConfig

if TYPE_CHECKING:
    from pandas import DataFrame

    from .model.decoder import Decoder
    from .search.front import Front
    from .search.progress import Progress
    from .search.run import Run
    from .training.evaluation import Evaluation

__all__ = ["Drawing", "FoundModel", "FrontModels", "ModelShape", "SearchRun", "SharingConfig"]
__all__ += ["draw", "front_of", "load", "open_run", "preset", "resume", "run_search"]


def run_search(
    trial: str | Path,
    runs: str | Path = "runs",
    *,
    name: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    address: str | None = None,
    settings: Sequence[str] = (),
    progress: Progress | None = None,
) -> SearchRun:
    """Do the search of a trial's file, from start to front, as `nas search` does; its options have the same meaning.

    `settings` are `KEY=VALUE`, in place of the trial's own. Without `progress` nothing is shown. Raises `nas.errors.UserError`
    before anything is written, `nas.errors.RunFailed` after.
    """
    from .search.launch import Launch, start
    from .search.progress import Silent

    launch = Launch(Path(trial), Path(runs), name, address, workers, overwrite, tuple(settings))
    return SearchRun(start(launch, progress or Silent())[0])


def resume(
    run: str,
    runs: str | Path = "runs",
    *,
    address: str | None = None,
    workers: int | None = None,
    tracking: str | None = None,
    progress: Progress | None = None,
) -> SearchRun:
    """Go on with a run, by its name or folder, as `nas resume` does. Raises as `run_search` does."""
    from .search.launch import resume as go_on
    from .search.progress import Silent

    found = open_run(run, runs)
    go_on(found.run, progress or Silent(), address, workers, tracking)
    return found


def open_run(run: str, runs: str | Path = "runs") -> SearchRun:
    """A run by its name or folder. Raises UserError for what is none."""
    from .search.run import Run

    return SearchRun(Run.find(run, Path(runs)))


def front_of(*names: str, runs: str | Path = "runs") -> FrontModels:
    """One front of several finished runs, by their names or folders, as `nas front A B C` shows it; each model knows its run.
    Raises UserError for runs that cannot be compared."""
    from .search.fronts import Fronts

    if len(names) == 1:
        return open_run(names[0], runs).front
    found = Fronts.of([open_run(name, runs).run for name in names])
    return FrontModels(found.runs, found.front)


def load(directory: str | Path, seed: int = 0) -> Decoder:
    """The model in a folder that `nas export` wrote: a `torch.nn.Module` in which each shared weight is one Parameter.

    `model(tokens)` gives logits `(batch, seq, vocab)` of tokens `(batch, seq)`; `model.shape` and `model.plan` say what it is.
    From a folder with weights it is the trained one, in their dtype; from a `config` folder a new one in float32, initialised
    from `seed` as the search does. Raises `nas.errors.UserError` (a ValueError) in one line for a folder that is none of these.
    """
    from .export.load import load_model

    return load_model(Path(directory), seed)


def draw(config: SharingConfig, shape: ModelShape, memory: MemorySpec | None = None, name: str = "") -> Drawing:
    """The picture of who shares what, with bytes by part where `memory` says; a notebook shows it."""
    from .report.sharing import sharing_svg

    return Drawing(sharing_svg(shape, config, memory, name))


@dataclass(frozen=True)
class Drawing:
    """An SVG picture."""

    svg: str

    def _repr_html_(self) -> str:
        return self.svg


@dataclass(frozen=True)
class SearchRun:
    """A run's folder: what its search evaluated, and the front."""

    run: Run

    @property
    def folder(self) -> Path:
        """Where everything of it lies."""
        return self.run.folder

    def extend(
        self,
        evaluations: int | str | None = None,
        candidates: int | str | None = None,
        *,
        address: str | None = None,
        workers: int | None = None,
        tracking: str | None = None,
        progress: Progress | None = None,
    ) -> SearchRun:
        """Go on to more evaluations and candidates, as `nas extend` does: `"+200"` are so many more, 400 the number in all.
        Raises as `run_search` does."""
        from .search.launch import extend
        from .search.progress import Silent

        extend(self.run, progress or Silent(), evaluations, candidates, address, workers, tracking)
        return self

    @property
    def shape(self) -> ModelShape:
        """Of its models."""
        return self.run.trial().space.shape

    @property
    def evaluations(self) -> list[Evaluation]:
        """Of the search, by their numbers; not the front's."""
        return self.run.searched()

    @property
    def frame(self) -> DataFrame:
        """The evaluations of the search as a table, with the columns of `evaluations.csv`."""
        return _frame(self.evaluations)

    @property
    def front(self) -> FrontModels:
        """The models that were trained alike. Raises UserError if the run has not come so far."""
        return FrontModels({"": self.run}, self.run.front())

    def __repr__(self) -> str:
        return f"SearchRun({str(self.folder)!r})"


@dataclass(frozen=True)
class FrontModels:
    """The models of finished runs that no other dominates, by ascending memory; `all` has the dominated ones, too.

    `runs` are by the names that the models have in `Evaluation.run`, which is empty where there is one run.
    """

    runs: Mapping[str, Run]
    found: Front

    def __iter__(self) -> Iterator[FoundModel]:
        return (self._model(min(m.evaluations, key=lambda e: e.point)) for m in self.found.members)

    def __len__(self) -> int:
        return len(self.found.members)

    @property
    def all(self) -> list[FoundModel]:
        """Every model that was trained, presets among them; one for each seed."""
        return [*map(self._model, self.found.evaluations)]

    def pick(self, pick: str) -> FoundModel:
        """A model by what `nas export --pick` takes: `knee`, `lowest-perplexity`, `max-memory=300MiB`, a preset, a label, a hash.
        Raises UserError."""
        return self._model(self.found.pick(pick))

    def _model(self, evaluation: Evaluation) -> FoundModel:
        return FoundModel(self.runs[evaluation.run], evaluation)

    @property
    def frame(self) -> DataFrame:
        """Every model that was trained as a table, unrounded: a row for each seed, its label as the index."""
        return _frame(self.found.evaluations)

    def __repr__(self) -> str:
        from .report.tables import front_table, markdown_table

        return markdown_table(front_table(self.found.evaluations))

    def _repr_html_(self) -> str:
        from pandas import DataFrame

        from .report.tables import front_table

        return str(DataFrame(front_table(self.found.evaluations)).to_html(index=False))


def _frame(evaluations: Sequence[Evaluation]) -> DataFrame:
    from io import StringIO

    from pandas import read_csv

    from .report.tables import front_csv

    text = StringIO(front_csv(evaluations))
    return read_csv(
        text, index_col="label", dtype={"hash": str}, keep_default_na=False, na_values=[""], float_precision="round_trip"
    )


@dataclass(frozen=True)
class FoundModel:
    """A model of a run's front."""

    run: Run
    evaluation: Evaluation

    @property
    def config(self) -> SharingConfig:
        """What its layers share."""
        return self.evaluation.config

    @property
    def figures(self) -> dict[str, Any]:
        """Bytes, perplexity and what else was measured, by names that carry their units."""
        return {name: value for name, value in self.evaluation.to_data().items() if name != "config"}

    def load(self) -> Decoder:
        """The trained model, in float32."""
        from .search.jobs import read_model

        return read_model(self.run.trial().space.shape, self.config, self.run.weights(self.evaluation))

    def draw(self) -> Drawing:
        """Who shares what."""
        trial = self.run.trial()
        return draw(self.config, trial.space.shape, trial.file.memory, self.evaluation.label)

    def export(self, directory: str | Path, format: str = "hf", overwrite: bool = False) -> Path:
        """Write its config's model, of several seeds the best by validation, as a folder that a trainer loads; returns the
        folder. Raises UserError."""
        from .search.publish import export_run

        export_run(self.run, self.config.hash, Path(directory), format, overwrite)
        return Path(directory)

    def _repr_html_(self) -> str:
        return self.draw().svg
