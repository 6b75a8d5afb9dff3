"""What the machine of a search is busy with: the series of MLflow's page "System metrics".

Owns `Machine`, on MLflow's own monitors. It is the driver's machine; workers elsewhere are not watched.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from .store import be_quiet

EVERY = 10.0  # seconds between two looks, as of MLflow's own


class Machine:
    """Processor, memory, network and GPUs, as far as this machine tells."""

    def __init__(self) -> None:
        self._monitors, self._looked = _monitors(), time.monotonic()
        self._collect()  # a processor's use is counted from one look to the next

    def figures(self) -> dict[str, float]:
        """The figures by name, if it is time for them."""
        if time.monotonic() - self._looked < EVERY:
            return {}
        self._looked = time.monotonic()
        return self._collect()

    def _collect(self) -> dict[str, float]:
        found = dict[str, float]()
        for monitor in self._monitors:
            with suppress(Exception):  # a driver that does not answer is no reason to stop tracking
                monitor.clear_metrics()
                monitor.collect_metrics()
                found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
        return found


def _monitors() -> list[Any]:
    be_quiet()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found = []
    for kind in (CPUMonitor, NetworkMonitor, GPUMonitor):
        with suppress(Exception):  # what this machine does not have
            found.append(kind())
    return found
