"""MLflow's own application without its assistant, whose tools run commands on this machine for every local caller.

`nas.tracking.server` starts this file as a program, which imports nothing of this package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from mlflow.server import (
    ARTIFACT_ROOT_ENV_VAR,
    ARTIFACTS_DESTINATION_ENV_VAR,
    BACKEND_STORE_URI_ENV_VAR,
    REGISTRY_STORE_URI_ENV_VAR,
    SERVE_ARTIFACTS_ENV_VAR,
)
from mlflow.server import app as pages
from mlflow.server.fastapi_app import app as whole
from starlette.responses import HTMLResponse, PlainTextResponse, Response

ASSISTANT = "/mlflow/assistant"

CLOSED = "<script>try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch (e) {}</script>"
"""MLflow opens the assistant's panel, a quarter of the width, at a browser's first visit: this says that it was opened before."""


async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """An ASGI application: 404 below `ASSISTANT`, the page with its panel closed, MLflow's answer elsewhere."""
    path = scope.get("path", "")
    answer: Any = whole
    if f"{ASSISTANT}/" in f"{path}/":
        answer = PlainTextResponse("not found", 404)
    elif path == "/" and scope.get("method") == "GET":
        answer = start_page() or whole
    await answer(scope, receive, send)


def start_page() -> Response | None:
    """MLflow's start page with `CLOSED` in it, or None where it has none that can be read."""
    try:
        text = (Path(pages.static_folder or "") / "index.html").read_text(encoding="utf-8")
    except OSError:
        return None
    return HTMLResponse(text.replace("<head>", f"<head>{CLOSED}", 1), headers={"Cache-Control": "no-cache"})


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
