"""GPU kernels of the decay family where a head's channels fade alike: constant rates, and one per token and head.

Where each channel fades at its own rate, channel.py computes it.

Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU (docs/numerics.md).

One sweep computes the outputs and all three gradients. It reads rows x_t, w_t, z_t and keeps a state S (X, Z); in a
chunk of m tokens, with L the running sum of log_decay:

    y_r = Σ_{s≤r} e^{L_r - L_s} (x_r · w_s) z_s + e^{L_r} x_r S        S ← e^{L_m} S + Σ_s e^{L_m - L_s} w_sᵀ z_s

forwards, or backwards, with s ≥ r and the two ends of the chunk exchanged:

    sweep        x    w    z    y    S
    forwards     q    k    v    o    state
    forwards     do   v    k    dq   stateᵀ
    backwards    v    do   q    dk   gradient of the stateᵀ
    backwards    k    q    do   dv   gradient of the state

So states are recomputed in the backward and never all written; nothing that a product returned is transposed, which
Triton 3.4 to 3.7.0 miscompiles on Hopper; and every sum has one order. Where documents are cut (pieces.py) a sweep
without x finds what each piece adds, and another kernel chains them.

The gradient of log_decay: with dq and dk less each token's product with itself, which does not fade,

    dlog_decay_t = S_t' · G_t' + Σ_{t ≤ u < t'} (q_u · dq_u - k_u · dk_u)

for any later t', S_t' the state before token t' and G_t' its gradient. These are differences of nearly equal sums, so
t' is never far: every so many tokens is an *anchor*, where S is kept; and products that would be rounded to the inputs'
dtype get what rounding took as a second term, so that both sweeps add up the same numbers.

Lightning Attention-2 (arXiv:2401.04658) for the chunks; the symmetry and the gradient are derived here.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.decay import Decay
from isotach.ops.triton import channel, device
from isotach.ops.triton.arithmetic import OPERANDS, product, running, tile, weights
from isotach.ops.triton.channel import Config, fitting
from isotach.ops.triton.layout import flat, padded, sides
from isotach.ops.triton.pieces import chain, cut, find_document, find_piece
from isotach.ops.triton.step import free, one_token

REGISTERS = 255  # of a thread, all there are: left to itself the assembler once took 32 and spilled thousands of bytes
CHUNKS = (16, 32, 64, 128)


# By dtype of the queries and the wider of K and V, at most. Chosen by what the compiler reports: no or few spilled
# registers, two programs per processor at 128. Not measured.
CONFIGS = {
    (torch.bfloat16, 64): Config(64, 64, 4, 3, 1024, 99 << 10),
    (torch.bfloat16, 128): Config(64, 64, 4, 2, 1024, 99 << 10),
    (torch.bfloat16, 256): Config(64, 32, 8, 2, 1024, 170 << 10),
    (torch.float16, 64): Config(32, 32, 4, 2, 1024, 48 << 10),
    (torch.float16, 128): Config(32, 32, 4, 2, 1024, 48 << 10),
    (torch.float16, 256): Config(32, 32, 8, 2, 1024, 99 << 10),
    (torch.float32, 64): Config(32, 32, 8, 1, 64, 48 << 10),
    (torch.float32, 128): Config(32, 32, 8, 1, 64, 48 << 10),
    (torch.float32, 256): Config(16, 16, 8, 1, 64, 48 << 10),
}


# fmt: off
@triton.jit(do_not_specialize=[
    "documents", "time", "piece", "tokens", "anchored", "decay_token", "decay_head",
])
def _sweep(  # type: ignore[no-untyped-def]
    x, w, z, y, partner, dots, anchors, links, log_decay, before, between, totals, after,
    cu_seqlens, ends, document, documents, time, piece, tokens, anchored,
    x_token, x_head, w_token, w_head, z_token, z_head, partner_token, partner_head, decay_token, decay_head,
    before_document, before_head, before_x, before_z,
    HEADS: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, ANCHOR: tl.constexpr, REVERSE: tl.constexpr, TURNED: tl.constexpr, PER_TOKEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):
    # fmt: on
    """One piece, head and block of z's columns; without x, only what the piece adds to a state of zeros.

    before, between, after  states of documents, after pieces (totals: their log_decay), and of documents at the end;
                            in memory (Z, X) where TURNED, else (X, Z)
    partner, dots           rows that multiply y, and the products (blocks, H, tokens)
    anchors, links          S at anchors, kept forwards, and S · G (blocks, anchored, H), found backwards
    """
    BLOCKS: tl.constexpr = (Z + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, number = program % BLOCKS, (program // BLOCKS) % HEADS, program // (BLOCKS * HEADS)
    own = find_piece(number, document, cu_seqlens, time, piece)
    if own >= documents:
        return
    start, length, pieces, slot = find_document(own, cu_seqlens, ends, time, piece)
    index = number - slot - own
    order = pieces - 1 - index if REVERSE else index
    if x is None:
        if order == pieces - 1:
            return
    size = tl.minimum(piece, length - index * piece)
    rows, wide, columns = tl.arange(0, CHUNK), tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    inside = (wide < X)[:, None] & (columns < Z)[None, :]
    places = wide[:, None] + columns[None, :] * X if TURNED else wide[:, None] * Z + columns[None, :]
    state = tl.zeros((WIDTH, BLOCK), tl.float32)
    if x is not None:
        if between is not None:
            if order > 0:
                at = ((slot + order - 1).to(tl.int64) * HEADS + head) * (X * Z)
                state = tl.load(between + at + places, mask=inside, other=0.0)
        if before is not None:
            if order == 0:
                at = own.to(tl.int64) * before_document + head * before_head
                spots = before + at + wide[:, None] * before_x + columns[None, :] * before_z
                state = tl.load(spots, mask=inside, other=0.0).to(tl.float32)
    log_decay += head * decay_head
    if not PER_TOKEN and cu_seqlens is None:
        log_decay += own.to(tl.int64) * decay_token
    faded = tl.zeros((), tl.float64)

    for step in range(tl.cdiv(size, CHUNK)):
        chunk = tl.cdiv(size, CHUNK) - 1 - step if REVERSE else step
        since = index * piece + chunk * CHUNK
        token, count = start + since, size - chunk * CHUNK
        anchor = token // ANCHOR * HEADS + head
        if anchors is not None and not REVERSE:
            if (since % ANCHOR == 0) & (since > 0):
                tl.store(anchors + anchor * (X * Z) + places, state, mask=inside)
        ws = tile(w + token * w_token + head * w_head, rows[None, :], w_token, wide[:, None], count, X).to(OPERAND)
        zs = tile(z + token * z_token + head * z_head, rows[:, None], z_token, columns[None, :], count, Z)
        rates = log_decay + token * decay_token if PER_TOKEN else log_decay
        sums, total = running(rates, decay_token, rows, count, PER_TOKEN)
        if x is not None:
            xs = tile(x + token * x_token + head * x_head, rows[:, None], x_token, wide[None, :], count, X).to(OPERAND)
            outputs, alone = _outputs(
                xs, ws, zs, state, sums, total, rows, REVERSE, OPERAND, PRECISION, SPLIT, dots is not None
            )
            if dots is not None:
                others = partner + token * partner_token + head * partner_head
                others = tile(others, rows[:, None], partner_token, columns[None, :], count, Z).to(tl.float32)
                spots = dots + (block * HEADS + head).to(tl.int64) * tokens + token + rows
                tl.store(spots, tl.sum(others * outputs, 1), mask=rows < count)
                outputs += alone[:, None] * zs.to(tl.float32)
            spots = y + (token * HEADS + head) * Z + rows[:, None] * (HEADS * Z) + columns[None, :]
            tl.store(spots, outputs.to(y.dtype.element_ty), mask=(rows < count)[:, None] & (columns < Z)[None, :])
        left = (sums if REVERSE else total - sums).to(tl.float32)
        update = zs.to(tl.float32) * tl.exp(left)[:, None]
        state = product(ws, update, state * tl.exp(total.to(tl.float32)), OPERAND, PRECISION, SPLIT)
        faded += total
        if anchors is not None and REVERSE:
            if (since % ANCHOR == 0) & (since > 0):
                kept = tl.load(anchors + anchor * (X * Z) + places, mask=inside, other=0.0)
                tl.store(links + block * anchored * HEADS + anchor, tl.sum(kept * state))

    if x is None:
        at = (slot + order).to(tl.int64) * HEADS + head
        tl.store(between + at * (X * Z) + places, state, mask=inside)
        if block == 0:
            tl.store(totals + at, faded.to(tl.float32))
    elif after is not None:
        if order == pieces - 1:
            tl.store(after + (own.to(tl.int64) * HEADS + head) * (X * Z) + places, state, mask=inside)


@triton.jit
def _outputs(  # type: ignore[no-untyped-def]
    xs, ws, zs, state, sums, total, rows,
    REVERSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """y of a chunk. STRICT leaves out each token's own z, and returns by what it is to be multiplied."""
    visible = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
    scores = tl.dot(xs, ws, input_precision=PRECISION) * weights(sums, visible, REVERSE)
    alone = tl.zeros((rows.shape[0],), tl.float32)
    if STRICT:
        diagonal = rows[:, None] == rows[None, :]
        alone = tl.sum(tl.where(diagonal, scores, 0.0), 1)
        scores = tl.where(diagonal, 0.0, scores)
    outputs = product(xs, state, tl.zeros(zs.shape, tl.float32), OPERAND, PRECISION, SPLIT)
    outputs *= tl.exp((total - sums if REVERSE else sums).to(tl.float32))[:, None]
    outputs = tl.dot(scores.to(OPERAND), zs.to(OPERAND), outputs, input_precision=PRECISION)
    return outputs, alone


def refusal(x: Decay.Inputs, chunk_size: int | None) -> str | None:
    """What of a call these kernels cannot take, if so."""
    if _apart(x):
        return channel.refusal(x, chunk_size)
    config = fitting(CONFIGS, CHUNKS, x, chunk_size)
    return config if isinstance(config, str) else device.refusal(x.q.device, config.shared)


def _apart(x: Decay.Inputs) -> bool:
    """Whether each channel of a head fades at its own rate."""
    return bool(x.log_decay.shape[-1] != 1)


def step(
    rec: Decay, x: Decay.Inputs, s: Decay.State, into: Decay.State | None = None
) -> tuple[Tensor, Decay.State]:
    after = free(s.state) if into is None else into.state
    return one_token(*x, s.state, after), Decay.State(after)


@register(Decay, "triton", device="cuda", refusal=refusal, step=step)
def decay(
    rec: Decay, x: Decay.Inputs, s: Decay.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Decay.State]:
    output, state = _forward(*x, s.state, cu_seqlens, chunk_size)
    return output, Decay.State(state)


@torch.library.custom_op("isotach::decay_triton", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    x = Decay.Inputs(q, k.to(q.dtype), v.to(q.dtype), log_decay)
    if _apart(x):
        return channel.forward(x, state, cu_seqlens, chunk_size)
    call = _Call(x, cu_seqlens, chunk_size)
    output, after = q.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)
    call.sweep(q, x.k, x.v, output, before=state, between=call.between(x.k, x.v, state), after=after)
    return output, after


@_forward.register_fake
def _(q, k, v, log_decay, state, cu_seqlens, chunk_size):  # type: ignore[no-untyped-def]
    return q.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("isotach::decay_triton_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    with_decay: bool,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and state; of shape (0,) where the last two are not wanted."""
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    x = Decay.Inputs(q, k.to(q.dtype), v.to(q.dtype), log_decay)
    backward = channel.backward if _apart(x) else _backward_by_heads
    dlog, first = backward(
        grad_output, grad_state, x, state, grads, cu_seqlens, chunk_size, with_decay=with_decay, with_state=with_state
    )
    return *grads, q.new_empty(0) if dlog is None else dlog, q.new_empty(0) if first is None else first


@_backward.register_fake
def _(grad_output, grad_state, q, k, v, log_decay, state, cu_seqlens, chunk_size, with_decay, with_state):  # type: ignore[no-untyped-def]
    dlog = log_decay.new_empty(log_decay.shape) if with_decay else q.new_empty(0)
    first = state.new_empty(state.shape, dtype=torch.float32) if with_state else q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), dlog, first)


def _backward_by_heads(
    grad_output: Tensor,
    grad_state: Tensor | None,
    x: Decay.Inputs,
    state: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    *,
    with_decay: bool,
    with_state: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As channel.backward."""
    (q, k, v, log_decay), (dq, dk, dv) = x, grads
    call = _Call(x, cu_seqlens, chunk_size)
    ledger = _Ledger.of(call, q, v.shape[-1]) if with_decay else None
    final = state.new_empty(state.shape, dtype=torch.float32) if with_decay and grad_state is not None else None
    first = state.new_empty(state.shape, dtype=torch.float32) if with_state else None

    between = call.between(k, v, state, exact=with_decay)
    call.sweep(grad_output, v, k, dq, before=state, between=between, after=final, turned=True, partner=q, ledger=ledger)
    between = call.between(q, grad_output, grad_state, reverse=True, exact=with_decay)
    call.sweep(
        v, grad_output, q, dk,
        before=grad_state, between=between, turned=True, reverse=True, partner=k, ledger=ledger,
    )  # fmt: skip
    call.sweep(k, q, grad_output, dv, before=grad_state, between=between, after=first, reverse=True)
    if ledger is None:
        return None, first
    owed = None if grad_state is None or final is None else (final * grad_state).sum((-2, -1), dtype=torch.float64)
    return call.decay_gradient(ledger, owed).to(log_decay.dtype, memory_format=torch.contiguous_format), first


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
    if grad_output is None:
        grad_output = q.new_zeros(()).expand(v.shape)
    wanted = ctx.needs_input_grad[3:5]
    *grads, dlog, before = _backward(
        grad_output, grad_state, q, k, v, log_decay, state, cu_seqlens, ctx.chunk_size, *wanted
    )
    return (*grads, dlog if wanted[0] else None, before.to(state.dtype) if wanted[1] else None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("decay", "triton"))
sharding.declare("decay_triton", Decay.Inputs, state=Decay.State, output="v")


class _Call:
    """One call's cut and arithmetic. States are (documents, H, K, V) for every sweep."""

    def __init__(self, x: Decay.Inputs, cu_seqlens: Tensor | None, chunk_size: int | None) -> None:
        config = fitting(CONFIGS, CHUNKS, x, chunk_size)
        assert isinstance(config, Config), config  # run has refused already
        self.config, self.operands = config, OPERANDS[x.q.dtype]
        self.batch, time, self.heads, _ = x.q.shape
        self.per_token = x.log_decay.shape[1] != 1
        self.log_decay = x.log_decay.flatten(0, 1) if self.per_token else x.log_decay[:, 0]
        programs = self.heads * self.blocks(x.v.shape[-1])
        self.pieces = cut(self.batch, time, cu_seqlens, programs=programs, chunk=config.chunk, device=x.q.device)

    @property
    def tokens(self) -> int:
        return self.batch * self.pieces.time

    def blocks(self, width: int) -> int:
        """Programs that share the columns of z."""
        return triton.cdiv(width, min(self.config.block, padded(width)))

    def sweep(
        self,
        x: Tensor | None,
        w: Tensor,
        z: Tensor,
        y: Tensor | None,
        *,
        before: Tensor | None = None,
        between: Tensor | None = None,
        totals: Tensor | None = None,
        after: Tensor | None = None,
        turned: bool = False,
        reverse: bool = False,
        exact: bool = False,
        partner: Tensor | None = None,
        ledger: "_Ledger | None" = None,
    ) -> None:
        """Fill y, after and the ledger, or between and totals; all as the kernel has it."""
        pieces, config, heads, wide, columns = self.pieces, self.config, self.heads, w.shape[-1], z.shape[-1]
        programs, operands = pieces.limit * heads * self.blocks(columns), self.operands
        exact = exact or ledger is not None
        if programs == 0:
            return
        dots = anchors = links = None
        if ledger is not None:
            dots, anchors, links = ledger.writes if reverse else ledger.reads, ledger.anchors, ledger.links
        rows = [flat(row) for row in (x, w, z, partner if ledger is not None else None)]
        (x_rows, *x_at), (w_rows, *w_at), (z_rows, *z_at), (partners, *partners_at) = rows
        with torch.cuda.device_of(z):
            _sweep[(programs,)](
                x_rows, w_rows, z_rows, y, partners, dots, anchors, links, self.log_decay,
                before, between, totals, after, pieces.cu_seqlens, pieces.ends, pieces.document,
                pieces.documents, pieces.time, pieces.tokens, self.tokens, self.tokens // config.anchor + 1,
                *x_at, *w_at, *z_at, *partners_at, *self.log_decay.stride()[:2], *sides(before, turned),
                HEADS=heads, X=wide, Z=columns, WIDTH=padded(wide), BLOCK=min(config.block, padded(columns)),
                CHUNK=config.chunk, ANCHOR=config.anchor, REVERSE=reverse, TURNED=turned, PER_TOKEN=self.per_token,
                OPERAND=operands.dtype, PRECISION=operands.exact if exact else operands.precision,
                SPLIT=exact and operands.split,
                num_warps=config.warps, num_stages=config.stages, maxnreg=REGISTERS,
            )  # fmt: skip

    def between(
        self, w: Tensor, z: Tensor, before: Tensor | None, *, reverse: bool = False, exact: bool = False
    ) -> Tensor | None:
        """The states (·, H, K, V) after pieces that others follow; None where documents are whole."""
        pieces, heads, wide, columns = self.pieces, self.heads, w.shape[-1], z.shape[-1]
        if pieces.between == 0 or heads == 0:
            return None
        between = w.new_empty((pieces.between, heads, wide, columns), dtype=torch.float32)
        totals = w.new_empty((pieces.between, heads), dtype=torch.float32)
        self.sweep(None, w, z, None, between=between, totals=totals, reverse=reverse, exact=exact)
        with torch.cuda.device_of(w):
            chain(pieces, before, between, totals)
        return between

    def decay_gradient(self, ledger: "_Ledger", owed: Tensor | None) -> Tensor:
        """Of log_decay; `owed` (documents, H) is S · G at the end of documents, None for 0."""
        tokens, anchor = torch.arange(self.tokens, device=ledger.links.device), self.config.anchor
        bounds = self.pieces.cu_seqlens
        if bounds is None:
            bounds = torch.arange(self.batch + 1, device=tokens.device) * self.pieces.time
        own = torch.searchsorted(bounds, tokens, right=True) - 1
        start, end = bounds[own], bounds[own + 1]
        later = torch.minimum(tokens + anchor - (tokens - start) % anchor, end)

        terms = ledger.reads.sum(0, dtype=torch.float64) - ledger.writes.sum(0, dtype=torch.float64)
        suffix = F.pad(terms.flip(-1).cumsum(-1).flip(-1), (0, 1))
        linked = ledger.links.sum(0, dtype=torch.float64).T[:, later // anchor]
        linked = torch.where(later < end, linked, 0.0 if owed is None else owed.T[:, own])
        dlog = (linked + suffix[:, :-1] - suffix[:, later]).unflatten(1, (self.batch, -1))
        return (dlog if self.per_token else dlog.sum(-1, keepdim=True)).permute(1, 2, 0).unsqueeze(-1)


class _Ledger(NamedTuple):
    """What sweeps note for the gradient of log_decay, in float32.

    reads, writes  q · dq and k · dk (blocks, H, tokens), without each token's product with itself
    anchors        S (·, H, K, V) at anchors: that before token t, if t is one, is number t // anchor
    links          S · G there, (blocks, ·, H)
    """

    reads: Tensor
    writes: Tensor
    anchors: Tensor
    links: Tensor

    @classmethod
    def of(cls, call: _Call, q: Tensor, values: int) -> Self:
        blocks, count = call.blocks(q.shape[-1]), call.tokens // call.config.anchor + 1
        dots, state = (blocks, call.heads, call.tokens), (call.heads, q.shape[-1], values)
        sizes: tuple[tuple[int, ...], ...] = (dots, dots, (count, *state), (blocks, count, call.heads))
        return cls(*(q.new_empty(size, dtype=torch.float32) for size in sizes))
