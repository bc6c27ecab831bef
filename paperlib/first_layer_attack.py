"""Reading the first layer: one sample at a time from the gradient block of the first weights.

The gradient of f(x) in the weights W of a linear first layer is delta(x) x^T, delta(x) being the
gradient in the layer's outputs W x. Where theta is a sum of gradients, its block of the first layer
is therefore a matrix of rank n,

    Theta_1 = sum_i alpha_i delta(x_i) x_i^T     (h, d),

whose row space is the span of the samples and whose column space is that of the delta(x_i). That
takes the search apart. A sample x is recognised on its own, by delta(x) lying in the column space,

    c(x) = || P_perp delta(x) ||^2 / || delta(x) ||^2 = 0,    x in the row space,

with n unknowns in place of n d. This is the subspace method of array processing (MUSIC, Schmidt
1986). Samples that are found are projected out of the denominator before the next are looked for
(as in RAP-MUSIC, Mosher and Leahy 1999), or the one with the widest basin would be found each time.
With all delta(x_i) known, the samples are the rows of [delta]^+ Theta_1, up to a factor.

It needs n < d and n < h: with n >= d samples every x lies in the row space, with n >= h every
delta in the column space. The search has been tried on two-layer networks; with more layers c(x) is
still zero at the data alone, but delta(x) has more kinks to cross.

That the first layer's move spans the data also holds along gradient descent on a network that is
not linearised (see arXiv 2605.06519 for the use of that span), but then the delta(x_i) change on
the way and c(x_i) is no longer zero.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paperlib.checks import check_count, check_positive, check_theta
from paperlib.gradient_features import GradientFeatures, SmoothReLU
from paperlib.law import parameters_told
from paperlib.levenberg_marquardt import levenberg_marquardt
from paperlib.progress import Progress
from paperlib.projection import Linearization
from paperlib.record import Reconstruction, conclude
from paperlib.sphere import random_on_sphere, to_sphere
from paperlib.streams import stream

# Singular values of the first block below this, relative to the largest, are rounding (float32).
RANK_CUTOFF = {torch.float32: 1e-5, torch.float64: 1e-10}

# Sharpness of smoothed ReLUs, from a landscape without kinks to nearly the ReLU.
LADDER = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

# Random points at which the size of each neuron's delta is taken.
TYPICAL = 256

# A candidate whose delta is this close to the span of those found is one of them.
SAME = 1e-4


def first_layer_attack(
    features: GradientFeatures,
    theta: Tensor,
    n: int | None = None,
    *,
    starts: int = 50,
    steps: int = 50,
    learning_rate: float = 0.2,
    rounds: int = 30,
    criterion: float = 1e-6,
    polish: int = 20,
    tolerance: float = 1e-10,
    seed: int = 0,
    progress: bool | None = None,
) -> Reconstruction:
    """The samples, one at a time, from the first layer's part of theta.

    Args:
        features: gradients of a network whose first layer is `nn.Linear` on the whole input.
        theta: (1, p), a sum of these gradients, such as the move of a linearised network.
        n: number of samples; if None, the rank of the first layer's part.
        starts: random starts of a round.
        steps: Adam steps at each sharpness of the ladder (networks without ReLUs take as many in
            all, at their own slope).
        learning_rate: of Adam.
        rounds: most rounds.
        criterion: c(x) at which a candidate counts as a sample. What is still missing after the
            last round is filled with the candidates of smallest c(x).
        polish: most Levenberg-Marquardt steps on the projection loss of all layers at the end.
        tolerance: projection loss that counts as explained.
        seed: of the starts.
        progress: draw a progress bar; if None, unless PAPERLIB_PROGRESS=0 is set.

    Returns:
        The samples, with the projection loss of all layers. `stages` counts the samples found in
        each round. Passes are counted as for the other attacks, starts in place of candidates.

    Raises:
        TypeError: if the features are no `GradientFeatures`.
        ValueError: for a network whose first layer does not see the whole input, theta of another
            shape, or n that is not below min(h, d) or above the rank.
    """
    problem = FirstLayer(features, theta, n)
    check_count("starts", starts)
    check_count("steps", steps)
    check_count("rounds", rounds)
    check_count("polish", polish, least=0)
    check_positive("learning_rate", learning_rate)
    check_positive("criterion", criterion)
    check_positive("tolerance", tolerance, below=1.0)
    generator = stream("first layer attack", check_count("seed", seed, least=0))
    begun, history, stages, passes = time.perf_counter(), [], [], 0
    found: list[Found] = []
    spare: list[Found] = []
    with Progress(progress) as watch:
        for number in range(rounds):
            watch.stage(f"round {number + 1}, {len(found)} found")
            X = problem.search(
                problem.random(starts, generator),
                found,
                steps=steps,
                learning_rate=learning_rate,
                watch=watch,
            )
            deltas = problem.deltas(X)
            costs = problem.criterion(deltas, [])
            for j in costs.argsort().tolist():
                if len(found) == problem.n:
                    break
                if problem.among(deltas[j], found):
                    continue
                candidate = Found(X[j], deltas[j], float(costs[j]))
                (found if candidate.cost <= criterion else spare).append(candidate)
            spent = 2 * steps * problem.levels + 1
            passes += spent
            best = float(costs.min())
            seconds = time.perf_counter() - begun
            history.append({"step": number + 1, "loss": best, "found": len(found)})
            stages.append(
                {
                    "restart": 0,
                    "stage": f"round {number + 1}",
                    "loss": best,
                    "found": len(found),
                    "candidates": starts,
                    "passes": spent,
                    "seconds": seconds,
                }
            )
            if len(found) == problem.n:
                break
        X = problem.samples(found, spare, generator)
        point = Linearization(features, problem.theta, X)
        if polish:
            watch.stage("polish")
            run = levenberg_marquardt(
                lambda Y: Linearization(features, problem.theta, Y, curvature=True),
                X,
                target=tolerance,
                max_steps=polish,
                on_step=lambda record, at: watch.step(record["loss"], at.X),
            )
            if run.point.loss <= point.loss:
                point = run.point
            stages.append(
                {
                    "restart": 0,
                    "stage": "polish",
                    "loss": point.loss,
                    "found": len(found),
                    "candidates": problem.n,
                    "passes": run.passes,
                    "seconds": time.perf_counter() - begun,
                }
            )
            passes += run.passes
    identifiable = parameters_told(problem.theta) > problem.n * features.d
    return Reconstruction(
        samples=point.X,
        loss=point.loss,
        status=conclude(point.loss, tolerance, identifiable=identifiable),
        explained=point.loss <= tolerance,
        identifiable=identifiable,
        history=history,
        stages=stages,
        passes=passes,
        seconds=time.perf_counter() - begun,
        restart=0,
        options={
            "attack": "first layer",
            "n": problem.n,
            "starts": starts,
            "steps": steps,
            "learning_rate": learning_rate,
            "rounds": rounds,
            "criterion": criterion,
            "polish": polish,
            "tolerance": tolerance,
            "seed": seed,
            "model": features.describe(),
        },
    )


@dataclass(frozen=True)
class Found:
    """A candidate x (d,) with delta(x) (h,) and c(x)."""

    x: Tensor
    delta: Tensor
    cost: float


def first_linear(features: GradientFeatures) -> str:
    """The name of the first linear layer.

    Raises:
        ValueError: if there is none, or it does not see the whole input.
    """
    for name, part in features.network.named_modules():
        if isinstance(part, nn.Linear):
            X = random_on_sphere(1, features.d, generator=stream("module check", 0))
            X = X.to(features.device, features.dtype)
            block = features.block_of(features.features(X), f"{name}.weight")[0]
            # A gradient in these weights is delta x^T only if x is what the layer sees.
            rest = block - (block @ X.T) @ X / features.d
            if part.in_features == features.d and float(rest.norm()) <= 1e-4 * float(block.norm()):
                return name
            break
    raise ValueError(
        f"the first layer of {features.name} must be nn.Linear on the whole input, d = {features.d}"
    )


class FirstLayer:
    """The first block of theta taken apart: row space, column space, and delta(x).

    Attributes:
        theta: (1, p).
        n: number of samples.
        basis: (n, d) orthonormal rows, the span of the samples.
        columns: (h, n) orthonormal columns, the span of the delta(x_i).
        levels: sharpnesses of the ladder; 1 without ReLUs.
        sizes: (h,) typical size of each entry of delta, by which delta and block are divided.
        singular_values: of the block.
    """

    def __init__(self, features: GradientFeatures, theta: Tensor, n: int | None):
        """Decompose the first block in float64."""
        if not isinstance(features, GradientFeatures):
            raise TypeError(f"features must be GradientFeatures, got {type(features).__name__}")
        self.features, self.theta = features, check_theta(theta, features)
        if len(self.theta) != 1:
            raise ValueError(f"theta must have shape (1, {features.p}), got {tuple(theta.shape)}")
        self.name = first_linear(features)
        self.block = features.block_of(self.theta, f"{self.name}.weight")[0].double()
        Vh = torch.linalg.svd(self.block, full_matrices=False).Vh
        # Neurons are brought to one size: else those with large weights above them rule c, and
        # the search stops where a few of the others are on the wrong side of their kinks.
        self.sizes = torch.ones(len(self.block)).to(self.theta)
        typical = random_on_sphere(TYPICAL, features.d, generator=stream("neuron sizes", 0))
        sizes = self.deltas(typical.to(self.theta)).square().mean(0).sqrt()
        self.sizes = sizes.clamp_min(1e-6 * float(sizes.max()))
        self.block = self.block / self.sizes[:, None].double()
        U, values, _ = torch.linalg.svd(self.block, full_matrices=False)
        rank = int((values > RANK_CUTOFF[features.dtype] * values[0]).sum())
        self.singular_values = values
        self.n = rank if n is None else check_count("n", n)
        h, d = self.block.shape
        if self.n >= min(h, d):
            raise ValueError(
                f"n must be below min(h, d) = {min(h, d)}, got {self.n}: the first layer's part of "
                "theta then fills its space and tells nothing of single samples"
            )
        if self.n > rank:
            raise ValueError(f"n must be at most the rank {rank} of the first layer, got {self.n}")
        self.basis = Vh[: self.n].to(features.dtype)
        self.columns = U[:, : self.n].to(features.dtype)
        self.smooth, self.relus = features, []
        try:
            self.smooth = features.smoothed(LADDER[0], exact_value=False)
        except ValueError:
            pass  # no ReLU: the slope is smooth as it is
        self.relus = [p for p in self.smooth.network.modules() if isinstance(p, SmoothReLU)]
        self.levels = len(LADDER) if self.relus else 1

    def random(self, m: int, generator: torch.Generator) -> Tensor:
        """Random points of the span on the sphere, (m, d)."""
        Z = torch.randn(m, self.n, generator=generator, dtype=torch.float64)
        return to_sphere(Z.to(self.basis) @ self.basis)

    def deltas(self, X: Tensor, *, smooth: bool = False) -> Tensor:
        """delta(x), (m, h): the gradient in the outputs of the first layer, over its size."""
        features = self.smooth if smooth else self.features
        layer = features.network.get_submodule(self.name)
        shift = X.new_zeros(len(X), len(self.block)).requires_grad_()
        hook = layer.register_forward_hook(lambda _module, _inputs, out: out + shift)
        try:
            with torch.enable_grad():
                out = features.network(X.reshape(-1, *features.input_shape))
                total = (out.reshape(len(X), -1) @ features.weights).sum()
                (delta,) = torch.autograd.grad(total, shift, create_graph=smooth)
        finally:
            hook.remove()
        return (delta if smooth else delta.detach()) / self.sizes

    def criterion(self, deltas: Tensor, found: list[Found]) -> Tensor:
        """C of each row, (m,), those found being taken out of the denominator."""
        off = deltas.square().sum(1) - (deltas @ self.columns).square().sum(1)
        size = deltas.square().sum(1)
        if found:
            F = orthonormal(found)
            size = (deltas - (deltas @ F) @ F.T).square().sum(1)
        # A little of the whole length, since both vanish at a sample that was found.
        return off.clamp_min(0) / (size + 1e-9 * deltas.detach().square().sum(1))

    def among(self, delta: Tensor, found: list[Found]) -> bool:
        """Whether delta lies in the span of those found."""
        if not found:
            return False
        F = orthonormal(found)
        return bool((delta - F @ (F.T @ delta)).norm() < SAME * delta.norm())

    def search(
        self, X: Tensor, found: list[Found], *, steps: int, learning_rate: float, watch: Progress
    ) -> Tensor:
        """Adam on c from every start in the span, sharper and sharper, (m, d)."""
        Z = X @ self.basis.T
        radius = float(self.features.d) ** 0.5
        for level in range(self.levels):
            for relu in self.relus:
                relu.sharpness = LADDER[level]
            Z = Z.detach().requires_grad_()
            optimizer = torch.optim.Adam([Z], lr=learning_rate)
            for _ in range(steps):
                optimizer.zero_grad()
                costs = self.criterion(self.deltas(Z @ self.basis, smooth=True), found)
                costs.sum().backward()
                optimizer.step()
                with torch.no_grad():
                    Z.mul_(radius / Z.norm(dim=1, keepdim=True))
                watch.step(float(costs.detach().min()), Z.detach())
        return Z.detach() @ self.basis

    def samples(self, found: list[Found], spare: list[Found], generator: torch.Generator) -> Tensor:
        """The rows of [delta]^+ Theta_1; else what was found and the best of the rest, (n, d)."""
        if len(found) < self.n:
            rest = self._distinct(found, sorted(spare, key=lambda other: other.cost))
            X = torch.stack([one.x for one in rest])
            return torch.cat([X, self.random(self.n - len(X), generator)])
        S = torch.stack([one.delta for one in found], dim=1).double()
        X = to_sphere(torch.linalg.lstsq(S, self.block).solution).to(self.theta)
        # The sign of alpha_i is not known, that of x_i is: delta(x_i) tells.
        off = [(self.deltas(Y) - S.T.to(X)).norm(dim=1) for Y in (X, -X)]
        return torch.where((off[0] <= off[1])[:, None], X, -X)

    def _distinct(self, found: list[Found], spare: list[Found]) -> list[Found]:
        """Those found and the cheapest others that are no copies, at most n, at least one."""
        kept = list(found)
        for other in spare:
            if len(kept) == self.n:
                break
            cosines = [float(other.x @ one.x) / self.features.d for one in kept]
            if max(cosines, default=0.0) < 0.95:
                kept.append(other)
        return kept


def orthonormal(found: list[Found]) -> Tensor:
    """A basis of the span of their deltas, (h, number found)."""
    return torch.linalg.qr(torch.stack([one.delta for one in found], dim=1)).Q
