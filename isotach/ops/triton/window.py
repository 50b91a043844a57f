"""GPU kernels of the short convolution: one pass forward, one backward, and a small one each for the states.

    o_t = Σ_j w_j ∘ x_{t-W+1+j}        dx_t = Σ_j w_j ∘ do_{t+W-1-j}        dw_j = Σ_t x_t ∘ do_{t+W-1-j}

A tile is some tokens of one row, wherever documents begin in it, and some channels: every token knows the bounds of its
document, reads the state where its filter reaches beyond the first of them, and nothing beyond the last. A tile is
loaded once per tap, which memory sees once. The backward loads do so, and from that same tile come dx and what x_t adds
to dw; what states add is found where documents begin. Each of a fixed number of programs sums dw over its tiles, and
the sums are added up in one order: no atomics.

Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU (docs/numerics.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.triton import device
from isotach.ops.triton.device import processors
from isotach.ops.triton.step import check_free, free
from isotach.ops.window import Window

# Reasoned, not measured.
BLOCK = 64  # channels of a tile
NUMBERS = 4096  # of a tile, once per tap
WARPS = 4
STAGES = tl.constexpr(2)  # tiles that the backward loads ahead
PROGRAMS = 8  # of the backward, per processor
SHARED = 48 << 10  # bytes of fast memory that any kernel takes, as compiled for Hopper
WIDEST = 16  # taps
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _bounds(tokens, total, document, cu_seqlens, time, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The document of each token, its first token and the one after its last; of tokens there are, up to `total`."""
    if PACKED:
        own = tl.load(document + tokens, mask=tokens < total, other=0).to(tl.int64)
        start, end = tl.load(cu_seqlens + own), tl.load(cu_seqlens + own + 1)
    else:
        own = tokens // time
        start, end = own * time, own * time + time
    return own, start, tl.where(tokens < total, end, 0)


@triton.jit
def _taps(weight, weight_tap, weight_column, columns, W: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(TAPS, 1, BLOCK) by how many tokens back a tap reaches, nearest first; and these numbers (TAPS, 1, 1)."""
    back = tl.arange(0, TAPS)[:, None, None]
    spots = weight + (W - 1 - back) * weight_tap + columns * weight_column
    return tl.load(spots, mask=(back < W) & (columns < COLUMNS), other=0.0).to(tl.float32), back


# fmt: off
@triton.jit(do_not_specialize=["total", "time"])
def _forward_tile(  # type: ignore[no-untyped-def]
    x, weight, state, output, document, cu_seqlens, total, time,
    x_token, x_column, weight_tap, weight_column, state_document, state_row, state_column,
    W: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    # fmt: on
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    block, number = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    columns = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    tokens = number * ROWS + tl.arange(0, ROWS)[None, :, None].to(tl.int64)
    own, start, end = _bounds(tokens, total, document, cu_seqlens, time, cu_seqlens is not None)
    taps, back = _taps(weight, weight_tap, weight_column, columns, W, TAPS, COLUMNS)
    there = (tokens < end) & (back < W) & (columns < COLUMNS)
    spots = x + (tokens - back) * x_token + columns * x_column
    seen = tl.load(spots, mask=there & (tokens - back >= start), other=0.0).to(tl.float32)
    if tl.max(tl.where((tokens < end) & (tokens - start < W - 1), 1, 0)) > 0:
        row = W + tokens - back - start
        past = state + own * state_document + row * state_row + columns * state_column
        seen += tl.load(past, mask=there & (row < W), other=0.0).to(tl.float32)
    sums = tl.sum(taps * seen, 0, keep_dims=True)
    stored = (tokens < end) & (columns < COLUMNS)
    tl.store(output + tokens * COLUMNS + columns, sums.to(output.dtype.element_ty), mask=stored)


# fmt: off
@triton.jit(do_not_specialize=["time"])
def _forward_state(  # type: ignore[no-untyped-def]
    x, state, after, cu_seqlens, time, x_token, x_column, state_document, state_row, state_column,
    W: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """The last W of a document's state and tokens."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    block, own = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    start, length = _document(own, cu_seqlens, time)
    rows, columns = tl.arange(0, TAPS)[:, None], block * BLOCK + tl.arange(0, BLOCK)[None, :]
    there, token = (rows < W) & (columns < COLUMNS), length - W + rows
    taken = x + (start + token) * x_token + columns * x_column
    kept = tl.load(taken, mask=there & (token >= 0), other=0.0).to(tl.float32)
    left = state + own * state_document + (length + rows) * state_row + columns * state_column
    kept += tl.load(left, mask=there & (token < 0), other=0.0).to(tl.float32)
    tl.store(after + (own * W + rows) * COLUMNS + columns, kept, mask=there)


# fmt: off
@triton.jit(do_not_specialize=["total", "time", "tiles", "programs"])
def _backward_tiles(  # type: ignore[no-untyped-def]
    grad, grad_state, x, weight, state, dx, partial, document, cu_seqlens, total, time, tiles, programs,
    grad_token, grad_column, grad_document, grad_row, grad_state_column, x_token, x_column, weight_tap, weight_column,
    state_document, state_row, state_column,
    W: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    # fmt: on
    """Every so many tiles of a block of channels: dx, and what they add to dw in partial (programs, W, COLUMNS)."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    block, first = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    columns = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    taps, back = _taps(weight, weight_tap, weight_column, columns, W, TAPS, COLUMNS)
    sums = tl.zeros((TAPS, ROWS, BLOCK), tl.float32)
    for number in tl.range(first, tiles, programs, num_stages=STAGES):
        tokens = number * ROWS + tl.arange(0, ROWS)[None, :, None].to(tl.int64)
        own, start, end = _bounds(tokens, total, document, cu_seqlens, time, cu_seqlens is not None)
        here, within = (tokens < end) & (columns < COLUMNS), (back < W) & (columns < COLUMNS)
        read = grad + (tokens + back) * grad_token + columns * grad_column
        later = tl.load(read, mask=within & (tokens + back < end), other=0.0).to(tl.float32)
        xs = tl.load(x + tokens * x_token + columns * x_column, mask=here, other=0.0).to(tl.float32)
        sums += later * xs
        grads = tl.sum(taps * later, 0, keep_dims=True)
        if grad_state is not None:
            if tl.max(tl.where((tokens < end) & (tokens >= end - W), 1, 0)) > 0:
                kept = grad_state + own * grad_document + (W + tokens - end) * grad_row + columns * grad_state_column
                grads += tl.load(kept, mask=here & (tokens >= end - W), other=0.0).to(tl.float32)
        if tl.max(tl.where((tokens < end) & (tokens - start < W - 1), 1, 0)) > 0:
            row = W + tokens - back - start
            past = state + own * state_document + row * state_row + columns * state_column
            seen = tl.load(past, mask=within & here & (row < W), other=0.0).to(tl.float32)
            own_grad = tl.load(grad + tokens * grad_token + columns * grad_column, mask=here, other=0.0)
            sums += seen * own_grad.to(tl.float32)
        tl.store(dx + tokens * COLUMNS + columns, grads.to(dx.dtype.element_ty), mask=here)
    spots = partial + (first.to(tl.int64) * W + W - 1 - back) * COLUMNS + columns
    tl.store(spots, tl.sum(sums, 1, keep_dims=True), mask=(back < W) & (columns < COLUMNS))


# fmt: off
@triton.jit(do_not_specialize=["time"])
def _backward_state(  # type: ignore[no-untyped-def]
    grad, grad_state, weight, before, cu_seqlens, time,
    grad_token, grad_column, grad_document, grad_row, grad_state_column, weight_tap, weight_column,
    W: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """The gradient of the state before a document: what its first tokens read, and what was left of it at the end."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    block, own = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    start, length = _document(own, cu_seqlens, time)
    rows, columns = tl.arange(0, TAPS)[None, :, None], block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    taps, back = _taps(weight, weight_tap, weight_column, columns, W, TAPS, COLUMNS)
    token = rows - W + back
    there = (rows < W) & (columns < COLUMNS)
    spots = grad + (start + token) * grad_token + columns * grad_column
    reads = tl.load(spots, mask=there & (back < W) & (token >= 0) & (token < length), other=0.0).to(tl.float32)
    grads = tl.sum(taps * reads, 0, keep_dims=True)
    if grad_state is not None:
        kept = grad_state + own * grad_document + (rows - length) * grad_row + columns * grad_state_column
        grads += tl.load(kept, mask=there & (rows >= length), other=0.0).to(tl.float32)
    tl.store(before + (own * W + rows) * COLUMNS + columns, grads, mask=there)


# fmt: off
@triton.jit
def _step(  # type: ignore[no-untyped-def]
    x, weight, state, output, after,
    x_row, x_column, weight_tap, weight_column, state_document, state_row, state_column,
    W: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """One token of a row: what the state was but for its oldest input, and the token, weighed."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    block, own = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    rows, columns = tl.arange(0, TAPS)[:, None], block * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = (rows < W) & (columns < COLUMNS)
    earlier = state + own * state_document + (rows + 1) * state_row + columns * state_column
    kept = tl.load(earlier, mask=there & (rows < W - 1), other=0.0).to(tl.float32)
    token = tl.load(x + own * x_row + columns * x_column, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    kept = tl.where(rows == W - 1, token, kept)
    taps = tl.load(weight + rows * weight_tap + columns * weight_column, mask=there, other=0.0).to(tl.float32)
    sums = tl.sum(taps * kept, 0, keep_dims=True)
    tl.store(output + own * COLUMNS + columns, sums.to(output.dtype.element_ty), mask=columns < COLUMNS)
    tl.store(after + (own * W + rows) * COLUMNS + columns, kept, mask=there)


@triton.jit
def _document(own, cu_seqlens, time):  # type: ignore[no-untyped-def]
    """A document's first token and length."""
    if cu_seqlens is None:
        start, length = own * time, own * 0 + time
    else:
        start = tl.load(cu_seqlens + own)
        length = tl.load(cu_seqlens + own + 1) - start
    return start, length


def _refusal(x: Window.Inputs, chunk_size: int | None) -> str | None:
    if x.x.dtype not in DTYPES or x.weight.dtype not in DTYPES:
        return f"takes bfloat16, float16 or float32; got x in {x.x.dtype} and weight in {x.weight.dtype}"
    if len(x.weight) > WIDEST:
        return f"takes filters of at most {WIDEST} taps; got {len(x.weight)}"
    return device.refusal(x.x.device, SHARED)


def step(
    rec: Window, x: Window.Inputs, s: Window.State, into: Window.State | None
) -> tuple[Tensor, Window.State]:
    rec.wide(x)  # raises where the filter is of another size
    after = free(s.inputs) if into is None else into.inputs
    return _one_token(*x, s.inputs, after), Window.State(after)


@torch.library.custom_op("isotach::window_step_triton", mutates_args=("after",))
def _one_token(x: Tensor, weight: Tensor, state: Tensor, after: Tensor) -> Tensor:
    """Outputs (B, 1, D); the state after the token is written into `after`, which is not `state`."""
    check_free(after)
    output, cut = x.new_empty(x.shape), _Cut(x, weight, None)
    if cut.documents:
        with torch.cuda.device_of(x):
            _step[(cut.documents * cut.blocks,)](
                x, weight, state, output, after, x.stride(0), x.stride(2), *weight.stride(), *state.stride(),
                **cut.sizes, num_warps=1,
            )  # fmt: skip
    return output


@_one_token.register_fake
def _(x, weight, state, after):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@register(Window, "triton", device="cuda", refusal=_refusal, step=step)
def window(
    rec: Window, x: Window.Inputs, s: Window.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Window.State]:
    """chunk_size has no meaning here."""
    rec.wide(x)  # raises where the filter is of another size
    output, state = _forward(*x, s.inputs, cu_seqlens)
    return output, Window.State(state)


@torch.library.custom_op("isotach::window_triton", mutates_args=())
def _forward(x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    output, after = x.new_empty(x.shape), state.new_empty(state.shape, dtype=torch.float32)
    cut, rows = _Cut(x, weight, cu_seqlens), x.flatten(0, 1)
    with torch.cuda.device_of(x):
        if cut.tiles:
            _forward_tile[(cut.tiles * cut.blocks,)](
                rows, weight, state, output, cut.document, cu_seqlens, cut.total, cut.time,
                *rows.stride(), *weight.stride(), *state.stride(), **cut.sizes, ROWS=cut.rows, num_warps=WARPS,
            )  # fmt: skip
        if cut.documents:
            _forward_state[(cut.documents * cut.blocks,)](
                rows, state, after, cu_seqlens, cut.time, *rows.stride(), *state.stride(), **cut.sizes, num_warps=WARPS
            )
    return output, after


@_forward.register_fake
def _(x, weight, state, cu_seqlens):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("isotach::window_triton_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and state; the last of shape (0,) where it is not wanted."""
    dx, cut, rows, grads = x.new_empty(x.shape), _Cut(x, weight, cu_seqlens), x.flatten(0, 1), grad_output.flatten(0, 1)
    before = state.new_empty(state.shape if with_state else 0, dtype=torch.float32)
    programs = min(cut.tiles, triton.cdiv(PROGRAMS * processors(x.device), cut.blocks))
    partial = x.new_empty((programs, *weight.shape), dtype=torch.float32)
    strides = (*grads.stride(), *((0, 0, 0) if grad_state is None else grad_state.stride()))
    with torch.cuda.device_of(x):
        if cut.tiles:
            _backward_tiles[(programs * cut.blocks,)](
                grads, grad_state, rows, weight, state, dx, partial, cut.document, cu_seqlens, cut.total, cut.time,
                cut.tiles, programs, *strides, *rows.stride(), *weight.stride(), *state.stride(),
                **cut.sizes, ROWS=cut.rows, num_warps=WARPS,
            )  # fmt: skip
        if with_state and cut.documents:
            _backward_state[(cut.documents * cut.blocks,)](
                grads, grad_state, weight, before, cu_seqlens, cut.time, *strides, *weight.stride(),
                **cut.sizes, num_warps=WARPS,
            )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype), before


@_backward.register_fake
def _(grad_output, grad_state, x, weight, state, cu_seqlens, with_state):  # type: ignore[no-untyped-def]
    before = state.new_empty(state.shape if with_state else 0, dtype=torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), before


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    x, weight, state, cu_seqlens = ctx.saved_tensors
    if grad_output is None:
        grad_output = x.new_zeros(()).expand(x.shape)
    wanted = ctx.needs_input_grad[2]
    dx, dweight, before = _backward(grad_output, grad_state, x, weight, state, cu_seqlens, wanted)
    return dx, dweight, before.to(state.dtype) if wanted else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("window", "triton"))
sharding.declare("window_triton", Window.Inputs, state=Window.State, output="x", over=("B", "D"))


class _Cut:
    """One call's tiles of `rows` tokens, numbered through its `total`, and the document (total,) that each belongs to.

    That is None where documents are rows of `time` tokens.
    """

    def __init__(self, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> None:
        batch, self.time, columns = x.shape
        taps = triton.next_power_of_2(len(weight))
        block = min(BLOCK, triton.next_power_of_2(columns))
        self.sizes = {"W": len(weight), "TAPS": taps, "COLUMNS": columns, "BLOCK": block}
        self.rows, self.blocks = NUMBERS // (taps * BLOCK), triton.cdiv(columns, block)
        self.total = batch * self.time
        self.tiles = triton.cdiv(self.total, self.rows)
        self.documents, self.document = batch, None
        if cu_seqlens is not None:
            self.documents = len(cu_seqlens) - 1
            tokens = torch.arange(self.total, device=x.device)
            self.document = torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)
