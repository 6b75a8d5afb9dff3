"""How a search, and a model's training, look in MLflow.

Owns MLflow: it is imported nowhere else. One parent run a search, a child for each evaluation that matters, all evaluations in a
table, a ready view with columns and charts; all of it written in the background (`Tracker`), and opened in the browser by `ui`.
Does not make figures, pages or pictures: they are handed in.

Importing this package does not import MLflow.
"""

from __future__ import annotations

from .note import front_note, sharing_line
from .server import serve, ui, wait
from .spec import Link, TrackingSpec
from .store import Kind, Status
from .tracker import Tracker, TrainingTracker

__all__ = [
    "Kind",
    "Link",
    "Status",
    "Tracker",
    "TrackingSpec",
    "TrainingTracker",
    "front_note",
    "serve",
    "sharing_line",
    "ui",
    "wait",
]
