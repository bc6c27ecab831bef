"""What rounding leaves in the difference of two states of a layer's weights.

A weight w stored with unit eps lies off by up to eps |w| / 2: over a power of two the mean square
is about eps^2 w^2 / 25. The difference of two states has both errors, and beside it, which may be
small, they count: they are a share of its squared length that no data explain, and rows of the
difference that should depend on one another do so only up to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What weights in 16 bits lose they lose once, when they are stored. With more digits they are
# stored as they were trained, and lost some in every step.
ONCE, EVERY_STEP = 4.0, 64.0

# Where so much may be rounding, the parameters hold little else.
MOST = 1e-2


def rounding_of(states: Sequence[Tensor]) -> float:
    """The share of ||end - start||^2 that may be rounding, with room for what training added.

    Args:
        states: the weights at the start and at the end, in the dtype in which they were stored.
    """
    start, end = (state.double() for state in states)
    change = float((end - start).square().sum())
    noise = 0.0
    for state, exact in zip(states, (start, end), strict=True):
        unit = torch.finfo(state.dtype)
        room = ONCE if unit.bits <= 16 else EVERY_STEP
        noise += room * unit.eps**2 / 25 * float(exact.square().sum())
    return min(MOST, noise / change) if change else 0.0
