"""Both products of a pass in one reading of V, by the matrix units of a processor.

A V^T, what lies between, and W V are made for a few hundred rows of V at a time: they are read from
memory once, what goes through them and comes back stays in the cache, in float32, and Python is
called once for a block. V is in bfloat16, in 8 bits or, for few rows, in float32, a number as the
sum of three of bfloat16 (`matrix_units.py`). There are four such passes: a Gauss-Newton product
(`normal_product.py`), the two of an evaluation of the loss (`projection.py`), and a product with a
second moment (`outlying_directions.py`), which have the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib import between_products, few_rows, matrix_units
from paperlib.between_products import Given, TwoSlopes
from paperlib.compiled import call, has
from paperlib.int8 import Int8Rows

SOURCE = "one_reading.cpp"

# Of float32: what the sums of more take leaves no room in the cache for V.
FLOAT32_MOST_ROWS = 32


def takes(
    A: Tensor | Int8Rows, V: Tensor | Int8Rows, activations: Given | TwoSlopes, outputs: int
) -> bool:
    """Whether there is a kernel for these arrays: for one output, in the formats of the units."""
    return outputs == 1 and takes_pass(A, V) and between_products.reads(activations, V.dtype)


def takes_pass(A: Tensor | Int8Rows, V: Tensor | Int8Rows) -> bool:
    """Whether rows of A can go through V and back: formats of the units, or few of float32."""
    if isinstance(V, Int8Rows):
        A, V = A.values, V.values
    few = V.dtype == torch.float32 and len(A) <= FLOAT32_MOST_ROWS
    units = matrix_units.available() if few else matrix_units.multiply(V.dtype)
    if not (units and few_rows.takes(A, V)):
        return False
    return has(SOURCE, f"second_moment_{few_rows.NAMES[V.dtype]}")  # it may fail to compile alone


def add_product(
    A: Tensor | Int8Rows,
    V: Tensor | Int8Rows,
    activations: Given | TwoSlopes,
    alpha: Tensor,
    da: Tensor,
    HX: Tensor,
    Ha: Tensor,
    *,
    linear: float = 1.0,
) -> None:
    """Add W V to HX, and what goes to da to Ha.

    Args:
        A: (n, d) step of the candidates, or (n + 1, d) with that of the linear part.
        V: (h, d), in the format of A.
        activations: features and slopes (n, h), or the inputs that both follow from.
        alpha: (n,) coefficients; where V is in 8 bits, times the scales of dX.
        da: (n,) step of the coefficients.
        HX: of the shape of A.
        Ha: (n, 1).
        linear: what the last row of A is multiplied with: the scale of dw.
    """
    h, d = V.shape
    rows, n = len(A), len(Ha)
    scales = None
    if isinstance(V, Int8Rows):
        A, V, scales = A.values, V.values, V.scale
    kernel, given = between_products.arguments(few_rows.NAMES[V.dtype], activations)
    numbers = alpha.float().contiguous(), da.float().contiguous(), float(linear), scales
    sums = HX, Ha
    # The kernel adds to rows of float32, one after another in memory.
    at_once = all(total.dtype == torch.float32 and total.is_contiguous() for total in sums)
    if not at_once:
        sums = [_zeros(total) for total in sums]
    A = A.contiguous()
    call(SOURCE, f"product_{kernel}", A, V, *given, *numbers, n, rows, h, d, *sums)
    if not at_once:
        HX += sums[0]
        Ha += sums[1]


def _zeros(like: Tensor) -> Tensor:
    """Sums of float32 for a kernel: row after row, which `zeros_like` does not promise."""
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def forward(X: Tensor, V: Tensor, left: float, right: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs X V^T and features, (n, h) as X, and features V, (n, d) float32.

    Args:
        X: (n, d), bfloat16 or float32.
        V: (h, d), as X.
        left: slope of the activation left of 0.
        right: slope right of it.
    """
    n, (h, d) = len(X), V.shape
    inputs, features = X.new_empty(n, h), X.new_empty(n, h)
    through = _zeros(X)
    slopes = float(left), float(right)
    X = X.contiguous()
    name = few_rows.NAMES[V.dtype]
    call(SOURCE, f"forward_{name}", X, V, *slopes, n, h, d, inputs, features, through)
    return inputs, features, through


def backward(
    w: Tensor, V: Tensor, activations: TwoSlopes, theta: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual E = theta - alpha^T features - V w, (h,), and (slopes * E) V, (n, d), float32.

    Args:
        w: (1, d), bfloat16 or float32.
        V: (h, d), as w.
        activations: inputs (n, h), as w.
        theta: (h,) float32.
        alpha: (n,) coefficients.
    """
    h, d = V.shape
    n = len(alpha)
    residual, through = theta.new_empty(h), theta.new_zeros(n, d)
    name = few_rows.NAMES[V.dtype]
    _, given = between_products.arguments(name, activations)
    numbers = theta.contiguous(), alpha.float().contiguous()
    w = w.contiguous()
    call(SOURCE, f"backward_{name}", w, V, *given, *numbers, n, h, d, residual, through)
    return residual, through


def second_moment(Q: Tensor | Int8Rows, V: Tensor | Int8Rows, Y: Tensor) -> Tensor:
    """sum_k y_k (q . v_k) v_k for each row q of Q: (q, d) float32.

    Args:
        Q: (q, d), in the format of V.
        V: (h, d), bfloat16 or in 8 bits. There, what goes back through it has 16.
        Y: (h,), of any dtype.
    """
    values = V.values if isinstance(V, Int8Rows) else V
    sizes = len(Q), *V.shape
    found = torch.zeros(len(Q), V.shape[1], dtype=torch.float32, device=values.device)
    Y = Y.float().contiguous()
    if isinstance(V, Int8Rows):
        arrays = Q.values.contiguous(), V.values, Y, V.scale
        call(SOURCE, "second_moment_int8", *arrays, *sizes, found)
        return found.mul_(Q.scale[:, None])
    call(SOURCE, f"second_moment_{few_rows.NAMES[V.dtype]}", Q.contiguous(), V, Y, *sizes, found)
    return found
