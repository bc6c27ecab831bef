"""The posterior of tied samples against conditioning one joint Gaussian."""

import torch

from paperlib.input_channel import tied_posterior

DOUBLE = torch.float64


def test_the_posterior_is_that_of_a_joint_gaussian():
    """x ~ N(0, I); seen are x + noise and mu alpha^T x + noise: condition by Schur complements."""
    n, C, mu = 4, 2, 0.7
    generator = torch.Generator().manual_seed(0)
    alpha = torch.randn(n, C, generator=generator, dtype=DOUBLE)
    S = torch.tensor([0.1, 0.5, 2.0, 30.0], dtype=DOUBLE)
    root = torch.randn(C, C, generator=generator, dtype=DOUBLE)
    S_L = root @ root.T + 0.1 * torch.eye(C, dtype=DOUBLE)
    seen = torch.cat([torch.eye(n, dtype=DOUBLE), mu * alpha.T])  # observations of x
    noise = torch.block_diag(torch.diag(S), S_L)
    gain = seen.T @ torch.linalg.inv(seen @ seen.T + noise)

    covariance, tie = tied_posterior(S, S_L, alpha, mu)
    torch.testing.assert_close(covariance, torch.eye(n, dtype=DOUBLE) - gain @ seen)
    observed = torch.randn(n + C, generator=generator, dtype=DOUBLE)
    mean = covariance @ (observed[:n] / S + tie @ observed[n:])
    torch.testing.assert_close(mean, gain @ observed)


def test_a_sharp_linear_part_fixes_the_weighted_sum_of_the_samples():
    alpha = torch.tensor([[1.0], [-2.0], [0.5]])
    free, _ = tied_posterior(torch.full((3,), 1e6), torch.tensor([[1e6]]), alpha, 0.5)
    torch.testing.assert_close(free, torch.eye(3, dtype=DOUBLE), rtol=0, atol=1e-4)
    tied, _ = tied_posterior(torch.full((3,), 1e6), torch.tensor([[1e-8]]), alpha, 0.5)
    weights = alpha[:, 0].double()
    assert float(weights @ tied @ weights) < 1e-6
    assert abs(float(tied.trace()) - 2) < 1e-3  # one direction of three is known
