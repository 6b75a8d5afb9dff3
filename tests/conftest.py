"""What every test starts from: one thread, property tests that draw the same examples each time, and one place for the copies
that transformers makes of an exported folder's code."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import torch
from hypothesis import HealthCheck, settings

# Read when transformers is imported; what was imported from one place is not found in another, so it is one for all tests.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="nas-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests begin, too
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

torch.set_num_threads(1)
settings.register_profile(
    "nas",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nas")
