"""Data on a known subspace: any feature map, seen from k coordinates instead of d.

An attacker who knows that the data lie in the span of k orthonormal columns B (d, k) writes

    x = sqrt(d / k) B z,    ||z|| = sqrt(k)  <=>  ||x|| = sqrt(d),

and looks for z. For features act(V x) this is a model of the same kind in dimension k, with the
weights sqrt(d / k) V B: for V with i.i.d. N(0, 1/d) entries these are i.i.d. N(0, 1/k), so that the
law p > d n becomes p > k n exactly. What lies off the subspace acts as noise on theta.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paperlib.checks import check_finite, check_rows
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.given_features import GivenFeatureBlock
from paperlib.precision import arithmetic
from paperlib.sphere import to_sphere
from paperlib.streams import stream

# Columns that are this close to combinations of the others (relative) count as dependent.
DEPENDENT = 1e-6

# Hutchinson probes of the preconditioner for features without weights, as in ModuleFeatures.
PROBES = 8


class SubspaceFeatures(FeatureMap):
    """z -> phi(sqrt(d / k) B z): the features of a model at points of a subspace.

    Give it to `reconstruct` in place of the model; `inputs` turns the samples it returns back into
    points of the model's own space. Where the model has weights V, this one has the weights
    sqrt(d / k) V B, so that the linear part can still be lifted.

    Attributes:
        inner: the model.
        basis: B, (inner.d, k) with orthonormal columns, in the model's dtype.
        d: k, the dimension of the subspace.
    """

    def __init__(self, model: FeatureMap, basis: Tensor, *, mean: Tensor | None = None):
        """Orthonormalise the basis.

        Args:
            model: the feature map whose inputs are restricted.
            basis: (model.d, k) independent columns.
            mean: (model.d,) a point that the samples are scattered around along the basis, such as
                the mean picture: x_i = c_i (mean + B z_i). On the sphere of radius sqrt(d) the
                factors c_i differ from sample to sample (that is what scaling to the sphere
                does), so the mean is one more direction: it joins the basis as its first column
                and k grows by 1.

        Raises:
            TypeError: if basis or mean is not a tensor of floating-point numbers.
            ValueError: for other shapes, values that are not finite, or dependent columns.
        """
        self.inner = model
        self.basis = _orthonormal(model, basis, mean)
        self.d = self.basis.shape[1]
        self.p, self.dtype, self.device = model.p, model.dtype, model.device
        self.linear_coefficient, self.odd = model.linear_coefficient, model.odd
        self.scale = (model.d / self.d) ** 0.5
        self.gaussian_weights = model.gaussian_weights
        self.group, self.projected_off = model.group, model.projected_off
        if model.has_weights:
            # Solvers tell by this method that there are weights, so only then it may exist.
            self.activation = model.activation
            self.weight_blocks = self._weight_blocks
            self._projected: dict[torch.dtype, list[tuple[int, Tensor]]] = {}

    @property
    def held(self) -> slice:
        """As the model does."""
        return self.inner.held

    def inputs(self, Z: Tensor) -> Tensor:
        """The points x = sqrt(d / k) B z, (n, inner.d), of coordinates Z (n, k)."""
        check_rows("Z", Z, self)
        return self.scale * (Z @ self.basis.T)

    def coordinates(self, X: Tensor) -> Tensor:
        """Coordinates (n, k), on the sphere, of the points of the subspace nearest to X.

        Args:
            X: (n, inner.d) points.
        """
        check_rows("X", X, self.inner)
        return to_sphere(X @ self.basis)

    def left_out(self, X: Tensor) -> Tensor:
        """Share of each row's squared norm that lies off the subspace, (n,).

        The distance of x from the nearest point of the subspace that lies on the sphere is
        sqrt(2 - 2 sqrt(1 - share)) sqrt(d): no attack within the subspace comes closer.

        Args:
            X: (n, inner.d) points.
        """
        check_rows("X", X, self.inner)
        off = X - (X @ self.basis) @ self.basis.T
        return off.square().sum(1) / X.square().sum(1)

    def _weight_blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row, rows of sqrt(d / k) V B); kept, since k is small."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in self._projected:
            kept = self._projected.get(self.dtype)
            if kept is None:
                B = self.scale * self.basis
                kept = [(start, V @ B) for start, V in self._rows()]
                self._projected[self.dtype] = kept
            self._projected[dtype] = [(start, W.to(dtype)) for start, W in kept]
        for start, W in self._projected[dtype]:
            yield start, W.to(arithmetic(dtype))

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row, rows of V) of the model."""
        return self.inner.weight_blocks()

    def release(self, dtype: torch.dtype) -> None:
        """Forget the weights in that dtype, as `RandomFeatures.release` does."""
        if self.has_weights:
            self._projected.pop(dtype, None)

    def blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[FeatureBlock]:
        """The blocks of the model, each seen from the subspace."""
        if self.has_weights:
            for start, W in self.weight_blocks(dtype=dtype):
                yield GivenFeatureBlock(start, W, self.activation, self.linear_coefficient)
        else:
            for index, block in enumerate(self.inner.blocks(dtype=dtype)):
                yield SubspaceBlock(block, self.scale * self.basis, index)

    def sum_over_processes(self, tensors: Sequence[Tensor]) -> None:
        """As the model does."""
        self.inner.sum_over_processes(tensors)

    def describe(self) -> dict[str, Any]:
        """The model, k, and a checksum that tells whether the basis is the same."""
        digest = hashlib.sha256(self.basis.cpu().contiguous().numpy().tobytes())
        return {
            "model": "SubspaceFeatures",
            "k": self.d,
            "sha256": digest.hexdigest()[:16],
            "inner": self.inner.describe(),
        }


class SubspaceBlock(FeatureBlock):
    """A block without weights, by the chain rule: J_z = J_x S with S = sqrt(d / k) B."""

    def __init__(self, inner: FeatureBlock, S: Tensor, index: int):
        """Wrap a block of the model; S is (d, k)."""
        self.inner, self.S, self.index = inner, S, index
        self.start, self.stop = inner.start, inner.stop

    def linearize(self, X: Tensor, *, lifted: bool = False) -> tuple[Tensor, Any]:
        """Features (n, h) at the points S z; n and the model's state."""
        features, state = self.inner.linearize(X @ self.S.T, lifted=lifted)
        return features, (len(X), state)

    def jvp(self, state: Any, dX: Tensor) -> Tensor:
        """J_x S dz in row i, (n, h)."""
        return self.inner.jvp(state[1], dX @ self.S.T)

    def vjp(self, state: Any, W: Tensor) -> Tensor:
        """S^T J_x^T w in row i, (n, k)."""
        return self.inner.vjp(state[1], W) @ self.S

    def slope_gram(self, state: Any) -> Tensor:
        """Hutchinson's estimate of tr(S^T J_i^T J_j S) / k, (n, n), from random signs in R^h.

        The model's own estimate would be the trace over all d directions, most of which are not
        open to the attack; for pictures they are not alike.
        """
        n, h, k = state[0], self.stop - self.start, self.S.shape[1]
        generator = stream("subspace probes", 0, index=self.index)
        gram = torch.zeros(n, n, dtype=torch.float64, device=self.S.device)
        for _ in range(PROBES):
            w = torch.randint(0, 2, (h,), generator=generator).to(self.S) * 2 - 1
            pulled = self.vjp(state, w.expand(n, -1)).double()
            gram += pulled @ pulled.T
        return gram / (PROBES * k)


def _orthonormal(model: FeatureMap, basis: Tensor, mean: Tensor | None) -> Tensor:
    """An orthonormal basis of the span of mean and basis, (d, k), in the model's dtype."""
    for name, value, shape in (("basis", basis, "k"), ("mean", mean, None)):
        if value is None and name == "mean":
            continue
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be a tensor of floating-point numbers, got {value!r:.60}")
        right = value.ndim == (2 if shape else 1) and value.shape[0] == model.d and value.numel()
        if not right:
            expected = f"({model.d}, k)" if shape else f"({model.d},)"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
        check_finite(name, value)
    columns = basis.detach().double()
    if mean is not None:
        columns = torch.cat([mean.detach().double()[:, None], columns], dim=1)
    if columns.shape[1] > model.d:
        raise ValueError(
            f"a subspace of dimension d = {model.d} has at most that many directions, "
            f"got {columns.shape[1]}"
        )
    lengths = torch.linalg.vector_norm(columns, dim=0)
    Q, R = torch.linalg.qr(columns / torch.where(lengths > 0, lengths, 1))
    dependent = int((R.diagonal().abs() < DEPENDENT).sum())
    if dependent:
        raise ValueError(f"columns must be independent, {dependent} depend on those before them")
    # QR leaves the sign of each column open: keep the columns' own.
    return (Q * R.diagonal().sign()).to(model.device, model.dtype)
