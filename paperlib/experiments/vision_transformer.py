"""One vision transformer: trained by gradient descent, attacked through its last layer, measured.

Its last normalisation leaves every token with entries that add up to zero, as long as its gains are
equal and its shifts zero: of the w features of a token w - 1 are free.
`count_transformer_parameters` counts what is left.
"""

from __future__ import annotations

import torch

from paperlib.checks import check_count, check_range
from paperlib.data import DataSet, digits
from paperlib.experiments.classification import DATA_SETS, labelled_data
from paperlib.experiments.network import (
    Attacked,
    attack_network,
    check_network_options,
    network_results,
    outputs_of,
    width_for,
)
from paperlib.identifiability import coefficients, jacobian_spectrum
from paperlib.law import unknowns
from paperlib.networks import VisionTransformer
from paperlib.training import train

__all__ = [
    "DATA_SETS",
    "attack_transformer",
    "check_transformer_cell",
    "count_tokens",
    "count_transformer_parameters",
    "run_transformer_cell",
    "transformer",
]


def count_tokens(data: DataSet, patch: int) -> int:
    """Patches of a picture, each a token that the last layer reads.

    Raises:
        ValueError: if the patch does not divide the picture.
    """
    height, wide = data.image_shape[:2]
    if height % patch or wide % patch:
        raise ValueError(f"patch must divide {height} and {wide}, got {patch}")
    return (height // patch) * (wide // patch)


def transformer(
    data: DataSet,
    p_over_dn: float,
    *,
    patch: int = 4,
    depth: int = 1,
    heads: int = 4,
    head_scale: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> VisionTransformer:
    """A transformer whose last layer, which reads all tokens, has about p_over_dn d n parameters.

    The width of a token is rounded to a multiple of `heads`, at least one.

    Args:
        data: what it is to learn; gives the shape of pictures and the number of outputs.
        p_over_dn: last-layer parameters C p per number in the data.
        patch: side of a patch in pixels.
        depth: encoder layers.
        heads: attention heads.
        head_scale: standard deviation of the last layer at initialisation over the paper's.
        seed: of the weights.
        device: where to compute.
    """
    C = outputs_of(data)
    width = heads * width_for(data, C, p_over_dn, positions=heads * count_tokens(data, patch))
    network = VisionTransformer(
        data.image_shape,
        width,
        C,
        patch=patch,
        depth=depth,
        heads=heads,
        seed=seed,
        device=device,
    )
    network.scale_head(head_scale)
    return network


def attack_transformer(
    n: int,
    p_over_dn: float,
    *,
    dataset: str = "digits",
    outputs: int = 4,
    layers: str = "all",
    patch: int = 4,
    depth: int = 1,
    heads: int = 4,
    head_scale: float = 1.0,
    seed: int = 0,
    momentum: float = 0.0,
    max_train_steps: int = 20_000,
    restarts: int = 3,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> Attacked:
    """Trains a transformer by gradient descent and attacks its last layer.

    The attack knows the layers below the last as trained, theta = W(T) - W(0) and n (arXiv
    2509.22214, Section 5 and the appendix on other networks). Weights, data and candidates are
    independent streams of the one seed.

    Args:
        n: number of training samples.
        p_over_dn: last-layer parameters C p per number in the data, d n, where p counts the
            activations of all tokens.
        dataset: "digits", "photographs" or "cifar10".
        outputs: C; 1 for labels -1 and +1, else the first C classes, one-hot.
        layers: "all", or "last" to train the last layer alone.
        patch: side of a patch in pixels.
        depth: encoder layers.
        heads: attention heads.
        head_scale: standard deviation of the last layer at initialisation over the paper's.
        seed: of data, weights and candidates.
        momentum: of gradient descent.
        max_train_steps: most steps of gradient descent.
        restarts: most starts of the attack.
        max_steps: most steps of one stage of one start.
        tolerance: projection loss at which no more starts are made.
        device: where to compute, such as "cpu" or "cuda".
    """
    data = labelled_data(dataset, n, outputs, seed=seed)
    network = transformer(
        data,
        p_over_dn,
        patch=patch,
        depth=depth,
        heads=heads,
        head_scale=head_scale,
        seed=seed,
        device=device,
    )
    return attack_network(
        data,
        network,
        layers=layers,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
    )


def run_transformer_cell(
    n: int,
    p_over_dn: float,
    dataset: str = "digits",
    outputs: int = 4,
    layers: str = "all",
    patch: int = 4,
    depth: int = 1,
    heads: int = 4,
    head_scale: float = 1.0,
    seed: int = 0,
    momentum: float = 0.0,
    max_train_steps: int = 20_000,
    restarts: int = 3,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> dict[str, float | int | bool | list[float] | None]:
    """One cell of a sweep over `attack_transformer`, whose arguments it takes.

    Returns:
        `tokens`, `width` (of a token), what `network_results` tells (but C, which is an argument
        here), and, None where p < n, `near` (samples with a signed error of at most 0.2),
        `errors` (signed, sample by sample) and `matched` (the reconstruction of each sample).
    """
    run = attack_transformer(
        n,
        p_over_dn,
        dataset=dataset,
        outputs=outputs,
        layers=layers,
        patch=patch,
        depth=depth,
        heads=heads,
        head_scale=head_scale,
        seed=seed,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        device=device,
    )
    tokens = count_tokens(run.data, patch)
    result = {"tokens": tokens, "width": run.network.p // tokens} | network_results(run)
    del result["outputs"]
    if run.record is None:
        return result | dict.fromkeys(("near", "errors", "matched"))
    return result | {
        "near": run.errors.recovered(0.2),
        "errors": run.errors.signed.tolist(),
        "matched": run.errors.matched.tolist(),
    }


def check_transformer_cell(
    n: int,
    p_over_dn: float,
    dataset: str,
    outputs: int,
    layers: str,
    patch: int,
    depth: int,
    heads: int,
    head_scale: float,
    seed: int,
    momentum: float,
    max_train_steps: int,
    restarts: int,
    max_steps: int,
    tolerance: float,
    device: str,
) -> None:
    """Refuses values that `run_transformer_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, a number outside its range, more outputs than the data
            have classes, an unknown name or device. A patch that does not divide the picture is
            found when the picture is loaded.
    """
    check_network_options(
        n=n,
        p_over_dn=p_over_dn,
        dataset=dataset,
        labels="one-hot",
        layers=layers,
        seed=seed,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        device=device,
        data_sets=DATA_SETS,
    )
    counts = {"outputs": outputs, "patch": patch, "depth": depth, "heads": heads}
    for name, value in counts.items():
        check_count(name, value)
    most = len(DATA_SETS[dataset][1])
    if outputs > most:
        raise ValueError(f"{dataset} have {most} classes, got outputs = {outputs}")
    check_range("head_scale", head_scale, least=0)


def count_transformer_parameters(
    n: int,
    width: int,
    outputs: int = 1,
    *,
    patch: int = 4,
    depth: int = 1,
    layers: str = "last",
    seed: int = 0,
) -> dict[str, int | float | bool]:
    """How many equations the last layer of a trained transformer gives: the rank of (X, alpha).

    The features of a token are z_k = gamma_k (h_k - mean h) / std h + beta_k, so

        sum_k z_k / gamma_k = sum_k beta_k / gamma_k,

    the same for every token and every sample, since tokens share gamma and beta. With beta = 0,
    as at initialisation, that is one linear relation between the p features for each token; once
    beta has moved the differences between tokens are left, one fewer. A row of theta, which is a
    sum of features, obeys the same ones.

    Args:
        n: number of digits, at least C.
        width: of a token; the transformer has one attention head.
        outputs: C.
        patch: side of a patch in pixels, a divisor of 8.
        depth: encoder layers.
        layers: "last", the last layer alone is trained, or "all".
        seed: of data and weights.

    Returns:
        `tokens`, `p`, `outputs`, `equations` (C p), `relations` (linear ones between the p
        features, as above), `free` (equations - C relations), `unknowns` (n (d - 1) + n C);
        then what is counted and not predicted, `rank` of the Jacobian at the data, and
        `identified`, whether that is as large as `unknowns`.
    """
    classes = {} if outputs == 1 else {"classes": range(outputs), "labels": "one-hot"}
    data = digits(n, seed=seed, dtype=torch.float64, **classes)
    tokens = count_tokens(data, patch)
    network = VisionTransformer(
        data.image_shape,
        width,
        outputs,
        patch=patch,
        depth=depth,
        heads=1,
        seed=seed,
        dtype=torch.float64,
    )
    training = train(network, data.X, data.y, layers=layers, max_steps=2000)
    alpha = coefficients(training.features, training.theta, data.X)
    spectrum = jacobian_spectrum(training.features, data.X, alpha)
    relations = tokens - (layers == "all")
    return {
        "tokens": tokens,
        "p": network.p,
        "outputs": outputs,
        "equations": spectrum.rows,
        "relations": relations,
        "free": spectrum.rows - outputs * relations,
        "unknowns": unknowns(n, data.d, outputs),
        "rank": spectrum.rank,
        "identified": spectrum.identified,
    }
