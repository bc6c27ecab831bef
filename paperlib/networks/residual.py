"""The residual network of the paper: a wide stem, blocks without normalisation, a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paperlib.checks import check_count
from paperlib.networks.network import ImageRows, Network, check_image_shape

# The stem leaves a map of 7 x 7 positions: from 32 x 32 with a 28 x 28 kernel and padding 1.
PADDING = 1
POSITIONS = 7


class ResNet(Network):
    """One stem convolution, residual blocks of two 3 x 3 convolutions, a head on all activations.

    h = relu(stem(x)); then in every block h <- relu(h + conv(relu(conv(h)))); f = W h, all
    positions of all channels being features: p = width * positions. No normalisation, no bias,
    weights N(0, 1/fan-in), head N(0, 1/p) (Section 5 and appendix of the paper, with a 28 x 28
    stem for 32 x 32 images, which leaves 7 x 7 positions, and four blocks).
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        width: int,
        outputs: int = 1,
        *,
        blocks: int = 4,
        stem: int | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ):
        """Draw all layers.

        Args:
            image_shape: (H, W) or (H, W, channels), as in `DataSet.image_shape`.
            width: channels of every layer.
            outputs: C.
            blocks: residual blocks.
            stem: side of the stem's kernel; if None, the one that leaves 7 x 7 positions.
            seed: seed of the weights.
            dtype: float32 (if not given) or float64.
            device: the CPU if not given.

        Raises:
            ValueError: for sizes that are not positive, or a stem larger than the padded image.
        """
        height, wide, channels = check_image_shape(image_shape)
        width, blocks = check_count("width", width), check_count("blocks", blocks)
        if stem is None:
            stem = max(1, min(height, wide) + 2 * PADDING - POSITIONS + 1)
        stem = check_count("stem", stem)
        rows, columns = (side + 2 * PADDING - stem + 1 for side in (height, wide))
        if min(rows, columns) < 1:
            raise ValueError(
                f"stem must be at most {min(height, wide) + 2 * PADDING} for images of "
                f"{height} x {wide}, got {stem}"
            )
        body = nn.Sequential(
            ImageRows(image_shape),
            _convolution(channels, width, stem),
            nn.ReLU(),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.Flatten(),
        )
        d, p = height * wide * channels, width * rows * columns
        super().__init__(body, d, p, outputs, seed=seed, dtype=dtype, device=device)


class ResidualBlock(nn.Module):
    """relu(h + conv(relu(conv(h)))), 3 x 3 convolutions that keep the shape."""

    def __init__(self, width: int):
        """Two convolutions of `width` channels."""
        super().__init__()
        self.first = _convolution(width, width, 3)
        self.second = _convolution(width, width, 3)

    def forward(self, h: Tensor) -> Tensor:
        """(n, width, H, W) -> the same shape."""
        return torch.relu(h + self.second(torch.relu(self.first(h))))


def _convolution(channels: int, width: int, side: int) -> nn.Conv2d:
    return nn.utils.skip_init(
        nn.Conv2d, channels, width, kernel_size=side, padding=PADDING, bias=False
    )
