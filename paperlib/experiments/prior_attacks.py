"""One cell of the comparison of attacks: train a two-layer network, run one attack, measure.

Two arenas. "linearised" and "descent": square loss from a known start, the attacks see how far the
parameters moved. "margin": logistic loss from a small start that no attack knows, so that the
trained parameters themselves stand for the move.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive
from paperlib.compare import Comparison, compare
from paperlib.data import DataSet, digits
from paperlib.data.digits import PIXELS
from paperlib.feature_map import FeatureMap
from paperlib.first_layer_attack import LADDER, first_layer_attack
from paperlib.gradient_features import GradientFeatures
from paperlib.kkt_attack import kkt_attack
from paperlib.min_norm import fit_min_norm
from paperlib.networks import TwoLayer
from paperlib.ntk_attack import ntk_attack
from paperlib.projection import projection_loss
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.training import train

ARENAS = ("linearised", "descent", "margin")

# Whose parameters p_over_dn counts: it decides the width.
COUNTED = ("all layers", "last layer")

# What an attack takes for granted beside the network and n, in words.
PRIORS = {
    "last layer": "sphere",
    "all layers": "sphere",
    "first layer": "sphere, n < width",
    "tangent": "sphere, box",
    "margin": "sphere, box, labels balanced, multipliers > 0",
}
ATTACKS = tuple(PRIORS)

# The configurations that each first-order attack may try: (learning rate, sharpness).
TANGENT_TRIES = ((0.02, (2.0, 50.0)), (0.05, (1.0, 100.0)))
MARGIN_TRIES = ((0.02, (10.0, 10.0)), (0.05, (2.0, 50.0)))
TRIES = len(TANGENT_TRIES)

# Training loss: of the square loss as in the paper, of the logistic loss far into the margin.
LOGISTIC_TARGET = 1e-10


@dataclass(frozen=True)
class Arena:
    """A trained network and what the attacks see of it.

    Attributes:
        data: the training data.
        features: gradients of all parameters, at the start ("linearised", "descent") or at the
            end ("margin").
        theta: (1, p), the move of all parameters, or the parameters themselves ("margin").
        last: the last-layer features that an attack on the last layer knows.
        last_theta: (1, width), the last layer's part of theta.
        training_loss: at the end.
    """

    data: DataSet
    features: GradientFeatures
    theta: Tensor
    last: FeatureMap
    last_theta: Tensor
    training_loss: float


def width_of(n: int, p_over_dn: float, counted: str, d: int) -> int:
    """Neurons whose parameters, as far as they count, come next to p_over_dn d n."""
    per_neuron = d + 1 if counted == "all layers" else 1
    return max(1, round(p_over_dn * d * n / per_neuron))


@lru_cache(maxsize=8)
def make_arena(
    arena: str,
    n: int,
    p_over_dn: float,
    counted: str,
    activation: str,
    seed: int,
    start_scale: float,
) -> Arena:
    """Train; see `run_prior_attack_cell` for the arguments."""
    data = digits(n, seed=seed)
    width = width_of(n, p_over_dn, counted, data.d)
    network = TwoLayer(data.d, width, activation=activation, seed=seed)
    if arena == "margin":
        # Both layers small, the first smaller, so that training forgets them (Haim et al. 2022).
        with torch.no_grad():
            network.body[0].weight.mul_(0.1 * start_scale)
            network.head.weight.mul_(start_scale)
        network = network.double()  # margins grow until float32 sees no gradient
        X = data.X.double()
        run = train(
            network,
            X,
            data.y,
            loss="logistic",
            target=LOGISTIC_TARGET,
            step_scale=0.2,
            max_steps=5000,
            progress=False,
        )
        network = network.float()
        features = GradientFeatures(network, data.d)
        theta, loss = features.flatten(network), run.loss
        last, last_theta = network.feature_map(), network.head.weight.detach()
    else:
        features = GradientFeatures(network, data.d)
        last = network.feature_map()
        if arena == "linearised":
            wanted = data.y - features.outputs_at(data.X)[:, 0]
            theta = fit_min_norm(features, data.X, wanted)
            off = features.features(data.X) @ theta[0] - wanted
            loss = float(off.double().square().mean())
        else:
            before = features.flatten(network)
            loss = train(network, data.X, data.y, progress=False).loss
            theta = features.flatten(network) - before
            last = network.feature_map()
        last_theta = features.block_of(theta, "head.weight")[0]
    return Arena(data, features, theta, last, last_theta, loss)


def run_attack(
    arena: Arena, attack: str, *, budget: int, seed: int, box: bool = True
) -> tuple[Reconstruction, int]:
    """One attack with `TRIES` times `budget` passes at most; the record and the passes spent.

    The two first-order attacks spend `budget` passes on each of their configurations and return
    the one with the smallest loss of their own: the attacker has nothing else to choose by. The
    others start again until the parameters are explained or the same number of passes is spent; a
    start that has begun is finished.
    """
    n, features, theta = arena.data.n, arena.features, arena.theta
    if attack in ("tangent", "margin"):
        limits = (float(arena.data.X.min()), float(arena.data.X.max())) if box else None
        call, tries = (
            (ntk_attack, TANGENT_TRIES) if attack == "tangent" else (kkt_attack, MARGIN_TRIES)
        )
        records = [
            call(
                features,
                theta,
                n,
                steps=max(1, budget // 2),
                learning_rate=rate,
                sharpness=sharpness if has_relu(features) else None,
                box=limits,
                seed=seed,
                progress=False,
            )
            for rate, sharpness in tries
        ]
        return min(records, key=lambda r: r.loss), sum(r.passes for r in records)
    best, spent, k = None, 0, 0
    # More samples take longer searches, which a larger budget affords: 30 for 1,000, at most 50.
    length = min(50, max(1, 3 * budget // 100))
    while best is None or (spent < TRIES * budget and not best.explained):
        if attack == "first layer":
            record = first_layer_attack(
                features,
                theta,
                n,
                starts=length,
                steps=length,
                rounds=max(1, TRIES * budget // (2 * length * len(LADDER))),
                seed=1000 * k + seed,
                progress=False,
            )
        else:
            whole = attack == "all layers"
            record = reconstruct(
                features if whole else arena.last,
                theta if whole else arena.last_theta,
                n,
                restarts=1,
                seed=1000 * k + seed,
                progress=False,
            )
        spent += record.passes
        k += 1
        if best is None or record.loss < best.loss:
            best = record
    return best, spent


def has_relu(features: GradientFeatures) -> bool:
    """Whether there is a ReLU to smooth."""
    try:
        features.smoothed(1.0)
    except ValueError:
        return False
    return True


def effective_rank(values: Tensor) -> float:
    """Exp of the entropy of singular values (Roy and Vetterli 2007): how many count.

    Args:
        values: (k,) not negative.
    """
    shares = values.double() / values.double().sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def run_prior_attack_cell(
    arena: str,
    attack: str,
    n: int,
    p_over_dn: float,
    counted: str = "all layers",
    activation: str = "relu",
    seed: int = 0,
    budget: int = 2000,
    start_scale: float = 0.1,
    box: bool = True,
) -> dict[str, float | int | bool | str]:
    """Trains one network on digits and runs one attack.

    Args:
        arena: one of `ARENAS`.
        attack: one of `ATTACKS`.
        n: number of digits.
        p_over_dn: parameters over d n.
        counted: whose: of "all layers", or of the "last layer" alone, which makes the network
            d + 1 times as wide.
        activation: one of `activation_names()`.
        seed: of digits, weights and attack.
        budget: passes over all candidates for each of `TRIES` tries.
        start_scale: factor of the last layer's start in the arena "margin"; the first layer's is
            a tenth of it.
        box: whether the first-order attacks know the range of pixels.

    Returns:
        `d`, `width`, `parameters` (attacked), `training_loss`, `gram_rank` and `jacobian_rank`
        (effective ranks of the features of the data, at most n, and of the Jacobian of all
        unknowns, at most n d), `residual_at_truth`, `loss` (attained), `explained`, `candidates`,
        `priors`, `passes`, `products` (passes times candidates), `signed_error`, `best_half` (mean
        error of the better half of the samples), `recovered` (error at most 0.05), `near` (at
        most 0.2), `cpu_seconds`.
    """
    made = make_arena(arena, n, p_over_dn, counted, activation, seed, start_scale)
    begun = time.process_time()
    record, passes = run_attack(made, attack, budget=budget, seed=seed, box=box)
    cpu = time.process_time() - begun
    features, theta = (
        (made.last, made.last_theta) if attack == "last layer" else (made.features, made.theta)
    )
    truth = made.data.X
    errors: Comparison = compare(truth, record.samples)
    gram, jacobian = ranks(features, theta, truth)
    held = max(stage["candidates"] for stage in record.stages if "candidates" in stage)
    return {
        "d": made.data.d,
        "width": made.last.p,
        "parameters": features.p,
        "training_loss": made.training_loss,
        "gram_rank": gram,
        "jacobian_rank": jacobian,
        "residual_at_truth": float(projection_loss(features, theta, truth)),
        "loss": record.loss,
        "explained": record.explained,
        "candidates": len(record.samples),
        "priors": PRIORS[attack],
        "passes": passes,
        "products": passes * held,
        "signed_error": errors.signed_error,
        "best_half": float(torch.tensor(errors.signed).sort().values[: max(1, n // 2)].mean()),
        "recovered": errors.recovered(),
        "near": errors.recovered(0.2),
        "cpu_seconds": cpu,
    }


def ranks(features: FeatureMap, theta: Tensor, X: Tensor) -> tuple[float, float]:
    """Effective ranks of phi(X) and of the Jacobian of (X, alpha) -> theta at the data."""
    Phi = features.features(X).double()
    alpha = torch.linalg.lstsq(Phi.T, theta.double().T).solution  # (n, 1)
    rows = [Phi]
    for i in range(len(X)):
        # alpha_i J_i in the d directions of x_i, one product for all of them.
        eye = torch.eye(features.d, dtype=X.dtype, device=X.device)
        J = features.jvp(X[i].expand(features.d, -1).contiguous(), eye).double()
        along = X[i].double() / X[i].double().norm()
        rows.append(alpha[i] * (J - along[:, None] * (along @ J)))
    values = torch.linalg.svdvals(torch.cat(rows))
    return effective_rank(torch.linalg.svdvals(Phi)), effective_rank(values)


def check_prior_attack_cell(
    arena: str,
    attack: str,
    n: int,
    p_over_dn: float,
    counted: str,
    activation: str,
    seed: int,
    budget: int,
    start_scale: float,
    box: bool,
) -> None:
    """Refuses values that `run_prior_attack_cell` cannot compute with.

    Raises:
        ValueError: for a count below 1, a ratio or scale that is not positive, unknown names, or a
            network too narrow for the attack.
    """
    check_count("n", n)
    check_count("seed", seed, least=0)
    check_count("budget", budget, least=2)
    check_positive("p_over_dn", p_over_dn)
    check_positive("start_scale", start_scale)
    for name, value, known in (
        ("arena", arena, ARENAS),
        ("attack", attack, ATTACKS),
        ("counted", counted, COUNTED),
        ("activation", activation, activation_names()),
        ("box", box, (True, False)),
    ):
        check_named(name, value, known)
    width = width_of(n, p_over_dn, counted, PIXELS)
    if attack == "first layer" and n >= min(width, PIXELS):
        raise ValueError(f"n must be below min(width, d) = {min(width, PIXELS)}, got {n}")
    p = width if attack == "last layer" else (PIXELS + 1) * width
    if p < n:
        raise ValueError(f"p must be at least n = {n}, got {p}")
