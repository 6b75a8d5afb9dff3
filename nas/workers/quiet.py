"""Ray as this project imports it: told to be quiet, and to leave the user's machine alone, before it is imported.

Every module of this room that needs Ray takes it from here, since Ray reads most of these at import. What the user has set
already stays.
"""

from __future__ import annotations

import os

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables: the project's own progress bar is what people see
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would upload the working directory
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # or relative paths change their meaning inside a training
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no TensorBoard, CSV and JSON files beside each training
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # or Tune takes Ctrl-C for "finish now", and the run goes on to its next stage
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a training's last report carries its result and no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a Failure says it
    "TUNE_WARN_THRESHOLD_S": "60",  # one that a busy machine passes is no news
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402

# Ray prints the death of every worker, a page of it, on standard output, where `--json` goes, whatever `log_to_driver` says.
ray._private.worker._worker_logs_enabled = False

__all__ = ["ray"]
