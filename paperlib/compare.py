"""How close reconstructed samples come to the training data: matching, and the paper's error.

Every error is a distance between a training sample x_i and the candidate matched to it, relative
to sqrt(d), the radius of the sphere on which both lie:

    signed       || x_i - x^_j || / sqrt(d)                      the honest one, and the default
    up to sign   min(|| x_i - x^_j ||, || x_i + x^_j ||) / sqrt(d)
    published    || |x_i| - |x^_j| || / sqrt(d)                  absolute values by coordinate

The published error (appendix of arXiv 2509.22214) never exceeds the one up to sign, which never
exceeds the signed one; it also forgives a wrong sign of every single coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from paperlib.checks import check_count, check_finite, check_positive

ERRORS = ("signed", "up_to_sign", "published")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """n training samples compared with m reconstructed ones.

    For each error the candidates are matched one to one so that the sum of that error is least
    (Hungarian algorithm). With fewer candidates than samples, m < n, some samples stay without a
    partner: their error is the distance to the nearest candidate, whoever that belongs to, and
    they never count as recovered. With m > n the superfluous candidates are left out.

    Attributes:
        signed: (n,) signed error of each training sample.
        up_to_sign: (n,) error up to one sign for each sample.
        published: (n,) the paper's error, coordinate-wise absolute values.
        matching: (n,) row of `samples` matched to each training sample by the signed error; -1
            where none was left.
        matching_up_to_sign: the same by the error up to sign.
        matching_published: the same by the published error.
        nearest: (n,) signed distance to the nearest candidate, whether or not matched to it.
        matched: (n, d) row i is the sample matched to x_i by the signed error, or the nearest one
            where `matching` is -1. Show it by `data.images(comparison.matched, index=range(n))`.
        matched_up_to_sign: (n, d) the same by the error up to sign, each turned to the sign that
            agrees with x_i.
        candidates: m.
    """

    signed: np.ndarray
    up_to_sign: np.ndarray
    published: np.ndarray
    matching: np.ndarray
    matching_up_to_sign: np.ndarray
    matching_published: np.ndarray
    nearest: np.ndarray
    matched: Tensor
    matched_up_to_sign: Tensor
    candidates: int

    @property
    def n(self) -> int:
        """Number of training samples."""
        return len(self.signed)

    @property
    def signed_error(self) -> float:
        """Mean signed error."""
        return float(self.signed.mean())

    @property
    def up_to_sign_error(self) -> float:
        """Mean error up to one sign for each sample."""
        return float(self.up_to_sign.mean())

    @property
    def published_error(self) -> float:
        """Mean of the paper's error."""
        return float(self.published.mean())

    def recovered(self, tolerance: float = 0.05, error: str = "signed") -> int:
        """How many training samples have a partner with an error of at most `tolerance`.

        Args:
            tolerance: largest error, relative to sqrt(d).
            error: "signed", "up_to_sign" or "published".

        Raises:
            ValueError: for a tolerance that is not a positive number, or an unknown error.
        """
        tolerance = check_positive("tolerance", tolerance)
        errors, matching = self._of(error)
        return int(((errors <= tolerance) & (matching >= 0)).sum())

    def summary(self, tolerance: float = 0.05) -> str:
        """A short table of the three errors."""
        lines = [
            f"{self.n} training samples, {self.candidates} reconstructed",
            f"{'error / sqrt(d)':<16}{'mean':>10}{'median':>10}{'largest':>10}{'recovered':>12}",
        ]
        for error in ERRORS:
            values, _ = self._of(error)
            count = f"{self.recovered(tolerance, error)} of {self.n}"
            lines.append(
                f"{error.replace('_', ' '):<16}{values.mean():>10.2g}{np.median(values):>10.2g}"
                f"{values.max():>10.2g}{count:>12}"
            )
        lines.append(f"recovered: error at most {tolerance:g}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The table of `summary`."""
        return self.summary()

    def __repr__(self) -> str:
        """One line: how many samples came back, and how well."""
        return (
            f"Comparison({self.recovered()} of {self.n} recovered, signed error "
            f"{self.signed_error:.2g})"
        )

    def _of(self, error: str) -> tuple[np.ndarray, np.ndarray]:
        if error not in ERRORS:
            raise ValueError(f"error must be one of {', '.join(ERRORS)}, got {error!r}")
        matching = self.matching if error == "signed" else getattr(self, f"matching_{error}")
        return getattr(self, error), matching


def compare(X: Tensor, samples: Tensor) -> Comparison:
    """Matches reconstructed samples to training samples and measures the three errors.

    Computed in float64 on the CPU, whatever the inputs are.

    Args:
        X: (n, d) training samples, ||x_i|| = sqrt(d).
        samples: (m, d) reconstructed samples in any order; m may differ from n.

    Returns:
        A Comparison; its `matched` has the dtype and device of `samples`.

    Raises:
        TypeError: when X or samples is not a tensor.
        ValueError: when shapes do not fit, either has no rows, or an entry is NaN or infinite.
    """
    for name, value in (("X", X), ("samples", samples)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(f"{name} must have shape (rows, d), got {tuple(value.shape)}")
        check_finite(name, value)
    if samples.shape[1] != X.shape[1]:
        raise ValueError(
            f"samples must have the dimension of X, d = {X.shape[1]}, got {samples.shape[1]}"
        )
    x = X.detach().to("cpu", torch.float64).numpy()
    s = samples.detach().to("cpu", torch.float64).numpy()

    distances = _distances(x, s)
    signed, partner, matching = _match(distances["signed"])
    up_to_sign, partner_up_to_sign, matching_up_to_sign = _match(distances["up_to_sign"])
    published, _, matching_published = _match(distances["published"])
    matched_up_to_sign = samples.detach()[partner_up_to_sign]
    agrees = (x * s[partner_up_to_sign]).sum(axis=1) >= 0
    signs = torch.from_numpy(np.where(agrees, 1.0, -1.0)).to(matched_up_to_sign)
    return Comparison(
        signed=signed,
        up_to_sign=up_to_sign,
        published=published,
        matching=matching,
        matching_up_to_sign=matching_up_to_sign,
        matching_published=matching_published,
        nearest=distances["signed"].min(axis=1),
        matched=samples.detach()[partner],
        matched_up_to_sign=signs[:, None] * matched_up_to_sign,
        candidates=len(s),
    )


@dataclass(frozen=True)
class Baseline:
    """The errors that random candidates reach, after matching."""

    signed: float
    up_to_sign: float
    published: float


def random_baseline(
    n: int, d: int, *, X: Tensor | None = None, seed: int = 0, draws: int = 10
) -> Baseline:
    """What random candidates score: the line above which an attack has found nothing.

    Simulated: n random directions on the sphere are matched to n training samples, which are
    random directions too unless X is given (for pictures the published error is a little
    different), and the mean errors are averaged over the draws.

    Args:
        n: number of training samples and of candidates.
        d: dimension.
        X: (n, d) the training samples themselves.
        seed: of the simulation.
        draws: number of simulated attacks.

    Raises:
        ValueError: when a count is below 1 or X has another shape.
    """
    n, d, draws = check_count("n", n), check_count("d", d), check_count("draws", draws)
    if X is not None and tuple(X.shape) != (n, d):
        raise ValueError(f"X must have shape ({n}, {d}), got {tuple(X.shape)}")
    rng = np.random.default_rng(check_count("seed", seed, least=0))

    def directions() -> np.ndarray:
        rows = rng.standard_normal((n, d))
        return rows * (math.sqrt(d) / np.linalg.norm(rows, axis=1, keepdims=True))

    fixed = None if X is None else X.detach().to("cpu", torch.float64).numpy()
    means = []
    for _ in range(draws):
        x = directions() if fixed is None else fixed
        distances = _distances(x, directions())
        means.append([_match(distances[error])[0].mean() for error in ERRORS])
    return Baseline(*(float(mean) for mean in np.mean(means, axis=0)))


def _distances(x: np.ndarray, s: np.ndarray) -> dict[str, np.ndarray]:
    """The three errors of every pair, each (n, m), from differences and so exact near zero."""
    radius = math.sqrt(x.shape[1])
    signed = cdist(x, s) / radius
    return {
        "signed": signed,
        "up_to_sign": np.minimum(signed, cdist(x, -s) / radius),
        "published": cdist(np.abs(x), np.abs(s)) / radius,
    }


def _match(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One-to-one matching of least total cost.

    Returns:
        For each row its error, the column it is measured from (the nearest where none was left),
        and the matching with -1 where none was left.
    """
    rows, columns = linear_sum_assignment(cost)
    matching = np.full(len(cost), -1)
    matching[rows] = columns
    partner = np.where(matching >= 0, matching, cost.argmin(axis=1))
    return cost[np.arange(len(cost)), partner], partner, matching
