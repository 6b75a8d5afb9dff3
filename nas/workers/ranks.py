"""A training that several workers do together, data-parallel (`run.workers_per_training`).

Owns the workers beside the one that leads: they start with its training and end with it. If one of them dies, so does the
training's worker, and the training goes on elsewhere from its checkpoint, as after any death.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..training.ranks import PATIENCE, PeerLost, Ranks, joined
from .cluster import configure_worker, place, ray
from .executor import Outcome, Report, Trainings
from .work import Failure, run_catching

LOOPBACK = "127.0.0.1"


def train_together(trainings: Trainings, key: str, tell: Report) -> Outcome:
    """Do a training in this worker, which leads, and in as many others as the spec says."""
    trainings = replace(trainings, spec=place(trainings.spec))
    spec, size = trainings.spec, trainings.spec.together
    host = ray.util.get_node_ip_address()
    _stay_local(host)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    options = {"num_cpus": spec.cpus_per_worker, "num_gpus": spec.gpus_per_worker, "max_restarts": 0}
    others = [ray.remote(_Follower).options(**options).remote() for _ in range(size - 1)]
    try:
        done = [one.train.remote(trainings, key, host, store.port, n) for n, one in enumerate(others, 1)]
        threading.Thread(target=_end_with, args=(done, others), daemon=True).start()
        with joined(store, Ranks(0, size)) as ranks:
            outcome = replace(trainings, ranks=ranks).run(key, tell)
        return _reason(done) or outcome if _is_peers(outcome) else outcome
    finally:
        for one in others:
            with suppress(Exception):
                ray.kill(one)


def _end_with(done: list[Any], others: list[Any]) -> None:
    """End all other workers if the first of them to end has failed: whoever waits for it, waits for nothing else."""
    with suppress(ray.exceptions.RayError):
        (first,), _ = ray.wait(done, num_returns=1)
        if isinstance(ray.get(first), Failure):
            for one in others:
                ray.kill(one)


def _reason(done: list[Any]) -> Failure | None:
    """Why another worker ended, if it says. Where one died, this worker ends, too, and the training goes on elsewhere."""
    for ref in ray.wait(done, num_returns=len(done), timeout=1.0)[0]:
        try:
            outcome = ray.get(ref)
        except ray.exceptions.RayActorError:
            ray.actor.exit_actor()
        if isinstance(outcome, Failure) and not _is_peers(outcome):
            return outcome
    return None


def _is_peers(outcome: Outcome) -> bool:
    """Whether it is a failure of which another worker is the cause."""
    return isinstance(outcome, Failure) and outcome.reason.startswith(PeerLost.__name__)


class _Follower:
    """A worker that trains beside the one that leads: it neither reports nor saves."""

    def train(self, trainings: Trainings, key: str, host: str, port: int, rank: int) -> Outcome:
        configure_worker(trainings.spec)
        _stay_local(host)

        def work() -> dict[str, Any]:
            store = TCPStore(host, port, is_master=False, timeout=PATIENCE)
            with joined(store, Ranks(rank, trainings.spec.together)) as ranks:
                return replace(trainings, ranks=ranks).follow(key)

        return run_catching(work)


def _stay_local(host: str) -> None:
    """On a cluster of this machine alone Gloo uses the loopback interface, as Ray does."""
    if host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
