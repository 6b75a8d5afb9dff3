"""Checkpoints of the Llama family, and conversions of a dense model to one that shares.

Owns the families (`FAMILIES`: what a `config.json` means and what weights are called), the reading of a folder as `transformers`
writes it, and what a plain decoder can compute. Nothing of a folder is run or unpickled, and `transformers` is not needed. A
folder that this project wrote of a model that shares is `nas.export`'s.
"""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import family_of as family_of
from .checkpoint import materialise as materialise
from .checkpoint import materialised_shape as materialised_shape
from .checkpoint import read_checkpoint as read_checkpoint
from .checkpoint import read_shape as read_shape
from .checkpoint import require_plain as require_plain
from .checkpoint import tensors_of as tensors_of
from .families import FAMILIES as FAMILIES
from .families import Family as Family
from .files import FolderMetadata as FolderMetadata
