"""Walks through data that explain the same parameters, below p = d n.

Where the Jacobian of (X, alpha) -> theta has a null space (`identifiability.py`), the data that
give the same parameters form a smooth family. A step goes along the null space, and Gauss-Newton
steps of least length lead back onto the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paperlib.checks import (
    check_count,
    check_finite,
    check_on_sphere,
    check_positive,
    check_rows,
    check_theta,
)
from paperlib.feature_map import FeatureMap
from paperlib.identifiability import check_double, coefficients, parameter_jacobian, tangent_bases
from paperlib.projection import projection_loss
from paperlib.sphere import to_sphere, to_tangent
from paperlib.streams import stream

# A corrected step ends at ||theta(X, alpha) - theta||^2 / ||theta||^2 below this: float64's floor.
CORRECTED = 1e-26
CORRECTIONS = 12

# A step of the walk that cannot be corrected is halved this many times before the walk ends.
HALVINGS = 12


@dataclass(frozen=True)
class Walk:
    """A path of data sets that all give the same parameters.

    Attributes:
        path: (steps + 1, n, d), the data at every step; path[0] is the start.
        coefficients: (steps + 1, n, C), the coefficients that go with them.
        losses: (steps + 1,) projection loss of theta at every step.
        distances: (steps + 1, n), ||x_i - x_i(0)|| / sqrt(d).
        dimensions: (steps,) dimension of the null space at every step.
        status: "done", or why the walk ended early.
    """

    path: Tensor
    coefficients: Tensor
    losses: list[float]
    distances: Tensor
    dimensions: list[int]
    status: str


def walk_explanations(
    model: FeatureMap,
    theta: Tensor,
    X: Tensor,
    *,
    steps: int = 100,
    step_length: float = 0.05,
    target: Tensor | None = None,
    seed: int = 0,
) -> Walk:
    """Walk from data X along other data that explain the same parameters exactly.

    Each step moves (X, alpha) within the null space of the Jacobian and then back onto
    theta(X, alpha) = theta by Gauss-Newton steps of least length. Without a target the walk goes
    straight on from a random null direction; with one it goes where the distance to the target
    falls fastest.

    Args:
        model: the feature map, of dtype float64.
        theta: (C, p) parameters that X explains: L(X) below 1e-20.
        X: (n, d) the start, on the sphere.
        steps: most steps.
        step_length: root mean square over the samples of how far each moves, relative to sqrt(d).
        target: (n, d) data to walk towards; rows of samples that may move freely equal X's.
        seed: of the first direction.

    Raises:
        ValueError: if X does not explain theta, or the null space is empty: the data are
            identified, and there is nowhere to walk.
        TypeError: for a model that does not compute in float64.
    """
    check_double(model)
    theta = check_theta(theta, model).double()
    check_on_sphere("X", check_finite("X", check_rows("X", X, model)))
    if target is not None:
        check_rows("target", target, model, rows=len(X))
    check_count("steps", steps)
    check_positive("step_length", step_length, below=1.0)
    X = to_sphere(X)
    start_loss = float(projection_loss(model, theta, X))
    if start_loss > 1e-20:
        raise ValueError(f"X must explain theta to a loss of at most 1e-20, got {start_loss:.1e}")

    n, d = X.shape
    point = _Explanation(model, theta, X, coefficients(model, theta, X))
    kick = torch.randn(n, d, generator=stream("walk", seed), dtype=torch.float64).to(X.device)
    heading = to_tangent(X, kick)
    points, dimensions, status = [point], [], "done"
    length = step_length * math.sqrt(n * d)
    for _ in range(steps):
        wanted = heading if target is None else to_tangent(point.X, target - point.X)
        null_dimension, dX, dalpha = point.null_step(wanted)
        if null_dimension == 0:
            if len(points) == 1:
                raise ValueError(
                    "the null space is empty: theta identifies X, at least locally, and no other "
                    "data nearby explain it"
                )
            status = "no null space left"
            break
        reach = float(torch.linalg.vector_norm(dX))
        remaining = length if target is None else min(length, reach)
        if reach < 1e-6 * length:
            status = "as close to the target as the family comes"
            break
        trial = point.moved(dX * (remaining / reach), dalpha * (remaining / reach))
        if trial is None:
            status = "a step could not be corrected"
            break
        if target is not None and _gap(trial.X, target) >= _gap(point.X, target):
            status = "as close to the target as the family comes"
            break
        heading = to_tangent(trial.X, trial.X - point.X)
        point = trial
        points.append(point)
        dimensions.append(null_dimension)
    path = torch.stack([point.X for point in points])
    return Walk(
        path=path,
        coefficients=torch.stack([point.alpha for point in points]),
        losses=[float(projection_loss(model, theta, x)) for x in path],
        distances=torch.linalg.vector_norm(path - path[0], dim=2) / math.sqrt(d),
        dimensions=dimensions,
        status=status,
    )


def _gap(X: Tensor, target: Tensor) -> float:
    return float(torch.linalg.vector_norm(X - target))


class _Explanation:
    """A point (X, alpha) with theta(X, alpha) = theta, and the Jacobian there."""

    def __init__(self, model: FeatureMap, theta: Tensor, X: Tensor, alpha: Tensor):
        self.model, self.theta, self.X, self.alpha = model, theta, X, alpha
        self.bases = tangent_bases(X)
        J = parameter_jacobian(model, X, alpha, bases=self.bases)
        # Equal units for both kinds of unknowns: a step of alpha counts by the change of theta.
        self.unit = float(torch.linalg.vector_norm(alpha)) / math.sqrt(X.numel())
        J[:, X.shape[0] * (X.shape[1] - 1) :] *= self.unit
        self.U, self.S, self.Vt = torch.linalg.svd(J, full_matrices=False)
        self.rank = int((self.S > max(J.shape) * torch.finfo(J.dtype).eps * self.S[0]).sum())
        self.columns = J.shape[1]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(dX, dalpha) of a vector of unknowns."""
        n, d = self.X.shape
        along = z[: n * (d - 1)].view(n, 1, d - 1)
        dX = (along @ self.bases).squeeze(1)
        return dX, self.unit * z[n * (d - 1) :].view_as(self.alpha)

    def null_step(self, wanted: Tensor) -> tuple[int, Tensor, Tensor]:
        """The null space's dimension and the (dX, dalpha) within it nearest to dX = wanted."""
        along = (self.bases @ wanted[:, :, None]).reshape(-1)
        z = torch.cat([along, along.new_zeros(self.alpha.numel())])
        rows = self.Vt[: self.rank]
        return self.columns - self.rank, *self.split(z - rows.T @ (rows @ z))

    def least_step(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """The shortest (dX, dalpha) that changes theta by `rest`, to first order."""
        kept = slice(0, self.rank)
        coordinates = (self.U.T[kept] @ rest.reshape(-1)) / self.S[kept]
        return self.split(self.Vt[kept].T @ coordinates)

    def moved(self, dX: Tensor, dalpha: Tensor) -> _Explanation | None:
        """The explanation a step away, after correction; None where corrections fail."""
        for halving in range(HALVINGS):
            scale = 0.5**halving
            point = self._corrected(to_sphere(self.X + scale * dX), self.alpha + scale * dalpha)
            if point is not None:
                return point
        return None

    def _corrected(self, X: Tensor, alpha: Tensor) -> _Explanation | None:
        """Gauss-Newton with this point's Jacobian, renewed only where it converges slowly."""
        total = self.theta.square().sum()
        factored, smallest = self, math.inf
        for _ in range(CORRECTIONS):
            rest = self.theta - alpha.T @ self.model.features(X)
            error = float(rest.square().sum() / total)
            if error <= CORRECTED:
                return _Explanation(self.model, self.theta, X, alpha)
            if error > 0.1 * smallest:
                if error > smallest and factored is not self:
                    return None
                factored = _Explanation(self.model, self.theta, X, alpha)
            smallest = min(error, smallest)
            dX, dalpha = factored.least_step(rest)
            # The bases belong to the point that was factored: back onto the tangent space here.
            X, alpha = to_sphere(X + to_tangent(X, dX)), alpha + dalpha
        return None
