"""Neural architecture search for how a transformer language model shares its parameters and its KV cache.

Each room is imported by its own name (`nas.space`, `nas.search`, …); `import nas` alone loads nothing.
"""

import os

# Threads that wait for one another may spin for some microseconds, not for milliseconds: on two cores that other processes want
# too, a supernet step of two threads took 0.3 to 5 s spinning as long as GNU OpenMP does by itself, and 0.25 s so; on idle cores
# 0.08 s either way. OpenMP reads this when torch is first imported; worker processes inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
