"""A small vision transformer, its encoder from torchvision, its last layer on all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paperlib.checks import check_count
from paperlib.feature_map import FeatureMap
from paperlib.networks.network import ImageRows, Network, check_image_shape

READOUTS = ("tokens", "class")

# Up to this dimension Jacobians are formed: a sixth of d products pays for them (measured at
# d = 64), and one step of the solver takes 16 or more.
DENSE_D = 128


class VisionTransformer(Network):
    """Patches, embedded with their positions; an encoder; a linear head.

    The head reads all tokens, p = patches * width, or the class token alone, p = width. Without
    dropout. Weights N(0, 1/fan-in), head N(0, 1/p), biases 0 (the paper's experiments beyond
    residual networks, its appendix).
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        width: int,
        outputs: int = 1,
        *,
        patch: int | None = None,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        readout: str = "tokens",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ):
        """Draw all layers.

        Args:
            image_shape: (H, W) or (H, W, channels), as in `DataSet.image_shape`.
            width: width of a token, a multiple of `heads`.
            outputs: C.
            patch: side of a patch, a divisor of H and W; if None, an eighth of the side, at
                least 2.
            depth: encoder layers.
            heads: attention heads.
            mlp_ratio: hidden width of an encoder layer's perceptron over `width`.
            readout: "tokens" or "class".
            seed: seed of the weights.
            dtype: float32 (if not given) or float64.
            device: the CPU if not given.

        Raises:
            ValueError: for sizes that are not positive or do not divide, an unknown readout.
        """
        height, wide, channels = check_image_shape(image_shape)
        width, heads = check_count("width", width), check_count("heads", heads)
        depth = check_count("depth", depth)
        patch = max(2, min(height, wide) // 8) if patch is None else check_count("patch", patch)
        if height % patch or wide % patch:
            raise ValueError(f"patch must divide {height} and {wide}, got {patch}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {READOUTS}, got {readout!r}")
        hidden = check_count("mlp_ratio * width", round(mlp_ratio * width))
        tokens = (height // patch) * (wide // patch)
        # Imported here: these libraries take seconds to load, in every process of a sweep.
        from torchvision.models.vision_transformer import Encoder

        # torchvision initialises from the global stream, which is none of our business.
        with torch.random.fork_rng(devices=[]):
            encoder = Encoder(tokens + (readout == "class"), depth, heads, width, hidden, 0.0, 0.0)
            body = Tokens(image_shape, channels, patch, width, encoder, readout)
        p = width if readout == "class" else tokens * width
        d = height * wide * channels
        super().__init__(body, d, p, outputs, seed=seed, dtype=dtype, device=device)

    def feature_map(self, **options) -> FeatureMap:
        """The last-layer features as they are now, with Jacobians formed where d is small.

        A small transformer consists of many small operations: a product with its Jacobians by
        automatic differentiation takes ten times as long as one with matrices.

        Args:
            **options: for `ModuleFeatures`.
        """
        return super().feature_map(**{"dense": self.d <= DENSE_D, **options})


class Tokens(nn.Module):
    """Rows of pixels -> the tokens that the head reads, (n, p)."""

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int,
        patch: int,
        width: int,
        encoder: nn.Module,
        readout: str,
    ):
        """Hold the patch embedding and the encoder."""
        super().__init__()
        self.rows = ImageRows(image_shape)
        self.embed = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.encoder = encoder
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if readout == "class" else None

    def forward(self, X: Tensor) -> Tensor:
        """(n, d) -> (n, p)."""
        tokens = self.embed(self.rows(X)).flatten(2).transpose(1, 2)  # (n, patches, width)
        if self.class_token is None:
            return self.encoder(tokens).flatten(1)
        tokens = torch.cat([self.class_token.expand(len(X), -1, -1), tokens], dim=1)
        return self.encoder(tokens)[:, 0]
