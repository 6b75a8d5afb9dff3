"""The primitives of sharing: the one table in which each is defined.

Owns `PRIMITIVES`: what a primitive means, how it changes a builder, how it is read off a finished plan, where a search may choose
it and from what, and which weights a supernet keeps for it. Bytes, the forward, pictures and exports follow from the plan.
"""

from . import composed, ffn, heads, reading, weights, whole
from .row import ENTRIES, OWN, Primitive, entry
from .whole import FACTORED, NORMS

PRIMITIVES: dict[str, Primitive] = {
    row.name: row for family in (whole, weights, reading, heads, ffn, composed) for row in family.ROWS
}
"""Every primitive, in the order in which they are applied. A new one is a row in one of these modules, and nothing elsewhere."""

MODEL_ROWS = [row for row in PRIMITIVES.values() if row.per_model]
LAYER_ROWS = [row for row in PRIMITIVES.values() if not row.per_model]

__all__ = ["ENTRIES", "FACTORED", "LAYER_ROWS", "MODEL_ROWS", "NORMS", "OWN", "PRIMITIVES", "Primitive", "entry"]
