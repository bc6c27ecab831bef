"""A second chance for missed samples: the least useful candidate starts again from the residual.

When all samples but one are right, the residual E is what that one leaves: E_k ~ a rest(v_k . x).
Its second moment sum_k E_k v_k v_k^T then has x as an outlying eigenvector (the spectral start of
phase retrieval), wherever the activation has a Hermite coefficient of order two. A sample with a
tiny |alpha|, which random candidates overlook, stands out in the residual alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.elimination import least_useful
from paperlib.feature_map import FeatureMap
from paperlib.projection import Linearization
from paperlib.sphere import random_on_sphere, to_sphere

SUBSPACE = 8
ITERATIONS = 30


def reseed_least_useful(point: Linearization, *, generator: torch.Generator) -> Tensor:
    """The candidates of `point` with the one that is missed least moved to a spectral start.

    For a model without weights V, the new start is random.

    Args:
        point: the loss at the candidates.
        generator: source of the random subspace.
    """
    model, X = point.model, point.X
    worst = least_useful(point.gram, point.gram_inverse, point.alpha)[0]
    # What this candidate explained so far is given back to the residual.
    others = [i for i in range(len(X)) if i != worst]
    if not others or not hasattr(model, "weight_blocks"):
        fresh = random_on_sphere(1, model.d, generator=generator).to(X)
    else:
        rest = Linearization(model, point.theta, X[others], lift=point.lift, dtype=point.dtype)
        fresh = spectral_direction(model, rest.residual, generator=generator).to(X)
    moved = X.clone()
    moved[worst] = fresh[0]
    return moved


def spectral_direction(
    model: FeatureMap, residual: Tensor, *, generator: torch.Generator
) -> Tensor:
    """The outlying eigenvector of sum_k e_k v_k v_k^T on the sphere, (1, d), up to sign.

    Subspace iteration: each step is one product with V and one with its transpose, on 8 vectors.

    Args:
        model: a feature map with weights V.
        residual: (C, p); e is its leading direction across the outputs.
        generator: source of the first subspace.
    """
    outer = torch.zeros(len(residual), len(residual), dtype=torch.float64, device=residual.device)
    for block in model.blocks():
        part = residual[:, block.start : block.stop].double()
        outer += part @ part.T
    model.sum_over_processes([outer])
    strengths, mixes = torch.linalg.eigh(outer)
    e = (mixes[:, -1] / strengths[-1].sqrt()).to(residual.dtype) @ residual
    count = min(SUBSPACE, model.d)
    Q = random_on_sphere(count, model.d, generator=generator).to(residual)
    mean = torch.zeros((), dtype=torch.float64, device=residual.device)
    for step in range(ITERATIONS):
        Q = torch.linalg.qr(Q.T).Q.T
        MQ = torch.zeros_like(Q)
        for block in model.blocks():
            V, part = block.weights, e[block.start : block.stop]
            MQ += ((Q @ V.T) * part) @ V
            if step == 0:
                mean += (part.double() @ V.double().square().sum(1)) / model.d
        model.sum_over_processes([MQ] + ([mean] if step == 0 else []))
        MQ -= mean.to(Q.dtype) * Q
        small = Q @ MQ.T
        Q = MQ
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T).double())
    top = vectors[:, values.abs().argmax()]
    # Ritz vector in the subspace after the last product, whose rows are M Q.
    direction = (top / values[values.abs().argmax()]).to(MQ.dtype) @ MQ
    return to_sphere(direction[None])
