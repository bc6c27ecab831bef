"""Directions in which samples lie, found without ever forming a d x d matrix.

The second moment of the parameters, or of what candidates leave unexplained of them,

    M_c = (d / p) sum_k (E_ck - mean(E_c)) v_k v_k^T    (one matrix for each output c),

has eigenvalues beyond the edge of a random matrix's spectrum where samples are missing or not yet
sharp (`spectral_start.py`). Their eigenvectors, those of sum_c M_c^2 where there are several
outputs, come of a block Krylov space with the method of Rayleigh and Ritz (Golub and Underwood
1977): products of V with a few dozen rows in place of d.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paperlib import one_reading
from paperlib.feature_map import FeatureMap
from paperlib.int8 import Int8Rows
from paperlib.long_sum import LongSum

# An eigenvalue of M counts as outlying this far beyond the edge, relatively.
BEYOND = 1.025

# How often a block is multiplied by an M, and how many rows it has at least. Few rows waste the
# products with V, which take as long for 16 as for 8; few products miss what is near the edge.
PRODUCTS = 8
LEAST_ROWS = 16

# So many directions of the Krylov space for each that may be asked for.
ROOM = 2


class SecondMoment:
    """M of one output, or sum_c M_c^2 of several, as an operator on rows.

    Attributes:
        edge: where the absolute eigenvalues of M, or the singular values of all M_c side by side,
            would end if Y were noise.
        passes: readings of V so far.
    """

    def __init__(self, model: FeatureMap, Y: Tensor, *, dtype: torch.dtype):
        """Take the means out, and the scale of the noise.

        Args:
            model: features with weights V.
            Y: (C, p) parameters, or residuals, without their part in the span of V.
            dtype: of the products with V.
        """
        self.model, self.dtype, self.passes = model, dtype, 0
        C, held = len(Y), Y[:, model.held]
        # Row by row, since Y can be as large as the features.
        rows = (row.double() for row in held)
        sums = torch.stack([torch.stack([row.sum(), row.square().sum()]) for row in rows], 1)
        model.sum_over_processes([sums])
        mean, square = sums / model.p
        self.centred = Y - mean.to(Y.dtype)[:, None]
        variance = float((square - mean.square()).mean().clamp(min=0)) * model.d / model.p
        # Marchenko and Pastur's edge for C matrices side by side; 2 standard deviations for one.
        self.edge = (C * variance) ** 0.5 * (1 + C**-0.5)

    def __call__(self, Q: Tensor) -> Tensor:
        """Q M, or Q sum_c M_c^2: (q, d) for Q of shape (q, d)."""
        C, q = len(self.centred), len(Q)
        images = self.products(Q.expand(C, *Q.shape))
        if C == 1:
            return images[0]
        return self.products(images).sum(0).view(q, -1)

    def singular_values(self, eigenvalues: Tensor) -> Tensor:
        """Of all M_c side by side, from the eigenvalues of the operator."""
        one = len(self.centred) == 1
        return eigenvalues.abs() if one else eigenvalues.clamp(min=0).sqrt()

    def products(self, Q: Tensor) -> Tensor:
        """Q_c M_c for each output: (C, q, d)."""
        C, q, d = Q.shape
        # The same rows for all outputs go through V once.
        shared = C > 1 and Q.stride(0) == 0
        rows = Q[0] if shared else Q.flatten(0, 1)
        total = LongSum(C * q, d, device=Q.device)
        # In the format of V.
        sent = Int8Rows.of(rows) if self.dtype == torch.int8 else rows.to(self.dtype)
        for block in self.model.blocks(dtype=self.dtype):
            part = slice(block.start, block.stop)
            if C == 1 and one_reading.takes_pass(sent, block.stored):
                moment = one_reading.second_moment(sent, block.stored, self.centred[0, part])
                total.add(moment, block.stop - block.start)
                continue
            U = block.project(rows)
            U = U if shared else U.view(C, q, -1)
            weighted = self.centred[:, None, part].to(U.dtype) * U
            # Products with Y, whose entries differ much, are too coarse in 8 bits.
            combine = block.stored.combine_sharp if block.in_int8 else block.combine
            total.add(combine(weighted.flatten(0, 1)), block.stop - block.start)
        self.passes += 2
        product = total.total
        self.model.sum_over_processes([product])
        return (product * (self.model.d / self.model.p)).to(Q.dtype).view(C, q, d)


def outlying_directions(
    model: FeatureMap,
    Y: Tensor,
    *,
    most: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Eigenvectors of the second moment of Y beyond the edge, strongest first.

    Args:
        model: features with weights V.
        Y: (C, p) without its part in the span of V.
        most: at most so many.
        dtype: of the products with V.
        generator: source of the rows that the Krylov space begins with.

    Returns:
        Unit vectors (k, d), 1 <= k <= most: one even if none is outlying. And how often V was read.
    """
    moment = SecondMoment(model, Y, dtype=dtype)
    products = PRODUCTS if len(Y) == 1 else PRODUCTS // 2
    rows = max(LEAST_ROWS, -(-ROOM * most // products))
    if rows * products >= model.d:
        rows, products = model.d, 1  # all directions at once
    shape = (rows, model.d)
    basis, images = krylov_space(moment, shape, products, generator=generator, like=Y)
    values, mixing = torch.linalg.eigh(0.5 * (basis @ images.T + images @ basis.T))
    strengths = moment.singular_values(values)
    order = strengths.argsort(descending=True)
    outlying = int((strengths > BEYOND * moment.edge).sum())
    strongest = mixing[:, order[: min(max(outlying, 1), most)]]
    return (strongest.T @ basis).to(Y), moment.passes


def krylov_space(
    operator: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    products: int,
    *,
    generator: torch.Generator,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Orthonormal rows of a random block and its images, (.., rows * products, d) float64.

    Args:
        operator: symmetric, on rows (.., rows, d), of each of a batch by itself.
        shape: of the first block, (.., rows, d).
        products: how many blocks.
        generator: source of the first block.
        like: whose dtype and device the operator takes.

    Returns:
        The rows and their images under the operator.
    """
    fresh = torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device)
    basis = images = fresh[..., :0, :]
    for _ in range(products):
        # Of all rows so far: reflections keep them orthogonal also where a block adds nothing but
        # rounding, which taking its part in the others out, even twice, does not.
        rows = torch.cat([basis, fresh], -2)
        fresh = torch.linalg.qr(rows.mT).Q.mT[..., basis.shape[-2] :, :]
        image = operator(fresh.to(like)).double()
        basis, images = torch.cat([basis, fresh], -2), torch.cat([images, image], -2)
        fresh = image
    return basis, images
