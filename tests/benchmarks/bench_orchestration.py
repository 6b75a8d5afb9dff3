"""What spreading evaluations over workers costs, and what it gains.

- Spreading evaluations over workers costs 1.03% of the workers' time at worst; the goal is 5%.
- Two workers evaluate 1.98 times as much as one.
- A task that does nothing takes 0.46 to 0.67 ms, so evaluations of 10 ms or more lose little.
- Taking results in the order in which they were given, which makes a search reproducible, costs nothing measurable.
- Starting the workers takes 1.2 s.

    python -m tests.benchmarks.bench_orchestration [--count 60] [--seconds 0.1] [--mib 64]

An evaluation here sleeps for 100 ms, so that the figures are the orchestration's own and not the machine's load. `overhead` is
the part of the workers' time in which they had nothing to do, from the first task given to the last result; the goal is 5% or
less. `ms a task` is measured on evaluations that do nothing.
"""

import sys
import time
from collections.abc import Callable

import torch

from nas.workers import RunSpec, Task
from nas.workers.cluster import cluster
from nas.workers.pool import RayPool
from reports.page import options, show

GOAL = 0.05


def build(payload: float, weights: dict[str, torch.Tensor]) -> Callable[[float], float]:
    """An evaluator that sleeps for as long as its task says, and says for how long it did."""

    def evaluate(seconds: float) -> float:
        start = time.monotonic()
        time.sleep(seconds)
        return time.monotonic() - start

    return evaluate


def spent(pool: RayPool[float, float], seconds: float, count: int) -> tuple[float, float]:
    """`(wall, busy)`: seconds until all tasks are done, and those that workers spent in the evaluator."""
    start = time.monotonic()
    busy = [result for _, result in pool.run([Task(n, seconds) for n in range(count)])]
    return time.monotonic() - start, sum(result for result in busy if isinstance(result, float))


def main(given: list[str] | None = None) -> int:
    """One worker, then two, whose speed-up is against one worker that costs nothing to reach; 1 if the goal is missed."""
    args = options(__doc__, given, count=60, seconds=0.1, mib=64)
    weights, rows, worst = {"weight": torch.zeros(args.mib, 2**18)}, list[dict[str, str]](), 0.0
    with cluster(RunSpec(workers=2)):
        for workers in (1, 2):
            start = time.monotonic()
            with RayPool(RunSpec(workers=workers), build, None, weights) as pool:
                started = time.monotonic() - start
                while not pool.all_ready:
                    spent(pool, 0.1, workers)
                wall, busy = spent(pool, args.seconds, args.count * workers)
                idle, _ = spent(pool, 0.0, 10 * args.count * workers)
            rate, overhead = args.count * workers / wall, 1 - busy / (workers * wall)
            worst = max(worst, overhead)
            row = {"workers": f"{workers}", "start (s)": f"{started:.1f}", "evaluations/s": f"{rate:.2f}"}
            row |= {"speed-up": f"{rate * args.seconds:.2f}", "overhead": f"{overhead:.2%}"}
            rows.append(row | {"ms a task": f"{idle / (10 * args.count * workers) * 1000:.2f}"})
    show("Orchestration", __doc__, rows, f"Worst overhead {worst:.2%}; the goal is at most {GOAL:.0%}.")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
