"""Searching the few directions that matter before all d of them.

From a few times d n parameters on, the second moment of theta has outlying directions, and the
samples lie near their span, which has tens of dimensions where d is in the thousands: pictures are
alike, and what the span misses acts as noise. Within it, the search for n samples is a small
problem (`SubspaceFeatures` with a part of the p features), far less work than one step in d
dimensions.

What it finds starts a descent in all dimensions. When that slows down, the span of its candidates
and of the outlying directions in what they leave unexplained is searched in turn: there, wrong
candidates find their places among the right ones, which takes dozens of steps in d dimensions.
A few rounds find all samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paperlib.elimination import doubtful_candidates, eliminate
from paperlib.feature_map import FeatureMap
from paperlib.levenberg_marquardt import Descent, levenberg_marquardt
from paperlib.lift import Lift
from paperlib.memory import PRODUCTS, activation_bytes, bytes_of
from paperlib.outlying_directions import outlying_directions
from paperlib.precision import Formats, search_products
from paperlib.projection import Linearization
from paperlib.remainder import left_by
from paperlib.sphere import random_on_sphere, to_sphere
from paperlib.subspace import SubspaceFeatures

# Features in a search, for each number that it looks for (k a candidate), and at least.
FEATURES_PER_NUMBER = 5
LEAST_FEATURES = 1024

# How often the first search starts at random.
STARTS = 2

# A search ends when its loss has fallen by less than a tenth in so many steps.
STALL_STEPS, STALL_RATIO = 3, 0.9
MOST_STEPS = 60

# So many outlying directions at most, for each sample.
DIRECTIONS = 2

# A search pays while its products are smaller than this share of those with all of V. Where n is
# not small beside d it would be the whole problem, solved from two starts in place of one.
PAYS = 0.5

# Loss below which a search has nothing to add: its candidates are sharper than its sample.
ENOUGH = 1e-7


class SampledSubspace(SubspaceFeatures):
    """Features of a model on a subspace, only the first so many of them.

    They keep their places among the p features, so that theta is taken as it is.
    """

    def __init__(self, model: FeatureMap, basis: Tensor, features: int):
        """Restrict the inputs to a basis (d, k), and each process to its share of the features."""
        super().__init__(model, basis)
        self.rows = share_held(model, features)
        total = torch.tensor([float(self.rows)], dtype=torch.float64, device=model.device)
        model.sum_over_processes([total])
        self.p = int(total)

    @property
    def held(self) -> slice:
        """The first of those that the model holds here."""
        start = self.inner.held.start
        return slice(start, start + self.rows)

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row, rows of V) until there are enough."""
        left = self.rows
        for start, V in self.inner.weight_blocks():
            yield start, V[:left]
            left -= len(V)
            if left <= 0:
                break


class SubspaceSearch:
    """Candidates for n samples from the directions that stand out.

    Attributes:
        passes: readings of all of V so far; those of the weights of a search count by their size.
    """

    def __init__(
        self,
        model: FeatureMap,
        theta: Tensor,
        n: int,
        *,
        candidates: int,
        lift: Lift | None,
        dtype: torch.dtype,
        forcing: float,
        generator: torch.Generator,
    ):
        """Keep the problem.

        Args:
            model: features with weights V.
            theta: (C, p), without the span of V if `lift` is given.
            n: how many samples.
            candidates: n^ >= n, in a search.
            lift: the projection off the columns of V.
            dtype: of products with all of V.
            forcing: relative residual of the linear solves.
            generator: source of the candidates.
        """
        self.model, self.theta, self.n, self.lift = model, theta, n, lift
        self.candidates, self.dtype = candidates, dtype
        self.forcing, self.generator = forcing, generator
        self.passes = 0.0

    def first(self) -> Tensor:
        """Candidates (n, d) from the parameters alone."""
        return self._search(self._outlying(self.theta), [None] * STARTS)

    def next(self, point: Linearization) -> Tensor:
        """Candidates (n, d) from those of a point and what they leave unexplained.

        Those that matter little more than what is left are doubted: the directions that stand out
        are taken from what the others leave, and one start is made without them.
        """
        X = point.X.to(self.theta)
        sure = ~doubtful_candidates(point)
        if not sure.any():
            directions = self._outlying(self.theta)
            return self._search(torch.cat([X, directions]), [X, directions])
        rest = left_by(point, sure)
        self.passes += 1
        directions = self._outlying(rest.residual)
        span = [X, directions]
        # The linear part of theta beside the candidates' own has to stay within reach.
        span += [p.linear.T.to(X) for p in (point, rest) if p.linear is not None]
        return self._search(torch.cat(span), [X, torch.cat([X[sure], directions])])

    def _outlying(self, Y: Tensor) -> Tensor:
        directions, passes = outlying_directions(
            self.model,
            Y,
            most=DIRECTIONS * self.n,
            dtype=self.dtype,
            generator=self.generator,
        )
        self.passes += passes
        return directions

    def _search(self, span: Tensor, starts: list[Tensor | None]) -> Tensor:
        """The best candidates (n, d) in the span of some rows (m, d).

        Each start is some candidates, or None, and as many random ones as make n^ of them.
        """
        basis = independent_columns(span)
        wanted = features_wanted(basis.shape[1], self.candidates)
        features = SampledSubspace(self.model, basis, wanted)
        lift = Lift(features, self.theta, dtype=features.dtype) if self.lift else None
        best: Descent | None = None
        for begin in starts:
            Z = random_on_sphere(self.candidates, features.d, generator=self.generator)
            Z = Z.to(self.theta)
            if begin is not None:
                begun = features.coordinates(begin[: self.candidates])
                Z = torch.cat([begun, Z[len(begun) :]])
            run = self._descend(features, lift, Z)
            run = self._descend(features, lift, run.point.X[eliminate(run.point, self.n).kept])
            if best is None or run.point.loss < best.point.loss:
                best = run
        return to_sphere(features.inputs(best.point.X.to(features.dtype)))

    def _descend(self, features: FeatureMap, lift: Lift | None, Z: Tensor) -> Descent:
        theta = lift.theta if lift else self.theta
        size = self.candidates * features.p * features.d
        products = search_products(features.device, features.dtype, size)
        run = levenberg_marquardt(
            lambda Z: Linearization(
                features, theta, Z, lift=lift, curvature_dtype=products, curvature=True
            ),
            Z,
            target=ENOUGH,
            max_steps=MOST_STEPS,
            forcing=self.forcing,
            stall_steps=STALL_STEPS,
            stall_ratio=STALL_RATIO,
        )
        self.passes += run.passes * (features.p * features.d) / (self.model.p * self.model.d)
        return run


def share_held(model: FeatureMap, features: int) -> int:
    """How many of the features of a search this process takes: as its share of all p."""
    return min(model.features_held, -(-features * model.features_held // model.p))


def features_wanted(directions: int, candidates: int) -> int:
    """Features of a search for so many candidates in the span of so many directions."""
    return max(LEAST_FEATURES, FEATURES_PER_NUMBER * directions * candidates)


def largest_search(model: FeatureMap, n: int, candidates: int, outputs: int) -> tuple[int, int]:
    """The most features and directions of a search.

    Candidates, outlying directions, and the linear parts of two points span it.
    """
    directions = min(model.d, (1 + DIRECTIONS) * n + 2 * outputs)
    return min(model.p, features_wanted(directions, candidates)), directions


def search_pays(model: FeatureMap, n: int, candidates: int, outputs: int) -> bool:
    """Whether searches are smaller problems than the whole one."""
    features, directions = largest_search(model, n, candidates, outputs)
    return features * directions <= PAYS * model.p * model.d


def search_bytes(model: FeatureMap, n: int, candidates: int, outputs: int) -> int:
    """The most bytes that a search allocates: its weights, and two points of its descent."""
    features, directions = largest_search(model, n, candidates, outputs)
    features = share_held(model, features)
    products = search_products(model.device, model.dtype, candidates * features * directions)
    formats = Formats(model.dtype, products)
    points = activation_bytes(candidates, n, features, PRODUCTS, model.dtype, formats)
    parameters = bytes_of(model.dtype, 3, outputs, model.p)
    weights = sum(bytes_of(dtype, features, directions) for dtype in set(formats))
    return points + parameters + weights


def independent_columns(rows: Tensor, *, cutoff: float = 1e-4) -> Tensor:
    """An orthonormal basis (d, k) of the span of some rows (m, d), without what depends on others.

    Args:
        rows: (m, d), not all zero; their lengths do not matter.
        cutoff: relative size of what counts as dependent.
    """
    units = torch.nn.functional.normalize(rows.double())
    _, sizes, right = torch.linalg.svd(units, full_matrices=False)
    return right[sizes > cutoff * sizes[0]].T.to(rows)
