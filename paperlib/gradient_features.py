"""Gradient features: phi(x) is the gradient of the network's output in all of its parameters.

To first order in a move delta of the parameters, a network is a linear model of these features,

    f(x; theta_0 + delta) = f(x; theta_0) + phi(x) . delta,    phi(x) = d f(x; theta_0) / d theta,

and phi(x) . phi(x') is its neural tangent kernel (Jacot, Gabriel and Hongler 2018). Gradient
descent on that linear model moves theta within span{phi(x_1), .., phi(x_n)}: the projection loss,
and with it `reconstruct`, attacks all layers at once. The attacks of Haim et al. (2022), Buzaglo et
al. (2023) and Loo et al. (2024) are losses of the same features, weighted sums of which, `combine`,
are one backward pass over all samples together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.checks import check_finite, check_positive, check_rows
from paperlib.module_features import ModuleFeatures, refusals_in_words, shape_of_input
from paperlib.networks.two_layer import Pointwise
from paperlib.saved_activations import saved_bytes
from paperlib.second_derivatives import differentiable_attention


class GradientFeatures(ModuleFeatures):
    """phi(x) = gradient of v . f(x) in all parameters of a module, in R^p, p their number.

    The module is copied, and the gradient is taken at its parameters as they are now. They stand in
    the order of `module.named_parameters()`, each flattened.

    Attributes:
        network: the copy.
        outputs: C, outputs of the network.
        weights: v, (C,).
        names: names of the parameters, in order.
        sizes: entries of each.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: int | Sequence[int],
        *,
        weights: Tensor | Sequence[float] | None = None,
        chunk: int | None = None,
        probes: int = 8,
        seed: int = 0,
        memory: float = 2.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Copy the module and try it on random inputs.

        Args:
            module: (n, *input_shape) -> (n,) or (n, C), each row a function of the same row alone.
            input_shape: shape of one input; d is the product of its entries.
            weights: v, the combination of the C outputs whose gradient is taken; may be left out
                for one output. `combine` takes other weights for every sample.
            chunk: samples differentiated at a time; if None, as many as fit `memory`.
            probes: Hutchinson probes of the preconditioner.
            seed: seed of the probes.
            memory: GiB that linearisations may keep.
            device: as in `ModuleFeatures`.
            dtype: as in `ModuleFeatures`.

        Raises:
            TypeError: for anything but a module.
            ValueError: for a module without parameters, outputs that are not (n,) or (n, C),
                several outputs without weights, weights that are not C finite numbers or all zero,
                rows that influence each other, and what `ModuleFeatures` refuses.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if not any(True for _ in module.parameters()):
            raise ValueError(f"{type(module).__name__} has no parameters to take a gradient in")
        rows = ParameterGradients(module, weights, input_shape)
        super().__init__(
            rows,
            input_shape,
            chunk=chunk,
            probes=probes,
            seed=seed,
            memory=memory,
            device=device,
            dtype=dtype,
        )
        self.name = f"gradients of {type(module).__name__}"
        self.network = self.module.network
        self.weights = self.module.weights
        self.outputs = len(self.weights)
        parameters = dict(self.network.named_parameters())
        self.names = tuple(parameters)
        self.sizes = tuple(parameter.numel() for parameter in parameters.values())
        self._arguments = {"chunk": chunk, "probes": probes, "seed": seed, "memory": memory}

    def flatten(self, source: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """The parameters of a network of the same kind as one row, (1, p), as `theta` is.

        The move of the parameters is `features.flatten(after) - features.flatten(before)`.

        Args:
            source: a module, or its state dictionary.

        Raises:
            ValueError: if a parameter is missing or has another shape.
        """
        given = dict(source.named_parameters()) if isinstance(source, nn.Module) else dict(source)
        rows = []
        for name, own in self.network.named_parameters():
            if name not in given or given[name].shape != own.shape:
                got = tuple(given[name].shape) if name in given else "nothing"
                raise ValueError(f"parameter {name!r} must be {tuple(own.shape)}, got {got}")
            rows.append(given[name].detach().reshape(-1))
        return torch.cat(rows)[None].to(self.device, self.dtype)

    def block_of(self, row: Tensor, name: str) -> Tensor:
        """The entries of `row`, (.., p), that belong to one parameter, in its shape.

        Raises:
            ValueError: for a parameter that the network does not have.
        """
        if name not in self.names:
            raise ValueError(f"no parameter {name!r}: there are {', '.join(self.names)}")
        k = self.names.index(name)
        shape = dict(self.network.named_parameters())[name].shape
        part = row.split(self.sizes, dim=-1)[k]
        return part.reshape(*row.shape[:-1], *shape)

    def outputs_at(self, X: Tensor) -> Tensor:
        """f(X), (n, C), for X of shape (n, d)."""
        check_rows("X", X, self)
        with torch.no_grad():
            return torch.cat([self._outputs(part) for part in X.split(self.chunk)])

    def combine(self, X: Tensor, A: Tensor) -> Tensor:
        """sum_i sum_c A_ic d f_c(x_i) / d theta, (p,), differentiable in X and A.

        One backward pass for all samples: nothing of size n x p exists.

        Args:
            X: (n, d).
            A: (n, C).

        Raises:
            ValueError: for another shape.
            TypeError: for another dtype.
        """
        check_rows("X", X, self)
        check_rows("A", A, self, rows=len(X), columns=self.outputs)
        parameters = [p.detach().requires_grad_() for p in self.network.parameters()]
        named = dict(zip(self.names, parameters, strict=True))
        with torch.enable_grad(), differentiable_attention():
            out = torch.func.functional_call(
                self.network, named, (X.reshape(-1, *self.input_shape),)
            )
            total = (A * out.reshape(len(X), -1)).sum()
            parts = torch.autograd.grad(
                total, parameters, create_graph=True, materialize_grads=True
            )
        return torch.cat([part.reshape(-1) for part in parts])

    def smoothed(self, sharpness: float, *, exact_value: bool = True) -> GradientFeatures:
        """The same features with every ReLU's slope replaced by sigmoid(sharpness * u).

        A ReLU's slope is a step: it is constant almost everywhere, so that gradient features give
        no direction in which to move across a kink. Haim et al. (2022) attack with the slope of a
        sigmoid instead.

        Args:
            sharpness: of the sigmoid, the larger the closer to the ReLU.
            exact_value: keep the value max(u, 0) and replace the slope alone, as they do; else
                the value is that of the softplus with this slope, log(1 + exp(s u)) / s, and the
                features are those of a smooth network.

        Raises:
            ValueError: if the sharpness is not positive or the network has no ReLU.
        """
        network = smooth_relus(self.network, sharpness, exact_value=exact_value)
        return GradientFeatures(
            network,
            self.input_shape,
            weights=self.weights,
            device=self.device,
            dtype=self.dtype,
            **self._arguments,
        )

    def describe(self) -> dict[str, Any]:
        """As `ModuleFeatures`, with the weights of the outputs."""
        return super().describe() | {
            "model": "GradientFeatures",
            "parameters": self.p,
            "weights": self.weights.tolist(),
        }

    def _outputs(self, X: Tensor) -> Tensor:
        with differentiable_attention():
            return self.network(X.reshape(-1, *self.input_shape)).reshape(len(X), -1)

    def _bytes_per_sample(self) -> int:
        """A gradient, its tangent, and the activations forward and backward of one sample."""
        network = self.module.network
        x = torch.zeros(1, self.d, device=self.device, dtype=self.dtype, requires_grad=True)
        inner, _ = saved_bytes(
            lambda: network(x.reshape(1, *self.input_shape)), network.state_dict().values()
        )
        return 2 * inner + 2 * self.p * x.element_size()


class ParameterGradients(nn.Module):
    """Rows (n, *input_shape) -> gradients of v . f of each in all parameters, (n, p)."""

    def __init__(
        self,
        network: nn.Module,
        weights: Tensor | Sequence[float] | None,
        input_shape: int | Sequence[int],
    ):
        """Find out the number of outputs, and keep network and weights."""
        super().__init__()
        self.network = network
        first = next(network.parameters())
        shape, name = shape_of_input(input_shape), type(network).__name__
        zeros = torch.zeros(2, *shape, device=first.device, dtype=first.dtype)
        copy = deepcopy(network)  # batch normalisation in training would change the caller's own
        with torch.no_grad(), refusals_in_words(name, shape), differentiable_attention():
            out = copy(zeros)
        if not isinstance(out, Tensor) or out.ndim not in (1, 2) or len(out) != 2:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{name} must return (n,) or (n, C), expected (2, C), got {got}")
        outputs = out.reshape(2, -1).shape[1]
        if weights is None:
            if outputs != 1:
                raise ValueError(
                    f"{name} has {outputs} outputs: pass weights=, {outputs} numbers, to say of "
                    "which combination of them the gradient is taken"
                )
            weights = [1.0]
        weights = torch.as_tensor(weights, dtype=first.dtype, device=first.device)
        if weights.shape != (outputs,):
            raise ValueError(f"weights must be {outputs} numbers, got {tuple(weights.shape)}")
        check_finite("weights", weights)
        if not bool((weights != 0).any()):
            raise ValueError("weights must not all be zero: the gradient would be")
        self.register_buffer("weights", weights.detach().clone())

    def forward(self, X: Tensor) -> Tensor:
        """One gradient a row."""
        parameters = {name: p.detach() for name, p in self.network.named_parameters()}

        def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            out = torch.func.functional_call(self.network, parameters, (x[None],))
            return (out.reshape(-1) * self.weights).sum()

        rows = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0))(parameters, X)
        # A parameter that is one number, of no dimension, leaves no second axis to flatten.
        flat = [rows[name].reshape(len(X), p.numel()) for name, p in parameters.items()]
        return torch.cat(flat, dim=1)


def smooth_relus(module: nn.Module, sharpness: float, *, exact_value: bool = True) -> nn.Module:
    """A copy of a module whose ReLUs have the slope sigmoid(sharpness * u).

    Args:
        module: with `nn.ReLU` or the "relu" of paperlib's networks in it.
        sharpness: of the sigmoid.
        exact_value: keep the value max(u, 0); else it is that of the softplus.

    Raises:
        ValueError: if the sharpness is not positive, or there is no ReLU to replace.
    """
    sharpness = check_positive("sharpness", sharpness)
    copy = deepcopy(module)
    if _is_relu(copy):
        return SmoothReLU(sharpness, exact_value=exact_value)
    # One instance may stand in several places, each of which is to be replaced. The parents are
    # looked up before the first of them is, while all names still lead somewhere.
    places = [name for name, part in copy.named_modules(remove_duplicate=False) if _is_relu(part)]
    if not places:
        raise ValueError(f"{type(module).__name__} has no ReLU whose slope could be smoothed")
    split = [name.rpartition(".") for name in places]
    for parent, child in [(copy.get_submodule(parent), child) for parent, _, child in split]:
        setattr(parent, child, SmoothReLU(sharpness, exact_value=exact_value))
    return copy


def _is_relu(part: nn.Module) -> bool:
    if isinstance(part, Pointwise):
        return part.activation.name == "relu"
    return isinstance(part, nn.ReLU | SmoothReLU)


class SmoothReLU(nn.Module):
    """A ReLU with the slope sigmoid(sharpness * u), whose own slope is that of the sigmoid."""

    def __init__(self, sharpness: float, *, exact_value: bool = True):
        """Keep the sharpness.

        Args:
            sharpness: of the sigmoid.
            exact_value: whether the value is max(u, 0); else log(1 + exp(s u)) / s.
        """
        super().__init__()
        self.sharpness, self.exact_value = sharpness, exact_value

    def forward(self, U: Tensor) -> Tensor:
        """The value, entry by entry."""
        # softplus(s u) / s, in a form that no s u overflows.
        smooth = -nn.functional.logsigmoid(-self.sharpness * U) / self.sharpness
        return smooth + (torch.relu(U) - smooth).detach() if self.exact_value else smooth

    def extra_repr(self) -> str:
        """Its options."""
        return f"sharpness={self.sharpness:g}, exact_value={self.exact_value}"
