"""How much the options of a decision disagree about the weights they share.

Owns the gradients that are taken for a cut, and their distances. It steps nothing and leaves every weight as it was; which cut
follows from the distances is `partition`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..model.supernet import Supernet
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment
from ..training.evaluation import NotFinite, window_losses
from .tree import LeafSpace, Options


@dataclass(frozen=True)
class Gradient:
    """One config's gradient of the supernet's Parameters, in their order.

    `flat` `(numbers,)` holds zeros where a Parameter is not trained; `trained` and `squares` `(parameters,)` say which are, and
    their squared norms; `sizes` how many numbers each has.
    """

    flat: Tensor
    trained: Tensor
    squares: Tensor
    sizes: tuple[int, ...]

    @staticmethod
    def of(supernet: Supernet, config: SharingConfig, rows: Tensor) -> Gradient:
        """The gradient on a batch `(batch, seq + 1)`, in float32. No `.grad` is touched, and no weight. Raises NotFinite."""
        params = list(supernet.parameters())
        loss = window_losses(supernet.subnet(config), rows, autocast=False).mean()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        filled = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]
        squares = torch.stack([torch.linalg.vector_norm(grad) for grad in filled]).cpu().double().square()
        if not squares.isfinite().all():
            raise NotFinite(f"the gradient of config {config.hash} is not finite, at a loss of {loss.item()}")
        trained = torch.tensor([grad is not None for grad in grads], dtype=torch.float64)
        return Gradient(torch.cat([grad.flatten() for grad in filled]), trained, squares, tuple(p.numel() for p in params))


def cosine_distances(gradients: Sequence[Gradient]) -> Tensor:
    """1 − cosine of each pair `(n, n)`, in float64, 0 to 2: how much two gradients disagree on what *both* train.

    Gradients are keyed by Parameter and a pair is compared on the Parameters that both have a gradient for. What one alone trains
    (an untied layer's own projections, say) is no conflict: the other never moves it, and zeros in its place would count it as
    one. With nothing in common, the distance is 0.
    """
    flat = torch.stack([g.flat for g in gradients])
    trained, squares = (torch.stack(rows) for rows in zip(*((g.trained, g.squares) for g in gradients), strict=True))
    seen = (squares @ trained.T).sqrt()  # [i, j]: the norm of i's gradient on what j trains
    norms = seen * seen.T
    cosines = torch.where(norms > 0, (flat @ flat.T).cpu().double() / norms.clamp(min=1e-300), 1.0)
    return (1 - cosines).clamp(0, 2).fill_diagonal_(0)


def module_distances(gradients: Sequence[Gradient]) -> Tensor:
    """1 − the mean cosine over the Parameters that each pair both trains `(n, n)`, in float64, 0 to 2: each counts alike.

    One cosine over all of them is that of the few whose gradients are largest (the embedding's, mostly). With nothing in common,
    the distance is 0.
    """
    trained, squares = (torch.stack(rows) for rows in zip(*((g.trained, g.squares) for g in gradients), strict=True))
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for n, parts in enumerate(zip(*(g.flat.split(g.sizes) for g in gradients), strict=True)):
        flat, norms = torch.stack(parts), squares[:, n].sqrt()
        both = norms[:, None] * norms
        total += torch.where(both > 0, (flat @ flat.T).cpu().double() / both.clamp(min=1e-300), 0.0)
    alive = (trained * (squares > 0)).double()
    common = alive @ alive.T
    return (1 - torch.where(common > 0, total / common.clamp(min=1), 1.0)).clamp(0, 2).fill_diagonal_(0)


DISTANCES: dict[str, Callable[[Sequence[Gradient]], Tensor]] = {"global": cosine_distances, "per_tensor": module_distances}
"""How far apart gradients are: by one cosine of all that two train in common, or by the mean over its Parameters."""


def conflicts(
    supernet: Supernet,
    space: LeafSpace,
    decisions: Mapping[str, Options],
    batches: Sequence[Tensor],
    rng: random.Random,
    similarity: str = "global",
) -> tuple[dict[str, Tensor], int]:
    """How much the options of each decision disagree: `(options, options)` mean distances, and the tokens that it took.

    For each batch `(batch, seq + 1)` one random config of the leaf fixes all decisions; then each decision in turn runs each of
    its options in it (2203.15207), without a step; every weight is left bitwise as it was. What is compared is in
    `cosine_distances`: a decision's own Parameters are those that only one of two options trains, and count for neither.

    A distance is the *expected* one over random settings of the other decisions, and two options that compute the same
    are at 0: so are all options of a decision that the setting leaves closed, and options that lead out of the leaf meet nobody.
    So a decision that is seldom asked weighs as little as it matters; drawing again until it is open would split off the
    few configs that ask it. And one setting serves all decisions: they are compared on equal terms, and most gradients are
    needed once only. Tokens are those of each gradient taken, times the tokens of its batch.
    """
    totals = {name: torch.zeros(len(options), len(options), dtype=torch.float64) for name, options in decisions.items()}
    tokens = 0
    for rows in batches:
        setting = _draw_setting(space, rng)
        base = space.config_of(setting)
        first = {base: Gradient.of(supernet, base, rows)}
        tokens += rows[:, 1:].numel()
        for name, options in decisions.items():
            configs = [space.config_of(setting | {name: option}) for option in options]
            here = [n for n, config in enumerate(configs) if space.holds(config)]
            fresh = [config for config in dict.fromkeys(configs[n] for n in here) if config != base]
            if fresh:
                gradients = first | {config: Gradient.of(supernet, config, rows) for config in fresh}
                tokens += len(fresh) * rows[:, 1:].numel()
                index = torch.tensor(here)
                totals[name][index[:, None], index] += _between([configs[n] for n in here], gradients, similarity)
    return {name: total / max(len(batches), 1) for name, total in totals.items()}, tokens


def _draw_setting(space: LeafSpace, rng: random.Random) -> Assignment:
    """An option for every decision, open or not, that make a config of the leaf."""
    for _ in range(10_000):
        setting = {name: rng.choice(options) for name, options in space.options.items()}
        if space.holds(space.config_of(setting)):
            return setting
    raise UserError(f"no config of sub-supernet {space.leaf} was found in 10,000 draws", hint="loosen the limits")


def _between(configs: Sequence[SharingConfig], gradients: Mapping[SharingConfig, Gradient], similarity: str) -> Tensor:
    """The distances of configs, equal ones at exactly 0."""
    distinct = list(dict.fromkeys(configs))
    index = torch.tensor([distinct.index(config) for config in configs])
    return DISTANCES[similarity]([gradients[config] for config in distinct])[index[:, None], index]
