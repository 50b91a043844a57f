"""GPU kernels of the elementwise family: one sweep forward, one backward, every number read and written once.

    forwards    h_t = v_t + e^{log_decay_t} ∘ h_{t-1}
    backwards   r_t = do_t + e^{log_decay_{t+1}} ∘ r_{t+1}        dv_t = r_t
                dlog_decay_t = Σ e^{log_decay_t} ∘ h_{t-1} ∘ r_t over the heads that share the decay

A program takes a block of channels, with all heads that share their decay, and sweeps a piece of a document (pieces.py)
tile after tile of some rows: inside a tile an associative scan, between tiles only its last row. Products of decays are
formed, never quotients. The backward reads h from the outputs.

Where channels and batch leave processors idle, documents are cut: then a sweep without outputs finds what each piece
makes of zeros, and every program composes the pieces before its own. That reads everything twice, so it is left until
half the processors would have nothing to do: the other half can draw most of what the memory gives.

Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU (docs/numerics.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.elementwise import Elementwise
from isotach.ops.triton import device
from isotach.ops.triton.pieces import cut, find_document, find_piece
from isotach.ops.triton.step import check_free, free

# Reasoned, not measured: tiles so large that a few programs per processor keep enough of memory under way.
ROW_BYTES = 128  # of a row of a tile, where no heads share a decay
NUMBERS = 4096  # of a tile
STEPPED = 512  # numbers of all rows' that a program takes of one token
WARPS = 4
STAGES = 2  # tiles that are loaded ahead
SHARED = 99 << 10  # bytes of fast memory that any sweep takes, as compiled for Hopper
WIDEST = 64  # heads that may share a decay
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNKS = (16, 32, 64, 128)


@triton.jit
def _compose(first_decay, first, then_decay, then):  # type: ignore[no-untyped-def]
    return first_decay * then_decay, then_decay * first + then


@triton.jit
def _swept(xs, decay, carry):  # type: ignore[no-untyped-def]
    """y_i = x_i + decay_i y_{i-1} for the rows of a tile, from `carry` on, and the last of them."""
    ROWS: tl.constexpr = xs.shape[0]
    factor, ys = tl.associative_scan((tl.broadcast_to(decay, xs.shape), xs), 0, _compose)
    ys += factor * carry
    last = tl.arange(0, ROWS)[:, None, None] == ROWS - 1
    return ys, tl.sum(tl.where(last, ys, 0.0), 0, keep_dims=True)


# fmt: off
@triton.jit(do_not_specialize=["documents", "time", "piece"])
def _sweep(  # type: ignore[no-untyped-def]
    x, y, log_decay, h, dlog, before, first, after, totals, between,
    cu_seqlens, ends, document, documents, time, piece,
    x_token, x_head, x_column, decay_token, decay_column,
    before_document, before_head, before_column, first_document, first_head, first_column,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, REVERSE: tl.constexpr,
):
    # fmt: on
    """One piece and block of columns, y from x; without y, only what the piece makes of zeros.

    before, after    (documents, HEADS, COLUMNS): y before the first token, and the state or its gradient after the last
    totals, between  of pieces that others follow: log_decay (·, COLUMNS), what they make of zeros (·, HEADS, COLUMNS)
    h, first, dlog   outputs and the state before them; from these, in REVERSE, the gradient of log_decay
    """
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    block, number = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    own = find_piece(number, document, cu_seqlens, time, piece)
    if own >= documents:
        return
    start, length, pieces, slot = find_document(own, cu_seqlens, ends, time, piece)
    index = number - slot - own
    order = pieces - 1 - index if REVERSE else index
    if y is None:
        if order == pieces - 1:
            return
    size = tl.minimum(piece, length - index * piece)
    scanned = tl.arange(0, ROWS)[:, None, None]
    rows = ROWS - 1 - scanned if REVERSE else scanned  # a scan that runs backwards takes four times as many shuffles
    heads, columns = tl.arange(0, WIDE)[None, :, None], block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    inside = (heads < HEADS) & (columns < COLUMNS)
    places = heads * COLUMNS + columns
    carry, past = tl.zeros((1, WIDE, BLOCK), tl.float32), tl.zeros((1, WIDE, BLOCK), tl.float32)
    if y is not None:
        if before is not None:
            its = before + own.to(tl.int64) * before_document + heads * before_head + columns * before_column
            carry = tl.load(its, mask=inside, other=0.0).to(tl.float32)
        if between is not None:
            for done in range(0, order, ROWS):
                slots, short = slot + done + scanned, scanned < order - done
                lost = tl.load(totals + slots * COLUMNS + columns, mask=short & (columns < COLUMNS), other=0.0)
                added = tl.load(between + slots * (HEADS * COLUMNS) + places, mask=short & inside, other=0.0)
                _, carry = _swept(added, tl.exp(lost), carry)
    if dlog is not None:
        its = first + own.to(tl.int64) * first_document + heads * first_head + columns * first_column
        past = tl.load(its, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((1, 1, BLOCK), tl.float32)

    steps = tl.cdiv(size, ROWS)
    for step in tl.range(0, steps, num_stages=STAGES):
        chunk = steps - 1 - step if REVERSE else step
        since, count = index * piece + chunk * ROWS, size - chunk * ROWS
        token = start + since
        read = x + token * x_token + rows * x_token + heads * x_head + columns * x_column
        xs = tl.load(read, mask=(rows < count) & inside, other=0.0).to(tl.float32)
        here = (rows < count) & (columns < COLUMNS)
        rates = log_decay + token * decay_token + rows * decay_token + columns * decay_column
        if REVERSE:
            faded = tl.load(rates + decay_token, mask=here & (since + rows + 1 < length), other=0.0).to(tl.float32)
        else:
            faded = tl.load(rates, mask=here, other=0.0).to(tl.float32)
        if y is None:
            total += tl.sum(faded, 0, keep_dims=True)
        ys, carry = _swept(xs, tl.exp(faded), carry)
        spots = token * (HEADS * COLUMNS) + rows * (HEADS * COLUMNS) + places
        if y is not None:
            tl.store(y + spots, ys.to(y.dtype.element_ty), mask=(rows < count) & inside)
        if dlog is not None:
            there = (rows < count) & (since + rows > 0) & inside
            earlier = tl.load(h + spots - HEADS * COLUMNS, mask=there, other=0.0).to(tl.float32)
            earlier = tl.where(since + rows == 0, past, earlier)
            fade = tl.exp(tl.load(rates, mask=here, other=0.0).to(tl.float32))
            grads = fade * tl.sum(ys * earlier, 1, keep_dims=True)
            written = dlog + token * COLUMNS + rows * COLUMNS + columns
            tl.store(written, grads.to(dlog.dtype.element_ty), mask=here)

    if y is None:
        at = slot + order
        tl.store(between + at * (HEADS * COLUMNS) + places, carry, mask=inside)
        tl.store(totals + at * COLUMNS + columns, total, mask=columns < COLUMNS)
    elif after is not None:
        if order == pieces - 1:
            if REVERSE:
                rates = log_decay + start * decay_token + columns * decay_column
                carry *= tl.exp(tl.load(rates, mask=(columns < COLUMNS) & (length > 0), other=0.0).to(tl.float32))
            tl.store(after + own.to(tl.int64) * (HEADS * COLUMNS) + places, carry, mask=inside)


# fmt: off
@triton.jit(do_not_specialize=["total"])
def _step(  # type: ignore[no-untyped-def]
    v, log_decay, state, output, after, total,
    v_row, v_head, v_column, decay_row, decay_head, decay_column, state_row, state_head, state_column,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr,
):
    # fmt: on
    """One token: so many of all rows' numbers."""
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    row, head, column, there = at // (HEADS * COLUMNS), at // COLUMNS % HEADS, at % COLUMNS, at < total
    rates = tl.load(log_decay + row * decay_row + head * decay_head + column * decay_column, mask=there, other=0.0)
    kept = tl.load(state + row * state_row + head * state_head + column * state_column, mask=there, other=0.0)
    added = tl.load(v + row * v_row + head * v_head + column * v_column, mask=there, other=0.0).to(tl.float32)
    found = tl.exp(rates.to(tl.float32)) * kept.to(tl.float32) + added
    tl.store(output + at, found.to(output.dtype.element_ty), mask=there)
    tl.store(after + at, found, mask=there)


class _Tiles(NamedTuple):
    """Of a call: heads that share a decay and columns, as they are and as programs take them, and a tile's rows."""

    heads: int
    columns: int
    wide: int
    block: int
    rows: int


def _tiles(x: Elementwise.Inputs, chunk_size: int | None) -> _Tiles | str:
    """How inputs like x are cut, or what cannot be taken."""
    if x.v.dtype not in DTYPES or x.log_decay.dtype not in DTYPES:
        return f"takes bfloat16, float16 or float32; got v in {x.v.dtype} and log_decay in {x.log_decay.dtype}"
    if chunk_size not in (None, *CHUNKS):
        return f"takes chunks of {CHUNKS} tokens; got chunk_size = {chunk_size}"
    heads, columns = (x.v if _shared(x) else _side_by_side(x.v)).shape[-2:]
    if heads > WIDEST:
        return f"takes at most {WIDEST} heads that share a decay; got {heads}"
    wide = triton.next_power_of_2(heads)
    block = max(8, min(ROW_BYTES // x.v.element_size(), 256 // wide))
    block = min(block, triton.next_power_of_2(columns))
    return _Tiles(heads, columns, wide, block, chunk_size or min(CHUNKS[-1], max(CHUNKS[0], NUMBERS // (wide * block))))


def _refusal(x: Elementwise.Inputs, chunk_size: int | None) -> str | None:
    tiles = _tiles(x, chunk_size)
    return tiles if isinstance(tiles, str) else device.refusal(x.v.device, SHARED)


def step(
    rec: Elementwise, x: Elementwise.Inputs, s: Elementwise.State, into: Elementwise.State | None
) -> tuple[Tensor, Elementwise.State]:
    after = free(s.state) if into is None else into.state
    return _one_token(*x, s.state, after), Elementwise.State(after)


@torch.library.custom_op("isotach::elementwise_step_triton", mutates_args=("after",))
def _one_token(v: Tensor, log_decay: Tensor, state: Tensor, after: Tensor) -> Tensor:
    """Outputs (B, 1, H, V); the state after the token is written into `after`, which may be `state`."""
    check_free(after)
    output, token, rates = v.new_empty(v.shape), v[:, 0], log_decay[:, 0].expand(-1, v.shape[2], -1)
    total = output.numel()
    if total:
        with torch.cuda.device_of(v):
            _step[(triton.cdiv(total, STEPPED),)](
                token, rates, state, output, after, total, *token.stride(), *rates.stride(), *state.stride(),
                HEADS=v.shape[2], COLUMNS=v.shape[3], NUMBERS=STEPPED, num_warps=WARPS,
            )  # fmt: skip
    return output


@_one_token.register_fake
def _(v, log_decay, state, after):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


@register(Elementwise, "triton", device="cuda", refusal=_refusal, step=step)
def elementwise(
    rec: Elementwise, x: Elementwise.Inputs, s: Elementwise.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Elementwise.State]:
    output, state = _forward(*x, s.state, cu_seqlens, chunk_size)
    return output, Elementwise.State(state)


@torch.library.custom_op("isotach::elementwise_triton", mutates_args=())
def _forward(
    v: Tensor, log_decay: Tensor, state: Tensor, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    output, after = v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)
    _Call(Elementwise.Inputs(v, log_decay), cu_seqlens, chunk_size).sweep(v, output, before=state, after=after)
    return output, after


@_forward.register_fake
def _(v, log_decay, state, cu_seqlens, chunk_size):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("isotach::elementwise_triton_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_state: Tensor | None,
    output: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    with_decay: bool,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, log_decay and state; of shape (0,) where the last two are not wanted."""
    dv, nothing = output.new_empty(output.shape), output.new_empty(0)
    dlog = log_decay.new_empty(log_decay.shape) if with_decay else None
    first = state.new_empty(state.shape, dtype=torch.float32) if with_state else None
    call = _Call(Elementwise.Inputs(output, log_decay), cu_seqlens, chunk_size)
    call.sweep(grad_output, dv, before=grad_state, after=first, reverse=True, past=(output, state), dlog=dlog)
    return dv, nothing if dlog is None else dlog, nothing.clone() if first is None else first


@_backward.register_fake
def _(grad_output, grad_state, output, log_decay, state, cu_seqlens, chunk_size, with_decay, with_state):  # type: ignore[no-untyped-def]
    dlog = log_decay.new_empty(log_decay.shape) if with_decay else output.new_empty(0)
    first = state.new_empty(state.shape, dtype=torch.float32) if with_state else output.new_empty(0)
    return output.new_empty(output.shape), dlog, first


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, log_decay, state, cu_seqlens, ctx.chunk_size = inputs
    ctx.save_for_backward(output[0], log_decay, state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    output, log_decay, state, cu_seqlens = ctx.saved_tensors
    if grad_output is None:
        grad_output = output.new_zeros(()).expand(output.shape)
    wanted = ctx.needs_input_grad[1:3]
    dv, dlog, first = _backward(
        grad_output, grad_state, output, log_decay, state, cu_seqlens, ctx.chunk_size, *wanted
    )  # fmt: skip
    return dv, dlog if wanted[0] else None, first.to(state.dtype) if wanted[1] else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("elementwise", "triton"))
sharding.declare("elementwise_triton", Elementwise.Inputs, state=Elementwise.State, output="v", over=("B", "H", "V"))


class _Call:
    """One call's cut. Tensors come as they are: (B, T, H, V) and states (documents, H, V)."""

    def __init__(self, x: Elementwise.Inputs, cu_seqlens: Tensor | None, chunk_size: int | None) -> None:
        tiles = _tiles(x, chunk_size)
        assert isinstance(tiles, _Tiles), tiles  # run has refused already
        self.tiles, self.shared = tiles, _shared(x)
        batch, time = x.v.shape[:2]
        log_decay = x.log_decay if self.shared else _side_by_side(x.log_decay)
        self.log_decay, self.blocks = log_decay.flatten(0, 1), triton.cdiv(tiles.columns, tiles.block)
        self.pieces = cut(batch, time, cu_seqlens, programs=2 * self.blocks, chunk=tiles.rows, device=x.v.device)

    def sweep(
        self,
        x: Tensor,
        y: Tensor,
        *,
        before: Tensor | None,
        after: Tensor | None,
        reverse: bool = False,
        past: tuple[Tensor, Tensor] | None = None,
        dlog: Tensor | None = None,
    ) -> None:
        """Fill y, after and dlog; `past` is the outputs and the state before them, all as the kernel has it."""
        totals = between = None
        if self.pieces.between:
            size = (self.pieces.between, self.tiles.columns)
            totals = x.new_empty(size, dtype=torch.float32)
            between = x.new_empty((size[0], self.tiles.heads, size[1]), dtype=torch.float32)
            self._launch(x, None, totals=totals, between=between, reverse=reverse)
        self._launch(
            x, y, before=before, after=after, totals=totals, between=between, reverse=reverse, past=past, dlog=dlog
        )

    def _launch(
        self,
        x: Tensor,
        y: Tensor | None,
        *,
        before: Tensor | None = None,
        after: Tensor | None = None,
        totals: Tensor | None,
        between: Tensor | None,
        reverse: bool,
        past: tuple[Tensor, Tensor] | None = None,
        dlog: Tensor | None = None,
    ) -> None:
        pieces, tiles, programs = self.pieces, self.tiles, self.pieces.limit * self.blocks
        if programs == 0:
            return
        x = self._apart(x).flatten(0, 1)
        before, first = (None if s is None else self._apart(s) for s in (before, None if past is None else past[1]))
        h = None if past is None or dlog is None else past[0]
        with torch.cuda.device_of(x):
            _sweep[(programs,)](
                x, y, self.log_decay, h, dlog, before, None if dlog is None else first, after, totals, between,
                pieces.cu_seqlens, pieces.ends, pieces.document, pieces.documents, pieces.time, pieces.tokens,
                *x.stride(), self.log_decay.stride(0), self.log_decay.stride(2), *_strides(before), *_strides(first),
                HEADS=tiles.heads, COLUMNS=tiles.columns, WIDE=tiles.wide, BLOCK=tiles.block, ROWS=tiles.rows,
                STAGES=STAGES, REVERSE=reverse, num_warps=WARPS,
            )  # fmt: skip

    def _apart(self, x: Tensor) -> Tensor:
        """Heads that share a decay are an axis; channels that each have their own are columns, whatever their head."""
        return x if self.shared else _side_by_side(x)


def _shared(x: Elementwise.Inputs) -> bool:
    return x.log_decay.shape[2] != x.v.shape[2]


def _side_by_side(x: Tensor) -> Tensor:
    """(..., H, V) as (..., 1, H V)."""
    return x.flatten(-2).unsqueeze(-2)


def _strides(state: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if state is None else state.stride()
