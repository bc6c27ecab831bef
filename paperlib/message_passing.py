"""Approximate message passing: candidates from beliefs about them, where descent gets stuck.

Levenberg-Marquardt moves points, and a point is always certain of itself: near p = d n it settles
in one of many local minima. Message passing moves beliefs. Sample x_i is Gaussian with mean X_i and
variance tau_i in each coordinate, and so is its pre-activation at every feature,

    z_ik = v_k . x_i ~ N(omega_ik, tau_i),   omega_i = V X_i - tau_i g_i    (Onsager's correction).

The parameters say theta_k = sum_i alpha_i act(z_ik). For one sample at a time the others are noise,
their sum being Gaussian of mean sum_j alpha_j E act(z_jk) and variance
sum_j alpha_j^2 Var act(z_jk).
That gives the posterior of z_ik (a sum over a grid), its score g_ik = (E[z_ik | theta_k] -
omega_ik) / tau_i, and by V^T g_i a better mean of x_i. As long as little is known, Var act is large
and averages over the local minima; as it falls, samples with the next smaller |alpha| stand out.
Updates that overshoot are taken back, and those that follow are smaller.

The linear part, sum_i alpha_i mu_1 x_i, is one more unknown vector, seen directly in theta. It is
tied to the samples in the prior, so that signs come out right without a lift that would cost d
equations. Where the rest of the activation is even (ReLU, GELU), nothing else knows the signs, and
they are drawn at random at the start. A strong belief that has the wrong one does not turn by
itself: the tie presses the linear part that it lacks into all weaker ones, none of which then comes
out. So beliefs are turned round whenever the linear part is clearly explained better that way.

Where the features are projected off the span of rows Q, as those of known samples are, what was
taken out of phi(x_i) is given back: theta_k = sum_i alpha_i act(z_ik) + c . Q_k, c being regressed
along with alpha. So a parameter still speaks of its own pre-activations alone.

Sources: generalised approximate message passing, Rangan 2011 (arXiv 1010.5141); committee machines,
Aubin et al. 2018 (arXiv 1806.05451); the spectral start, Mondelli and Venkataramanan 2021 (arXiv
2010.03460). The sum over the other samples is taken as Gaussian here, which makes every integral
one-dimensional. alpha, which these papers take as known, is regressed on E act along the way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paperlib.elimination import DOUBT, doubtful_candidates
from paperlib.feature_map import FeatureMap
from paperlib.input_channel import tied_posterior
from paperlib.matrix_product import combine, project
from paperlib.memory import bytes_of
from paperlib.output_channel import NODES, OutputChannel
from paperlib.projection import Linearization, significant_eigenpairs
from paperlib.separation import Separation
from paperlib.signs import turned_round
from paperlib.spectral_start import SpectralStart, second_moment_coefficient
from paperlib.sphere import to_sphere
from paperlib.weight_gram import WeightGram

# Share of the new value in every update of a run that keeps its first pace; 1 oscillates.
DAMPING = 0.6
ALPHA_DAMPING = 0.2

# The more samples move at once, the sooner their updates overshoot together. When the residual is
# RISE times its least so far, the beliefs of the least come back and the pace of what follows is
# SLOWER times what it was; that of alpha, for which the beliefs have to be right first, falls by
# the square.
RISE, SLOWER, SLOWEST = 2.5, 0.6, 0.1

# What one iteration hands to the next.
STATE = ("X", "tau", "alpha", "c", "L", "L_cov", "misfit", "g", "g_L")

# A belief is turned round where that raises the log-likelihood of the linear part by this much.
TURN = 5.0

# Beliefs that learned nothing (variance above DEAD of the prior's) start again from the residual
# every REVIVE iterations, as does the weaker of two that are the same (|cosine| above SAME).
REVIVE, DEAD, SAME = 30, 0.9, 0.95

# Iterations end when the beliefs are this narrow, or when the residual stops falling.
NARROW = 2e-3
PATIENCE, GAIN = 100, 0.9

# Entries of the grid that are held at a time.
CHUNK = 1 << 21


@dataclass
class Beliefs:
    """What message passing ended with.

    Attributes:
        X: (n, d) means, put on the sphere.
        variance: (n,) tau, between 0 (certain) and 1 (nothing learned).
        alpha: (n, C) coefficients of the whitened outputs.
        unexplained: share of the parameters' square that the means leave unexplained.
        iterations: passes of the loop; each is two products with V.
        ended: why: "narrow", "stalled", "diverged" or "step limit".
        history: unexplained share before each iteration.
    """

    X: Tensor
    variance: Tensor
    alpha: Tensor
    unexplained: float
    iterations: int
    ended: str
    history: list[float] = field(default_factory=list)


def whiten(theta: Tensor) -> Tensor:
    """Rows with the span of theta's that are orthogonal and of mean square 1, (rank, p)."""
    values, vectors = significant_eigenpairs(theta.double() @ theta.double().T)
    scaled = vectors * (theta.shape[1] / values).sqrt()
    return scaled.T.to(theta.dtype) @ theta


class MessagePassing:
    """Beliefs about n samples, given V and theta."""

    def __init__(
        self,
        model: FeatureMap,
        theta: Tensor,
        n: int,
        *,
        generator: torch.Generator,
        jitter: float = 0.3,
        dtype: torch.dtype | None = None,
        weight_gram: WeightGram | None = None,
    ):
        """Begin at the outlying eigenvectors of the second moment of theta.

        Args:
            model: random features, with weights V, or those with rows projected off.
            theta: (C, p).
            n: how many samples.
            generator: source of the perturbation of the start.
            jitter: its size, relative to a random direction; 0 starts at the eigenvectors.
            dtype: of the products with V, the model's if None.
            weight_gram: V^T V in that dtype, where it is there already.
        """
        self.whole, self.n = model, n
        off = model.projected_off
        self.model = model = model.random_features
        self.dtype = model.dtype if dtype is None else dtype
        self.jitter, self.generator = jitter, generator
        self.y = whiten(theta).float()
        self.C, self.p = self.y.shape
        self.Q = self.y.new_empty(0, self.p) if off is None else off.float()
        self.mu = model.activation.linear_coefficient
        c_2 = second_moment_coefficient(model)
        self.spectral = SpectralStart(model, c_2, dtype=self.dtype, weight_gram=weight_gram)
        self.channel = OutputChannel(model.activation, self.y.device)

        # The same for every start: the passes over V with d columns are made once.
        self._linear_start = self.spectral.linear_part(self.y)
        self._moments = self.spectral.second_moments(self.y)
        self.begin()

    def begin(self) -> None:
        """Forget what was learned, and begin again from another perturbation of the start."""
        self.L = self._linear_start.clone()  # (C, d): sum_i alpha_i mu_1 x_i
        noise = 0.1 * self.L.square().mean() + 1e-3
        self.L_cov = noise * torch.eye(self.C).to(self.y)
        self.X, self.tau, self.alpha = self._fresh(self._moments, self.n)
        self.g = self.y.new_zeros(self.n, self.p)
        self.g_L = torch.zeros_like(self.y)
        self._give_back()
        self.misfit = 0.0
        self.pace = 1.0  # of the updates, lowered where they overshoot
        self.guarded = True  # against overshooting

    def _fresh(self, moments: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means, variances and coefficients of `count` beliefs from second moments."""
        parts = self.spectral.directions_of(*moments, count, generator=self.generator)
        directions, overlap, alpha = (part.to(self.y.dtype) for part in parts)
        d = self.model.d
        noise = torch.randn(count, d, generator=self.generator, dtype=torch.float32).to(directions)
        X = to_sphere(math.sqrt(d) * directions + self.jitter * noise)
        return X * overlap.sqrt()[:, None], 1 - overlap, alpha

    def _pre_activations(self, V: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Means omega of the pre-activations (n, h) and of the linear parts (C, h)."""
        both = project(torch.cat([self.X, self.L]).to(V.dtype), V)
        omega = both[: self.n].float() - self.tau[:, None] * self.g[:, part]
        return omega, both[self.n :].float() - self.L_cov @ self.g_L[:, part]

    def _chunks(self):
        """Pairs (rows of V, range of features) small enough for the grid."""
        height = max(1, CHUNK // (self.n * NODES))
        for block in self.model.blocks(dtype=self.dtype):
            V = block.weights  # a copy, where it is stored in fewer digits
            for start in range(block.start, block.stop, height):
                stop = min(start + height, block.stop)
                yield V[start - block.start : stop - block.start], slice(start, stop)

    def _give_back(self) -> None:
        """Regress c (r, C) on what the means and the linear part leave."""
        left = self.y.new_zeros(len(self.Q), self.C)
        for V, part in self._chunks() if len(self.Q) else ():
            omega, omega_L = self._pre_activations(V, part)
            mean = self.channel.moments(omega, self.tau)[1]
            left += self.Q[:, part] @ (self.y[:, part] - self.alpha.T @ mean - omega_L).T
        self.c = left

    def step(self, *, learn_alpha: bool, on_sphere: bool = True) -> float:
        """One iteration: two products with V. Returns the unexplained share before it."""
        n, C, p, d = self.n, self.C, self.p, self.model.d
        new = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=self.X.device)  # noqa: E731
        gram, rhs, outer = new(n, n), new(n, C), new(C, C)
        seen_off, mean_off = new(len(self.Q), C), new(len(self.Q), n)
        back, spread, squares = new(n + C, d), new(n), new(n)
        eye = torch.eye(C).to(self.y)
        alpha, tau, b, channel = self.alpha, self.tau, DAMPING * self.pace, self.channel

        ground = self.L_cov + (self.misfit + 1e-9) * eye
        separation = Separation(channel, alpha, tau, ground)
        noise = separation.noise
        L_gain = torch.linalg.inv(noise)

        for V, part in self._chunks():
            omega, omega_L = self._pre_activations(V, part)
            f, mean, variance = channel.moments(omega, tau)
            y, Q = self.y[:, part] - omega_L, self.Q[:, part]
            e = self.y[:, part] - alpha.T @ mean - omega_L - self.c.T @ Q
            score = separation.scores(e, f, mean, variance)
            score_L = L_gain @ e
            squares += score.square().sum(1)
            spread += variance.sum(1)
            outer += e @ e.T
            gram += mean @ mean.T
            rhs += mean @ y.T
            seen_off += Q @ y.T
            mean_off += Q @ mean.T
            self.g[:, part] = torch.lerp(self.g[:, part], score, b)
            self.g_L[:, part] = torch.lerp(self.g_L[:, part], score_L, b)
            scores = torch.cat([self.g[:, part], self.g_L[:, part]])
            back += combine(scores.to(V.dtype), V)
        self.model.sum_over_processes([gram, rhs, outer, back, spread, squares])

        # Precision of what the features say, by E[score^2] = - E[d score / d omega].
        S = d / squares.clamp(min=1e-6 * p).float()
        S_L = (d / p) * noise
        R = self.X + S[:, None] * back[:n].float()
        R_L = self.L + S_L @ back[n:].float()
        if channel.even:
            weights = self.mu * alpha
            doubt = S_L + (weights.T * tau) @ weights  # covariance of R_L about the means
            wrong = turned_round(self.X, weights, R_L, doubt, least=TURN)
            for rows in (self.X, R, self.g):
                rows[wrong] *= -1
        covariance, tie = tied_posterior(S, S_L, alpha, self.mu)
        X = (covariance @ (R.double() / S.double()[:, None] + tie @ R_L.double())).float()
        covariance = covariance.float()
        if on_sphere:
            # A mean that leaves the variance tau has the square length d (1 - tau). With any
            # other, a short mean and a large alpha explain theta as well.
            X = to_sphere(X) * (1 - covariance.diagonal()).clamp(min=0).sqrt()[:, None]
        self.X = torch.lerp(self.X, X, b)
        self.tau = torch.lerp(tau, covariance.diagonal(), b).clamp(1e-6, 1)
        self.L = torch.lerp(self.L, self.mu * alpha.T @ X, b)
        L_cov = self.mu**2 * alpha.T @ covariance @ alpha + 1e-9 * eye
        self.L_cov = torch.lerp(self.L_cov, L_cov, b)

        spread /= p
        expected = (alpha.T * spread.float()) @ alpha + self.L_cov
        misses = float(outer.trace()) / p
        self.misfit = max(0.0, (misses - float(expected.trace())) / C)
        if learn_alpha:
            ridge = float(expected.trace()) / C / max(float(alpha.square().mean()), 1e-12)
            ridge = ridge * torch.eye(n, dtype=torch.float64, device=gram.device)
            # With c eliminated: Q is orthonormal.
            gram, rhs = gram - mean_off.T @ mean_off, rhs - mean_off.T @ seen_off
            learned = torch.linalg.solve(gram + ridge, rhs).float()
            self.alpha = torch.lerp(alpha, learned, ALPHA_DAMPING * self.pace**2)
        self.c = torch.lerp(self.c, (seen_off - mean_off @ self.alpha.double()).float(), b)
        return misses / C

    def revive(self) -> int:
        """Start beliefs that are lost, or double, again from the residual; how many."""
        lost = self.tau > DEAD
        directions = torch.nn.functional.normalize(self.X)
        same = (directions @ directions.T).abs() > SAME
        same &= (self.tau < 0.5)[:, None] & (self.tau < 0.5)[None, :]
        by_weight = self.alpha.norm(dim=1).argsort(descending=True).tolist()
        for place, i in enumerate(by_weight):
            for j in by_weight[place + 1 :]:
                if same[i, j] and not lost[i] and not lost[j]:
                    self.alpha[i] += self.alpha[j]
                    lost[j] = True
        count = int(lost.sum())
        if count:
            residual = torch.zeros_like(self.y)
            weights = torch.where(lost[:, None], 0, self.alpha)
            for V, part in self._chunks():
                omega, omega_L = self._pre_activations(V, part)
                mean = self.channel.moments(omega, self.tau)[1]
                residual[:, part] = self.y[:, part] - weights.T @ mean - omega_L
                residual[:, part] -= self.c.T @ self.Q[:, part]
            self.X[lost], self.tau[lost], self.alpha[lost] = self._fresh(
                self.spectral.second_moments(residual), count
            )
            self.g[lost] = 0
        return count

    def resume(self, X: Tensor) -> None:
        """Go on from candidates that explain most: doubt those that matter no more than the rest.

        A candidate whose removal costs no more than `DOUBT` times what is unexplained starts again
        from the residual. The others are believed as far as that leaves them free to move.

        Args:
            X: (n, d) candidates.
        """
        point = Linearization(self.whole, self.y.to(self.model.dtype), X)
        doubtful = doubtful_candidates(point)
        self.alpha = point.alpha.float()
        share = self.C * point.loss / self.alpha.square().sum(1).clamp(min=1e-12)
        self.tau = (DOUBT * share).clamp(1e-4, 0.5)
        self.tau[doubtful] = 1.0
        self.X = X.float() * (1 - self.tau).sqrt()[:, None]
        self.L = self.mu * self.alpha.T @ self.X
        eye = torch.eye(self.C).to(self.y)
        self.L_cov = self.mu**2 * (self.alpha.T * self.tau) @ self.alpha + 1e-6 * eye
        self.misfit = point.loss
        # What is explained already stirs before the doubtful ones are found: no overshooting.
        self.guarded = False
        self.g.zero_()
        self.g_L.zero_()
        self._give_back()
        self.revive()

    def forget_scores(self) -> None:
        """Give up what is as large as the features, until the next `begin`."""
        self.g = self.g_L = self.y.new_empty(0)

    def _state(self) -> dict[str, Any]:
        """A copy of what one iteration hands to the next."""
        return {name: copy.deepcopy(getattr(self, name)) for name in STATE}

    def _restore(self, state: dict[str, Any]) -> None:
        """Go back to a copied state."""
        for name, value in state.items():
            setattr(self, name, copy.deepcopy(value))

    def run(
        self,
        max_iterations: int,
        *,
        on_sphere: bool = True,
        on_step: Callable[[float, Tensor], None] | None = None,
    ) -> Beliefs:
        """Iterate until the beliefs are narrow, or learn nothing more.

        Args:
            max_iterations: at most.
            on_sphere: whether means get the length that points of the sphere have. Most samples
                come out sooner so; some that are nearly opposite to another, only with free
                lengths.
            on_step: called after each iteration with the unexplained share and the means.
        """
        history: list[float] = []
        ended = "step limit"
        least, at_least, revived = math.inf, self._state(), 0
        for k in range(max_iterations):
            if k and k % REVIVE == 0:
                self.revive()
                revived = k
            before = self._state()
            share = self.step(learn_alpha=k - revived > 2, on_sphere=on_sphere)
            if share < least:
                least, at_least = share, before
            elif self.guarded and self.pace > SLOWEST and not share <= RISE * least:
                self._restore(at_least)
                self.pace *= SLOWER
                share = least
            del before  # as large as the features
            history.append(share)
            if on_step is not None:
                on_step(history[-1], self.X)
            if not math.isfinite(history[-1]) or history[-1] > 50:
                ended = "diverged"
                break
            if float(self.tau.max()) < NARROW:
                ended = "narrow"
                break
            past = history[:-PATIENCE]
            if past and min(history[-PATIENCE:]) > GAIN * min(past):
                ended = "stalled"
                break
        X = torch.nan_to_num(self.X)
        empty = X.square().sum(1) == 0
        fresh = torch.randn(X[empty].shape, generator=self.generator, dtype=torch.float32)
        X[empty] = fresh.to(X)
        return Beliefs(
            to_sphere(X), self.tau, self.alpha, history[-1], len(history), ended, history
        )


def message_bytes(n: int, outputs: int, p: int, d: int) -> int:
    """Bytes of the second moments, while they are made and beside the scores.

    Scores are held of now and of the best iteration, and of one being copied.
    """
    moments = bytes_of(torch.float64, outputs, d, d)
    scores = bytes_of(torch.float32, 3, n + outputs, p) + bytes_of(torch.float32, outputs, p)
    return max(4 * moments, moments + scores)
