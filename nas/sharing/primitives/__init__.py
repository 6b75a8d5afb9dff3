"""The table of primitives, the ways in which layers can share.

Owns `PRIMITIVES`. Bytes, the forward, figures and exports follow from the plan that primitives produce.
"""

from . import attention, composed, weights
from .row import ENTRIES, OWN, Primitive, entry
from .weights import FACTORED, NORMS

PRIMITIVES: dict[str, Primitive] = {row.name: row for family in (weights, attention, composed) for row in family.ROWS}
"""Every primitive, in the order in which they are applied. A new one is a row in one of these modules."""

MODEL_ROWS = [row for row in PRIMITIVES.values() if row.per_model]
LAYER_ROWS = [row for row in PRIMITIVES.values() if not row.per_model]

__all__ = ["ENTRIES", "FACTORED", "LAYER_ROWS", "MODEL_ROWS", "NORMS", "OWN", "PRIMITIVES", "Primitive", "entry"]
