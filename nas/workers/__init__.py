"""Work spread over processes and machines, or done in this process: the one room that knows Ray, and it knows nothing of sharing.

An `Executor` runs picklable work of two kinds: thousands of short tasks on an evaluator that is built once in each process
(`Executor.pool`), and a few long trainings that leave checkpoints (`Executor.train`). Work that cannot be done is a `Failure`,
never a bad number. Importing this package does not import Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .executor import Executor as Executor
from .executor import InProcess as InProcess
from .executor import Outcome as Outcome
from .executor import Report as Report
from .work import RESULT as RESULT
from .work import Failure as Failure
from .work import Job as Job
from .work import Pool as Pool
from .work import RunSpec as RunSpec
from .work import Saver as Saver
from .work import Session as Session
from .work import Task as Task
from .work import Train as Train
from .work import run_catching as run_catching


@contextmanager
def executor(spec: RunSpec) -> Iterator[Executor]:
    """The executor for a spec, ready for work. Raises UserError if its cluster cannot be had."""
    if not spec.workers:
        yield InProcess(spec)
        return
    from .cluster import cluster
    from .pool import RayExecutor

    with cluster(spec):
        yield RayExecutor(spec)


def train_all(
    jobs: Sequence[Job], train: Train, folder: Path, spec: RunSpec, on_progress: Report | None = None
) -> dict[str, Outcome]:
    """See `Executor.train`: on an executor for these jobs alone."""
    with executor(spec) as work:
        return work.train(jobs, train, folder, on_progress=on_progress)
