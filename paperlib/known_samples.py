"""Samples that the attacker already has: their features are projected off, the rest is attacked.

With theta = sum_known a_i phi(x_i) + sum_unknown a_j phi(x_j) and Q an orthonormal basis of the
span of the known features, let P = I - Q^T Q. Then P theta lies in the span of the unknown
samples' P phi(x_j), whatever the coefficients of the known ones: a reconstruction problem of its
own, whose feature map is x -> P phi(x). This is the informed adversary of Balle, Cherubin and Hayes
(2022), who has all samples but one or a few; the labels are not needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paperlib.checks import check_finite, check_rows, check_theta
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.lift import room_for_lift
from paperlib.progress import Progress
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction, conclude
from paperlib.sample_count import descend
from paperlib.signs import settle_signs
from paperlib.stages import stage_record

# Known features that are this close to the span of the others (relative) add no direction.
DEPENDENT = 1e-6


class WithoutKnown(FeatureMap):
    """x -> P phi(x), the features off the span of those of known samples.

    P mixes all p features, so that they come as one block without weights.

    Attributes:
        inner: the model.
        lift: whether the linear part of the features is projected off as well.
        projected_off: Q, (r, p), orthonormal basis of what is projected off.
    """

    def __init__(self, model: FeatureMap, known: Tensor, *, lift: bool = False):
        """Orthonormalise the features of the known samples.

        Args:
            model: the feature map phi.
            known: (m, d) samples.
            lift: project the d columns of V off, too, and leave the linear part of the activation
                out (see `lift.py`); candidates are then found up to their signs.

        Raises:
            TypeError: if known is not a tensor of the model's dtype.
            ValueError: for another shape, values that are not finite, at least as many samples as
                features, or features that are split over processes.
        """
        check_finite("known", check_rows("known", known, model))
        if model.group is not None:
            raise ValueError("known samples need all features in one process")
        if len(known) >= model.p:
            raise ValueError(f"{len(known)} known samples leave nothing of {model.p} features")
        self.inner = model
        self.d, self.p, self.dtype, self.device = model.d, model.p, model.dtype, model.device
        self.odd = model.odd
        self.known = known.detach().clone()
        self.lift = lift
        spanning = model.features(self.known).double()
        if lift:
            columns = torch.cat([block.weights for block in model.blocks()]).double().T  # (d, p)
            spanning = torch.cat([spanning, columns * (spanning.norm() / columns.norm())])
        _, singular, rows = torch.linalg.svd(spanning, full_matrices=False)
        self.projected_off = rows[singular > DEPENDENT * singular[0]].to(model.dtype)

    @property
    def random_features(self) -> FeatureMap | None:
        """Those of the model; none when the linear part, or anything else, is taken out as well."""
        plain = not self.lift and self.inner.projected_off is None
        return self.inner.random_features if plain else None

    def off(self, W: Tensor) -> Tensor:
        """Rows of W, (n, p), without their part in the span of the known features."""
        Q = self.projected_off.to(W.dtype)
        return W - (W @ Q.T) @ Q

    def blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[FeatureBlock]:
        """One block with all features."""
        yield WithoutKnownBlock(self, list(self.inner.blocks(dtype=dtype)))

    def describe(self) -> dict[str, Any]:
        """The model, and how many samples are known."""
        return {
            "model": "WithoutKnown",
            "known": len(self.known),
            "inner": self.inner.describe(),
        }


class WithoutKnownBlock(FeatureBlock):
    """All features of the model, projected."""

    def __init__(self, model: WithoutKnown, blocks: list[FeatureBlock]):
        """Hold the model's blocks."""
        self.model, self.blocks = model, blocks
        self.start, self.stop = 0, model.p

    def linearize(self, X: Tensor, *, lifted: bool = False) -> tuple[Tensor, Any]:
        """P phi(X), (n, p), and the states of the model's blocks.

        Raises:
            ValueError: for `lifted`: the lift belongs to the projection.
        """
        if lifted:
            raise ValueError("lift when the known samples are projected off, not later")
        parts = [block.linearize(X, lifted=self.model.lift) for block in self.blocks]
        features, states = zip(*parts, strict=True)
        return self.model.off(torch.cat(features, dim=1)), states

    def jvp(self, state: Any, dX: Tensor) -> Tensor:
        """P J_i dx_i in row i, (n, p)."""
        parts = [block.jvp(own, dX) for block, own in zip(self.blocks, state, strict=True)]
        return self.model.off(torch.cat(parts, dim=1))

    def vjp(self, state: Any, W: Tensor) -> Tensor:
        """J_i^T P w_i in row i, (n, d)."""
        W = self.model.off(W)
        parts = [
            block.vjp(own, W[:, block.start : block.stop])
            for block, own in zip(self.blocks, state, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def slope_gram(self, state: Any) -> Tensor:
        """That of the model: P takes only r of p directions away, and this is a preconditioner."""
        parts = [block.slope_gram(own) for block, own in zip(self.blocks, state, strict=True)]
        return torch.stack(parts).sum(0)


def reconstruct_unknown(
    model: FeatureMap, theta: Tensor, n: int, known: Tensor, **options: Any
) -> Reconstruction:
    """Find the n samples that are not known, given those that are.

    n (d - 1) + n C numbers are to be found in C (p - m) equations, m samples being known. For a
    ReLU, of which a share of 2^-n is off at all n samples, this share does not count.

    Args:
        model: the feature map phi.
        theta: trained minus initial parameters, (C, p), or (p,) for one output.
        n: number of samples that are not known.
        known: (m, d) the samples that are.
        **options: those of `reconstruct`.

    Returns:
        A `Reconstruction` of the unknown samples.

    Raises:
        ValueError: as `reconstruct`; or if the known samples explain theta to rounding.
        TypeError: as `reconstruct`.
    """
    theta = check_theta(theta, model)
    rest = WithoutKnown(model, known)
    left = rest.off(theta)
    share = float(left.double().norm() / theta.double().norm())
    if share < 100 * torch.finfo(model.dtype).eps:
        raise ValueError(
            f"the known samples explain the parameters (all but {share:.0e} of them): no other "
            "sample has left a trace"
        )
    record = reconstruct(rest, left, n, **options)
    second_order = options.get("solver", "levenberg-marquardt") == "levenberg-marquardt"
    room = room_for_lift(model.p, model.d, len(known) + n)
    if not record.explained and second_order and model.linear_coefficient and room:
        record = _lifted(rest, theta, left, n, record, options)
    return record


def _lifted(
    rest: WithoutKnown,
    theta: Tensor,
    left: Tensor,
    n: int,
    before: Reconstruction,
    options: dict[str, Any],
) -> Reconstruction:
    """A second attempt without the linear part, where wrong signs are no local minima.

    The better of both by loss, with the work of both.
    """
    lifted = WithoutKnown(rest.inner, rest.known, lift=True)
    # Message passing and the search of a subspace need all features: they refuse the lifted ones.
    record = reconstruct(lifted, lifted.off(theta), n, **options | {"start": "random"})
    begun, tolerance = time.perf_counter(), before.options["tolerance"]
    finish = descend(
        rest,
        left,
        settle_signs(rest, left, record.samples),
        None,
        target=tolerance,
        max_steps=before.options["max_steps"],
        watch=Progress(False),
    )
    seconds = time.perf_counter() - begun
    found, loss = before, finish.point.loss
    passes = finish.passes + 2
    if loss < before.loss:
        found = replace(
            before,
            samples=finish.point.X,
            loss=loss,
            explained=loss <= tolerance,
            status=conclude(loss, tolerance, identifiable=before.identifiable),
            restart=record.restart,
            elimination_losses=record.elimination_losses,
        )
    place = {"restart": record.restart, "stage": "finish"}
    stage = stage_record(
        "finish", rest.dtype, finish.status, loss, n, passes, seconds, record.restart
    )
    return replace(
        found,
        history=before.history + record.history + [place | step for step in finish.history],
        stages=[*before.stages, *record.stages, stage],
        passes=before.passes + record.passes + passes,
        seconds=before.seconds + record.seconds + seconds,
    )
