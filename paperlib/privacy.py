"""Ridge regression released with noise, and the differential privacy that the noise gives.

A release M(D) is (epsilon, delta)-differentially private if for any two data sets D, D' that differ
in one sample, and any set S of outcomes, P(M(D) in S) <= e^epsilon P(M(D') in S) + delta (Dwork et
al. 2006). Adding N(0, sigma^2) to every parameter gives that if the parameters move by at most
Delta, the *sensitivity*, when one sample is replaced. For minimum-norm interpolation there is no
such bound: two samples that nearly coincide with different labels make theta as large as one likes.
With features clipped to norm B and a ridge there is one (Chaudhuri, Monteleoni and Sarwate 2011):

    J(theta) = 1/(2n) sum_i ||theta phi_i - y_i||^2 + ridge/2 ||theta||^2,   ||phi_i|| <= B,
    ||y_i|| <= Y   =>   Delta <= 2 B Y / (ridge n) (1 + B / (2 sqrt(ridge))).

Proof. J is ridge-strongly convex, so with the gradient of J zero at theta(D), the minimisers differ
by at most ||grad J'(theta(D))|| / ridge, where only two terms of the sum differ, each at most
||residual|| B / n. Multiplying the optimality condition by theta gives ridge ||theta||^2 =
1/n sum f_i . (y_i - f_i) <= Y^2 / 4, so that any residual is at most Y + B Y / (2 sqrt(ridge)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import log_ndtr
from torch import Tensor

from paperlib.checks import check_count, check_finite, check_positive, check_rows
from paperlib.feature_map import FeatureMap
from paperlib.streams import stream


@dataclass(frozen=True)
class PrivateRidge:
    """A noisy ridge regression and what was paid for it.

    The guarantee covers this one release of theta, samples and labels alike, for data sets of the
    same n that differ in one sample, as long as nobody can draw the noise again (so without a
    seed). It does not cover what was computed from the data before (a mean or scale of the pixels),
    nor the choice of ridge and bound if those were tuned on the data.

    Attributes:
        theta: (C, p), released.
        clean: (C, p), before the noise.
        sensitivity: Delta.
        sigma: standard deviation of the noise of every parameter.
        clipped: share of the samples whose features were clipped.
    """

    theta: Tensor
    clean: Tensor
    sensitivity: float
    sigma: float
    clipped: float


def private_ridge(
    model: FeatureMap,
    X: Tensor,
    y: Tensor,
    *,
    ridge: float,
    bound: float,
    epsilon: float,
    delta: float = 1e-5,
    seed: int | None = None,
) -> PrivateRidge:
    """Ridge regression on clipped features, plus Gaussian noise for (epsilon, delta)-privacy.

    The features of a sample longer than `bound` are scaled down to it, which leaves their
    direction, and so what an attack through their span can find.

    Args:
        model: the feature map, chosen without a look at the data.
        X: (n, d) inputs.
        y: (n, C) labels; rows longer than 1 are refused, so that Y = 1.
        ridge: lambda > 0 of J.
        bound: B > 0.
        epsilon: above 0.
        delta: between 0 and 1.
        seed: of noise for experiments, which can be drawn again: whoever knows or guesses the seed
            takes the noise off. None draws noise that nobody can draw again.

    Raises:
        ValueError: for wrong shapes, labels longer than 1, or options without sense.
    """
    check_finite("X", check_rows("X", X, model))
    if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(X):
        raise ValueError(f"y must have shape ({len(X)}, C), got {tuple(getattr(y, 'shape', ()))}")
    targets = check_finite("y", y.to(model.device, torch.float64))
    longest = float(torch.linalg.vector_norm(targets, dim=1).max())
    if longest > 1 + 1e-9:
        raise ValueError(f"labels must have norm at most 1, got {longest:.3g}")
    bound = check_positive("bound", bound)
    features = model.features(X).double()
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    features = features * (bound / norms).clamp(max=1)
    n = len(X)
    system = features @ features.T
    system.diagonal().add_(n * check_positive("ridge", ridge))
    clean = (torch.linalg.solve(system, targets).T @ features).to(model.dtype)
    sensitivity = ridge_sensitivity(n, ridge, bound)
    sigma = gaussian_sigma(sensitivity, epsilon, delta)
    if seed is None:
        generator = torch.Generator()
        generator.seed()
    else:
        generator = stream("noise", check_count("seed", seed, least=0))
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return PrivateRidge(
        theta=clean + (sigma * noise).to(clean),
        clean=clean,
        sensitivity=sensitivity,
        sigma=sigma,
        clipped=float((norms > bound).double().mean()),
    )


def ridge_sensitivity(n: int, ridge: float, bound: float, *, labels: float = 1.0) -> float:
    """Delta: how far ridge regression moves at most when one of n samples is replaced.

    Args:
        n: number of samples.
        ridge: lambda of J.
        bound: B, the largest norm of a feature vector.
        labels: Y, the largest norm of a label.
    """
    n = check_count("n", n)
    ridge, bound = check_positive("ridge", ridge), check_positive("bound", bound)
    labels = check_positive("labels", labels)
    return 2 * bound * labels / (ridge * n) * (1 + bound / (2 * math.sqrt(ridge)))


def gaussian_delta(sensitivity: float, sigma: float, epsilon: float) -> float:
    """The smallest delta at that epsilon for noise N(0, sigma^2 I).

    Phi(D/(2s) - e s/D) - e^e Phi(-D/(2s) - e s/D), exact (Balle and Wang 2018, theorem 8).
    """
    return _delta(_ratio(sensitivity, sigma), check_positive("epsilon", epsilon))


def _ratio(sensitivity: float, sigma: float) -> float:
    """D/s, of numbers above 0."""
    return check_positive("sensitivity", sensitivity) / check_positive("sigma", sigma)


def _delta(ratio: float, epsilon: float) -> float:
    """`gaussian_delta` by D/s, and at epsilon = 0 too: 2 Phi(D/(2s)) - 1."""
    shift = epsilon / ratio
    # Logarithms, since e^epsilon overflows where the second term is of a moderate size.
    first = log_ndtr(ratio / 2 - shift)
    second = epsilon + log_ndtr(-ratio / 2 - shift)
    return max(0.0, float(math.exp(first) * -math.expm1(min(0.0, second - first))))


def gaussian_sigma(sensitivity: float, epsilon: float, delta: float) -> float:
    """The least noise for (epsilon, delta): bisection on `gaussian_delta`.

    Valid for every epsilon, where the older sigma = Delta sqrt(2 ln(1.25 / delta)) / epsilon
    (Dwork and Roth 2014, theorem A.1) is for epsilon below 1 alone.
    """
    check_positive("delta", delta, below=1.0)
    check_positive("epsilon", epsilon)
    sensitivity = check_positive("sensitivity", sensitivity)
    low = high = sensitivity
    while gaussian_delta(sensitivity, high, epsilon) > delta:
        high *= 2
    while gaussian_delta(sensitivity, low, epsilon) <= delta:
        low /= 2
    for _ in range(60):
        middle = math.sqrt(low * high)
        if gaussian_delta(sensitivity, middle, epsilon) > delta:
            low = middle
        else:
            high = middle
    return high


def gaussian_epsilon(sensitivity: float, sigma: float, delta: float) -> float:
    """The smallest epsilon at that delta for noise N(0, sigma^2 I); 0 if delta alone covers it.

    Raises:
        ValueError: for a sensitivity or a sigma that is not above 0, or delta outside (0, 1).
    """
    check_positive("delta", delta, below=1.0)
    if _delta(_ratio(sensitivity, sigma), 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1e-6
    while gaussian_delta(sensitivity, sigma, high) > delta:
        low, high = high, 2 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        if gaussian_delta(sensitivity, sigma, middle) > delta:
            low = middle
        else:
            high = middle
    return high
