"""Work spread over processes and machines: the one room that knows Ray, and it knows nothing of sharing.

Two executors run picklable work. `pool.Pool` keeps an evaluator alive in each worker, for thousands of short tasks;
`trainings.train_all` runs a few long trainings that leave checkpoints. Both take a `RunSpec`, both answer a piece of work that
cannot be done with a `Failure`, never with a bad number. Importing this package does not import Ray; its submodules do.
"""

from .outcome import Failure
from .spec import EarlyStopping, RunSpec

__all__ = ["EarlyStopping", "Failure", "RunSpec"]
