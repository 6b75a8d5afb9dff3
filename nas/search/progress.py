"""What a run says while it works, without knowing who listens.

Owns the protocol and the counting of steps; the terminal's display is the command line's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Stage(Protocol):
    """A stage that is under way."""

    def update(self, done: int, note: str = "") -> None:
        """So many units are done; `note` is the best so far, in words."""


class Progress(Protocol):
    """Where stages are shown."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Stage]:
        """Begin a stage of `total` units; it ends with the context."""

    def say(self, text: str) -> None:
        """Show a line."""


class StepCount:
    """Updates a stage by the steps of several trainings at once, as an executor's `Report`.

    `steps` has each training's number of steps, by its key; `done` the keys of those that are finished already.
    """

    def __init__(self, stage: Stage, steps: Mapping[str, int], done: Collection[str]) -> None:
        self.stage, self.steps = stage, steps
        self.done = {key: steps[key] for key in done}
        stage.update(sum(self.done.values()))

    def __call__(self, key: str, latest: Mapping[str, Any]) -> None:
        """See `nas.workers.executor.Report`."""
        if "step" in latest:
            self.done[key] = self.steps[key] - (latest["steps"] - latest["step"])
        loss = latest.get("loss_nats_per_token", math.nan)
        self.stage.update(sum(self.done.values()), f"loss {loss:.3f}" if math.isfinite(loss) else "")


class Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        """See `Progress`."""
        yield self

    def update(self, done: int, note: str = "") -> None:
        """See `Stage`."""

    def say(self, text: str) -> None:
        """See `Progress`."""
