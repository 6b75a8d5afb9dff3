"""Conversions of a trained dense model to one that shares, each a row of `METHODS`, and a supernet initialised from such a model.

Owns how the trained weights and a calibration text choose what is shared, how the shared weights are initialised, and the
fine-tuning that follows ("healing", in pruning papers). It reads and writes no folder and measures no perplexity.
"""

from .calibration import PretrainedModel as PretrainedModel
from .initialise import init_from_pretrained as init_from_pretrained
from .methods import METHODS as METHODS
from .methods import Conversion as Conversion
from .methods import align_heads as align_heads
from .methods import choose as choose
from .methods import convert as convert
from .methods import find as find
from .methods import fine_tune as fine_tune
from .methods import require_dense as require_dense
from .methods import spell as spell
