"""What the experiments on trained networks share: train one, attack its last layer, measure."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch

from paperlib.checks import check_count, check_named, check_positive, check_range
from paperlib.compare import Comparison, compare
from paperlib.data import DataSet, cifar10, digits, faces, photographs
from paperlib.experiments.device_name import check_device_name
from paperlib.feature_map import FeatureMap
from paperlib.networks.network import Network
from paperlib.projection import Linearization
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.training import LAYERS, TARGET, Training, train

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
        features: the feature map that the attack used.
        residual_at_truth: projection loss of theta at the training data under these features.
        record: of the attack; None for a network with fewer features than samples.
        errors: the samples matched with the data; None as `record`.
    """

    data: DataSet
    network: Network
    training: Training
    features: FeatureMap
    residual_at_truth: float
    record: Reconstruction | None
    errors: Comparison | None


def load_data(
    dataset: str, n: int, *, labels: str, seed: int, per_channel: bool = False
) -> DataSet:
    """The chosen data set.

    Args:
        dataset: a name of `DATA_SETS`.
        n: number of samples.
        labels: "binary" or "one-hot". CIFAR-10 is frogs and trucks for the one, all ten classes
            for the other.
        seed: chooses the samples.
        per_channel: standardise every colour channel of CIFAR-10 by itself.
    """
    options = {}
    if dataset == "cifar10":
        options["per_channel"] = per_channel
        if labels == "one-hot":
            options["classes"] = "all"
    return DATA_SETS[dataset](n, labels=labels, seed=seed, **options)


def width_for(data: DataSet, outputs: int, p_over_dn: float, *, positions: int = 1) -> int:
    """Channels (or neurons) whose outputs * channels * positions come next to p_over_dn d n."""
    return max(1, round(p_over_dn * data.d * len(data.X) / (outputs * positions)))


def outputs_of(data: DataSet) -> int:
    """C, one for labels -1 and +1."""
    return data.y.shape[1] if data.y.ndim == 2 else 1


def attack_network(
    data: DataSet,
    network: Network,
    *,
    layers: str,
    momentum: float,
    max_train_steps: int,
    restarts: int,
    max_steps: int,
    tolerance: float,
    step_scale: float = 1.0,
    known: float = 1.0,
    loss: str = "squared",
    target: float = TARGET,
    start: str = "random",
) -> Attacked:
    """Trains a network by gradient descent and attacks theta = W(T) - W(0), its last layer.

    Section 5 of arXiv 2509.22214. The attack knows the layers below, theta and n. Candidates are a
    stream of their own of the network's seed.

    Args:
        data: the training data.
        network: at initialisation; it is trained in place, where it is.
        layers: "all", or "last" to train the last layer alone.
        momentum: of gradient descent.
        max_train_steps: most steps of gradient descent.
        restarts: most starts of the attack.
        max_steps: most steps of one stage of one start.
        tolerance: projection loss at which no more starts are made.
        step_scale: step size of training times the largest curvature.
        known: which layers below the last the attack uses: 1 for the trained ones, as in the
            paper, 0 for those at initialisation, and weights in between on the straight line.
        loss: of training, as in `train`.
        target: training loss at which to stop.
        start: how the attack starts; "random" is what every network can do, with weights V or
            without.
    """
    device = network.theta_0.device
    X, y = data.X.to(device), data.y.to(device)
    untrained = None if known == 1 else deepcopy(network.body.state_dict())
    training = train(
        network,
        X,
        y,
        loss=loss,
        layers=layers,
        target=target,
        momentum=momentum,
        max_steps=max_train_steps,
        step_scale=step_scale,
    )
    features, residual = training.features, training.residual_at_truth
    if untrained is not None:
        features = features_between(network, untrained, known)
        residual = Linearization(features, training.theta, X).loss
    n = len(X)
    if network.p < n:
        return Attacked(data, network, training, features, residual, None, None)
    record = reconstruct(
        features,
        training.theta,
        n,
        seed=network.seed,
        start=start,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
    )
    errors = compare(data.X, record.samples)
    return Attacked(data, network, training, features, residual, record, errors)


def features_between(network: Network, start: dict[str, torch.Tensor], share: float) -> FeatureMap:
    """The features of a body with weights `share` of the way from `start` to the trained ones."""
    between = deepcopy(network)
    between.body.load_state_dict(
        {
            name: torch.lerp(start[name], end, share) if end.is_floating_point() else end
            for name, end in network.body.state_dict().items()
        }
    )
    return between.feature_map()


def network_results(run: Attacked) -> dict[str, float | int | bool | None]:
    """What a cell of a sweep reports of a network, its training and the attack.

    Returns:
        `d`, `outputs` (C), `parameters` (C p, of the last layer), `numbers` (what must be found:
        n (d - 1) for directions and n C for coefficients), `training_loss`, `relative_loss` (1
        for a model that says zero), `trained` (whether the loss reached 1e-7), `training_steps`,
        `drift` (relative move of the data's features) and `training_seconds`; then, None where
        p < n, `residual_at_truth`, `signed_error`, `up_to_sign_error`, `published_error` (means
        of `compare`), `largest_error` (signed, of the worst sample), `recovered` (signed error at
        most 0.05), `projection_loss`, `explained` (whether it is below `tolerance`) and
        `attack_seconds`.
    """
    n, d, C = len(run.data.X), run.data.d, run.network.outputs
    result = {
        "d": d,
        "outputs": C,
        "parameters": run.network.last_layer_parameters,
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
        "residual_at_truth": run.residual_at_truth,
        "signed_error": run.errors.signed_error,
        "up_to_sign_error": run.errors.up_to_sign_error,
        "published_error": run.errors.published_error,
        "largest_error": float(run.errors.signed.max()),
        "recovered": run.errors.recovered(),
        "projection_loss": run.record.loss,
        "explained": run.record.explained,
        "attack_seconds": run.record.seconds,
    }


def check_network_options(
    *,
    n: int,
    p_over_dn: float,
    dataset: str,
    labels: str,
    layers: str,
    seed: int,
    momentum: float,
    max_train_steps: int,
    restarts: int,
    max_steps: int,
    tolerance: float,
    device: str,
    data_sets: Iterable[str] = tuple(DATA_SETS),
) -> None:
    """Refuses values that a cell on a trained network cannot compute with.

    The arguments are those of the cell, and `data_sets`, the names that it knows.

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
    check_range("momentum", momentum, least=0, below=1)
    check_named("dataset", dataset, data_sets)
    check_named("labels", labels, LABELS)
    check_named("layers", layers, LAYERS)
    check_device_name(device)
