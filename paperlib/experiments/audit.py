"""Networks trained as anybody would, saved as anybody would: what an audit is given."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.audit import Audit, audit
from paperlib.checks import check_count, check_named, check_positive
from paperlib.data import DataSet, digits

LAYERS = ("all", "last")


def perceptron() -> nn.Module:
    """Two layers with biases on 8 x 8 pixels, ten classes; the last layer is "2"."""
    return nn.Sequential(nn.Linear(64, 640), nn.ReLU(), nn.Linear(640, 10))


def convolution() -> nn.Module:
    """Two convolutions with biases on (1, 8, 8) pixels, ten classes; the last layer is "5"."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


# The last layer and the shape of an input of each.
NETWORKS = {"perceptron": (perceptron, "2", (64,)), "convolution": (convolution, "5", (1, 8, 8))}


def standardised_digits(n: int, *, seed: int = 0) -> tuple[DataSet, Tensor]:
    """N digits, and their pixels minus the mean over the standard deviation, (n, 64).

    That is how pictures are usually fed to a network: norms differ from one to the next.
    """
    data = digits(n, labels="one-hot", seed=seed)
    contrast = torch.as_tensor(data.contrast, dtype=data.X.dtype)
    return data, data.X * contrast[:, None]


def train_and_save(
    network: str,
    inputs: Tensor,
    classes: Tensor,
    folder: Path,
    *,
    layers: str = "all",
    learning_rate: float = 0.1,
    target: float = 1e-2,
    max_steps: int = 3000,
    seed: int = 0,
) -> tuple[Path, Path, float]:
    """Cross-entropy, full-batch `torch.optim.SGD`, torch's own initial weights; both states saved.

    Args:
        network: a name of `NETWORKS`.
        inputs: (n, d).
        classes: (n,) class indices.
        folder: where before.pt (by `torch.save`) and after.safetensors are written.
        layers: "all", or "last" to leave the layers below as they were drawn.
        learning_rate: of gradient descent.
        target: training loss to reach.
        max_steps: most steps.
        seed: of the initial weights.

    Returns:
        Both paths and the final training loss.

    Raises:
        ValueError: for an unknown network or layers, or options without sense.
    """
    # Imported here, as in `load_state_dict`.
    from safetensors.torch import save_file

    check_named("network", network, NETWORKS)
    check_named("layers", layers, LAYERS)
    check_positive("learning_rate", learning_rate)
    check_positive("target", target)
    make, last_layer, shape = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
    torch.save(module.state_dict(), folder / "before.pt")
    trained = module if layers == "all" else module.get_submodule(last_layer)
    optimiser = torch.optim.SGD(trained.parameters(), lr=learning_rate)
    rows = inputs.reshape(-1, *shape)
    for _ in range(check_count("max_steps", max_steps)):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(module(rows), classes)
        loss.backward()
        optimiser.step()
        if float(loss.detach()) <= target:
            break
    save_file(module.state_dict(), folder / "after.safetensors")
    return folder / "before.pt", folder / "after.safetensors", float(loss.detach())


# Cases of the notebook: the network, and which of its layers are trained.
CASES = {
    f"{network}, {'all layers' if layers == 'all' else 'last layer'}": (network, layers)
    for network in NETWORKS
    for layers in LAYERS
}


def audit_case(case: str, n: int, *, seed: int = 0, **options: Any) -> Audit:
    """Trains one of `CASES` on n standardised digits, and audits what it saved.

    Args:
        case: a name of `CASES`.
        n: number of samples.
        seed: of the data, the weights and the candidates.
        **options: of `audit`.

    Raises:
        ValueError: for an unknown case.
    """
    check_named("case", case, CASES)
    network, layers = CASES[case]
    make, last_layer, shape = NETWORKS[network]
    data, inputs = standardised_digits(n, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        before, after, _ = train_and_save(
            network, inputs, data.class_index, Path(folder), layers=layers, seed=seed
        )
        return audit(
            make(),
            before,
            after,
            last_layer=last_layer,
            input_shape=shape,
            n=n,
            data=inputs.reshape(-1, *shape),
            seed=seed,
            progress=False,
            **options,
        )


def summary_of(found: Audit) -> dict[str, object]:
    """One row of the notebook's table, for an audit that was judged by the data."""
    attacked = found.record is not None
    return {
        "parameters": found.parameters,
        "readable": found.readable,
        "below moved": found.body_moved,
        "verdict": found.verdict,
        "agreed on": int(found.confirmed.sum()) if attacked else 0,
        "residual": found.residual_at_truth,
        "error": found.comparison.signed_error if attacked else None,
    }
