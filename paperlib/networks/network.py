"""What the networks have in common: layers below, one linear layer on top, and its start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paperlib.checks import check_count, check_device, check_dtype
from paperlib.feature_map import FeatureMap
from paperlib.module_features import ModuleFeatures
from paperlib.second_derivatives import differentiable_attention
from paperlib.streams import stream


class Network(nn.Module):
    """f(x) = W phi(x): `body` gives the p last-layer features, `head` is W (C, p), no bias.

    The attack of the paper (its Section 5) knows the layers below the last as trained, and by how
    much training moved the last layer, theta = W(T) - W(0).

    Attributes:
        d: dimension of an input; rows of X are flattened inputs.
        p: number of features that the last layer reads.
        outputs: C.
        body: module (n, d) -> (n, p).
        head: linear layer of weights (C, p).
        theta_0: (C, p), the last layer at initialisation.
        seed: seed of all weights.
    """

    def __init__(
        self,
        body: nn.Module,
        d: int,
        p: int,
        outputs: int,
        *,
        seed: int,
        dtype: torch.dtype | None,
        device: str | torch.device | None,
    ):
        """Draw all weights: N(0, 1 / fan-in) each, and N(0, 1 / p) in the last layer."""
        super().__init__()
        self.d, self.p = d, p
        self.outputs = check_count("outputs", outputs)
        self.seed = check_count("seed", seed, least=0)
        self.body = body
        self.head = nn.utils.skip_init(nn.Linear, p, self.outputs, bias=False)
        draw_weights(self, seed=self.seed)
        self.register_buffer("theta_0", self.head.weight.detach().clone())
        self.to(check_device(device), check_dtype(dtype))

    def forward(self, X: Tensor) -> Tensor:
        """Outputs (n, C) for rows X (n, d)."""
        with differentiable_attention():
            return self.head(self.body(X))

    def feature_map(self, **options) -> FeatureMap:
        """The last-layer features as they are now; later training does not change them.

        Args:
            **options: for `ModuleFeatures`.
        """
        return ModuleFeatures(self.body, self.d, **options)

    @torch.no_grad()
    def scale_head(self, factor: float) -> None:
        """Multiply the last layer at initialisation by `factor`, before any training.

        The layers below learn through the last one, so they move less the smaller it starts: at 0
        (as in Zhang, Dauphin and Ma, "Fixup initialization", 2019) only through what it has learnt.

        Args:
            factor: at least 0; 1 leaves N(0, 1 / p).

        Raises:
            ValueError: for a factor that is negative or not finite.
        """
        if not 0 <= factor < float("inf"):
            raise ValueError(f"factor must be finite and at least 0, got {factor}")
        self.theta_0.mul_(factor)
        self.head.weight.copy_(self.theta_0)

    @contextmanager
    def in_span(self, X: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """A module and rows of it on which full-batch gradient descent takes this network's steps.

        What was trained inside is written back at the end. Here the network and X themselves; a
        network whose first layer is linear can do with fewer numbers.

        Args:
            X: (n, d) training inputs.
        """
        yield self, X

    @property
    def theta(self) -> Tensor:
        """The last layer now minus at initialisation, (C, p)."""
        return self.head.weight.detach() - self.theta_0

    @property
    def last_layer_parameters(self) -> int:
        """C p, which the paper compares with d n."""
        return self.outputs * self.p


class ImageRows(nn.Module):
    """Rows (n, d) of flattened pictures (H, W) or (H, W, c) as (n, c, H, W)."""

    def __init__(self, image_shape: Sequence[int]):
        """Keep the shape."""
        super().__init__()
        self.image_shape = check_image_shape(image_shape)

    def forward(self, X: Tensor) -> Tensor:
        """Channels first, as convolutions want them."""
        height, width, channels = self.image_shape
        return X.reshape(-1, height, width, channels).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """The shape, in which modules of the same weights may differ."""
        return f"image_shape={self.image_shape}"


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """(H, W, channels) of (H, W) or (H, W, channels).

    Raises:
        ValueError: for another number of sizes, or one below 1.
        TypeError: for a size that is not a whole number.
    """
    if image_shape is None or len(image_shape) not in (2, 3):
        raise ValueError(f"image_shape must be (H, W) or (H, W, channels), got {image_shape}")
    height, width, channels = (*image_shape, 1)[:3]
    return (
        check_count("height", height),
        check_count("width", width),
        check_count("channels", channels),
    )


@torch.no_grad()
def draw_weights(module: nn.Module, *, seed: int) -> None:
    """Weights N(0, 1 / fan-in), biases 0, scales of normalisation 1; a stream for each tensor.

    Embeddings of positions are N(0, 0.02^2), as in torchvision. Drawn in float32 on the CPU, so
    that a network is the same in every dtype and on every device.
    """
    for k, (name, weight) in enumerate(module.named_parameters()):
        if weight.ndim < 2:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        fan_in = weight[0].numel()
        std = 0.02 if name.endswith(("pos_embedding", "class_token")) else fan_in**-0.5
        weight.normal_(std=std, generator=stream("network", seed, index=k))
