"""How a search, and a model's training, look in MLflow.

Owns MLflow: it is imported nowhere else. A search is one parent run, a child for each model of the front, all evaluations in a
table, and a view with columns and charts. `Tracker` writes it in the background from an outbox on disk, `sync` writes what is
left there, `ui` opens it in the browser. Figures, pages and pictures are made elsewhere.

Importing this package does not import MLflow.
"""

from __future__ import annotations

from .server import serve, ui, wait
from .spec import Link, TrackingSpec
from .store import Kind, Status
from .tracker import Tracker, forget, set_aside, sync, tracked, unsent
from .view import front_note

__all__ = ["Kind", "Link", "Status", "Tracker", "TrackingSpec", "forget", "front_note", "serve", "set_aside", "sync", "tracked"]
__all__ += ["ui", "unsent", "wait"]
