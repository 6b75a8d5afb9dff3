"""What a transformer can share, and what it costs: shapes, plans, primitives, configs, search spaces, bytes and operations.

Nothing here needs weights or text.
"""

from .memory import MemorySpec as MemorySpec
from .memory import measure as measure
from .shape import ModelShape as ModelShape
from .sharing_config import SharingConfig as SharingConfig
from .space import SearchSpace as SearchSpace
