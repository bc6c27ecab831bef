"""One cell of identifiability: how many of the unknowns the parameters determine."""

from __future__ import annotations

import torch

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named
from paperlib.data import sphere
from paperlib.identifiability import jacobian_spectrum
from paperlib.law import least_parameters
from paperlib.random_features import RandomFeatures
from paperlib.streams import stream

# How far below the count the search for the smallest p begins.
BELOW = 8


def run_identifiability_cell(
    n: int, d: int, p: int, activation: str = "relu+tanh", outputs: int = 1, seed: int = 0
) -> dict[str, int | float | bool]:
    """Rank and smallest singular value of (X, alpha) -> theta at random data, in float64.

    Data are uniform on the sphere and coefficients N(0, 1). Nothing is trained and nothing is
    attacked: this is what the parameters determine, not what a solver finds.

    Args:
        n: number of samples.
        d: their dimension.
        p: features.
        activation: one of `activation_names()`.
        outputs: C, vectors of parameters with the same features.
        seed: of data, features and coefficients.

    Returns:
        `equations` C p, `unknowns` n (d - 1) + n C, `rank`, `smallest` (of the singular values
        with unit columns), `dead` features, `identified` (full column rank).
    """
    data = sphere(n, d, seed=seed, dtype=torch.float64)
    model = RandomFeatures(d, p, activation, seed=seed, dtype=torch.float64)
    alpha = torch.randn(n, outputs, generator=stream("coefficients", seed), dtype=torch.float64)
    spectrum = jacobian_spectrum(model, data.X, alpha)
    return {
        "equations": spectrum.rows,
        "unknowns": spectrum.columns,
        "rank": spectrum.rank,
        "smallest": spectrum.smallest,
        "dead": spectrum.dead_rows // outputs,
        "identified": spectrum.identified,
    }


def least_identifying_p(
    n: int, d: int, activation: str = "relu+tanh", outputs: int = 1, seed: int = 0, reach: int = 8
) -> dict[str, int | None]:
    """The smallest p at which the Jacobian has full column rank, searched for near the count.

    Args:
        n: number of samples.
        d: their dimension.
        activation: one of `activation_names()`.
        outputs: C.
        seed: of data, features and coefficients.
        reach: p is tried from a few below `predicted`, where counting rules it out, to
            `predicted + reach`. A ReLU needs more than the count: it tells of a sample only at the
            features where it is active.

    Returns:
        `predicted`, `least_parameters(n, d, outputs)`; `p`, the smallest p of full rank, None if
        there is none within reach.
    """
    predicted = least_parameters(n, d, outputs)
    for p in range(max(1, predicted - BELOW), predicted + reach + 1):
        if run_identifiability_cell(n, d, p, activation, outputs, seed)["identified"]:
            return {"predicted": predicted, "p": p}
    return {"predicted": predicted, "p": None}


def check_identifiability_cell(
    n: int, d: int, activation: str, outputs: int, seed: int, p: int = 1, reach: int = 1
) -> None:
    """Refuses values that the cells above cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, d below 2, or an unknown activation.
    """
    for name, value in {"n": n, "p": p, "outputs": outputs, "reach": reach}.items():
        check_count(name, value)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_named("activation", activation, activation_names())
