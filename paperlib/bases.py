"""Subspaces that pictures lie near, learned from other pictures.

`principal_basis` takes the directions of largest second moment; `cosine_basis` the two-dimensional
cosine waves (those of JPEG) in the three uncorrelated colours, ranked by their energy. Both want
rows on the sphere as the data loaders return them, of pictures that are not under attack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paperlib.checks import check_count, check_finite


def principal_basis(X: Tensor, k: int) -> Tensor:
    """The k leading eigenvectors of X^T X, (d, k) orthonormal columns in the dtype of X.

    Nothing is subtracted: on the sphere the mean picture is one more direction, and mostly the
    first.

    Args:
        X: (m, d) samples other than the ones under attack.
        k: number of directions, at most min(m, d).

    Raises:
        TypeError: if X is not a tensor of floating-point numbers.
        ValueError: for another shape, values that are not finite, or k above the rank of X.
    """
    _check_samples(X)
    k = check_count("k", k)
    _, singular, rows = torch.linalg.svd(X.double(), full_matrices=False)
    rank = int((singular > 1e-6 * singular[0]).sum()) if bool(singular[0] > 0) else 0
    if k > rank:
        raise ValueError(f"{len(X)} samples span {rank} directions, got k = {k}")
    return rows[:k].T.to(X.dtype).contiguous()


def cosine_basis(X: Tensor, image_shape: Sequence[int], k: int) -> Tensor:
    """The k cosine waves with most energy in X, (d, k) orthonormal columns in the dtype of X.

    The waves of an H x W picture are the products of cos(pi (i + 1/2) u / H) with those of the
    columns (the discrete cosine transform, type II). For colour pictures each wave comes in the
    three colours that are uncorrelated over X. Few samples suffice to rank them, since nothing
    but d energies (and a 3 x 3 matrix) is learned.

    Args:
        X: (m, d) samples other than the ones under attack.
        image_shape: (H, W) or (H, W, channels) of one sample, as in a DataSet.
        k: number of waves, at most d.

    Raises:
        TypeError: if X is not a tensor of floating-point numbers.
        ValueError: for another shape, values that are not finite, or k above d.
    """
    _check_samples(X)
    shape = tuple(check_count("image_shape", side) for side in image_shape)
    if len(shape) not in (2, 3) or torch.Size(shape).numel() != X.shape[1]:
        raise ValueError(
            f"image_shape must be (H, W) or (H, W, channels) with {X.shape[1]} entries in all, "
            f"got {shape}"
        )
    k = check_count("k", k)
    if k > X.shape[1]:
        raise ValueError(f"there are d = {X.shape[1]} waves, got k = {k}")
    pictures = X.double().reshape(len(X), *shape[:2], -1)
    colours = torch.linalg.eigh(torch.einsum("nhwc,nhwe->ce", pictures, pictures))[1]
    rows, columns = (_waves(side).to(X.device) for side in shape[:2])
    energy = torch.einsum("uh,vw,ce,nhwc->nuve", rows, columns, colours, pictures)
    ranked = energy.square().sum(0).flatten().argsort(descending=True, stable=True)[:k]
    u, v, e = torch.unravel_index(ranked, (*shape[:2], pictures.shape[3]))
    basis = torch.einsum("kh,kw,kc->khwc", rows[u], columns[v], colours.T[e])
    return basis.reshape(k, -1).T.to(X.dtype).contiguous()


def _waves(side: int) -> Tensor:
    """Row u is the normalised wave cos(pi (i + 1/2) u / side), (side, side)."""
    i = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(torch.pi / side * torch.outer(i, i + 0.5))
    return waves / torch.linalg.vector_norm(waves, dim=1, keepdim=True)


def _check_samples(X: Tensor) -> None:
    if not isinstance(X, Tensor) or not X.dtype.is_floating_point:
        kind = X.dtype if isinstance(X, Tensor) else type(X).__name__
        raise TypeError(f"X must be a tensor of floating-point numbers, got {kind}")
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must have shape (m, d), got {tuple(X.shape)}")
    check_finite("X", X)
