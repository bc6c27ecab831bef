"""Which data the parameters determine: the Jacobian of (X, alpha) -> theta and its null space.

The parameters of C outputs are theta_c = sum_i alpha_ic phi(x_i), a map from

    N = n (d - 1) + n C

numbers (n directions on the sphere, n C coefficients; N = d n for one output) to C p numbers. Near
a point where its Jacobian has full column rank the map is one to one: no other data nearby give
the same parameters. Where the Jacobian has full row rank C p < N instead, the data that give the
same parameters form a smooth family of dimension N - C p (implicit function theorem), and
`walk_explanations` walks along it.

Everything here is dense, (C p) x N, and in float64: for sizes where a singular value
decomposition takes seconds.
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
from paperlib.projection import projection_loss, pseudo_inverse
from paperlib.sphere import to_sphere, to_tangent
from paperlib.streams import stream

# A corrected step ends at ||theta(X, alpha) - theta||^2 / ||theta||^2 below this: float64's floor.
CORRECTED = 1e-26
CORRECTIONS = 12

# A step of the walk that cannot be corrected is halved this many times before the walk ends.
HALVINGS = 12


def unknowns(n: int, d: int, outputs: int = 1) -> int:
    """Numbers in the data and coefficients, N = n (d - 1) + n C."""
    n, d = check_count("n", n), check_count("d", d, least=2)
    return n * (d - 1) + n * check_count("outputs", outputs, least=0)


def least_parameters(n: int, d: int, outputs: int = 1) -> int:
    """The fewest features p at which the parameters can determine the data.

    T = min(C, n) outputs count, since more vectors in the span of n features are dependent:
    T p >= n (d - 1) + n T. That is p >= d n for one output and p >= n + d - 1 once C >= n.
    """
    releases = min(check_count("outputs", outputs), check_count("n", n))
    return -(-unknowns(n, d, releases) // releases)


def independent_rows(theta: Tensor, *, cutoff: float = 1e-6) -> int:
    """The rank of theta, singular values below `cutoff` of the largest left out."""
    squares = torch.linalg.eigvalsh(theta.double() @ theta.double().T)
    return int((squares > cutoff**2 * squares[-1]).sum())


def numbers_per_unknown(model: FeatureMap, theta: Tensor, n: int) -> float:
    """C p / (n (d - 1 + C)) for C independent outputs: p / (d n) for one.

    Outputs count as far as they are independent, and n samples span no more than n of them. What
    is projected off the features are equations less.
    """
    outputs = min(n, independent_rows(theta))
    p = model.p - (0 if model.projected_off is None else len(model.projected_off))
    return outputs * p / (n * (model.d - 1 + outputs))


def determines(model: FeatureMap, theta: Tensor, n: int) -> bool:
    """Whether there are more equations than unknown numbers.

    A ReLU that is off at all n samples says nothing of them but that: its feature is zero there and
    nearby. A share of 2^-n of the equations is lost so, half of them for a single sample.
    """
    plain = model.random_features
    silent = plain is not None and plain.activation.silent
    return numbers_per_unknown(model, theta, n) * (1 - 0.5**n if silent else 1) > 1


def coefficients(model: FeatureMap, theta: Tensor, X: Tensor) -> Tensor:
    """Coefficients alpha (n, C) of least squares theta ~ alpha^T phi(X), in float64."""
    features = model.features(X).double()
    gram_inverse = pseudo_inverse(features @ features.T, cutoff=1e-14)
    return gram_inverse @ (features @ theta.double().T)


def tangent_bases(X: Tensor) -> Tensor:
    """For every row an orthonormal basis of the directions that stay on the sphere, (n, d - 1, d).

    The last d - 1 rows of the Householder reflection that takes x_i / ||x_i|| to the first axis.
    """
    n, d = X.shape
    u = X / torch.linalg.vector_norm(X, dim=1, keepdim=True)
    # Away from the axis on its own side, so that nothing cancels.
    w = u.clone()
    w[:, 0] += torch.where(u[:, 0] >= 0, 1.0, -1.0)
    scale = 2 / w.square().sum(1)
    reflection = torch.eye(d, dtype=X.dtype, device=X.device).repeat(n, 1, 1)
    reflection -= scale[:, None, None] * w[:, :, None] * w[:, None, :]
    return reflection[:, 1:]


def parameter_jacobian(
    model: FeatureMap, X: Tensor, alpha: Tensor, *, bases: Tensor | None = None
) -> Tensor:
    """The Jacobian of (X, alpha) -> theta, (C p, n (d - 1) + n C) in float64.

    Columns: d theta_c / d t = alpha_ic J_i t for the d - 1 tangent directions t of x_1, then of
    x_2, and so on; then phi(x_i) in the rows of output c, for (i, c) in row-major order.

    Args:
        model: the feature map, of dtype float64.
        X: (n, d) rows on the sphere.
        alpha: (n, C) coefficients.
        bases: (n, d - 1, d) bases of the tangent spaces, `tangent_bases(X)` if not given.

    Raises:
        ValueError: for wrong shapes, or rows off the sphere.
        TypeError: for a model that does not compute in float64.
    """
    _check_double(model)
    check_on_sphere("X", check_finite("X", check_rows("X", X, model)))
    n, d = X.shape
    if alpha.ndim != 2 or len(alpha) != n:
        raise ValueError(f"alpha must have shape ({n}, C), got {tuple(alpha.shape)}")
    bases = tangent_bases(X) if bases is None else bases
    C, p = alpha.shape[1], model.p
    pushed = torch.stack([model.jvp(X, bases[:, k].contiguous()) for k in range(d - 1)], dim=1)
    directions = alpha.T[:, :, None, None] * pushed  # (C, n, d - 1, p)
    directions = directions.reshape(C, n * (d - 1), p).transpose(1, 2).reshape(C * p, -1)
    values = torch.zeros(C, p, n, C, dtype=torch.float64, device=X.device)
    for c, block in enumerate(values):
        block[:, :, c] = model.features(X).T
    return torch.cat([directions, values.reshape(C * p, n * C)], dim=1)


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the Jacobian with columns scaled to length 1.

    Unit columns make them pure numbers: neither the size of the coefficients (as long as none is
    0) nor that of the features enters for one output.

    Attributes:
        rows: C p, equations.
        columns: n (d - 1) + n C, unknowns.
        rank: singular values above rounding, max(rows, columns) eps times the largest.
        smallest: the smallest of the `columns` singular values; 0 where rows are fewer.
        dead_rows: rows that are zero: features that are inactive at all samples (ReLU), which
            hold no information.
        singular_values: all of them, descending, (min(rows, columns),).
    """

    rows: int
    columns: int
    rank: int
    smallest: float
    dead_rows: int
    singular_values: Tensor

    @property
    def identified(self) -> bool:
        """Whether all unknowns are determined locally: full column rank."""
        return self.rank == self.columns


def jacobian_spectrum(model: FeatureMap, X: Tensor, alpha: Tensor) -> Spectrum:
    """Rank and singular values of the Jacobian at (X, alpha); see `parameter_jacobian`."""
    J = parameter_jacobian(model, X, alpha)
    rows, columns = J.shape
    dead = int((J == 0).all(dim=1).sum())
    lengths = torch.linalg.vector_norm(J, dim=0)
    values = torch.linalg.svdvals(J / torch.where(lengths > 0, lengths, 1))
    cutoff = max(rows, columns) * torch.finfo(J.dtype).eps * values[0]
    rank = int((values > cutoff).sum())
    smallest = float(values[-1]) if rows >= columns else 0.0
    return Spectrum(rows, columns, rank, smallest, dead, values)


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
    _check_double(model)
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


def _check_double(model: FeatureMap) -> None:
    if model.dtype != torch.float64:
        raise TypeError(
            f"ranks and null spaces need a model of dtype torch.float64, got {model.dtype}"
        )
