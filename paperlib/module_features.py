"""Any torch module as a feature map, its Jacobian products by torch.func.

A solver multiplies by the same Jacobians many times: once for every probe of the preconditioner
and twice for every iteration of conjugate gradients. Each linearisation is therefore traced once
and its graph kept. With the pull-back w -> J^T w of `torch.func.vjp`, which is linear in w, the
push-forward is the pull-back of the pull-back: v -> (J^T)^T v = J v. Measured on the residual
network of the paper against `torch.func.jvp`, which runs the module again for every product, this
takes two thirds of the time; on a transformer, one third.

Where d is small, a product takes longer to launch than to compute. Then the Jacobians can be formed
once, all d columns in one batch, and kept as matrices: `dense=True`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.checks import check_count, check_device, check_dtype, check_positive, check_rows
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.saved_activations import saved_bytes
from paperlib.second_derivatives import differentiable_attention, differentiable_layers
from paperlib.sphere import random_on_sphere
from paperlib.streams import stream

# A linearisation keeps the activations, their derivatives and the graph of the pull-back.
GRAPH_FACTOR = 3

# Larger chunks gain nothing on a processor and little on a GPU.
LARGEST_CHUNK = 256

# Columns of the Jacobians that are computed in one batch.
DENSE_BATCH = 64

# Two evaluations of one row may differ by rounding (float32 sums in another order), not by more.
SAME_ROW = 1e-3


class ModuleFeatures(FeatureMap):
    """phi(x) = module(x) flattened, in R^p, for any differentiable torch module.

    The module sees rows of X as (n, *input_shape) and returns (n, p) or anything that flattens
    to it. It is copied and frozen: training the original later does not change the features.
    The linear part of the features cannot be lifted, since there are no weights V.

    Unlike V of `RandomFeatures`, a module is not split over processes: all features come out of
    one run, and what grows is the activations of the samples, which go through in chunks.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: int | Sequence[int],
        *,
        chunk: int | None = None,
        probes: int = 8,
        seed: int = 0,
        memory: float = 2.0,
        dense: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Copy the module and try it on random inputs.

        Args:
            module: (n, *input_shape) -> (n, p), each row a function of the same row alone. Call
                `module.eval()` first if it holds batch normalisation or dropout.
            input_shape: shape of one input; d is the product of its entries.
            chunk: samples that go through the module at a time; if None, as many as fit `memory`,
                at most 256.
            probes: Hutchinson probes of the preconditioner (8 are enough for it; see
                `slope_gram`).
            seed: seed of the probes.
            memory: GiB of activations to keep for repeated products. Samples beyond it are run
                again for every product, which takes about twice as long.
            dense: form the Jacobians (n, p, d) of every linearisation that is multiplied, if they
                fit `memory` once more. The products are the same up to rounding. Worth it where
                d columns take less time than the products of a step, 16 to 100.
            device: moves the copy there; if None, it stays where the module's parameters are.
            dtype: float32 or float64, converts the copy; if None, the parameters' own (float32
                for a module without any).

        Raises:
            TypeError: for anything but a module, one that computes in another dtype, or a shape
                that is not of whole numbers.
            ValueError: if the module does not take such inputs, if rows influence each other, if
                two calls differ, if the output has no row for each input or is not finite, if it
                cannot be differentiated twice, or if its derivative is zero.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.input_shape = shape_of_input(input_shape)
        self.d = math.prod(self.input_shape)
        self.probes = check_count("probes", probes)
        self.seed = check_count("seed", seed, least=0)
        self.name = getattr(module, "shown_as", type(module).__name__)
        tensors = [t for t in module.parameters()] + [
            b for b in module.buffers() if b.is_floating_point()
        ]
        self.device = check_device(device or (tensors[0].device if tensors else None))
        self.dtype = check_dtype(dtype or (tensors[0].dtype if tensors else None))
        copied = differentiable_layers(deepcopy(module))
        self.module = copied.to(self.device, self.dtype).requires_grad_(False)
        self.p = self._try_out()
        budget = check_positive("memory", memory) * 2**30
        # How many samples' graphs fit; the module itself is not counted.
        fits = max(1, int(budget / max(1, GRAPH_FACTOR * self._bytes_per_sample())))
        self.kept_samples = fits
        # How many samples' Jacobians fit.
        entries = self.p * self.d * torch.finfo(self.dtype).bits // 8
        self.dense_samples = int(budget / entries) if dense else 0
        self.chunk = min(fits, LARGEST_CHUNK) if chunk is None else check_count("chunk", chunk)
        self._signs = torch.randint(
            0, 2, (self.probes, self.p), generator=stream("hutchinson", self.seed), dtype=torch.int8
        ).to(self.device)

    def directions(self) -> Iterator[Tensor]:
        """The probes of the preconditioner, random signs (p,), always the same ones."""
        for signs in self._signs:
            yield (2 * signs - 1).to(self.dtype)

    def forward(self, X: Tensor) -> Tensor:
        """The module on rows of X, (n, d) -> (n, p)."""
        with differentiable_attention():
            out = self.module(X.reshape(-1, *self.input_shape))
        return out.flatten(1) if out.ndim > 1 else out[:, None]  # (n,) is one feature a row

    def blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[FeatureBlock]:
        """One block with all p features.

        Raises:
            ValueError: for a dtype that is not the module's.
        """
        if dtype not in (None, self.dtype):
            raise ValueError(
                f"a module computes in its own dtype {self.dtype}, got {dtype}: "
                "use bulk='auto', or build ModuleFeatures with that dtype"
            )
        yield ModuleBlock(self)

    def features(self, X: Tensor) -> Tensor:
        """phi(X), (n, p), for X of shape (n, d)."""
        check_rows("X", X, self)
        with torch.no_grad():
            return torch.cat([self.forward(part) for part in X.split(self.chunk)])

    def describe(self) -> dict[str, Any]:
        """Class, sizes and a checksum of the module, which tells whether it is the same one.

        The checksum is of its layers as they print, and of its tensors.
        """
        # Where an object lies in memory is of this process alone.
        layers = re.sub(r" at 0x[0-9a-fA-F]+", "", str(self.module))
        digest = hashlib.sha256(layers.encode())
        for name, tensor in self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return {
            "model": "ModuleFeatures",
            "module": self.name,
            "input_shape": list(self.input_shape),
            "d": self.d,
            "p": self.p,
            "parameters": sum(t.numel() for t in self.module.parameters()),
            "sha256": digest.hexdigest()[:16],
            "probes": self.probes,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _try_out(self) -> int:
        """Run the module on random rows; returns p."""
        X = random_on_sphere(3, self.d, generator=stream("module check", 0))
        X = X.to(self.device, self.dtype)
        with torch.no_grad():
            out = self._raw(X)
            if out.dtype != self.dtype:
                raise TypeError(f"{self.name} must return {self.dtype}, got {out.dtype}")
            if out.ndim < 1 or len(out) != 3:
                raise ValueError(
                    f"{self.name} must return one row for each input, expected (3, ...), "
                    f"got {tuple(out.shape)}"
                )
            if not bool(torch.isfinite(out).all()):
                raise ValueError(f"{self.name} returns values that are not finite")
            first, again, other = (self.forward(X[[0, k]])[0] for k in (1, 1, 2))
        self._expect_same(first, again, "returns something else when called again")
        self._expect_same(first, other, "mixes the rows of a batch")
        steps = random_on_sphere(2, self.d, generator=stream("module check", 1)).to(X)
        try:
            change = Tangents(self.forward, X[:2]).jvp(steps)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{self.name} cannot be differentiated as the solver needs it: {error}"
            ) from error
        if not bool(change.any()):
            raise ValueError(
                f"{self.name} has no derivative in its inputs: is a part of it run under "
                "torch.no_grad(), detached, rounded, or a step? Leave that out of a copy for the "
                "attack: values and checkpoints stay the same"
            )
        return out[0].numel()

    def _raw(self, X: Tensor) -> Tensor:
        with refusals_in_words(self.name, self.input_shape), differentiable_attention():
            out = self.module(X.reshape(-1, *self.input_shape))
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.name} must return a tensor, got {type(out).__name__}")
        return out

    def _expect_same(self, a: Tensor, b: Tensor, fault: str) -> None:
        difference = float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))
        if difference > SAME_ROW:
            mode = (
                f"it is in training mode: call {self.name}.eval() first, since batch "
                "normalisation and dropout in training are no function of one sample"
                if any(part.training for part in self.module.modules())
                else "features must be a function of one sample alone, which dropout that ignores "
                "eval() is not (F.dropout without training=self.training)"
            )
            raise ValueError(f"{self.name} {fault} (relative difference {difference:.1g}); {mode}")

    def _bytes_per_sample(self) -> int:
        """Activations that autograd saves for one sample."""
        x = torch.zeros(1, self.d, device=self.device, dtype=self.dtype, requires_grad=True)
        inner, out = saved_bytes(lambda: self.forward(x), self.module.state_dict().values())
        return inner + out.numel() * out.element_size()


def shape_of_input(input_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one input as a tuple; a whole number stands for a row of that length.

    Raises:
        TypeError: for anything but whole numbers.
        ValueError: for a size below 1.
    """
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else (input_shape,)
    return tuple(check_count("input_shape", size) for size in shape)


@contextmanager
def refusals_in_words(name: str, shape: Sequence[int]) -> Iterator[None]:
    """What a module raises that does not take an input, as an error that says so.

    Raises:
        ValueError: for it.
    """
    try:
        yield
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{name} does not take real inputs of shape ({', '.join(map(str, shape))}): "
            f"{type(error).__name__}: {error}"
        ) from error


class Tangents:
    """A function linearised at some rows: its value, and products with its Jacobians."""

    def __init__(self, function, X: Tensor, *, dense: bool = False):
        """Trace the function at X, (n, d) -> (n, p).

        Args:
            function: each row of its value depends on the same row alone.
            X: (n, d).
            dense: multiply by the Jacobians as matrices, formed when they are first needed.
        """
        # Without gradients some kernels (oneDNN's LSTM) keep nothing for the way back.
        with torch.enable_grad():
            self.value, self._pull = torch.func.vjp(function, X)
        self._push = None
        self._jacobians: Tensor | None = None
        self._shape = X.shape
        self._dense = dense

    def vjp(self, W: Tensor) -> Tensor:
        """Row i is J_i^T w_i, (n, d)."""
        if self._dense:
            return torch.bmm(W[:, None, :], self.jacobians())[:, 0]
        return self._pull(W)[0]

    def jvp(self, dX: Tensor) -> Tensor:
        """Row i is J_i dx_i, (n, p)."""
        if self._dense:
            return torch.bmm(self.jacobians(), dX[:, :, None])[:, :, 0]
        return self._pushed(dX)

    def jacobians(self) -> Tensor:
        """J_i of every row, (n, p, d)."""
        if self._jacobians is None:
            n, d = self._shape
            columns = torch.eye(d, dtype=self.value.dtype, device=self.value.device)
            columns = columns[:, None, :].expand(d, n, d)  # e_k for every row
            self._pushed(columns[0])  # traces the push-forward, outside of the batch
            pushed = torch.func.vmap(self._pushed, chunk_size=DENSE_BATCH)(columns)  # (d, n, p)
            self._jacobians = pushed.permute(1, 2, 0).contiguous()
        return self._jacobians

    def _pushed(self, dX: Tensor) -> Tensor:
        if self._push is None:
            zero = torch.zeros_like(self.value)
            _, self._push = torch.func.vjp(lambda W: self._pull(W)[0], zero)
        return self._push(dX)[0]


class ModuleState:
    """The module linearised at X in chunks; what exceeds the memory is traced when needed."""

    def __init__(self, model: ModuleFeatures, X: Tensor):
        """Trace the first `model.kept_samples` rows, run the others forward."""
        self.parts = X.split(model.chunk)
        self.dtype = X.dtype
        self._function = model.forward
        room = (
            model.kept_samples
            if len(X) <= model.kept_samples
            else (model.kept_samples - model.chunk)
        )
        dense = len(X) <= min(model.dense_samples, room)
        self._kept: list[Tangents | None] = []
        values, used = [], 0
        for part in self.parts:
            used += len(part)
            tangents = Tangents(self._function, part, dense=dense) if used <= room else None
            self._kept.append(tangents)
            if tangents is None:
                with torch.no_grad():
                    values.append(self._function(part))
            else:
                values.append(tangents.value)
        self.value = values[0] if len(values) == 1 else torch.cat(values)

    def __iter__(self) -> Iterator[Tangents]:
        """The linearisations of the chunks, in order."""
        for part, tangents in zip(self.parts, self._kept, strict=True):
            yield Tangents(self._function, part) if tangents is None else tangents


class ModuleBlock(FeatureBlock):
    """All features of a module."""

    def __init__(self, model: ModuleFeatures):
        """Refer to the module."""
        self.model = model
        self.start, self.stop = 0, model.p

    def linearize(self, X: Tensor, *, lifted: bool = False) -> tuple[Tensor, ModuleState]:
        """Features (n, p) and the linearised chunks.

        Raises:
            ValueError: for `lifted`: no part of a module is known to be linear.
        """
        if lifted:
            raise ValueError("the features of a module have no linear part that can be lifted")
        state = ModuleState(self.model, X.detach())
        return state.value, state

    def jvp(self, state: ModuleState, dX: Tensor) -> Tensor:
        """J_i dx_i in row i, (n, p)."""
        parts = dX.split(self.model.chunk)
        return torch.cat([t.jvp(part) for t, part in zip(state, parts, strict=True)])

    def vjp(self, state: ModuleState, W: Tensor) -> Tensor:
        """J_i^T w_i in row i, (n, d)."""
        parts = W.split(self.model.chunk)
        return torch.cat([t.vjp(part) for t, part in zip(state, parts, strict=True)])

    def slope_gram(self, state: ModuleState) -> Tensor:
        """Hutchinson's estimate of tr(J_i^T J_j) / d, (n, n), symmetric positive semi-definite.

        The trace is that of J_j J_i^T, so the probes can be random signs w in R^p (Hutchinson
        1989): the mean of (J_i^T w) . (J_j^T w). Pull-backs cost half of what push-forwards do.
        Each w is shared by all samples, without which the entries with i != j would be zero on
        average.
        """
        d = self.model.d
        pulled = [
            torch.stack([t.vjp(w.expand(len(part), -1)) for w in self.model.directions()])
            for t, part in zip(state, state.parts, strict=True)
        ]  # chunks of (probes, rows, d)
        G = torch.cat(pulled, dim=1).double()
        gram = torch.einsum("kid,kjd->ij", G, G) / (self.model.probes * d)
        return 0.5 * (gram + gram.T)
