"""MLflow's own application without its assistant, whose tools run commands on this machine for every local caller.

`nas.tracking.server` starts this file as a program, which imports nothing of this package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from mlflow.server import (
    ARTIFACT_ROOT_ENV_VAR,
    ARTIFACTS_DESTINATION_ENV_VAR,
    BACKEND_STORE_URI_ENV_VAR,
    REGISTRY_STORE_URI_ENV_VAR,
    SERVE_ARTIFACTS_ENV_VAR,
)
from mlflow.server.fastapi_app import app as whole
from starlette.responses import PlainTextResponse

ASSISTANT = "/mlflow/assistant"


async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """An ASGI application: 404 below `ASSISTANT`, MLflow's answer elsewhere."""
    refused = f"{ASSISTANT}/" in f"{scope.get('path', '')}/"
    await (PlainTextResponse("not found", 404) if refused else whole)(scope, receive, send)


if __name__ == "__main__":
    host, port, artifacts = sys.argv[1:]
    store = os.environ["MLFLOW_BACKEND_STORE_URI"]  # as an argument, its password would stand in every process list
    os.environ |= {  # as `mlflow server` does before it starts the application
        BACKEND_STORE_URI_ENV_VAR: store,
        REGISTRY_STORE_URI_ENV_VAR: store,
        ARTIFACT_ROOT_ENV_VAR: artifacts,
        ARTIFACTS_DESTINATION_ENV_VAR: "mlartifacts",
        SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    uvicorn.run(app, host=host, port=int(port), log_level="warning")
