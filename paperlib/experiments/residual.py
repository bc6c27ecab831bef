"""One residual network: train all layers on digits, attack through the last one, measure."""

from __future__ import annotations

from copy import deepcopy

from paperlib.checks import check_count, check_positive, check_range
from paperlib.data import DataSet
from paperlib.experiments.network import (
    DATA_SETS,
    Attacked,
    attack_network,
    check_network_options,
    features_between,
    load_data,
    network_results,
    outputs_of,
    width_for,
)
from paperlib.networks import ResNet
from paperlib.networks.residual import POSITIONS
from paperlib.projection import Linearization
from paperlib.training import TARGET, train

__all__ = [
    "DATA_SETS",
    "attack_residual",
    "check_drift_cell",
    "check_residual_cell",
    "residual_network",
    "run_drift_cell",
    "run_residual_cell",
]


def residual_network(
    data: DataSet,
    p_over_dn: float,
    *,
    blocks: int = 4,
    head_scale: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> ResNet:
    """The network of the paper whose last layer has about p_over_dn d n parameters.

    The width is rounded to whole channels of 7 x 7 positions each, at least 1.

    Args:
        data: what it is to learn; gives the shape of pictures and the number of outputs.
        p_over_dn: last-layer parameters C p per number in the data.
        blocks: residual blocks.
        head_scale: standard deviation of the last layer at initialisation over the paper's.
        seed: of the weights.
        device: where to compute.
    """
    C = outputs_of(data)
    width = width_for(data, C, p_over_dn, positions=POSITIONS**2)
    network = ResNet(data.image_shape, width, C, blocks=blocks, seed=seed, device=device)
    network.scale_head(head_scale)
    return network


def attack_residual(
    n: int,
    p_over_dn: float,
    *,
    dataset: str = "digits",
    labels: str = "binary",
    layers: str = "all",
    blocks: int = 4,
    head_scale: float = 1.0,
    known: float = 1.0,
    seed: int = 0,
    momentum: float = 0.0,
    max_train_steps: int = 20_000,
    restarts: int = 3,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> Attacked:
    """Trains a residual network by gradient descent and attacks its last layer.

    Section 5 of arXiv 2509.22214, where pictures are standardised by channel, as here. The attack
    knows the layers below the last, theta = W(T) - W(0) and n. Weights, data and candidates are
    independent streams of the one seed.

    Args:
        n: number of training samples.
        p_over_dn: last-layer parameters C p per number in the data, d n.
        dataset: "digits", "faces", "photographs" or "cifar10".
        labels: "binary", one output, labels -1 and +1; "one-hot", one output for each class.
        layers: "all", or "last" to train the last layer alone.
        blocks: residual blocks of two convolutions.
        head_scale: standard deviation of the last layer at initialisation over the paper's.
        known: which layers below the last the attack uses: 1 for the trained ones, as in the
            paper, 0 for those at initialisation, and weights in between on the straight line.
        seed: of data, weights and candidates.
        momentum: of gradient descent.
        max_train_steps: most steps of gradient descent.
        restarts: most starts of the attack.
        max_steps: most steps of one stage of one start.
        tolerance: projection loss at which no more starts are made.
        device: where to compute, such as "cpu" or "cuda".
    """
    data = load_data(dataset, n, labels=labels, seed=seed, per_channel=True)
    network = residual_network(
        data, p_over_dn, blocks=blocks, head_scale=head_scale, seed=seed, device=device
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
        known=known,
    )


def run_residual_cell(
    n: int,
    p_over_dn: float,
    dataset: str = "digits",
    labels: str = "binary",
    layers: str = "all",
    blocks: int = 4,
    head_scale: float = 1.0,
    known: float = 1.0,
    seed: int = 0,
    momentum: float = 0.0,
    max_train_steps: int = 20_000,
    restarts: int = 3,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> dict[str, float | int | bool | list[float] | None]:
    """One cell of a sweep over `attack_residual`, whose arguments it takes.

    Returns:
        `width` (channels), what `network_results` tells, and, None where p < n, `near` (samples
        with a signed error below 0.2), `errors` (signed, sample by sample), `shares` (how much
        the projection loss at the trained features rises without each sample) and `matched`
        (the reconstruction of each sample).
    """
    run = attack_residual(
        n,
        p_over_dn,
        dataset=dataset,
        labels=labels,
        layers=layers,
        blocks=blocks,
        head_scale=head_scale,
        known=known,
        seed=seed,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        device=device,
    )
    result = {"width": run.network.p // POSITIONS**2} | network_results(run)
    if run.record is None:
        return result | dict.fromkeys(("near", "errors", "shares", "matched"))
    return result | {
        "near": run.errors.recovered(0.2),
        "errors": run.errors.signed.tolist(),
        "shares": run.training.shares.tolist(),
        "matched": run.errors.matched.tolist(),
    }


def check_residual_cell(
    n: int,
    p_over_dn: float,
    dataset: str,
    labels: str,
    layers: str,
    blocks: int,
    head_scale: float,
    known: float,
    seed: int,
    momentum: float,
    max_train_steps: int,
    restarts: int,
    max_steps: int,
    tolerance: float,
    device: str,
) -> None:
    """Refuses values that `run_residual_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, a ratio that is not positive, a momentum outside [0, 1),
            a share outside [0, 1], an unknown name or device.
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
    check_count("blocks", blocks)
    check_share("known", known)
    check_range("head_scale", head_scale, least=0)


def run_drift_cell(
    n: int,
    p_over_dn: float,
    dataset: str = "digits",
    labels: str = "binary",
    blocks: int = 4,
    head_scale: float = 1.0,
    step_scale: float = 1.0,
    momentum: float = 0.0,
    target: float = TARGET,
    max_train_steps: int = 20_000,
    known: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, float | int | bool | list[float]]:
    """Trains a residual network on all layers and tells what bounds an attack, without making one.

    Args:
        n: number of training samples.
        p_over_dn: last-layer parameters C p per number in the data, d n.
        dataset: "digits", "faces", "photographs" or "cifar10".
        labels: "binary" or "one-hot".
        blocks: residual blocks of two convolutions.
        head_scale: standard deviation of the last layer at initialisation over the paper's.
        step_scale: step size of training times the largest curvature.
        momentum: of gradient descent.
        target: training loss at which to stop.
        max_train_steps: most steps of gradient descent.
        known: for which shares of the way from the initial to the trained weights of the layers
            below the last to take features.
        seed: of data and weights.
        device: where to compute, such as "cpu" or "cuda".

    Returns:
        `width`, `parameters`, `training_loss`, `trained`, `training_steps`, `drift`,
        `residual_at_truth`, `weakest` (the smallest share of a sample over that residual) and
        `residuals`, the residual at the truth for each of `known`.
    """
    data = load_data(dataset, n, labels=labels, seed=seed, per_channel=True)
    network = residual_network(
        data, p_over_dn, blocks=blocks, head_scale=head_scale, seed=seed, device=device
    )
    start = deepcopy(network.body.state_dict())
    X, y = data.X.to(device), data.y.to(device)
    training = train(
        network,
        X,
        y,
        target=target,
        max_steps=max_train_steps,
        momentum=momentum,
        step_scale=step_scale,
    )
    residuals = [
        Linearization(features_between(network, start, share), training.theta, X).loss
        for share in known
    ]
    return {
        "width": network.p // POSITIONS**2,
        "parameters": network.last_layer_parameters,
        "training_loss": training.loss,
        "trained": training.reached,
        "training_steps": training.steps,
        "drift": training.drift,
        "residual_at_truth": training.residual_at_truth,
        "weakest": float(training.shares.min()) / training.residual_at_truth,
        "residuals": residuals,
    }


def check_drift_cell(
    n: int,
    p_over_dn: float,
    dataset: str,
    labels: str,
    blocks: int,
    head_scale: float,
    step_scale: float,
    momentum: float,
    target: float,
    max_train_steps: int,
    known: tuple[float, ...],
    seed: int,
    device: str,
) -> None:
    """Refuses values that `run_drift_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: as `check_residual_cell`, and for a step that gradient descent cannot take.
    """
    check_residual_cell(
        n=n,
        p_over_dn=p_over_dn,
        dataset=dataset,
        labels=labels,
        layers="all",
        blocks=blocks,
        head_scale=head_scale,
        known=1.0,
        seed=seed,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=1,
        max_steps=1,
        tolerance=0.5,
        device=device,
    )
    check_positive("step_scale", step_scale, below=2.0)
    check_positive("target", target)
    for share in known:
        check_share("known", share)


def check_share(name: str, value: float) -> None:
    """Refuses what is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
