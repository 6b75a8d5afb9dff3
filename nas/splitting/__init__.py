"""Splitting a supernet: which configs get a sub-supernet of their own, so that their gradients no longer conflict.

Owns the split methods (`METHODS`), the tree that they grow (`SplitTree`: which leaf a config belongs to) and the search space of
a leaf (`LeafSpace`). Training the supernets is `nas.training`'s; when to split, and which weights and optimizer state a leaf
starts from, is the caller's:

    tree, nets = SplitTree(), {"0": supernet}
    for _ in range(spec.rounds):
        tree, tokens = split_leaves(spec, tree.spaces(space, memory), in_process(nets), batches, rng)
        nets = {leaf: copy.deepcopy(nets[ancestor(leaf, nets)]) for leaf in tree.leaves()}
"""

from .gradients import MOST_TRIED, Compare, Compared, Comparison, Products, best_partition, compare, conflicts, cosine_distances
from .methods import METHODS, SplitSpec, in_process, split_leaves
from .tree import LeafSpace, Split, SplitTree, ancestor

__all__ = [
    "METHODS",
    "MOST_TRIED",
    "Compare",
    "Compared",
    "Comparison",
    "LeafSpace",
    "Products",
    "Split",
    "SplitSpec",
    "SplitTree",
    "ancestor",
    "best_partition",
    "compare",
    "conflicts",
    "cosine_distances",
    "in_process",
    "split_leaves",
]
