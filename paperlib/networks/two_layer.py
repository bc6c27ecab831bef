"""The two-layer network of the paper: f(x) = W2 act(W1 x)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paperlib.activations import Activation, activation
from paperlib.checks import check_count
from paperlib.given_features import GivenFeatures
from paperlib.networks.network import Network

_activation = activation


class TwoLayer(Network):
    """f(x) = W2 act(W1 x), W1 (width, d) with N(0, 1/d) entries, W2 (C, width) with N(0, 1/width).

    Random features whose V is trained as well (Section 5 of the paper; there ReLU, width 122,880,
    ten outputs).
    """

    def __init__(
        self,
        d: int,
        width: int,
        outputs: int = 1,
        *,
        activation: str | Activation = "relu",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ):
        """Draw both layers.

        Args:
            d: dimension of an input.
            width: hidden neurons, p; the last layer has outputs * width parameters.
            outputs: C.
            activation: a name of `activation_names()` or an `Activation`.
            seed: seed of the weights.
            dtype: float32 (if not given) or float64.
            device: the CPU if not given.

        Raises:
            ValueError: for sizes that are not positive or an unknown activation.
        """
        d, width = check_count("d", d), check_count("width", width)
        act = _activation(activation)
        hidden = nn.utils.skip_init(nn.Linear, d, width, bias=False)
        body = nn.Sequential(hidden, Pointwise(act))
        super().__init__(body, d, width, outputs, seed=seed, dtype=dtype, device=device)
        self.activation = act

    def feature_map(self, **options) -> GivenFeatures:
        """Act(W1 x) with W1 as it is now: weights are known, so its linear part can be lifted.

        Args:
            **options: for `GivenFeatures`.
        """
        return GivenFeatures(self.body[0].weight, self.activation, **options)

    @contextmanager
    def in_span(self, X: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Both layers, W1 in coordinates of the span of the n < d training inputs.

        The gradient with respect to W1 is a sum of (something) x_i^T, so gradient descent changes
        no row of W1 but by vectors of span{x_i}. With orthonormal columns of Q (d, n) that span
        it, W1 x_i = (W1 Q) (Q^T x_i): training W1 Q (width, n) on the rows X Q takes the same
        steps for an n / d of the memory and work.
        """
        n, d = X.shape
        if n >= d:
            yield self, X
            return
        weight = self.body[0].weight
        Q = torch.linalg.qr(X.double().T).Q.to(X)
        inner = nn.utils.skip_init(nn.Linear, n, self.p, bias=False, device=X.device, dtype=X.dtype)
        with torch.no_grad():
            inner.weight.copy_(weight @ Q)
        inner.weight.requires_grad_(weight.requires_grad)  # a frozen first layer stays as it is
        start = inner.weight.detach().clone()
        try:
            yield nn.Sequential(inner, self.body[1], self.head), X @ Q
        finally:  # also where training was interrupted: the head was trained in its place
            with torch.no_grad():
                weight.addmm_(inner.weight - start, Q.T)


class Pointwise(nn.Module):
    """An activation as a module."""

    def __init__(self, act: Activation):
        """Keep the activation."""
        super().__init__()
        self.activation = act

    def forward(self, U: Tensor) -> Tensor:
        """act(u), entry by entry."""
        return self.activation.value(U)

    def extra_repr(self) -> str:
        """Its name."""
        return self.activation.name
