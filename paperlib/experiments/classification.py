"""One classifier: a two-layer network trained by logistic loss or cross-entropy, and attacked."""

from __future__ import annotations

import torch

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive, check_range
from paperlib.data import DataSet, cifar10, digits, photographs
from paperlib.data.cifar10 import CLASSES as CIFAR10_CLASSES
from paperlib.data.photographs import SOURCES as PHOTOGRAPHS
from paperlib.experiments.device_name import check_device_name
from paperlib.experiments.network import Attacked, attack_network, width_for
from paperlib.identifiability import coefficients, jacobian_spectrum
from paperlib.law import independent_rows, least_parameters, unknowns
from paperlib.losses import loss_named
from paperlib.networks import TwoLayer
from paperlib.releases import combine_releases
from paperlib.training import LAYERS, train

LOSSES = ("logistic", "cross-entropy", "squared")

# A loader, and its classes in the order in which a classifier of C outputs takes them.
DATA_SETS = {
    "digits": (digits, tuple(range(10))),
    "photographs": (photographs, tuple(PHOTOGRAPHS)),
    "cifar10": (cifar10, CIFAR10_CLASSES),
}

# What a cell with fewer features than samples cannot have: their span holds any theta.
ATTACK_RESULTS = (
    "residual_at_truth",
    "weakest_share",
    "signed_error",
    "largest_error",
    "recovered",
    "projection_loss",
    "attack_seconds",
)


def labelled_data(dataset: str, n: int, outputs: int, *, seed: int = 0) -> DataSet:
    """Draw n samples of two classes with labels -1 and +1 (one output), or of C classes, one-hot.

    Args:
        dataset: "digits", "photographs" or "cifar10".
        n: number of samples.
        outputs: 1 for the binary labels of the loader, else C, the first C classes.
        seed: chooses the samples.
    """
    load, classes = DATA_SETS[dataset]
    if outputs == 1:
        return load(n, seed=seed)
    return load(n, classes=classes[:outputs], labels="one-hot", seed=seed)


def attack_classifier(
    n: int,
    p_over_dn: float,
    *,
    loss: str = "logistic",
    outputs: int = 1,
    layers: str = "all",
    dataset: str = "digits",
    activation: str = "relu",
    seed: int = 0,
    target: float = 1e-7,
    momentum: float = 0.9,
    max_train_steps: int = 20_000,
    restarts: int = 5,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> Attacked:
    """Trains f(x) = W2 act(W1 x) as a classifier and attacks theta = W2(T) - W2(0).

    The attack knows W1(T), theta and n. Weights, data and candidates are independent streams of
    the one seed.

    Args:
        n: number of training samples.
        p_over_dn: last-layer parameters C p per number in the data, d n; the width p is rounded
            to a whole number, at least 1.
        loss: "logistic" (one output), "cross-entropy" (2 outputs or more) or "squared".
        outputs: C.
        layers: "all" trains W1 and W2, "last" W2 alone.
        dataset: as in `labelled_data`.
        activation: one of `activation_names()`.
        seed: of data, weights and candidates.
        target: training loss at which training ends. Losses of classifiers have no minimum: the
            target decides how long they are trained.
        momentum: of gradient descent.
        max_train_steps: most steps of gradient descent.
        restarts: most starts of the attack.
        max_steps: most steps of one stage of one start.
        tolerance: projection loss at which no more starts are made.
        device: where to compute, such as "cpu" or "cuda".
    """
    data = labelled_data(dataset, n, outputs, seed=seed)
    width = width_for(data, outputs, p_over_dn)
    network = TwoLayer(data.d, width, outputs, activation=activation, seed=seed, device=device)
    return attack_network(
        data,
        network,
        loss=loss,
        layers=layers,
        target=target,
        momentum=momentum,
        max_train_steps=max_train_steps,
        start="auto",
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
    )


def run_classification_cell(
    n: int,
    p_over_dn: float,
    loss: str = "logistic",
    outputs: int = 1,
    layers: str = "all",
    dataset: str = "digits",
    activation: str = "relu",
    seed: int = 0,
    target: float = 1e-7,
    momentum: float = 0.9,
    max_train_steps: int = 20_000,
    restarts: int = 5,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> dict[str, float | int | bool | None]:
    """One cell of a sweep over `attack_classifier`, whose arguments it takes.

    Returns:
        `d`, `width` (p), `parameters` (C p, of the last layer), `independent` (the rank of theta:
        with cross-entropy one row is minus the sum of the others), `numbers` (what must be found,
        n (d - 1) for directions and n for the coefficients of each independent row),
        `training_loss`, `relative_loss` (1 for a model that says zero), `trained` (whether the
        loss reached the target), `training_steps`, `norm` (||theta|| / ||theta_0||), `drift`
        (relative move of the data's features) and `training_seconds`; then, None where p < n,
        `residual_at_truth`, `weakest_share` (the smallest share of a sample over the mean share),
        `signed_error` (mean of `compare`), `largest_error` (of the worst sample), `recovered`
        (signed error at most 0.05), `projection_loss` and `attack_seconds`.
    """
    run = attack_classifier(
        n,
        p_over_dn,
        loss=loss,
        outputs=outputs,
        layers=layers,
        dataset=dataset,
        activation=activation,
        seed=seed,
        target=target,
        momentum=momentum,
        max_train_steps=max_train_steps,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        device=device,
    )
    chosen, training = loss_named(loss), run.training
    targets = chosen.targets(run.data.y, outputs)
    nothing = float(chosen.value(torch.zeros_like(targets), targets))
    independent = independent_rows(training.theta)
    result = {
        "d": run.data.d,
        "width": run.network.p,
        "parameters": outputs * run.network.p,
        "independent": independent,
        "numbers": unknowns(n, run.data.d, min(n, independent)),
        "training_loss": training.loss,
        "relative_loss": training.loss / nothing,
        "trained": training.reached,
        "training_steps": training.steps,
        "norm": float(training.theta.norm() / run.network.theta_0.norm()),
        "drift": training.drift,
        "training_seconds": training.seconds,
    }
    if run.record is None:
        return result | dict.fromkeys(ATTACK_RESULTS)
    return result | {
        "residual_at_truth": training.residual_at_truth,
        "weakest_share": float(training.shares.min() / training.shares.mean()),
        "signed_error": run.errors.signed_error,
        "largest_error": float(run.errors.signed.max()),
        "recovered": run.errors.recovered(),
        "projection_loss": run.record.loss,
        "attack_seconds": run.record.seconds,
    }


def check_classification_cell(
    n: int,
    p_over_dn: float,
    loss: str,
    outputs: int,
    layers: str,
    dataset: str,
    activation: str,
    seed: int,
    target: float,
    momentum: float,
    max_train_steps: int,
    restarts: int,
    max_steps: int,
    tolerance: float,
    device: str,
) -> None:
    """Refuses values that `run_classification_cell` cannot compute with.

    Raises:
        ValueError: for a count below 1, a number outside its range, an unknown name or device,
            more outputs than the data have classes, or a loss that does not fit the outputs.
    """
    counts = {
        "n": n,
        "outputs": outputs,
        "max_train_steps": max_train_steps,
        "restarts": restarts,
        "max_steps": max_steps,
    }
    for name, value in counts.items():
        check_count(name, value)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    check_positive("target", target)
    check_positive("tolerance", tolerance, below=1.0)
    check_range("momentum", momentum, least=0, below=1)
    for name, value, known in (
        ("loss", loss, LOSSES),
        ("layers", layers, LAYERS),
        ("dataset", dataset, tuple(DATA_SETS)),
        ("activation", activation, activation_names()),
    ):
        check_named(name, value, known)
    if outputs > len(DATA_SETS[dataset][1]):
        most = len(DATA_SETS[dataset][1])
        raise ValueError(f"{dataset} have {most} classes, got outputs = {outputs}")
    if loss == "logistic" and outputs != 1:
        raise ValueError(f"logistic loss here has one output, got outputs = {outputs}")
    if loss == "cross-entropy" and outputs < 2:
        raise ValueError("cross-entropy needs at least 2 outputs, got 1")
    check_device_name(device)


def count_classifier_parameters(
    n: int, outputs: int, *, activation: str = "relu+tanh", seed: int = 0
) -> dict[str, int | float | bool]:
    """What a softmax layer on random features determines, at the least number of parameters.

    The gradients of cross-entropy with respect to the C rows of W2 add up to zero, since the
    probabilities add up to one. So theta has C - 1 independent rows, and the data need
    (C - 1) p >= n (d - 1) + n (C - 1). A network of just that width is trained on digits by
    cross-entropy, its last layer alone, and the rank of (X, alpha) -> theta is counted.

    Args:
        n: number of digits, at least C.
        outputs: C.
        activation: one of `activation_names()`.
        seed: of data and weights.

    Returns:
        `d`, `p` (the width), `parameters` (C p), `independent` (rank of theta), `row_sum`
        (||sum of the rows|| / ||theta||), `equations`, `unknowns`, `rank` and `identified`.
    """
    data = digits(n, classes=range(outputs), labels="one-hot", seed=seed, dtype=torch.float64)
    p = least_parameters(n, data.d, outputs - 1)
    network = TwoLayer(data.d, p, outputs, activation=activation, seed=seed, dtype=torch.float64)
    training = train(
        network, data.X, data.y, loss="cross-entropy", layers="last", target=1e-3, momentum=0.9
    )
    theta = training.theta
    combined = combine_releases(list(theta.split(1)))
    alpha = coefficients(training.features, combined, data.X)
    spectrum = jacobian_spectrum(training.features, data.X, alpha)
    return {
        "d": data.d,
        "p": p,
        "parameters": outputs * p,
        "independent": len(combined),
        "row_sum": float(theta.sum(0).norm() / theta.norm()),
        "equations": spectrum.rows,
        "unknowns": spectrum.columns,
        "rank": spectrum.rank,
        "identified": spectrum.identified,
    }
