"""Exchanges: a candidate that is missed least is put where a sample may still be.

Near p = d n a descent ends with most samples right and the others mixed: two samples that are alike
share one candidate, and a spare candidate fits what they leave. No small step leads out of that.
An exchange takes one of the less useful candidates away and puts it

* where the residual without it has an outlying direction (`reseed.py`), or
* beside another candidate, which is split: x_i becomes x_i + e and x_i - e.

A split adds to the features of x_i, to second order in e, the multiple of

    q_k = act''(v_k . x_i) (v_k . e)^2,   of which   (alpha_i . E q)^2 / (|alpha_i|^2 |q|^2)

of the residual's square can be explained. The direction e is the leading eigenvector of
sum_k (alpha_i . E_k) act''(v_k . x_i) v_k v_k^T (splitting steepest descent, Wu, Wang and Liu 2019,
arXiv 1910.02366). The second derivative is averaged over pre-activations about as far away as the
halves are put, so that a ReLU has one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from paperlib.activations import Activation
from paperlib.elimination import removal_costs
from paperlib.feature_map import FeatureMap
from paperlib.memory import bytes_of
from paperlib.outlying_directions import (
    PRODUCTS,
    SecondMoment,
    krylov_space,
    outlying_directions,
)
from paperlib.projection import Linearization
from paperlib.reseed import leading_output
from paperlib.sphere import random_on_sphere, to_sphere, to_tangent

# Of three exchanges one goes to the residual; of so many of its directions one is taken.
TO_RESIDUAL, DIRECTIONS = 1 / 3, 4

# How far the halves of a split candidate are put from it, one of these relative to sqrt(d), and how
# far the second derivative is averaged.
REACHES, AVERAGED = (0.1, 0.3, 0.6), 0.4

# Grid of that average, in standard deviations.
NODES, WIDTH = 33, 5.0


class Exchanges:
    """Candidates with one of the less useful put elsewhere, as often as asked for.

    Attributes:
        passes: readings of V so far, those of `settle` left out.
    """

    def __init__(
        self,
        point: Linearization,
        *,
        settle: Callable[[Tensor], Linearization],
        generator: torch.Generator,
    ):
        """Rank the candidates.

        Args:
            point: the loss at the candidates, of `random_features`.
            settle: a short descent of what is left when one is taken away: the others made up for
                what it took of the residual.
            generator: source of all choices.
        """
        self.point, self.settle, self.generator = point, settle, generator
        # Where known samples are projected off, the residual has no part in their span anyway.
        self.model = point.model.random_features
        self.by_use = removal_costs(point.gram_inverse, point.alpha).argsort().tolist()
        self.passes = 0
        self._left: dict[int, Linearization] = {}
        self._splits: dict[int, list[tuple[int, Tensor]]] = {}

    def next(self) -> Tensor:
        """Candidates (n, d) in another order, the last of them put elsewhere."""
        n = len(self.point.X)
        if n == 1:
            return random_on_sphere(1, self.model.d, generator=self.generator).to(self.point.X)
        taken = self.by_use[self._of_first_half(n)]
        if torch.rand(1, generator=self.generator) < TO_RESIDUAL:
            return self._to_residual(taken)
        return self._beside_another(taken)

    def _to_residual(self, taken: int) -> Tensor:
        """With the candidate `taken` in a direction of the residual without it."""
        left = self._without(taken)
        directions, passes = outlying_directions(
            self.model,
            leading_output(self.model, left.residual),
            most=DIRECTIONS,
            dtype=self.model.dtype,
            generator=self.generator,
        )
        self.passes += passes
        chosen = directions[self._below(len(directions))][None].to(left.X)
        return torch.cat([left.X, self._sign() * to_sphere(chosen)])

    def _beside_another(self, taken: int) -> Tensor:
        """With another candidate split, the candidate `taken` being one half."""
        if taken not in self._splits:
            self._splits[taken] = self._ranked_splits(taken)
        splits = self._splits[taken]
        i, e = splits[self._of_first_half(len(splits))]
        X = self._without(taken).X.clone()
        step = REACHES[self._below(len(REACHES))] * e
        # For an even feature the halves may as well be on opposite sides.
        halves = to_sphere(torch.cat([X[i : i + 1] + step, self._sign() * (X[i : i + 1] - step)]))
        X[i] = halves[0]
        return torch.cat([X, halves[1:]])

    def _ranked_splits(self, taken: int) -> list[tuple[int, Tensor]]:
        """The others, by number, and the directions of their halves; what promises most first."""
        left = self._without(taken)
        directions, gains, passes = split_directions(
            self.model, left.residual, left.X, left.alpha, generator=self.generator
        )
        self.passes += passes
        order = gains.argsort(descending=True).tolist()
        return [(i, directions[i : i + 1]) for i in order]

    def _without(self, taken: int) -> Linearization:
        """The other candidates, settled."""
        if taken not in self._left:
            rows = torch.arange(len(self.point.X), device=self.point.X.device) != taken
            self._left[taken] = self.settle(self.point.X[rows])
        return self._left[taken]

    def _of_first_half(self, count: int) -> int:
        """One of the first half of ranks, at random: the first is not right often enough."""
        return self._below(min(count, max(2, count // 2)))

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.generator))

    def _sign(self) -> float:
        return math.copysign(1.0, float(torch.rand(1, generator=self.generator)) - 0.5)


def split_directions(
    model: FeatureMap,
    residual: Tensor,
    X: Tensor,
    alpha: Tensor,
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, int]:
    """Where the halves of each candidate go from it.

    Args:
        model: features with weights V.
        residual: (C, p), what the candidates leave.
        X: (n, d), the candidates.
        alpha: (n, C), their coefficients.
        generator: source of the Krylov spaces.

    Returns:
        Directions e, (n, d) of length sqrt(d) and tangent to the sphere; how much of the residual's
        square each split can explain, (n,); and how often V was read.
    """
    n, d = X.shape
    pull = torch.nn.functional.normalize(alpha, dim=1).to(residual) @ residual  # (n, p)
    bend = torch.zeros_like(pull)
    for block in model.blocks(dtype=model.dtype):
        part = slice(block.start, block.stop)
        bend[:, part] = mean_curvature(model.activation, block.project(X), AVERAGED)
    moments = SecondMoment(model, pull * bend, dtype=model.dtype)
    rows, products = (DIRECTIONS, PRODUCTS) if DIRECTIONS * PRODUCTS < d else (d, 1)
    basis, images = krylov_space(
        moments.products, (n, rows, d), products, generator=generator, like=X
    )
    values, mixing = torch.linalg.eigh(0.5 * (basis @ images.mT + images @ basis.mT))
    # Where a value is negative, a split does harm.
    E = (mixing[:, :, -DIRECTIONS:].mT @ basis).to(X)
    E = to_tangent(X.repeat_interleave(E.shape[1], 0), E.flatten(0, 1))
    E = to_sphere(E).view(n, -1, d)
    sums = torch.zeros(2, n, E.shape[1], dtype=torch.float64, device=X.device)
    for block in model.blocks(dtype=model.dtype):
        part = slice(block.start, block.stop)
        q = bend[:, None, part] * block.project(E.flatten(0, 1)).square().view(*E.shape[:2], -1)
        along = (q * pull[:, None, part]).sum(2)
        sums += torch.stack([along, q.square().sum(2)]).double()
    model.sum_over_processes([sums])
    along, squares = sums
    gains = along.clamp(min=0).square() / squares.clamp(min=torch.finfo(torch.float64).tiny)
    most, best = gains.max(1)
    return E[torch.arange(n), best.to(E.device)], most, moments.passes + 2


def exchange_bytes(n: int, outputs: int, p: int, d: int) -> int:
    """The most bytes that an exchange allocates beside the candidates' activations.

    Pull, bend and the second moments of their product, before and after these are centred; what is
    left without each candidate that was taken; and the Krylov spaces of all splits.
    """
    moments = bytes_of(torch.float32, 4, n, p)
    left = bytes_of(torch.float32, (n + 1) // 2, outputs, p)
    return moments + left + bytes_of(torch.float64, 2, n, DIRECTIONS * PRODUCTS, d)


def mean_curvature(activation: Activation, z: Tensor, reach: float) -> Tensor:
    """E act''(z + reach g) over g ~ N(0, 1), as E act(z + reach g) (g^2 - 1) / reach^2."""
    grid = torch.linspace(-WIDTH, WIDTH, NODES, dtype=torch.float64)
    weights = torch.softmax(-grid.square() / 2, 0) * (grid.square() - 1) / reach**2
    total = torch.zeros_like(z)
    for t, weight in zip(grid.tolist(), weights.tolist(), strict=True):
        total += weight * activation.value(z + reach * t)
    return total
