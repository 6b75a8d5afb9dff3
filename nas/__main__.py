"""`python -m nas`, and so `torchrun -m nas`: the command line."""

from __future__ import annotations

from .cli import main

main()
