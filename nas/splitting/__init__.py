"""Splitting a supernet: which configs get a sub-supernet of their own, so that they stop spoiling one another's weights.

Owns the methods of splitting (`METHODS`), the tree they grow (`SplitTree`: which leaf a config belongs to) and the space of a
leaf (`LeafSpace`). Training the supernets is `nas.training`'s; when to split, the weights that a leaf starts from and the
optimiser's state are the caller's:

    tree, nets = SplitTree(), {"0": supernet}
    for _ in range(spec.rounds):
        tree, tokens = split_leaves(spec, tree.spaces(space, memory), nets, batches, rng)
        nets = {leaf: copy.deepcopy(nets[ancestor(leaf, nets)]) for leaf in tree.leaves()}
"""

from .gradients import Gradient, conflicts, cosine_distances
from .methods import METHODS, SplitSpec, split_leaves
from .partition import MOST_TRIED, best_partition
from .tree import LeafSpace, Split, SplitTree, ancestor

__all__ = [
    "METHODS",
    "MOST_TRIED",
    "Gradient",
    "LeafSpace",
    "Split",
    "SplitSpec",
    "SplitTree",
    "ancestor",
    "best_partition",
    "conflicts",
    "cosine_distances",
    "split_leaves",
]
