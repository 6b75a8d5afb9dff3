"""Which device computes: the GPU that this process was given, or the one that a user names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UserError

DEVICES = "auto, cpu, cuda, cuda:1 or mps"


def find_device(name: str = "auto") -> torch.device:
    """The device of a name: `auto` is the first GPU that CUDA shows to this process, and the CPU where there is none. Raises
    UserError for another name, and for a device that this process does not have."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"{name!r} is no device", where="device", hint=f"use {DEVICES}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"{name} is not there: CUDA shows {gpus} GPUs to this process", where="device", hint="use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("mps is not there", where="device", hint="use auto or cpu")
    return device


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model's weights on a device for a while, and in the host's memory afterwards."""
    try:
        model.to(device)
        yield
    finally:
        model.cpu()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes may need it


def describe_device(device: torch.device) -> str:
    """A device for a person, a GPU by its model."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
