"""Neural architecture search for how a transformer language model shares its parameters and its KV cache.

The rooms are this package's modules; none is imported here, so that `import nas` costs nothing.
"""

import os

# Threads that wait for each other must not spin: with two threads on two cores that other processes want too, a training step
# took 0.35 s spinning and 0.08 s sleeping. OpenMP reads this when torch is first imported; worker processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
