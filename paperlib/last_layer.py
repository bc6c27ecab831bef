"""A whole network seen as an attack sees it: its last linear layer, and what that layer reads.

Gradient descent moves the weights of a linear layer by sums of (gradient at its output) x (its
input): W(T) - W(0) lies in the span of what the layer read from the training samples, whatever
loss or parameter-free function comes after it. Its bias moves by the same sums with 1 in place of
the input; it is left out, since one constant feature adds next to nothing and optimisers often
treat biases in a way of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paperlib.module_features import refusals_in_words

# Spread of log(norm) of random candidates; norms far outside of it can be reached as well.
LOG_NORM_SPREAD = 0.3

# phi(2 x) and phi(x) point the same way up to rounding.
HOMOGENEOUS = 1e-5


def check_last_layer(module: nn.Module, name: str, inputs: Tensor) -> nn.Linear:
    """The last layer of that name: linear, its weights used once, no parameters after it.

    Parameters of a module that holds the layer are taken as used before it.

    Args:
        module: the whole network, in evaluation mode.
        name: of the layer, as in `module.named_modules()`.
        inputs: a few inputs to try.

    Raises:
        ValueError: for anything else; the message names the linear layers there are, or what comes
            after this one.
    """
    parts = dict(module.named_modules())
    linear = [repr(key) for key, part in parts.items() if isinstance(part, nn.Linear)]
    if name not in parts:
        raise ValueError(
            f"last_layer {name!r} is not there: linear layers are {', '.join(linear) or 'none'}"
        )
    layer = parts[name]
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"last_layer {name!r} must be a torch.nn.Linear, got {type(layer).__name__}: linear "
            f"layers are {', '.join(linear) or 'none'}"
        )
    shared = [
        key
        for key, weight in module.named_parameters(remove_duplicate=False)
        if weight is layer.weight
    ]
    if len(shared) > 1:
        raise ValueError(
            f"the weights of last_layer {name!r} are used in two places ({', '.join(shared)}), so "
            "that they did not move within the span of one layer's inputs"
        )
    # In the order in which they begin, since what holds the last layer ends after it.
    order: list[str] = []
    handles = [
        part.register_forward_pre_hook(lambda *_, key=key: order.append(key))
        for key, part in parts.items()
        if next(part.parameters(recurse=False), None) is not None
    ]
    try:
        with torch.no_grad(), refusals_in_words("the module", inputs.shape[1:]):
            module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if order.count(name) != 1:
        raise ValueError(
            f"last_layer {name!r} must be called once for each input, got {order.count(name)} calls"
        )
    after = order[order.index(name) + 1 :]
    if after:
        raise ValueError(
            f"last_layer {name!r} is not the end of the module: {', '.join(map(repr, after))} with "
            "parameters of its own comes after it. If that only runs beside it, audit a subclass "
            "whose forward returns this layer's output alone: the checkpoints still fit"
        )
    return layer


class LastLayerInput(nn.Module):
    """The input of the last layer, (n, p), as a module; the network around it is left as it is."""

    def __init__(self, network: nn.Module, last_layer: str):
        """Refer to the network and the name of its last layer."""
        super().__init__()
        self.network = network
        self.last_layer = last_layer
        self.shown_as = type(network).__name__  # in messages to whoever brought the network

    def forward(self, X: Tensor) -> Tensor:
        """Run the network and return what the last layer was given."""
        seen: list[Tensor] = []
        layer = self.network.get_submodule(self.last_layer)

        # Hooked for one call and with no state kept, so that copies of the module work, and so do
        # the transforms of torch.func, whose tensors must not outlive the call.
        def keep(_: nn.Module, arguments: tuple, named: dict) -> None:
            seen.append(arguments[0] if arguments else named["input"])

        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.network(X)
        finally:
            handle.remove()
        features = seen[0]
        if features.numel() != len(X) * layer.in_features:
            raise ValueError(
                f"last_layer {self.last_layer!r} must read one row of {layer.in_features} features "
                f"for each input, got {tuple(features.shape)} for {len(X)} inputs: a layer that "
                "is applied at several places of one input has no single feature of a sample"
            )
        return features.reshape(len(X), -1)

    def extra_repr(self) -> str:
        """Which layer it is."""
        return f"last_layer={self.last_layer!r}"


class InputsOfAnyNorm(nn.Module):
    """A body fed with rows on a sphere, whose norms in the network's own units are free or fixed.

    The solvers keep candidates on a sphere, as the paper does. Inputs of one known norm r are
    x = r z / ||z||. Inputs of unknown norms get one coordinate more:

        x = sqrt(d) exp(0.3 s) z_{1..d} / ||z_{1..d}||,    s = sqrt(d) z_{d+1} / ||z_{1..d}||,

    smooth, and with norms spread around sqrt(d) where z is uniform on the sphere. Towards the poles
    s grows beyond all bounds, and every norm can be reached.
    """

    def __init__(self, body: nn.Module, input_shape: Sequence[int], *, radius: float | None):
        """Wrap the body.

        Args:
            body: (n, *input_shape) -> (n, p).
            input_shape: shape of one input.
            radius: norm of every input; None if norms are unknown and may differ.
        """
        super().__init__()
        self.body = body
        self.shown_as = getattr(body, "shown_as", type(body).__name__)
        self.input_shape = tuple(input_shape)
        self.inputs_d = math.prod(self.input_shape)
        self.radius = radius
        self.d = self.inputs_d + (radius is None)

    def inputs(self, Z: Tensor) -> Tensor:
        """The inputs (n, *input_shape) that rows on the sphere (n, d) stand for."""
        rows = Z[:, : self.inputs_d]
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows / lengths
        if self.radius is None:
            unit = math.sqrt(self.inputs_d)
            norms = unit * torch.exp(LOG_NORM_SPREAD * unit * Z[:, self.inputs_d :] / lengths)
        else:
            norms = self.radius
        return (rows * norms).reshape(-1, *self.input_shape)

    def forward(self, Z: Tensor) -> Tensor:
        """(n, d) -> (n, p)."""
        return self.body(self.inputs(Z))

    def extra_repr(self) -> str:
        """Shape and norm of the inputs."""
        norm = f"sqrt(d) exp({LOG_NORM_SPREAD} s)" if self.radius is None else self.radius
        return f"input_shape={self.input_shape}, norm={norm}"


def is_homogeneous(body: nn.Module, inputs: Tensor) -> bool:
    """Whether features keep their direction when an input is scaled: then norms leave no trace."""
    with torch.no_grad():
        a, b = body(inputs), body(2 * inputs)
    cosines = torch.nn.functional.cosine_similarity(a.double(), b.double())
    return bool((cosines > 1 - HOMOGENEOUS).all())
