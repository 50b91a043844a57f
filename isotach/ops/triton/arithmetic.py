"""Products and decays of one chunk on chip, as every family's kernels need them.

Products are formed in the inputs' dtype where that loses nothing but its last bit, sums and states are float32. What a
product returned is never transposed before it enters another: Triton 3.4 to 3.7.0 miscompiles that on Hopper.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Operands(NamedTuple):
    """What factors are rounded to, and how float32 factors are multiplied; `exact`, where rounding must not show.

    split  exact products of factors that are rounded get the rest as a second term
    """

    dtype: tl.dtype
    precision: str
    exact: str
    split: bool


# By dtype of the queries. Large states and scores would overflow float16, so its products take float32's range.
OPERANDS = {
    torch.bfloat16: Operands(tl.bfloat16, "tf32", "tf32", True),
    torch.float16: Operands(tl.float32, "tf32", "tf32x3", False),
    torch.float32: Operands(tl.float32, "ieee", "ieee", False),
}


@triton.jit
def tile(base, rows, stride, columns, count, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first `count` rows of WIDTH channels, and zeros around; how rows and columns lie says whether transposed."""
    return tl.load(base + rows * stride + columns, mask=(rows < count) & (columns < WIDTH), other=0.0)


@triton.jit
def product(a, b, into, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """into + a b for float32 b, which is rounded to OPERAND; SPLIT adds what rounding took."""
    near = b.to(OPERAND)
    into = tl.dot(a, near, into, input_precision=PRECISION)
    if SPLIT:
        into = tl.dot(a, (b - near.to(tl.float32)).to(OPERAND), into, input_precision=PRECISION)
    return into


@triton.jit
def running(log_decay, stride, rows, count, PER_TOKEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """L (rows,) and its last value in float64: their differences are then as exact as they are small."""
    inside = tl.minimum(count, rows.shape[0])
    if PER_TOKEN:
        rates = tl.load(log_decay + rows * stride, mask=rows < inside, other=0.0).to(tl.float64)
        sums, total = tl.cumsum(rates, 0), tl.sum(rates, 0)
    else:
        rate = tl.load(log_decay).to(tl.float64)
        sums, total = rate * tl.minimum(rows + 1, inside).to(tl.float64), rate * inside.to(tl.float64)
    return sums, total


@triton.jit
def weights(sums, visible, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """e^{L_r - L_s} where `visible` is set, e^{L_s - L_r} if REVERSE, else 0: never of a positive difference.

    L is split into pairs of float32, because some GPUs hardly compute in float64.
    """
    near = sums.to(tl.float32)
    rest = (sums - near.to(tl.float64)).to(tl.float32)
    gaps = (near[:, None] - near[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp(tl.where(visible, -gaps if REVERSE else gaps, -float("inf")))
