"""Attackers who know less than the paper's, or more: one cell each."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive, check_range
from paperlib.compare import compare
from paperlib.data import sphere
from paperlib.given_features import GivenFeatures
from paperlib.known_samples import reconstruct_unknown
from paperlib.min_norm import fit_min_norm
from paperlib.projection import projection_loss
from paperlib.quantise import BITS, quantise
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.streams import stream

# What an attacker may lack; `amount` says how much of it.
LACKS = ("nothing", "theta_0", "V", "parameters", "digits")


def run_knowledge_cell(
    n: int,
    d: int,
    p_over_dn: float,
    lack: str = "nothing",
    amount: float = 0.0,
    format: str | None = None,
    activation: str = "relu",
    seed: int = 0,
    restarts: int = 3,
    max_steps: int = 60,
) -> dict[str, float | int | bool | None]:
    """One attack that lacks one thing.

    Args:
        n: number of training samples, uniform on the sphere.
        d: their dimension.
        p_over_dn: parameters per number in the data.
        lack: "nothing"; "theta_0": training began at a random theta_0 that the attacker takes for
            zero, with ||theta_0|| = amount ||theta - theta_0||; "V": the attacker has
            V + amount W with W of the same distribution; "parameters": the attacker has a random
            share 1 - amount of the parameters (and the rows of V that belong to them); "digits":
            parameters stored in `format`.
        amount: how much is lacking; 0 for "nothing" and "digits".
        format: one of `paperlib.quantise.BITS`, for "digits".
        activation: one of `activation_names()`.
        seed: of data, features, what is lacking, and candidates.
        restarts: most starts.
        max_steps: most steps of one stage of one start.

    Returns:
        `p`; `equations`, the number of parameters the attacker has; `disturbance`, the relative
        change of the parameters (for "V", of the true samples' features); `recovered`, signed
        error at most 0.05, and `roughly`, at most 0.2; `signed_error`; `projection_loss`;
        `loss_at_truth`.
    """
    data = sphere(n, d, seed=seed)
    model = RandomFeatures(d, round(p_over_dn * d * n), activation, seed=seed)
    attack, theta, disturbance = weakened(
        model, data.X, data.y, lack, amount=amount, format=format, seed=seed
    )
    record = reconstruct(
        attack, theta, n, seed=seed, restarts=restarts, max_steps=max_steps, progress=False
    )
    errors = compare(data.X, record.samples)
    return {
        "p": model.p,
        "equations": attack.p,
        "disturbance": disturbance,
        "recovered": errors.recovered(),
        "roughly": errors.recovered(0.2),
        "signed_error": errors.signed_error,
        "projection_loss": record.loss,
        "loss_at_truth": float(projection_loss(attack, theta, data.X)),
    }


def weakened(
    model: RandomFeatures,
    X: Tensor,
    y: Tensor,
    lack: str,
    *,
    amount: float,
    format: str | None,
    seed: int,
) -> tuple[GivenFeatures | RandomFeatures, Tensor, float]:
    """What the attacker has: a feature map, parameters, and how far these are from the true ones.

    The arguments are those of `run_knowledge_cell`.
    """
    generator = stream("lack", seed)
    if lack == "theta_0":
        start = torch.randn(1, model.p, generator=generator).to(X)
        # Training moves theta by Phi^+ (y - Phi theta_0), which depends on theta_0 itself.
        move = fit_min_norm(model, X, y)
        start = start * (amount * float(move.norm()) / float(start.norm()))
        move = fit_min_norm(model, X, y, theta_0=start)
        return model, start + move, float(start.norm() / move.norm())
    theta = fit_min_norm(model, X, y)
    if lack == "nothing":
        return model, theta, 0.0
    if lack == "digits":
        stored = quantise(theta, format)
        return model, stored, float((stored - theta).norm() / theta.norm())
    if lack == "V":
        wrong = model.V + amount * torch.randn(model.p, model.d, generator=generator) / model.d**0.5
        attack = GivenFeatures(wrong, model.activation)
        true = model.features(X)
        return attack, theta, float((attack.features(X) - true).norm() / true.norm())
    if lack == "parameters":
        kept = torch.randperm(model.p, generator=generator)[: round((1 - amount) * model.p)]
        kept = kept.sort().values
        return GivenFeatures(model.V[kept], model.activation), theta[:, kept], 0.0
    raise ValueError(f"lack must be one of {', '.join(LACKS)}, got {lack!r}")


def check_knowledge_cell(
    n: int,
    d: int,
    p_over_dn: float,
    lack: str,
    amount: float,
    format: str | None,
    activation: str,
    seed: int,
    restarts: int,
    max_steps: int,
) -> None:
    """Refuses values that `run_knowledge_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, d below 2, too few parameters, an amount or a format that
            does not fit what is lacking, or an unknown name.
    """
    _check_counts(n=n, restarts=restarts, max_steps=max_steps)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    check_range("amount", amount, least=0)
    check_named("activation", activation, activation_names())
    check_named("lack", lack, LACKS)
    if lack == "digits":
        check_named("format", format, BITS)
    elif format is not None:
        raise ValueError(f"format is for lack='digits', got {format!r} with lack={lack!r}")
    if lack in ("nothing", "digits") and amount != 0:
        raise ValueError(f"lack={lack!r} takes no amount, got {amount}")
    if lack == "parameters":
        check_range("amount", amount, least=0, below=1)
    have = (1 - amount if lack == "parameters" else 1) * p_over_dn * d * n
    if round(have) < n:
        raise ValueError(f"the attacker must have at least n = {n} parameters, got {round(have)}")


def run_informed_cell(
    n: int,
    d: int,
    unknown: int,
    p_over_dk: float,
    activation: str = "relu",
    seed: int = 0,
    restarts: int = 5,
    max_steps: int = 40,
) -> dict[str, float | int | bool]:
    """One attack that knows all training samples but `unknown` of them, and no labels.

    Args:
        n: number of training samples, uniform on the sphere.
        d: their dimension.
        unknown: k, how many the attacker does not know; n for the paper's attacker.
        p_over_dk: equations per number that is unknown; p = n - k + p_over_dk d k, since each
            known sample uses one equation up.
        activation: one of `activation_names()`.
        seed: of data, features and candidates.
        restarts: most starts.
        max_steps: most steps of one stage of one start.

    Returns:
        `p`; `p_over_dn`; `telling`, equations per unknown number without those of features that
        are zero at all unknown samples; `recovered`, of the k unknown samples, and their `share`;
        `signed_error`; `projection_loss`; `identifiable`.
    """
    data = sphere(n, d, seed=seed)
    p = n - unknown + round(p_over_dk * d * unknown)
    model = RandomFeatures(d, p, activation, seed=seed)
    theta = fit_min_norm(model, data.X, data.y)
    options = {"seed": seed, "restarts": restarts, "max_steps": max_steps, "progress": False}
    if unknown < n:
        record = reconstruct_unknown(model, theta, unknown, data.X[unknown:], **options)
    else:
        record = reconstruct(model, theta, n, **options)
    errors = compare(data.X[:unknown], record.samples)
    spoke = int((model.features(data.X[:unknown]) != 0).any(0).sum())
    return {
        "p": p,
        "p_over_dn": p / (d * n),
        "telling": (spoke - n + unknown) / (d * unknown),
        "recovered": errors.recovered(),
        "share": errors.recovered() / unknown,
        "signed_error": errors.signed_error,
        "projection_loss": record.loss,
        "identifiable": record.identifiable,
    }


def check_informed_cell(
    n: int,
    d: int,
    unknown: int,
    p_over_dk: float,
    activation: str,
    seed: int,
    restarts: int,
    max_steps: int,
) -> None:
    """Refuses values that `run_informed_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, d below 2, more unknown samples than there are, too few
            parameters, or an unknown activation.
    """
    _check_counts(n=n, unknown=unknown, restarts=restarts, max_steps=max_steps)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dk", p_over_dk)
    if unknown > n:
        raise ValueError(f"unknown must be at most n = {n}, got {unknown}")
    if round(p_over_dk * d * unknown) < unknown:
        raise ValueError("p must be at least n: p_over_dk is too small")
    check_named("activation", activation, activation_names())


def run_unlearning_cell(
    n: int,
    d: int,
    p_over_d: float,
    candidates: int,
    activation: str = "relu",
    seed: int = 0,
    restarts: int = 5,
    max_steps: int = 40,
) -> dict[str, float | int | bool]:
    """Parameters before and after one sample was deleted, by training again without it.

    For minimum-norm regression the difference is a multiple of the deleted feature's part off the
    span of the others: delta = a (phi(x_j) - sum_i b_i phi(x_i)).

    Args:
        n: number of training samples before, uniform on the sphere.
        d: their dimension.
        p_over_d: parameters per number in the deleted sample.
        candidates: how many samples the attacker looks for in the difference: 1 for the deleted
            one, n for all.
        activation: one of `activation_names()`.
        seed: of data, features and candidates.
        restarts: most starts.
        max_steps: most steps of one stage of one start.

    Returns:
        `p`; `p_over_dn`; `deleted_error`, signed, of the candidate nearest to the deleted sample;
        `recovered`, of the n samples; `projection_loss`; `loss_at_deleted`, what the true deleted
        sample alone leaves; `weight`, the coefficient of the deleted feature in the difference
        relative to the largest of the others.
    """
    data = sphere(n, d, seed=seed)
    model = RandomFeatures(d, round(p_over_d * d), activation, seed=seed)
    before = fit_min_norm(model, data.X, data.y)
    after = fit_min_norm(model, data.X[1:], data.y[1:])
    difference = before - after
    record = reconstruct(
        model,
        difference,
        candidates,
        seed=seed,
        restarts=restarts,
        max_steps=max_steps,
        progress=False,
    )
    features = model.features(data.X).double()
    coefficients = torch.linalg.lstsq(features.T, difference.double().T).solution[:, 0].abs()
    distances = torch.linalg.vector_norm(record.samples - data.X[0], dim=1) / d**0.5
    return {
        "p": model.p,
        "p_over_dn": model.p / (d * n),
        "deleted_error": float(distances.min()),
        "recovered": compare(data.X, record.samples).recovered(),
        "projection_loss": record.loss,
        "loss_at_deleted": float(projection_loss(model, difference, data.X[:1])),
        "weight": float(coefficients[0] / coefficients[1:].max()),
    }


def check_unlearning_cell(
    n: int,
    d: int,
    p_over_d: float,
    candidates: int,
    activation: str,
    seed: int,
    restarts: int,
    max_steps: int,
) -> None:
    """Refuses values that `run_unlearning_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, fewer than two samples or dimensions, too few parameters
            for the samples or the candidates, or an unknown activation.
    """
    _check_counts(candidates=candidates, restarts=restarts, max_steps=max_steps)
    check_count("n", n, least=2)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_d", p_over_d)
    p = round(p_over_d * d)
    if p < n:
        raise ValueError(f"p must be at least n = {n}, got {p}")
    if candidates > p:
        raise ValueError(f"p must be at least candidates = {candidates}, got {p}")
    check_named("activation", activation, activation_names())


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        check_count(name, value)
