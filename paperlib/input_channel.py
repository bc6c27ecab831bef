"""What is believed about samples, given what all features say: the input channel.

Message passing boils the features down to R_i = x_i + noise of variance S_i for each sample, and
R_L = the linear part + noise of covariance S_L. The prior is x_i ~ N(0, I), and the linear part is
no further unknown but mu_1 sum_i alpha_i x_i: it *ties* the samples to one another. Everything is
Gaussian and alike in all d coordinates, so the posterior has one covariance over the samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tied_posterior(S: Tensor, S_L: Tensor, alpha: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Covariance over samples, and the factor with which the linear part enters the mean.

    The mean is covariance (R / S + tie R_L).

    Args:
        S: (n,) variances.
        S_L: (C, C) covariance.
        alpha: (n, C) coefficients.
        mu: mu_1.

    Returns:
        (n, n) and (n, C), both float64.
    """
    tie = mu * torch.linalg.solve(S_L.double(), alpha.double().T).T
    precision = torch.diag(1 + 1 / S.double()) + mu * tie @ alpha.double().T
    return torch.linalg.inv(precision), tie
