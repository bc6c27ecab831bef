"""`audit`: can the training data be read back from this model, given as it was and as it is?

Everything follows from the last layer: how many numbers it holds beside how many the data hold
(the law), and what the attack finds. No labels and no data are needed. Where the layers below moved
while they were trained, not even the data explain the parameters, and a loss above zero says little
of a sample; so there the attack is run twice. Independent starts hardly ever meet but at what the
parameters point to, and a sample counts as confirmed if both find it. What the parameters point to
is the data, blurred by how far the features moved: how much, only the data themselves tell. Where n
was guessed too large, a second attack tells which candidates are superfluous.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paperlib.audit_report import in_words
from paperlib.checkpoints import check_states_fit, load_state_dict, without_prefix
from paperlib.checks import check_count, check_device, check_dtype, check_finite, check_positive
from paperlib.compare import Comparison, compare
from paperlib.confirmed_attack import attack_twice, read_back
from paperlib.last_layer import (
    InputsOfAnyNorm,
    LastLayerInput,
    check_last_layer,
    is_homogeneous,
)
from paperlib.law import independent_rows, most_readable, parameters_told
from paperlib.module_features import ModuleFeatures, shape_of_input
from paperlib.projection import projection_loss
from paperlib.reconstruct import TOLERANCE
from paperlib.record import Reconstruction
from paperlib.sample_count import SampleCount, estimate_sample_count
from paperlib.sphere import random_on_sphere
from paperlib.stored_rounding import rounding_of
from paperlib.streams import stream, stream_seed

# The most candidates tried when the number of samples has to be estimated: each costs an attack.
MOST = 12

# Where the last sample is added the loss falls by orders of magnitude: rounding is not needed.
COUNTED = 1e-6
# Where it neither falls that far nor to zero, no number of samples stands out.
CLEAR_JUMP = 100.0

# Rows of theta that depend on the others so closely add nothing.
INDEPENDENT = 1e-4

State = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class Audit:
    """What the last layer of a model gives away.

    Attributes:
        last_layer: its name.
        p: features it reads.
        outputs: C, its rows.
        independent: rank of theta, at most C, up to the rounding of the stored weights: what
            counts, C' below. (Under cross-entropy the outputs of a softmax move by sums that
            cancel: the rank is C - 1.)
        d: numbers in one input.
        d_searched: d + 1 where the norms of the inputs are unknown and can be read, else d.
        readable: the law: the most samples that theta can determine, C' p / (d - 1 + C') with
            the d that is searched, and of the p features those that some sample moved. An attack of
            this kind reads back three to five times fewer samples.
        n: number of samples attacked; None where nothing was.
        count: how n was estimated; None if it was given.
        moved: ||W(T) - W(0)|| / ||W(0)|| of the last layer.
        body_moved: the same for everything below it, running means and variances too; 0 if only
            the last layer was trained.
        samples: (n, *input_shape), what was read back; None where nothing was attacked.
        confirmed: (n,) which of them are confirmed; see `verdict`.
        shares: (n,) how much the loss rises without each sample: those with a small one are found
            last and hidden first.
        rounding: the share of ||theta||^2 that may be the rounding of the stored weights.
        record: of the attack.
        comparison: with the data, if they were given; errors relative to the mean norm.
        residual_at_truth: projection loss at the data, if they were given.
        features: what was attacked, the input of the last layer as a feature map.
        theta: (C, p), W(T) - W(0).
        start: (C, p), W(0).
        options: how the audit was called.
    """

    last_layer: str
    p: int
    outputs: int
    independent: int
    d: int
    d_searched: int
    readable: int
    n: int | None
    count: SampleCount | None
    moved: float
    body_moved: float
    samples: Tensor | None
    confirmed: Tensor | None
    shares: Tensor | None
    rounding: float
    record: Reconstruction | None
    comparison: Comparison | None
    residual_at_truth: float | None
    features: ModuleFeatures
    theta: Tensor
    start: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """C p, which the paper compares with d n."""
        return self.outputs * self.p

    @property
    def verdict(self) -> str:
        """What was found, in a word or three.

        - "read back": samples explain the parameters, which hold more numbers than the data. All
          are confirmed.
        - "partly read back": the same, but fewer than n would do. Those are confirmed that a
          second attack found, too; the others are superfluous, and need not be near any data.
        - "agreed on", "partly agreed on": they are not explained (no data would, after layers
          below moved), and two independent attacks found the same samples, all or some.
        - "not found": two attacks found different samples.
        - "not determined": n is more than `readable`, other data explain the parameters as well.
          That says nothing about attackers who know more than the parameters of this layer.
        - "not attacked": n was neither given nor possible to estimate: layers below moved, or no
          number of samples stood out.
        """
        if self.n is None:
            return "not determined" if self.readable == 0 else "not attacked"
        if self.record is None:
            return "not determined"
        found = int(self.confirmed.sum())
        if read_back(self.record):
            return "read back" if found == self.n else "partly read back"
        if found == self.n:
            return "agreed on"
        return "partly agreed on" if found else "not found"

    def pictures(self, image_shape: Sequence[int]) -> np.ndarray:
        """The samples as grey or colour pictures in [0, 1], brightness stretched to 1% .. 99%.

        Args:
            image_shape: (H, W), (H, W, 3) or, as torch has it, (1, H, W) or (3, H, W).

        Raises:
            ValueError: if nothing was read back, or the shape does not fit.
        """
        if self.samples is None:
            raise ValueError(f"nothing was read back: {self.verdict}")
        return stretch(self.samples, image_shape)

    def __str__(self) -> str:
        """The answer in words, with its numbers."""
        return "\n".join(in_words(self))

    def __repr__(self) -> str:
        """The verdict."""
        return f"Audit({self.last_layer!r}, n = {self.n}: {self.verdict})"


def audit(
    module: nn.Module,
    before: State,
    after: State,
    *,
    last_layer: str,
    input_shape: int | Sequence[int],
    n: int | None = None,
    most: int | None = None,
    radius: float | None = None,
    data: Tensor | None = None,
    seed: int = 0,
    restarts: int = 3,
    max_steps: int = 100,
    tolerance: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Audit:
    """Attack a model through its last layer, and say what came of it.

    What is attacked follows from plain gradient descent, with or without momentum. Adam, weight
    decay, dropout and augmentation move the last layer by something else, too, which no data
    explain: the answer is then more careful than an attack made for them would have to be.

    Args:
        module: the architecture; its own weights do not matter. It is copied, and evaluated as
            `module.eval()`. Batch normalisation and dropout make features of training differ from
            those of evaluation: they count as features that moved.
        before: state dictionary at the start of training, or the path of a checkpoint. A prefix
            that all names share and the module's lack is taken off.
        after: the same at the end.
        last_layer: name of its last `torch.nn.Linear`, as in `module.named_modules()`. What comes
            after it may not have parameters; those of a module that holds it, such as a class
            token, are taken as used before it. Its bias is left out.
        input_shape: shape of one input, without the batch.
        n: number of training samples, or a guess. If None it is estimated, which is possible
            only where the layers below did not move; otherwise nothing is attacked.
        most: largest n to consider when it is estimated; if None 12, or `readable` if that is
            less. An estimate costs several attacks with that many candidates.
        radius: norm of every input, where all have the same; None to search for norms as well.
            Where features do not show the norm (a ReLU network without biases) directions alone
            are found, and come back with norm sqrt(d).
        data: (n, *input_shape) the training inputs, to judge the attack; it never sees them.
        seed: of the random candidates.
        restarts: most starts of each of the two attacks.
        max_steps: most steps in one stage of one start.
        tolerance: projection loss at which the parameters count as explained, by default
            that of `reconstruct`, or what the rounding of the stored weights leaves if that is
            more.
        device: where to compute, the CPU if None.
        dtype: float32 (if None) or float64.
        progress: as in `reconstruct`.
        resume: a folder in which the estimate of n and both attacks are kept, to go on if they
            are stopped; as in `reconstruct`.

    Returns:
        An `Audit`; print it.

    Raises:
        TypeError: for a module or tensors of the wrong kind.
        ValueError: for checkpoints that do not fit, a last layer that is none, two equal states,
            or features that `ModuleFeatures` refuses.
        FileNotFoundError: for a path where nothing is.
        OSError: if the folder of `resume` cannot be written.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    shape = shape_of_input(input_shape)
    d = math.prod(shape)
    n = None if n is None else check_count("n", n)
    most = None if most is None else check_count("most", most)
    stream_seed("candidates", check_count("seed", seed, least=0) + 1)  # of the second attack
    check_count("restarts", restarts)
    check_count("max_steps", max_steps)
    if tolerance is not None:
        check_positive("tolerance", tolerance, below=1.0)
    if radius is not None:
        radius = check_positive("radius", radius)
    if data is not None:
        _check_data(data, shape)
    device, dtype = check_device(device), check_dtype(dtype)
    states = {
        name: without_prefix(load_state_dict(state), module)
        for name, state in (("before", before), ("after", after))
    }
    check_states_fit(module, states)
    trained = deepcopy(module).to(device, dtype).eval().requires_grad_(False)
    trained.load_state_dict(states["after"])

    probe = random_on_sphere(3, d, generator=stream("audit", 0)).to(device, dtype)
    check_last_layer(trained, last_layer, probe.reshape(-1, *shape))
    # Subtracted as they were stored: their difference is small beside them.
    stored = [states[k][f"{last_layer}.weight"] for k in states]
    start, end = (weights.double() for weights in stored)
    theta = (end - start).to(device, dtype)
    if not bool((theta != 0).any()):
        raise ValueError(
            f"the weights of {last_layer!r} are the same before and after: it was not trained, or "
            "the same checkpoint was given twice"
        )
    body = LastLayerInput(trained, last_layer)
    norm = radius
    if norm is None and is_homogeneous(body, probe.reshape(-1, *shape)):
        norm = math.sqrt(d)
    inputs = InputsOfAnyNorm(body, shape, radius=norm).eval()
    features = ModuleFeatures(inputs, inputs.d, device=device, dtype=dtype, seed=seed)
    rows = residual = None
    if data is not None:
        rows = data.to(device, dtype).flatten(1)
        residual = float(projection_loss(ModuleFeatures(body, shape), theta, rows))
    rounding = rounding_of(stored)
    # Rounding is spread over all rows, so that the largest direction of it has a part.
    rank = independent_rows(theta, cutoff=max(INDEPENDENT, 0.5 * math.sqrt(rounding)))
    known = {
        "last_layer": last_layer,
        "p": features.p,
        "outputs": len(theta),
        "independent": rank,
        "d": d,
        "d_searched": inputs.d,
        "readable": most_readable(parameters_told(theta), inputs.d, rank),
        "moved": _moved(states, [f"{last_layer}.weight"]),
        "body_moved": _moved(
            states,
            [
                key
                for key, value in states["after"].items()
                if value.is_floating_point() and not key.startswith(f"{last_layer}.")
            ],
        ),
        "rounding": rounding,
        "residual_at_truth": residual,
        "features": features,
        "theta": theta,
        "start": start.to(device),
    }
    # What explains up to rounding is found; then it is moved as far down as ever.
    target = TOLERANCE[dtype] if tolerance is None else tolerance
    if tolerance is None:
        tolerance = max(target, rounding)
    search = {
        "seed": seed,
        "restarts": restarts,
        "max_steps": max_steps,
        "tolerance": tolerance,
        "progress": progress,
    }
    count = None
    if n is None and known["body_moved"] == 0 and known["readable"]:
        most = min(known["readable"], MOST) if most is None else most
        options = search | {"tolerance": max(COUNTED, tolerance), "resume": resume}
        count = estimate_sample_count(features, theta, most=most, **options)
        n = count.n if count.explained or count.jump >= CLEAR_JUMP else None
    found = attack_twice(features, theta, n, known["readable"], target, search | {"resume": resume})
    if found["record"] is not None:
        found["samples"] = inputs.inputs(found["record"].samples)
    return Audit(
        **known,
        **found,
        comparison=_compare(rows, found["samples"], features),
        n=n,
        count=count,
        options=search | {"radius": radius, "input_shape": list(shape)},
    )


def stretch(samples: Tensor, image_shape: Sequence[int]) -> np.ndarray:
    """Rows as pictures in [0, 1], (n, H, W) or (n, H, W, 3), clipped at 1% of the pixels a side.

    Raises:
        ValueError: for a shape that is not that of a picture with as many pixels as a row has.
    """
    shape = tuple(check_count("image_shape", size) for size in image_shape)
    rows = samples.detach().cpu().double().flatten(1).numpy()
    flat = len(shape) == 2 or (len(shape) == 3 and (shape[2] == 3 or shape[0] in (1, 3)))
    if math.prod(shape) != rows.shape[1] or not flat:
        raise ValueError(
            f"image_shape must be (H, W), (H, W, 3), (1, H, W) or (3, H, W) with {rows.shape[1]} "
            f"pixels in all, got {shape}"
        )
    low, high = np.quantile(rows, [0.01, 0.99])
    pictures = np.clip((rows - low) / max(high - low, 1e-12), 0, 1).reshape(-1, *shape)
    if len(shape) == 3 and shape[0] == 1:
        return pictures[:, 0]
    return pictures.transpose(0, 2, 3, 1) if len(shape) == 3 and shape[0] == 3 else pictures


def _check_data(data: object, shape: tuple[int, ...]) -> None:
    """Inputs (n, *shape), finite."""
    if not isinstance(data, Tensor) or not data.dtype.is_floating_point:
        raise TypeError("data must be a tensor of floating-point numbers")
    if data.ndim != len(shape) + 1 or tuple(data.shape[1:]) != shape or len(data) == 0:
        raise ValueError(
            f"data must have shape (n, {', '.join(map(str, shape))}), got {tuple(data.shape)}"
        )
    check_finite("data", data)


def _compare(
    rows: Tensor | None, samples: Tensor | None, features: ModuleFeatures
) -> Comparison | None:
    """How close the samples come to the true inputs (n, d)."""
    if rows is None or samples is None:
        return None
    found = samples.flatten(1)
    unit = math.sqrt(rows.shape[1])
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool(norms.any()):
        norms = norms + unit  # zeros are far from all that was found
    if features.d == rows.shape[1]:  # norms were not searched for: directions are compared
        rows = rows * (unit / torch.where(norms > 0, norms, unit))
        found = found * (unit / torch.linalg.vector_norm(found, dim=1, keepdim=True))
    else:
        rows, found = rows * (unit / norms.mean()), found * (unit / norms.mean())
    return compare(rows, found)


def _moved(states: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> float:
    """||after - before|| / ||before|| over these tensors; 0 for none."""
    before, after = (
        torch.cat([state[name].double().flatten() for name in names]) if names else torch.zeros(1)
        for state in states.values()
    )
    size = float(before.norm())
    change = float((after - before).norm())
    return change / size if size else (math.inf if change else 0.0)
