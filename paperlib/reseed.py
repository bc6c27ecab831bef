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
from paperlib.outlying_directions import outlying_directions
from paperlib.projection import Linearization
from paperlib.remainder import left_by
from paperlib.sphere import random_on_sphere, to_sphere


def reseed_least_useful(point: Linearization, *, generator: torch.Generator) -> Tensor:
    """The candidates of `point` with the one that is missed least moved to a spectral start.

    For a model without weights V, the new start is random.

    Args:
        point: the loss at the candidates.
        generator: source of the random start.
    """
    model, X = point.model, point.X
    worst = least_useful(point.gram, point.gram_inverse, point.alpha)[0]
    others = torch.arange(len(X), device=X.device) != worst
    if not others.any() or not model.has_weights:
        fresh = random_on_sphere(1, model.d, generator=generator).to(X)
    else:
        # What this candidate explained so far is given back to the residual.
        residual = left_by(point, others).residual
        fresh = spectral_direction(model, residual, generator=generator).to(X)
    moved = X.clone()
    moved[worst] = fresh[0]
    return moved


def spectral_direction(
    model: FeatureMap, residual: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Where on the sphere a single sample that a residual tells of would lie, (1, d), up to sign.

    Args:
        model: a feature map with weights V.
        residual: (C, p).
        generator: source of the random start.
    """
    leading = leading_output(model, residual)
    direction, _ = outlying_directions(
        model, leading, most=1, dtype=model.dtype, generator=generator
    )
    return to_sphere(direction)


def leading_output(model: FeatureMap, residual: Tensor) -> Tensor:
    """The leading direction of a residual (C, p) across the outputs, (1, p).

    One sample adds the same features to all outputs, in proportion to its alpha.
    """
    held = residual[:, model.held].double()
    outer = held @ held.T
    model.sum_over_processes([outer])
    mixes = torch.linalg.eigh(outer).eigenvectors
    return mixes[:, -1:].T.to(residual.dtype) @ residual
