"""The law by counting: how many numbers the parameters hold, against those in the data.

n samples on the sphere and their coefficients for C outputs are N = n (d - 1) + n C numbers (d n
for one output), and C outputs of p features are C p equations for them. That this count decides,
locally, is what `identifiability.py` measures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.checks import check_count
from paperlib.feature_map import FeatureMap


def unknowns(n: int, d: int, outputs: int = 1) -> int:
    """Numbers in the data and coefficients, N = n (d - 1) + n C."""
    n, d = check_count("n", n), check_count("d", d, least=2)
    return n * (d - 1) + n * check_count("outputs", outputs, least=0)


def least_parameters(n: int, d: int, outputs: int = 1) -> int:
    """The fewest features p at which the parameters can determine the data.

    T = min(C, n) outputs count, since more vectors in the span of n features are dependent:
    T p >= n (d - 1) + n T. That is p >= d n for one output and p >= n + d - 1 once C >= n.

    Raises:
        ValueError: for n or outputs below 1, or d below 2.
        TypeError: for one that is no whole number.
    """
    releases = min(check_count("outputs", outputs), check_count("n", n))
    return -(-unknowns(n, d, releases) // releases)


def most_readable(p: int, d: int, outputs: int) -> int:
    """The most samples n that C outputs of p features determine: the law, solved for n.

    T = min(C, n) vectors count, T p >= n (d - 1) + n T; see `least_parameters`.
    """
    most = outputs * p // (d - 1 + outputs)
    return most if most >= outputs else max(0, min(outputs, p - d + 1))


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


def parameters_told(theta: Tensor) -> int:
    """The columns of theta (C, p) that are not zero: features that some sample moved.

    A ReLU that is off at all samples (or a parameter below it, for gradients) stays where it began.
    It says nothing of the samples but that: its feature is zero there and nearby.
    """
    return int((theta != 0).any(0).sum())


def determines(model: FeatureMap, theta: Tensor, n: int) -> bool:
    """Whether there are more equations than unknown numbers, ReLUs that are off left out.

    Projecting known samples off leaves no zeros in theta where only they were heard. There a ReLU
    is off at all n samples with probability 2^-n.
    """
    share = parameters_told(theta) / model.p
    plain = model.random_features
    if model.projected_off is not None and plain is not None and plain.activation.silent:
        share = min(share, 1 - 0.5**n)
    return numbers_per_unknown(model, theta, n) * share > 1
