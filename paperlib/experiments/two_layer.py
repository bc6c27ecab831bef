"""One two-layer network: train both layers on digits, attack through the last one, measure."""

from __future__ import annotations

from paperlib.activations import activation_names
from paperlib.checks import check_named
from paperlib.experiments.network import (
    ATTACK_RESULTS,
    DATA_SETS,
    LABELS,
    Attacked,
    attack_network,
    check_network_options,
    load_data,
    network_results,
    outputs_of,
    width_for,
)
from paperlib.networks import TwoLayer

__all__ = [
    "ATTACK_RESULTS",
    "DATA_SETS",
    "LABELS",
    "Attacked",
    "attack_two_layer",
    "check_two_layer_cell",
    "run_two_layer_cell",
]


def attack_two_layer(
    n: int,
    p_over_dn: float,
    *,
    dataset: str = "digits",
    labels: str = "one-hot",
    layers: str = "all",
    activation: str = "relu",
    seed: int = 0,
    momentum: float = 0.0,
    max_train_steps: int = 20_000,
    restarts: int = 5,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> Attacked:
    """Trains f(x) = W2 act(W1 x) by gradient descent and attacks theta = W2(T) - W2(0).

    Section 5 of arXiv 2509.22214. The attack knows W1(T), theta and n. Weights, data and candidates
    are independent streams of the one seed.

    Args:
        n: number of training samples.
        p_over_dn: last-layer parameters C p per number in the data, d n; the width p is rounded
            to a whole number, at least 1.
        dataset: "digits", "faces", "photographs" or "cifar10".
        labels: "one-hot", C outputs, one for each class; "binary", one output, labels -1 and +1.
        layers: "all" trains W1 and W2, "last" W2 alone.
        activation: one of `activation_names()`.
        seed: of data, weights and candidates.
        momentum: of gradient descent.
        max_train_steps: most steps of gradient descent.
        restarts: most starts of the attack.
        max_steps: most steps of one stage of one start.
        tolerance: projection loss at which no more starts are made.
        device: where to compute, such as "cpu" or "cuda".
    """
    data = load_data(dataset, n, labels=labels, seed=seed)
    C = outputs_of(data)
    width = width_for(data, C, p_over_dn)
    network = TwoLayer(data.d, width, C, activation=activation, seed=seed, device=device)
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


def run_two_layer_cell(
    n: int,
    p_over_dn: float,
    dataset: str = "digits",
    labels: str = "one-hot",
    layers: str = "all",
    activation: str = "relu",
    seed: int = 0,
    momentum: float = 0.0,
    max_train_steps: int = 20_000,
    restarts: int = 5,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> dict[str, float | int | bool | None]:
    """One cell of a sweep over `attack_two_layer`, whose arguments it takes.

    Returns:
        `width` (p) and what `network_results` tells.
    """
    run = attack_two_layer(
        n,
        p_over_dn,
        dataset=dataset,
        labels=labels,
        layers=layers,
        activation=activation,
        seed=seed,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        device=device,
    )
    return {"width": run.network.p} | network_results(run)


def check_two_layer_cell(
    n: int,
    p_over_dn: float,
    dataset: str,
    labels: str,
    layers: str,
    activation: str,
    seed: int,
    momentum: float,
    max_train_steps: int,
    restarts: int,
    max_steps: int,
    tolerance: float,
    device: str,
) -> None:
    """Refuses values that `run_two_layer_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, a ratio that is not positive, a momentum outside [0, 1),
            an unknown name or device.
    """
    check_network_options(
        n=n,
        p_over_dn=p_over_dn,
        dataset=dataset,
        labels=labels,
        layers=layers,
        seed=seed,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        device=device,
    )
    check_named("activation", activation, activation_names())
