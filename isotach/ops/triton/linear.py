"""Linear maps of a few rows on a GPU, with what lies before and behind them: weights are read once, and little else.

    y = s (x ∘ gate) Wᵀ        s = 1 / √(mean(x²) + eps), a number per row

A norm without gains is such a number, so it may as well multiply the product: the sum of squares is taken on the way,
and the gate of what was normalised goes onto x. Behind the product come an activation, the other half of a GLU, or the
addition to the residual stream. For a row or some all of these cost what launching them costs, which is more than the
product does.

There is no gradient. Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU
(docs/numerics.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops.triton import device


class Config(NamedTuple):
    """rows, outputs: of a program; step: inputs at a time; warps, stages: Triton's num_warps and num_stages."""

    rows: int
    outputs: int
    step: int
    warps: int
    stages: int


# By the rows that there are, at most. For few of them programs are narrow, so that all processors ask for weights at
# once, and many bytes are under way in each; for many, x is read too often where programs are narrow. Not measured.
CONFIGS = {
    16: Config(16, 16, 256, 4, 4),
    32: Config(32, 32, 128, 4, 4),
    64: Config(64, 32, 64, 4, 4),
    None: Config(128, 32, 64, 8, 3),
}
SHARED = 99 << 10  # bytes of fast memory that any of them takes, as compiled for Hopper


# fmt: off
@triton.jit(do_not_specialize=["rows"])
def _linear(  # type: ignore[no-untyped-def]
    x, gate, first, second, third, fourth, residual, output, rows, eps, x_row, gate_row, residual_row,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, WEIGHTS: tl.constexpr, NORMED: tl.constexpr, GLU: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):
    # fmt: on
    """Some outputs of one of the weights, or of both of a GLU, for a block of rows."""
    BLOCKS: tl.constexpr = (WIDTH + OUTPUTS - 1) // OUTPUTS
    PARTS: tl.constexpr = 1 if GLU else WEIGHTS
    program = tl.program_id(0)
    block, part = program % BLOCKS, program // BLOCKS % PARTS
    row, place = program // (BLOCKS * PARTS) * ROWS + tl.arange(0, ROWS), block * OUTPUTS + tl.arange(0, OUTPUTS)
    there, inside = (row < rows)[:, None], (place < WIDTH)[None, :]
    weight = first
    if not GLU:
        if part == 1:
            weight = second
        if part == 2:
            weight = third
        if part == 3:
            weight = fourth
    sums, others = tl.zeros((ROWS, OUTPUTS), tl.float32), tl.zeros((ROWS, OUTPUTS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, DEPTH, STEP, num_stages=STAGES):
        channel = start + tl.arange(0, STEP)
        known = there & (channel < DEPTH)[None, :]
        left = tl.load(x + row[:, None] * x_row + channel[None, :], mask=known, other=0.0).to(tl.float32)
        if NORMED:
            squares += tl.sum(left * left, 1)
        if gate is not None:
            left *= tl.load(gate + row[:, None] * gate_row + channel[None, :], mask=known, other=0.0).to(tl.float32)
        left = left.to(tl.bfloat16)
        spots, held = place[None, :] * DEPTH + channel[:, None], inside & (channel < DEPTH)[:, None]
        sums = tl.dot(left, tl.load(weight + spots, mask=held, other=0.0), sums)
        if GLU:
            others = tl.dot(left, tl.load(second + spots, mask=held, other=0.0), others)
    if NORMED:
        scale = tl.rsqrt(squares / DEPTH + eps)[:, None]
        sums *= scale
        others *= scale
    if SILU > 0:
        sums = tl.where(part < SILU, sums * tl.sigmoid(sums), sums)
    if GLU:
        sums *= others
    if residual is not None:
        sums += tl.load(residual + row[:, None] * residual_row + place[None, :], mask=there & inside, other=0.0)
    spots = output + row[:, None] * (PARTS * WIDTH) + part * WIDTH + place[None, :]
    tl.store(spots, sums.to(output.dtype.element_ty), mask=there & inside)


def refusal(where: torch.device) -> str | None:
    """Why this device cannot run the kernel, if so."""
    return device.refusal(where, SHARED)


@torch.library.custom_op("isotach::linear_triton", mutates_args=())
def linear(
    x: Tensor,
    gate: Tensor | None,
    weights: Sequence[Tensor],
    residual: Tensor | None,
    eps: float,
    silu: int,
    glu: bool,
) -> Tensor:
    """s (x ∘ gate) Wᵀ for each of up to four weights, side by side (R, Σ N) in bfloat16; the first `silu` activated.

    x, gate   (R, K)                                weights    (N, K) bfloat16, of one size
    residual  (R, N) float32, what the product is added to, and then the result's dtype
    eps       of the norm; negative for none, s = 1
    glu       two weights, whose products are multiplied instead: (R, N)
    """
    rows, depth = x.shape
    output = _output(x, weights, residual, glu)
    config = next(config for most, config in CONFIGS.items() if most is None or rows <= most)
    (width, _), x = weights[0].shape, x if x.stride(-1) == 1 else x.contiguous()
    programs = triton.cdiv(width, config.outputs) * triton.cdiv(rows, config.rows) * (1 if glu else len(weights))
    if programs:
        four = [*weights, *[weights[0]] * (4 - len(weights))]
        strides = (x.stride(0), *(0 if row is None else row.stride(0) for row in (gate, residual)))
        with torch.cuda.device_of(x):
            _linear[(programs,)](
                x, gate, *four, residual, output, rows, eps, *strides,
                DEPTH=depth, WIDTH=width, WEIGHTS=len(weights), NORMED=eps >= 0, GLU=glu, SILU=silu,
                ROWS=config.rows, OUTPUTS=config.outputs, STEP=config.step, STAGES=config.stages,
                num_warps=config.warps,
            )  # fmt: skip
    return output


@linear.register_fake
def _(x, gate, weights, residual, eps, silu, glu):  # type: ignore[no-untyped-def]
    return _output(x, weights, residual, glu)


def _output(x: Tensor, weights: Sequence[Tensor], residual: Tensor | None, glu: bool) -> Tensor:
    width = weights[0].shape[0] * (1 if glu else len(weights))
    return x.new_empty((x.shape[0], width), dtype=torch.bfloat16 if residual is None else torch.float32)
