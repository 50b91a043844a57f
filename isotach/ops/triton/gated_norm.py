"""A norm and a gate behind it, or before it, in one pass over memory. With s = 1 / √(mean(z²) + eps),

    behind    y = s z ∘ gain ∘ activation(gate), z = x        before    y = s z ∘ gain, z = x ∘ activation(gate)

By itself each of the three operations reads and writes everything. Going back nothing was kept but the inputs: with
n = s z, a = activation(gate) and a' its derivative,

    behind    e = dy ∘ gain ∘ a    dx = s (e - n mean(e ∘ n))    dgate = dy ∘ n ∘ gain ∘ a'    dgain = Σ dy ∘ n ∘ a
    before    e = dy ∘ gain        dz = s (e - n mean(e ∘ n))    dx = dz ∘ a, dgate = dz ∘ x ∘ a'    dgain = Σ dy ∘ n

Each of a fixed number of programs sums dgain over its rows, and the sums are added up in one order: no atomics.

Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU (docs/numerics.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative
from isotach.ops.triton.device import processors
from isotach.ops.triton.layout import flat

# Reasoned, not measured.
NUMBERS = 4096  # of a tile of rows
PROGRAMS = 8  # of the backward, per processor


@triton.jit
def _rows(number, rows):  # type: ignore[no-untyped-def]
    """Which of all rows those of a tile are: more than 32 bits count."""
    return tl.full((1,), rows.shape[0], tl.int64) * number + rows


@triton.jit
def _tile(x, number, x_token, x_head, rows, columns, total, HEADS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = _rows(number, rows)
    spots = x + (row // HEADS * x_token + row % HEADS * x_head)[:, None] + columns[None, :]
    return tl.load(spots, mask=(row < total)[:, None] & (columns < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _scale(xs, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.rsqrt(tl.sum(xs * xs, 1) / WIDTH + eps)[:, None]


@triton.jit
def _gain(gain, columns, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    gains = tl.full(columns.shape, 1.0, tl.float32)
    if gain is not None:
        gains = tl.load(gain + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    return gains[None, :]


@triton.jit
def _activated(gates, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation and its derivative."""
    slope = gates * 0.0 + 1.0
    if ACTIVATION == "sigmoid":
        open = tl.sigmoid(gates)
        slope = open * (1.0 - open)
    elif ACTIVATION == "silu":
        share = tl.sigmoid(gates)
        open = gates * share
        slope = share * (1.0 + gates * (1.0 - share))
    else:
        open = gates
    return open, slope


# fmt: off
@triton.jit(do_not_specialize=["total"])
def _forward_tile(  # type: ignore[no-untyped-def]
    x, gate, gain, output, total, eps, x_token, x_head, gate_token, gate_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    BEFORE: tl.constexpr,
):
    # fmt: on
    number, rows, columns = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, BLOCK)
    zs = _tile(x, number, x_token, x_head, rows, columns, total, HEADS, WIDTH)
    open, _ = _activated(_tile(gate, number, gate_token, gate_head, rows, columns, total, HEADS, WIDTH), ACTIVATION)
    if BEFORE:
        zs *= open
    ys = zs * _scale(zs, eps, WIDTH) * _gain(gain, columns, WIDTH)
    if not BEFORE:
        ys *= open
    row = _rows(number, rows)
    spots = output + row[:, None] * WIDTH + columns[None, :]
    tl.store(spots, ys.to(output.dtype.element_ty), mask=(row < total)[:, None] & (columns < WIDTH)[None, :])


# fmt: off
@triton.jit(do_not_specialize=["total", "tiles", "programs"])
def _backward_tiles(  # type: ignore[no-untyped-def]
    grad, x, gate, gain, dx, dgate, partial, total, tiles, programs, eps,
    grad_token, grad_head, x_token, x_head, gate_token, gate_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    BEFORE: tl.constexpr,
):
    # fmt: on
    """Every so many tiles: dx and dgate, and what they add to dgain in partial (programs, WIDTH)."""
    first, rows, columns = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, BLOCK)
    gains, sums = _gain(gain, columns, WIDTH), tl.zeros((ROWS, BLOCK), tl.float32)
    for number in tl.range(first, tiles, programs):
        xs = _tile(x, number, x_token, x_head, rows, columns, total, HEADS, WIDTH)
        dy = _tile(grad, number, grad_token, grad_head, rows, columns, total, HEADS, WIDTH)
        gates = _tile(gate, number, gate_token, gate_head, rows, columns, total, HEADS, WIDTH)
        open, slope = _activated(gates, ACTIVATION)
        zs, entering = xs, dy * gains
        if BEFORE:
            zs *= open
        else:
            entering *= open
        scale = _scale(zs, eps, WIDTH)
        normed = zs * scale
        grads = (entering - normed * (tl.sum(entering * normed, 1)[:, None] / WIDTH)) * scale
        if BEFORE:
            sums += dy * normed
            of_gate = grads * xs * slope
            grads *= open
        else:
            sums += dy * normed * open
            of_gate = dy * normed * gains * slope
        row = _rows(number, rows)
        spots, there = row[:, None] * WIDTH + columns[None, :], (row < total)[:, None] & (columns < WIDTH)[None, :]
        tl.store(dx + spots, grads.to(dx.dtype.element_ty), mask=there)
        tl.store(dgate + spots, of_gate.to(dgate.dtype.element_ty), mask=there)
    if partial is not None:
        tl.store(partial + first * WIDTH + columns, tl.sum(sums, 0), mask=columns < WIDTH)


@torch.library.custom_op("isotach::gated_norm_triton", mutates_args=())
def gated_norm(x: Tensor, gate: Tensor, gain: Tensor | None, eps: float, activation: str, before: bool) -> Tensor:
    """x, gate (B, T, H, V) and gain (V,) -> (B, T, H, V), of the wider dtype; activation: none, silu or sigmoid."""
    output = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gate.dtype))
    cut = _Cut(x)
    if cut.tiles:
        (xs, *x_at), (gates, *gate_at) = flat(x), flat(gate)
        with torch.cuda.device_of(x):
            _forward_tile[(cut.tiles,)](
                xs, gates, gain, output, cut.total, eps, *x_at, *gate_at, **cut.sizes, ACTIVATION=activation,
                BEFORE=before, num_warps=cut.warps,
            )  # fmt: skip
    return output


@gated_norm.register_fake
def _(x, gate, gain, eps, activation, before):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gate.dtype))


@torch.library.custom_op("isotach::gated_norm_triton_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, gate: Tensor, gain: Tensor | None, eps: float, activation: str, before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and gain; the last of shape (0,) where there is none."""
    dx, dgate, cut = x.new_empty(x.shape), gate.new_empty(gate.shape), _Cut(x)
    programs = min(cut.tiles, PROGRAMS * processors(x.device))
    partial = None if gain is None else x.new_empty((programs, x.shape[-1]), dtype=torch.float32)
    if cut.tiles:
        (grads, *grad_at), (xs, *x_at), (gates, *gate_at) = flat(grad), flat(x), flat(gate)
        with torch.cuda.device_of(x):
            _backward_tiles[(programs,)](
                grads, xs, gates, gain, dx, dgate, partial, cut.total, cut.tiles, programs, eps,
                *grad_at, *x_at, *gate_at, **cut.sizes, ACTIVATION=activation, BEFORE=before, num_warps=cut.warps,
            )  # fmt: skip
    if gain is None or partial is None:
        return dx, dgate, x.new_empty(0)
    return dx, dgate, partial.sum(0).to(gain.dtype)


@_backward.register_fake
def _(grad, x, gate, gain, eps, activation, before):  # type: ignore[no-untyped-def]
    dgain = x.new_empty(0) if gain is None else gain.new_empty(gain.shape)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dgain


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.eps, ctx.activation, ctx.before = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    x, gate, gain = ctx.saved_tensors
    dx, dgate, dgain = _backward(grad, x, gate, gain, ctx.eps, ctx.activation, ctx.before)
    return dx, dgate, None if gain is None else dgain, None, None, None


gated_norm.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("gated_norm", "triton"))


class _Inputs(NamedTuple):
    x: Float[Tensor, "B T H V"]
    gate: Float[Tensor, "B T H V"]
    gain: Float[Tensor, " V"]


sharding.declare("gated_norm_triton", _Inputs, output="x", over=("B", "T", "H"))


class _Cut:
    """Rows, one per token and head, in tiles."""

    def __init__(self, x: Tensor) -> None:
        heads, width = x.shape[-2:]
        block = triton.next_power_of_2(width)
        rows = max(1, NUMBERS // block)
        self.total = x.numel() // width
        self.tiles = triton.cdiv(self.total, rows)
        self.sizes = {"HEADS": heads, "WIDTH": width, "ROWS": rows, "BLOCK": block}
        self.warps = min(16, max(4, rows * block // 1024))
