"""GPU kernels of the decay family where every channel of a key fades at its own rate: GLA, HGRN2.

Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU (docs/numerics.md).

In a chunk of m tokens, L the running sum of log_decay, S (K, V) the state before it and G the gradient of that after:

    o_r  = Σ_{s≤r} (Σ_c q_rc k_sc e^{L_rc - L_sc}) v_s  + (q_r ∘ e^{L_r}) S
    dv_s = Σ_{r≥s} (Σ_c q_rc k_sc e^{L_rc - L_sc}) do_r + (k_s ∘ e^{L_m - L_s}) G
    dq_r = Σ_{s≤r} (do_r · v_s) k_s ∘ e^{L_r - L_s} + (do_r Sᵀ) ∘ e^{L_r}
    dk_s = Σ_{r≥s} (do_r · v_s) q_r ∘ e^{L_r - L_s} + (v_s Gᵀ) ∘ e^{L_m - L_s}

    S ← e^{L_m} ∘ S + Σ_s (k_s ∘ e^{L_m - L_s})ᵀ v_s        G ← e^{L_m} ∘ G + Σ_r (q_r ∘ e^{L_r})ᵀ do_r

The first two lines are one sweep, forwards and backwards, whose scores fade; the next two are another, whose rows do.
Both keep the state on chip, and it is recomputed for dq. Where documents are cut (pieces.py) the second sweep, without
x, finds what each piece adds, and another kernel chains them.

A chunk that decays by less than e^60 is one product: readers times e^{L_r}, writers times e^{-L_s}. Otherwise it is
halved, and halved again (channels.py), and no factor exceeds 1.

The gradient of log_decay: with dq and dk less each token's product with itself, which does not fade,

    dlog_decay_t = Σ_v S_t' ∘ G_t' + Σ_{t ≤ u < t'} (q_u ∘ dq_u - k_u ∘ dk_u)

for any later t', S_t' the state before token t' and G_t' its gradient. The sweep for dk adds it up on its way, from the
nearest *anchor* on, a token where the sweep for dq kept S. These are differences of nearly equal sums: both sweeps form
each pair's part of them from the same rounded factors, and products that would be rounded to the inputs' dtype get what
rounding took as a second term.

Gated Linear Attention (arXiv:2312.06635) for the chunks; the gradient of the decay is derived here.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops.decay import Decay
from isotach.ops.triton import device
from isotach.ops.triton.arithmetic import OPERANDS, product, tile
from isotach.ops.triton.channels import fades, parted, rates_at, since, until, weighed
from isotach.ops.triton.layout import flat, padded, sides
from isotach.ops.triton.pieces import chain, cut, find_document, find_piece

SAFE = tl.constexpr(60.0)  # e^60 = 1e26 leaves rows and columns a factor of 1e12 in float32
REGISTERS = 255  # of a thread, all there are: left to itself the assembler once took 128 and spilled thousands of bytes
CHUNKS = (16, 32, 64)


class Config(NamedTuple):
    """chunk: tokens; block: columns of the state per program; warps, stages: Triton's num_warps and num_stages;
    anchor: tokens between anchors; shared: bytes of fast memory that any sweep takes, as compiled for Hopper.
    """

    chunk: int
    block: int
    warps: int
    stages: int
    anchor: int
    shared: int


# By dtype of the queries and the wider of K and V, at most. Reasoned, and checked for what the compiler reports: few
# spilled registers but where chunks decay strongly and in float32 at 256, two programs per processor at 128.
# Not measured.
CONFIGS = {
    (torch.bfloat16, 64): Config(16, 64, 4, 2, 256, 36 << 10),
    (torch.bfloat16, 128): Config(16, 64, 4, 2, 256, 56 << 10),
    (torch.bfloat16, 256): Config(16, 32, 8, 2, 256, 112 << 10),
    (torch.float16, 64): Config(16, 32, 4, 2, 256, 48 << 10),
    (torch.float16, 128): Config(16, 32, 4, 2, 256, 64 << 10),
    (torch.float16, 256): Config(16, 32, 8, 1, 256, 64 << 10),
    (torch.float32, 64): Config(16, 32, 8, 1, 64, 36 << 10),
    (torch.float32, 128): Config(16, 32, 8, 1, 64, 36 << 10),
    (torch.float32, 256): Config(16, 16, 8, 1, 64, 72 << 10),
}


# fmt: off
@triton.jit(do_not_specialize=["documents", "time", "piece", "decay_token", "decay_head"])
def _fading_scores(  # type: ignore[no-untyped-def]
    x, w, z, y, log_decay, before, between, after,
    cu_seqlens, ends, document, documents, time, piece,
    x_token, x_head, w_token, w_head, z_token, z_head, decay_token, decay_head,
    before_document, before_head, before_k, before_v,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """o, or backwards dv, of one piece, head and block of values' columns."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, number = program % BLOCKS, (program // BLOCKS) % HEADS, program // (BLOCKS * HEADS)
    own = find_piece(number, document, cu_seqlens, time, piece)
    if own >= documents:
        return
    start, length, pieces, slot = find_document(own, cu_seqlens, ends, time, piece)
    index = number - slot - own
    order = pieces - 1 - index if REVERSE else index
    size = tl.minimum(piece, length - index * piece)
    rows, wide, columns = tl.arange(0, CHUNK), tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    inside, places = (wide < K)[:, None] & (columns < V)[None, :], wide[:, None] * V + columns[None, :]
    state = tl.zeros((WIDTH, BLOCK), tl.float32)
    if between is not None:
        if order > 0:
            at = ((slot + order - 1).to(tl.int64) * HEADS + head) * (K * V)
            state = tl.load(between + at + places, mask=inside, other=0.0)
    if before is not None:
        if order == 0:
            at = own.to(tl.int64) * before_document + head * before_head
            spots = before + at + wide[:, None] * before_k + columns[None, :] * before_v
            state = tl.load(spots, mask=inside, other=0.0).to(tl.float32)
    visible = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]

    for step in range(tl.cdiv(size, CHUNK)):
        chunk = tl.cdiv(size, CHUNK) - 1 - step if REVERSE else step
        token, count = start + index * piece + chunk * CHUNK, size - chunk * CHUNK
        xs = tile(x + token * x_token + head * x_head, rows[:, None], x_token, wide[None, :], count, K)
        ws = tile(w + token * w_token + head * w_head, rows[None, :], w_token, wide[:, None], count, K)
        zs = tile(z + token * z_token + head * z_head, rows[:, None], z_token, columns[None, :], count, V).to(OPERAND)
        rates, far = rates_at(log_decay, own, token, head, decay_token, decay_head, cu_seqlens, PER_TOKEN)
        now, later = fades(rates, far, rows[:, None], wide[None, :], count, K)
        now_turned, later_turned = fades(rates, far, rows[None, :], wide[:, None], count, K)
        total = tl.sum(now_turned, 1)
        if REVERSE:
            into, left = until(later, CHUNK, 0), since(now_turned, CHUNK, 1)
        else:
            into, left = since(now, CHUNK, 0), until(later_turned, CHUNK, 1)
        reads = (xs * into).to(OPERAND)
        if tl.min(total) > -SAFE:
            faded = until(later_turned, CHUNK, 1) if REVERSE else since(now_turned, CHUNK, 1)
            scores = tl.dot(reads, (ws / faded).to(OPERAND), input_precision=PRECISION)
            scores = tl.where(visible, scores, 0.0)
        else:
            scores = _scores(xs, ws, now, later, now_turned, later_turned, rows, LEVELS, REVERSE, PRECISION)
        outputs = product(reads, state, tl.zeros(zs.shape, tl.float32), OPERAND, PRECISION, False)
        outputs = tl.dot(scores.to(OPERAND), zs, outputs, input_precision=PRECISION)
        spots = y + (token * HEADS + head) * V + rows[:, None] * (HEADS * V) + columns[None, :]
        tl.store(spots, outputs.to(y.dtype.element_ty), mask=(rows < count)[:, None] & (columns < V)[None, :])
        state *= tl.exp(total)[:, None]
        state = tl.dot((ws * left).to(OPERAND), zs, state, input_precision=PRECISION)

    if after is not None:
        if order == pieces - 1:
            tl.store(after + (own.to(tl.int64) * HEADS + head) * (K * V) + places, state, mask=inside)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    xs, ws, now, later, now_turned, later_turned, rows,
    LEVELS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_c x_ic w_jc e^{L_ic - L_jc} for j ≤ i, backwards j ≥ i and e^{L_jc - L_ic}; w is (channels, tokens)."""
    plain = tl.dot(xs.to(tl.float32), ws.to(tl.float32), input_precision=PRECISION)
    total = tl.where(rows[:, None] == rows[None, :], plain, 0.0)
    for level in tl.static_range(LEVELS):
        if REVERSE:
            of_reader, of_writer = until(later, 1 << level, 0), since(now_turned, 1 << level, 1)
        else:
            of_reader, of_writer = since(now, 1 << level, 0), until(later_turned, 1 << level, 1)
        faded = tl.dot(xs * of_reader, ws * of_writer, input_precision=PRECISION)
        total += tl.where(parted(rows, 1 << level, REVERSE), faded, 0.0)
    return total


# fmt: off
@triton.jit(do_not_specialize=["documents", "time", "piece", "decay_token", "decay_head"])
def _fading_rows(  # type: ignore[no-untyped-def]
    x, w, z, y, partner, products, anchors, owing, dlog, log_decay, before, between, totals, after,
    cu_seqlens, ends, document, documents, time, piece,
    x_token, x_head, w_token, w_head, z_token, z_head, partner_token, partner_head, decay_token, decay_head,
    before_document, before_head, before_k, before_v,
    HEADS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, ANCHOR: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):
    # fmt: on
    """dq, or backwards dk, of one piece, head and block of keys' columns; without x, only what the piece adds.

    The state, or its gradient, is (V, BLOCK) here.

    before, between, after  states of documents, after pieces (totals: their log_decay), and of documents at the end
    partner, products       rows that multiply y, and the products (tokens, H, K): noted forwards, used backwards
    anchors                 S at anchors, kept forwards
    owing, dlog             S after documents, and the gradient of log_decay (tokens, H, K)
    """
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
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
    inside, places = (wide < V)[:, None] & (columns < K)[None, :], wide[:, None] + columns[None, :] * V
    state, linked = tl.zeros((WIDTH, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if x is not None:
        if between is not None:
            if order > 0:
                at = ((slot + order - 1).to(tl.int64) * HEADS + head) * (K * V)
                state = tl.load(between + at + places, mask=inside, other=0.0)
        if before is not None:
            if order == 0:
                at = own.to(tl.int64) * before_document + head * before_head
                spots = before + at + wide[:, None] * before_v + columns[None, :] * before_k
                state = tl.load(spots, mask=inside, other=0.0).to(tl.float32)
    if dlog is not None:
        if order > 0:
            anchor = ((start + index * piece + size) // ANCHOR * HEADS + head) * (K * V)
            linked = tl.sum(state * tl.load(anchors + anchor + places, mask=inside, other=0.0), 0)
        elif owing is not None:
            at = (own.to(tl.int64) * HEADS + head) * (K * V)
            linked = tl.sum(state * tl.load(owing + at + places, mask=inside, other=0.0), 0)
    faded = tl.zeros((BLOCK,), tl.float32)

    for step in range(tl.cdiv(size, CHUNK)):
        chunk = tl.cdiv(size, CHUNK) - 1 - step if REVERSE else step
        passed = index * piece + chunk * CHUNK
        token, count = start + passed, size - chunk * CHUNK
        ws = tile(w + token * w_token + head * w_head, rows[None, :], w_token, wide[:, None], count, V).to(OPERAND)
        zs = tile(z + token * z_token + head * z_head, rows[:, None], z_token, columns[None, :], count, K)
        zs = zs.to(tl.float32)
        rates, far = rates_at(log_decay, own, token, head, decay_token, decay_head, cu_seqlens, PER_TOKEN)
        now, later = fades(rates, far, rows[:, None], columns[None, :], count, K)
        total = tl.sum(now, 0)
        first, second = since(now, CHUNK, 0), until(later, CHUNK, 0)
        into, left = (second, first) if REVERSE else (first, second)
        if anchors is not None and not REVERSE:
            if (passed % ANCHOR == 0) & (passed > 0):
                tl.store(anchors + (token // ANCHOR * HEADS + head) * (K * V) + places, state, mask=inside)
        if x is not None:
            xs = tile(x + token * x_token + head * x_head, rows[:, None], x_token, wide[None, :], count, V).to(OPERAND)
            scores = tl.dot(xs, ws, input_precision=PRECISION)
            alone = tl.sum(tl.where(rows[:, None] == rows[None, :], scores, 0.0), 1)
            visible = rows[:, None] < rows[None, :] if REVERSE else rows[:, None] > rows[None, :]
            scores = tl.where(visible, scores, 0.0)
            zero = tl.zeros(zs.shape, tl.float32)
            outputs = into * product(xs, state, zero, OPERAND, PRECISION, SPLIT)
            here = (token * HEADS + head) * K + rows[:, None] * (HEADS * K) + columns[None, :]
            stored = (rows < count)[:, None] & (columns < K)[None, :]
            others = zero
            if products is not None:
                others = partner + token * partner_token + head * partner_head
                others = tile(others, rows[:, None], partner_token, columns[None, :], count, K).to(tl.float32)
            noted = others * outputs
            if tl.min(total) > -SAFE:
                to_reader, to_writer = (1 / first, first) if REVERSE else (first, 1 / first)
                near = product(scores.to(OPERAND), zs * to_writer, zero, OPERAND, PRECISION, SPLIT)
                outputs += to_reader * near
                noted += (others * to_reader) * near
            else:
                near = weighed(scores, zs, now, later, rows, LEVELS, REVERSE, PRECISION)
                outputs += near
                noted += others * near
            if dlog is not None:
                terms = tl.load(products + here, mask=stored, other=0.0) - noted
                tl.store(dlog + here, linked[None, :] + tl.cumsum(terms, 0, reverse=True), mask=stored)
                linked += tl.sum(terms, 0)
            elif products is not None:
                tl.store(products + here, noted, mask=stored)
            outputs += alone[:, None] * zs
            tl.store(y + here, outputs.to(y.dtype.element_ty), mask=stored)
        state *= tl.exp(total)[None, :]
        state = product(ws, zs * left, state, OPERAND, PRECISION, SPLIT)
        faded += total
        if dlog is not None:
            if (passed % ANCHOR == 0) & (passed > 0):
                anchor = (token // ANCHOR * HEADS + head) * (K * V)
                linked = tl.sum(state * tl.load(anchors + anchor + places, mask=inside, other=0.0), 0)

    if x is None:
        at = (slot + order).to(tl.int64) * HEADS + head
        tl.store(between + at * (K * V) + places, state, mask=inside)
        tl.store(totals + at * K + columns, faded, mask=columns < K)
    elif after is not None:
        if order == pieces - 1:
            tl.store(after + (own.to(tl.int64) * HEADS + head) * (K * V) + places, state, mask=inside)


def fitting(
    configs: Mapping[tuple[torch.dtype, int], Config],
    chunks: tuple[int, ...],
    x: Decay.Inputs,
    chunk_size: int | None,
) -> Config | str:
    """Of configurations by dtype and widest head the one for inputs like x, or what cannot be taken."""
    if chunk_size not in (None, *chunks):
        apart = "" if x.log_decay.shape[-1] == 1 else " where channels fade apart"
        return f"takes chunks of {chunks} tokens{apart}; got chunk_size = {chunk_size}"
    width = max(x.q.shape[-1], x.v.shape[-1])
    for (dtype, widest), config in configs.items():
        if dtype == x.q.dtype and width <= widest:
            chunk = chunk_size or config.chunk
            shared = config.shared * chunk // config.chunk
            return config._replace(chunk=chunk, anchor=max(chunk, config.anchor), shared=shared)
    return f"takes heads of at most 256 channels in bfloat16, float16 or float32; got {width} in {x.q.dtype}"


def refusal(x: Decay.Inputs, chunk_size: int | None) -> str | None:
    """What of a call with one decay per channel these kernels cannot take, if so."""
    config = fitting(CONFIGS, CHUNKS, x, chunk_size)
    return config if isinstance(config, str) else device.refusal(x.q.device, config.shared)


def forward(
    x: Decay.Inputs, state: Tensor, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Outputs, and the state after the last token of every document; keys and values in the queries' dtype."""
    q, k, v, _ = x
    call = _Call(x, cu_seqlens, chunk_size)
    output, after = q.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)
    call.fading_scores(q, k, v, output, before=state, between=call.between(v, k, state), after=after)
    return output, after


def backward(
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
    """The gradients of q, k and v into `grads`; those of log_decay and state, None where they are not wanted."""
    (q, k, v, log_decay), (dq, dk, dv) = x, grads
    call = _Call(x, cu_seqlens, chunk_size)
    ledger = _Ledger.of(call, q, v.shape[-1]) if with_decay else None
    final = state.new_empty(state.shape, dtype=torch.float32) if with_decay and grad_state is not None else None
    first = state.new_empty(state.shape, dtype=torch.float32) if with_state else None

    between = call.between(v, k, state, exact=with_decay)
    call.fading_rows(grad_output, v, k, dq, before=state, between=between, after=final, partner=q, ledger=ledger)
    between = call.between(grad_output, q, grad_state, reverse=True, exact=with_decay)
    call.fading_rows(
        v, grad_output, q, dk,
        before=grad_state, between=between, reverse=True, partner=k, ledger=ledger, owing=final,
    )  # fmt: skip
    call.fading_scores(k, q, grad_output, dv, before=grad_state, between=between, after=first, reverse=True)
    return None if ledger is None else ledger.decay_gradient(log_decay), first


class _Ledger(NamedTuple):
    """What the sweeps for dq and dk note for the gradient of log_decay, in float32.

    products  q ∘ dq (tokens, H, K), without each token's product with itself
    anchors   S (·, H, K, V) at anchors: that before token t, if t is one, is number t // anchor
    dlog      (tokens, H, K)
    """

    products: Tensor
    anchors: Tensor
    dlog: Tensor

    @classmethod
    def of(cls, call: "_Call", q: Tensor, values: int) -> Self:
        tokens, rows = q.shape[0] * q.shape[1], q.shape[2:]
        sizes: tuple[tuple[int, ...], ...] = (
            (tokens, *rows), (tokens // call.config.anchor + 1, *rows, values), (tokens, *rows)
        )  # fmt: skip
        return cls(*(q.new_empty(size, dtype=torch.float32) for size in sizes))

    def decay_gradient(self, log_decay: Tensor) -> Tensor:
        """As log_decay is, which may be the same for all tokens."""
        dlog = self.dlog.unflatten(0, (log_decay.shape[0], -1))
        if log_decay.shape[1] != dlog.shape[1]:
            dlog = dlog.sum(1, keepdim=True, dtype=torch.float64)
        return dlog.to(log_decay.dtype)


class _Call:
    """One call's cut and arithmetic. States are (documents, H, K, V) for every sweep."""

    def __init__(self, x: Decay.Inputs, cu_seqlens: Tensor | None, chunk_size: int | None) -> None:
        config = fitting(CONFIGS, CHUNKS, x, chunk_size)
        assert isinstance(config, Config), config  # run has refused already
        self.config, self.operands = config, OPERANDS[x.q.dtype]
        batch, time, self.heads, self.keys = x.q.shape
        self.values = x.v.shape[-1]
        self.per_token = x.log_decay.shape[1] != 1
        log_decay = x.log_decay.flatten(0, 1) if self.per_token else x.log_decay[:, 0]
        self.log_decay = log_decay if log_decay.stride(-1) == 1 else log_decay.contiguous()
        programs = self.heads * self.blocks(self.values)
        self.pieces = cut(batch, time, cu_seqlens, programs=programs, chunk=config.anchor, device=x.q.device)

    def blocks(self, width: int) -> int:
        """Programs that share the columns of z."""
        return triton.cdiv(width, min(self.config.block, padded(width)))

    def fading_scores(
        self,
        x: Tensor,
        w: Tensor,
        z: Tensor,
        y: Tensor,
        *,
        before: Tensor | None,
        between: Tensor | None,
        after: Tensor | None,
        reverse: bool = False,
    ) -> None:
        """Fill y and after, as the kernel has it."""
        pieces, programs = self.pieces, self.pieces.limit * self.heads * self.blocks(self.values)
        if programs == 0:
            return
        (x_rows, *x_at), (w_rows, *w_at), (z_rows, *z_at) = (flat(row) for row in (x, w, z))
        with torch.cuda.device_of(z):
            _fading_scores[(programs,)](
                x_rows, w_rows, z_rows, y, self.log_decay, before, between, after,
                pieces.cu_seqlens, pieces.ends, pieces.document, pieces.documents, pieces.time, pieces.tokens,
                *x_at, *w_at, *z_at, *self.log_decay.stride()[:2], *sides(before),
                WIDTH=padded(self.keys), BLOCK=min(self.config.block, padded(self.values)),
                PRECISION=self.operands.precision, **self._common(reverse),
            )  # fmt: skip

    def fading_rows(
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
        reverse: bool = False,
        exact: bool = False,
        partner: Tensor | None = None,
        ledger: _Ledger | None = None,
        owing: Tensor | None = None,
    ) -> None:
        """Fill y, after and the ledger, or between and totals; all as the kernel has it."""
        pieces, operands = self.pieces, self.operands
        programs, exact = pieces.limit * self.heads * self.blocks(self.keys), exact or ledger is not None
        if programs == 0:
            return
        products, anchors, dlog = (None, None, None) if ledger is None else ledger
        rows = [flat(row) for row in (x, w, z, None if ledger is None else partner)]
        (x_rows, *x_at), (w_rows, *w_at), (z_rows, *z_at), (partners, *partners_at) = rows
        with torch.cuda.device_of(z):
            _fading_rows[(programs,)](
                x_rows, w_rows, z_rows, y, partners, products, anchors, owing, dlog if reverse else None,
                self.log_decay, before, between, totals, after,
                pieces.cu_seqlens, pieces.ends, pieces.document, pieces.documents, pieces.time, pieces.tokens,
                *x_at, *w_at, *z_at, *partners_at, *self.log_decay.stride()[:2], *sides(before),
                WIDTH=padded(self.values), BLOCK=min(self.config.block, padded(self.keys)), ANCHOR=self.config.anchor,
                PRECISION=operands.exact if exact else operands.precision, SPLIT=exact and operands.split,
                **self._common(reverse),
            )  # fmt: skip

    def between(
        self, w: Tensor, z: Tensor, before: Tensor | None, *, reverse: bool = False, exact: bool = False
    ) -> Tensor | None:
        """The states (·, H, K, V) after pieces that others follow; None where documents are whole."""
        pieces, heads, keys, values = self.pieces, self.heads, self.keys, self.values
        if pieces.between == 0 or heads == 0:
            return None
        between = w.new_empty((pieces.between, heads, keys, values), dtype=torch.float32)
        totals = w.new_empty((pieces.between, heads, keys), dtype=torch.float32)
        self.fading_rows(None, w, z, None, between=between, totals=totals, reverse=reverse, exact=exact)
        with torch.cuda.device_of(w):
            chain(pieces, before, between, totals)
        return between

    def _common(self, reverse: bool) -> dict[str, object]:
        """What both sweeps are compiled for."""
        return {
            "HEADS": self.heads, "K": self.keys, "V": self.values, "CHUNK": self.config.chunk,
            "LEVELS": self.config.chunk.bit_length() - 1, "REVERSE": reverse, "PER_TOKEN": self.per_token,
            "OPERAND": self.operands.dtype, "num_warps": self.config.warps, "num_stages": self.config.stages,
            "maxnreg": REGISTERS,
        }  # fmt: skip
