"""Splitting a supernet: which configs get a sub-supernet of their own, so that their gradients no longer conflict.

Owns the split methods (`METHODS`), the tree that they grow (`SplitTree`: which leaf a config belongs to) and the search space of
a leaf (`LeafSpace`). Training the supernets is `nas.training`'s; when to split, and which weights and optimizer state a leaf
starts from, is the caller's:

    tree, nets = SplitTree(), {"0": supernet}
    for _ in range(spec.rounds):
        tree, tokens = split_leaves(spec, tree.spaces(space, memory), in_process(nets), batches, rng)
        nets = {leaf: copy.deepcopy(nets[ancestor(leaf, nets)]) for leaf in tree.leaves()}
"""

from .gradients import Compare as Compare
from .gradients import Compared as Compared
from .gradients import Comparison as Comparison
from .gradients import compare as compare
from .gradients import conflicts as conflicts
from .methods import SplitSpec as SplitSpec
from .methods import in_process as in_process
from .methods import split_leaves as split_leaves
from .tree import LeafSpace as LeafSpace
from .tree import Split as Split
from .tree import SplitTree as SplitTree
from .tree import ancestor as ancestor
