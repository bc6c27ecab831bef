"""One two-layer network: train both layers on digits, attack through the last one, measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_positive
from paperlib.compare import Comparison, compare
from paperlib.data import DataSet, cifar10, digits, faces, photographs
from paperlib.networks import TwoLayer
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.training import LAYERS, Training, train

DATA_SETS = {"digits": digits, "faces": faces, "photographs": photographs, "cifar10": cifar10}

LABELS = ("one-hot", "binary")

# What a cell with fewer features than samples cannot have: their span holds any theta.
ATTACK_RESULTS = (
    "residual_at_truth",
    "signed_error",
    "up_to_sign_error",
    "published_error",
    "largest_error",
    "recovered",
    "projection_loss",
    "explained",
    "attack_seconds",
)


@dataclass(frozen=True)
class Attacked:
    """A trained network and what was read back from it.

    Attributes:
        data: the training data.
        network: after training.
        training: what training left.
        record: of the attack; None for a network with fewer neurons than samples.
        errors: the samples matched with the data; None as `record`.
    """

    data: DataSet
    network: TwoLayer
    training: Training
    record: Reconstruction | None
    errors: Comparison | None


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
    data = DATA_SETS[dataset](n, labels=labels, seed=seed)
    X, y = data.X.to(device), data.y.to(device)
    outputs = y.shape[1] if y.ndim == 2 else 1
    width = max(1, round(p_over_dn * data.d * n / outputs))
    network = TwoLayer(data.d, width, outputs, activation=activation, seed=seed, device=device)
    training = train(network, X, y, layers=layers, momentum=momentum, max_steps=max_train_steps)
    if width < n:
        return Attacked(data, network, training, None, None)
    record = reconstruct(
        training.features,
        training.theta,
        n,
        seed=seed,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
    )
    return Attacked(data, network, training, record, compare(data.X, record.samples))


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
        `d`, `outputs` (C), `width` (p), `parameters` (C p, of the last layer), `numbers` (what
        must be found: n (d - 1) for directions and n C for coefficients), `training_loss`,
        `relative_loss` (1 for a model that says zero), `trained` (whether the loss reached
        1e-7), `training_steps`, `drift` (relative move of the data's features) and
        `training_seconds`; then, None where p < n, `residual_at_truth`, `signed_error`,
        `up_to_sign_error`, `published_error` (means of `compare`), `largest_error` (signed, of
        the worst sample), `recovered` (signed error at most 0.05), `projection_loss`,
        `explained` (whether it is below `tolerance`) and `attack_seconds`.
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
    d, C, width = run.data.d, run.network.outputs, run.network.p
    result = {
        "d": d,
        "outputs": C,
        "width": width,
        "parameters": C * width,
        "numbers": n * (d - 1 + C),
        "training_loss": run.training.loss,
        "relative_loss": run.training.loss / float(run.data.y.double().square().mean()),
        "trained": run.training.reached,
        "training_steps": run.training.steps,
        "drift": run.training.drift,
        "training_seconds": run.training.seconds,
    }
    if run.record is None:
        return result | dict.fromkeys(ATTACK_RESULTS)
    return result | {
        "residual_at_truth": run.training.residual_at_truth,
        "signed_error": run.errors.signed_error,
        "up_to_sign_error": run.errors.up_to_sign_error,
        "published_error": run.errors.published_error,
        "largest_error": float(run.errors.signed.max()),
        "recovered": run.errors.recovered(),
        "projection_loss": run.record.loss,
        "explained": run.record.explained,
        "attack_seconds": run.record.seconds,
    }


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
    counts = {
        "n": n,
        "max_train_steps": max_train_steps,
        "restarts": restarts,
        "max_steps": max_steps,
    }
    for name, value in counts.items():
        check_count(name, value)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    check_positive("tolerance", tolerance, below=1.0)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    for name, value, known in (
        ("dataset", dataset, tuple(DATA_SETS)),
        ("labels", labels, LABELS),
        ("layers", layers, LAYERS),
        ("activation", activation, activation_names()),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one that PyTorch knows, got {device!r}") from error
