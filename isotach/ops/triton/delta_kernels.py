"""The kernels behind delta.py, which says what they compute and in which order they run."""

import triton
import triton.language as tl

from isotach.ops.triton.arithmetic import product, running, tile, weights
from isotach.ops.triton.channels import fades, parted, rates_at, since, until, weighed
from isotach.ops.triton.pieces import find_document, find_piece

SAFE = tl.constexpr(60.0)  # e^60 = 1e26 leaves rows and columns a factor of 1e12 in float32

# Where a chunk's matrices stand: its inverse, and what is read along one key of what is written along another.
INVERSE, QUERY_ERASE, QUERY_WRITE, READ_WRITE = (tl.constexpr(number) for number in range(4))


# fmt: off
@triton.jit(do_not_specialize=["documents", "time", "tokens", "decay_token", "decay_head"])
def invert(  # type: ignore[no-untyped-def]
    q, read, erase, write, beta, log_decay, matrices, cu_seqlens, ends, document, documents, time, tokens,
    q_token, q_head, read_token, read_head, erase_token, erase_head, write_token, write_head, beta_token, beta_head,
    decay_token, decay_head,
    HEADS: tl.constexpr, X: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):
    # fmt: on
    """matrices (·, tokens, H, CHUNK) of one chunk and head: its inverse; with q its scores, which contain no beta."""
    program = tl.program_id(0)
    head, number = (program % HEADS).to(tl.int64), program // HEADS
    own = find_piece(number, document, cu_seqlens, time, CHUNK)
    if own >= documents:
        return
    start, length, _pieces, slot = find_document(own, cu_seqlens, ends, time, CHUNK)
    since_start = (number - slot - own) * CHUNK
    token, count = start + since_start, length - since_start
    rows = tl.arange(0, CHUNK)
    q += token * q_token + head * q_head
    read += token * read_token + head * read_head
    erase += token * erase_token + head * erase_head
    if write is not None:
        write += token * write_token + head * write_head
    rates, rate_stride = rates_at(log_decay, own, token, head, decay_token, decay_head, cu_seqlens, PER_TOKEN)

    erased = tl.zeros((CHUNK, CHUNK), tl.float32)
    query_erase, query_write, read_write = erased, erased, erased
    for first in range(0, WIDTH, SLICE):
        channels = first + tl.arange(0, SLICE)
        rs = tile(read, rows[:, None], read_token, channels[None, :], count, X).to(OPERAND)
        es = tile(erase, rows[None, :], erase_token, channels[:, None], count, X).to(OPERAND)
        if PER_CHANNEL:
            qs = tile(q, rows[:, None], q_token, channels[None, :], count, X).to(OPERAND)
            now, _ = fades(rates, rate_stride, rows[:, None], channels[None, :], count, X)
            now_turned, later = fades(rates, rate_stride, rows[None, :], channels[:, None], count, X)
            erased = _scores(rs, es, now, now_turned, later, rows, erased, False, LEVELS, PRECISION)
            query_erase = _scores(qs, es, now, now_turned, later, rows, query_erase, True, LEVELS, PRECISION)
            if write is not None:
                ks = tile(write, rows[None, :], write_token, channels[:, None], count, X).to(OPERAND)
                query_write = _scores(qs, ks, now, now_turned, later, rows, query_write, True, LEVELS, PRECISION)
                read_write = _scores(rs, ks, now, now_turned, later, rows, read_write, False, LEVELS, PRECISION)
        else:
            erased = tl.dot(rs, es, erased, input_precision=PRECISION)
    if not PER_CHANNEL:
        sums, _ = running(rates, decay_token, rows, count, PER_TOKEN)
        erased *= weights(sums, rows[:, None] > rows[None, :], False)
    if beta is not None:
        erased *= _betas(beta, token, head, beta_token, beta_head, rows, count)[None, :]

    inside = rows[:, None] < count
    spots = matrices + (token * HEADS + head) * CHUNK + rows[:, None] * (HEADS * CHUNK) + rows[None, :]
    each = tokens.to(tl.int64) * (HEADS * CHUNK)
    tl.store(spots + INVERSE * each, _inverse(erased, CHUNK, EXACT), mask=inside)
    if PER_CHANNEL:
        tl.store(spots + QUERY_ERASE * each, query_erase, mask=inside)
        if write is not None:
            tl.store(spots + QUERY_WRITE * each, query_write, mask=inside)
            tl.store(spots + READ_WRITE * each, read_write, mask=inside)


@triton.jit
def _initial(  # type: ignore[no-untyped-def]
    state, before, between, own, slot, order, head, places, inside, wide, wide_stride, columns, columns_stride,
    before_document, before_head, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The state before a piece, which is given as zeros."""
    if between is not None:
        if order > 0:
            at = ((slot + order - 1).to(tl.int64) * HEADS + head) * SIZE
            state = tl.load(between + at + places, mask=inside, other=0.0)
    if before is not None:
        if order == 0:
            spots = before + own.to(tl.int64) * before_document + head * before_head
            spots += wide * wide_stride + columns * columns_stride
            state = tl.load(spots, mask=inside, other=0.0).to(tl.float32)
    return state


@triton.jit
def _at(base, token, head, token_stride, head_stride, rows, columns, count, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile of a tensor at a chunk's first token."""
    return tile(base + token * token_stride + head * head_stride, rows, token_stride, columns, count, WIDTH)


@triton.jit
def _betas(beta, token, head, token_stride, head_stride, rows, count):  # type: ignore[no-untyped-def]
    spots = beta + token * token_stride + head * head_stride + rows * token_stride
    return tl.load(spots, mask=rows < count, other=0.0).to(tl.float32)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    readers, writers, now, now_turned, later, rows, total,
    OWN: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + Σ_c reader_ic writer_jc e^{L_ic - L_jc} for j < i, for j = i if OWN; writers are (channels, tokens)."""
    if tl.min(tl.sum(now, 0)) > -SAFE:
        begin, begin_turned = since(now, rows.shape[0], 0), since(now_turned, rows.shape[0], 1)
        faded = tl.dot(readers * begin, writers / begin_turned, input_precision=PRECISION)
        seen = rows[:, None] >= rows[None, :] if OWN else rows[:, None] > rows[None, :]
        total += tl.where(seen, faded, 0.0)
    else:
        for level in tl.static_range(LEVELS):
            faded = tl.dot(
                readers * since(now, 1 << level, 0), writers * until(later, 1 << level, 1), input_precision=PRECISION
            )
            total += tl.where(parted(rows, 1 << level, False), faded, 0.0)
        if OWN:
            plain = tl.dot(readers, writers, input_precision=PRECISION)
            total += tl.where(rows[:, None] == rows[None, :], plain, 0.0)
    return total


@triton.jit
def _inverse(lower, CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(1 + lower)⁻¹ of a strictly lower triangle: blocks of 16 row by row, then pairs of blocks by products."""
    at, rows = tl.arange(0, CHUNK // 16), tl.arange(0, 16)
    own = (at[:, None] == at[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(lower, (CHUNK // 16, 16, CHUNK // 16, 16)), 0.0), 2)
    solved = tl.where((rows[:, None] == rows[None, :])[None], 1.0, tl.zeros(blocks.shape, tl.float32))
    for i in range(1, 16):
        here = (rows == i)[None, :, None]
        factors = tl.sum(tl.where(here, blocks, 0.0), 1)
        known = tl.sum(factors[:, :, None] * solved, 1)
        solved = tl.where(here, solved - known[:, None, :], solved)
    inverse = tl.reshape(tl.where(own, solved[:, :, None, :], 0.0), (CHUNK, CHUNK))
    if CHUNK > 16:
        inverse = _merged(inverse, lower, 16, PRECISION)
    if CHUNK > 32:
        inverse = _merged(inverse, lower, 32, PRECISION)
    return inverse


@triton.jit
def _merged(inverse, lower, HALF: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """[[a, 0], [b, d]]⁻¹ = [[a⁻¹, 0], [-d⁻¹ b a⁻¹, d⁻¹]], of all pairs of blocks of HALF rows at once."""
    rows = tl.arange(0, lower.shape[0])
    below = tl.where(parted(rows, HALF, False), lower, 0.0)
    across = tl.dot(inverse, below, input_precision=PRECISION)
    return inverse - tl.dot(across, inverse, input_precision=PRECISION)


# fmt: off
@triton.jit(do_not_specialize=["documents", "time", "piece", "tokens", "decay_token", "decay_head"])
def solve(  # type: ignore[no-untyped-def]
    read, erase, write, values, reader, beta, log_decay, matrices, solved, y, before, between, transitions, after,
    cu_seqlens, ends, document, documents, time, piece, tokens,
    read_token, read_head, erase_token, erase_head, write_token, write_head, values_token, values_head,
    reader_token, reader_head, beta_token, beta_head, decay_token, decay_head,
    before_document, before_head, before_k, before_v,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr,
):
    # fmt: on
    """One piece, head and block of value columns; with transitions, only what the piece makes of a state.

    before, between, after  states of documents, after pieces, and of documents at the end
    between, transitions    to be filled, where the latter is given: what becomes of zeros, and of the unit matrix
    """
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    ALL: tl.constexpr = BLOCKS if transitions is None else BLOCKS + (K + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, number = program % ALL, (program // ALL) % HEADS, program // (ALL * HEADS)
    head = head.to(tl.int64)
    own = find_piece(number, document, cu_seqlens, time, piece)
    if own >= documents:
        return
    start, length, pieces, slot = find_document(own, cu_seqlens, ends, time, piece)
    index = number - slot - own
    order = pieces - 1 - index if REVERSE else index
    if transitions is not None:
        if order == pieces - 1:
            return
    size = tl.minimum(piece, length - index * piece)
    rows, wide, columns = tl.arange(0, CHUNK), tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    places, inside = wide[:, None] * V + columns[None, :], (wide < K)[:, None] & (columns < V)[None, :]
    unit = columns - BLOCKS * BLOCK
    state = tl.zeros((WIDTH, BLOCK), tl.float32)
    if transitions is not None:
        state = tl.where(wide[:, None] == unit[None, :], 1.0, state)
    else:
        state = _initial(
            state, before, between, own, slot, order, head, places, inside, wide[:, None], before_k,
            columns[None, :], before_v, before_document, before_head, HEADS, K * V,
        )  # fmt: skip

    for step in range(tl.cdiv(size, CHUNK)):
        chunk = tl.cdiv(size, CHUNK) - 1 - step if REVERSE else step
        token, count = start + index * piece + chunk * CHUNK, size - chunk * CHUNK
        rs = _at(read, token, head, read_token, read_head, rows[:, None], wide[None, :], count, K)
        es = _at(erase, token, head, erase_token, erase_head, rows[None, :], wide[:, None], count, K)
        vs = _at(values, token, head, values_token, values_head, rows[:, None], columns[None, :], count, V)
        rs, es, near = rs.to(OPERAND), es.to(OPERAND), vs.to(OPERAND)
        rates, rate_stride = rates_at(log_decay, own, token, head, decay_token, decay_head, cu_seqlens, PER_TOKEN)
        if PER_CHANNEL:
            into, left, last = _channel_fades(rates, rate_stride, rows, wide, count, K, REVERSE)
            seen = 0
        else:
            sums, total = running(rates, decay_token, rows, count, PER_TOKEN)
            into = tl.exp((total - sums if REVERSE else sums).to(tl.float32))
            left = tl.exp((sums if REVERSE else total - sums).to(tl.float32))
            last = tl.exp(total.to(tl.float32))
            visible = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
            seen = weights(sums, visible, REVERSE)
        base = matrices + (token * HEADS + head) * CHUNK
        each = tokens.to(tl.int64) * (HEADS * CHUNK)

        known = _far(rs, state, into, PER_CHANNEL, OPERAND, EXACT, SPLIT)
        if write is not None:
            ks = _at(write, token, head, write_token, write_head, rows[None, :], wide[:, None], count, K)
            ks = ks.to(OPERAND)
            scores = _near(
                rs, ks, seen, base + (QUERY_ERASE if REVERSE else READ_WRITE) * each, rows, count,
                HEADS, REVERSE, REVERSE, PER_CHANNEL, PRECISION,
            )  # fmt: skip
            known = tl.dot(scores, vs.to(tl.float32), known, input_precision=EXACT)
        else:
            known = vs.to(tl.float32) - known
        if beta is not None:
            betas = _betas(beta, token, head, beta_token, beta_head, rows, count)[:, None]
            if REVERSE:
                known *= betas
        inverse = _matrix(base + INVERSE * each, rows, count, HEADS, REVERSE)
        found = tl.dot(inverse, known, input_precision=EXACT)
        here = (token * HEADS + head) * V + rows[:, None] * (HEADS * V) + columns[None, :]
        stored = (rows < count)[:, None] & (columns < V)[None, :]
        if solved is not None:
            tl.store(solved + here, found, mask=stored)
        if y is not None:
            if reader is None:
                tl.store(y + here, found.to(y.dtype.element_ty), mask=stored)

        change = found if write is None else -found
        if beta is not None:
            if not REVERSE:
                change *= betas
        if reader is not None:
            qs = _at(reader, token, head, reader_token, reader_head, rows[:, None], wide[None, :], count, K)
            qs = qs.to(OPERAND)
            out = _far(qs, state, into, PER_CHANNEL, OPERAND, PRECISION, SPLIT)
            scores = _near(
                qs, es, seen, base + (READ_WRITE if REVERSE else QUERY_ERASE) * each, rows, count,
                HEADS, REVERSE, not REVERSE, PER_CHANNEL, PRECISION,
            )  # fmt: skip
            out = product(scores.to(OPERAND), change, out, OPERAND, PRECISION, SPLIT)
            if write is not None:
                scores = _near(
                    qs, ks, seen, base + QUERY_WRITE * each, rows, count, HEADS, REVERSE, True, PER_CHANNEL, PRECISION
                )
                out = tl.dot(scores.to(OPERAND), near, out, input_precision=PRECISION)
            tl.store(y + here, out.to(y.dtype.element_ty), mask=stored)
        state *= last
        state = _left(es, change, left, state, PER_CHANNEL, OPERAND, EXACT, SPLIT)
        if write is not None:
            state = _left(ks, vs.to(tl.float32), left, state, PER_CHANNEL, OPERAND, EXACT, SPLIT)

    if transitions is not None:
        at = (slot + order).to(tl.int64) * HEADS + head
        tl.store(between + at * (K * V) + places, state, mask=inside)
        made = (wide < K)[:, None] & ((unit >= 0) & (unit < K))[None, :]
        tl.store(transitions + at * (K * K) + wide[:, None] * K + unit[None, :], state, mask=made)
    elif after is not None:
        if order == pieces - 1:
            tl.store(after + (own.to(tl.int64) * HEADS + head) * (K * V) + places, state, mask=inside)


@triton.jit
def _channel_fades(rates, stride, rows, channels, count, K: tl.constexpr, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """By what fades the state up to each row, (C, K), each column up to the end, (K, C), and the state, (K, 1).

    Backwards start and end are exchanged.
    """
    now, later = fades(rates, stride, rows[:, None], channels[None, :], count, K)
    now_turned, later_turned = fades(rates, stride, rows[None, :], channels[:, None], count, K)
    last = tl.exp(tl.sum(now_turned, 1))[:, None]
    if REVERSE:
        into, left = until(later, rows.shape[0], 0), since(now_turned, rows.shape[0], 1)
    else:
        into, left = since(now, rows.shape[0], 0), until(later_turned, rows.shape[0], 1)
    return into, left, last


@triton.jit
def _far(  # type: ignore[no-untyped-def]
    xs, state, into, PER_CHANNEL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr
):
    """What rows read of the state before the chunk."""
    zero = tl.zeros((xs.shape[0], state.shape[1]), tl.float32)
    if PER_CHANNEL:
        return product(xs * into, state, zero, OPERAND, PRECISION, SPLIT)
    else:
        return product(xs, state, zero, OPERAND, PRECISION, SPLIT) * into[:, None]


@triton.jit
def _left(  # type: ignore[no-untyped-def]
    columns, zs, left, state,
    PER_CHANNEL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The state with what columns leave for later chunks."""
    if PER_CHANNEL:
        return product(columns * left, zs, state, OPERAND, PRECISION, SPLIT)
    else:
        return product(columns, zs * left[:, None], state, OPERAND, PRECISION, SPLIT)


@triton.jit
def _near(  # type: ignore[no-untyped-def]
    xs, columns, seen, kept, rows, count,
    HEADS: tl.constexpr, REVERSE: tl.constexpr, OWN: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of rows against the columns of their chunk that they see, each token's own among them if OWN."""
    if PER_CHANNEL:
        return _matrix(kept, rows, count, HEADS, REVERSE)
    else:
        scores = tl.dot(xs, columns, input_precision=PRECISION) * seen
        return scores if OWN else tl.where(rows[:, None] == rows[None, :], 0.0, scores)


@triton.jit
def _matrix(base, rows, count, HEADS: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of a chunk's matrices."""
    if TURNED:
        return tile(base, rows[None, :], HEADS * rows.shape[0], rows[:, None], count, rows.shape[0])
    else:
        return tile(base, rows[:, None], HEADS * rows.shape[0], rows[None, :], count, rows.shape[0])


# fmt: off
@triton.jit(do_not_specialize=["time", "piece"])
def chain(  # type: ignore[no-untyped-def]
    before, between, transitions, cu_seqlens, ends, time, piece, before_document, before_head, before_k, before_v,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    BLOCK: tl.constexpr, EXACT: tl.constexpr,
):
    # fmt: on
    """A document's states after its pieces, in their order, in the place of what each makes of zeros."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, own = program % BLOCKS, (program // BLOCKS) % HEADS, program // (BLOCKS * HEADS)
    head = head.to(tl.int64)
    _, _, pieces, slot = find_document(own, cu_seqlens, ends, time, piece)
    wide, columns = tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    places, inside = wide[:, None] * V + columns[None, :], (wide < K)[:, None] & (columns < V)[None, :]
    state = tl.zeros((WIDTH, BLOCK), tl.float32)
    if before is not None:
        initial = before + own.to(tl.int64) * before_document + head * before_head
        initial += wide[:, None] * before_k + columns[None, :] * before_v
        state = tl.load(initial, mask=inside, other=0.0).to(tl.float32)
    for order in range(pieces - 1):
        at = (slot + order).to(tl.int64) * HEADS + head
        for first in range(0, K, SLICE):
            some = first + tl.arange(0, SLICE)
            moved = tile(transitions + at * (K * K), some[:, None], K, wide[None, :], K, K)
            spots = between + at * (K * V) + some[:, None] * V + columns[None, :]
            there = (some < K)[:, None] & (columns < V)[None, :]
            made = tl.dot(moved, state, tl.load(spots, mask=there, other=0.0), input_precision=EXACT)
            tl.store(spots, made, mask=there)
        tl.debug_barrier()  # what was stored is loaded by other threads
        state = tl.load(between + at * (K * V) + places, mask=inside, other=0.0)


# fmt: off
@triton.jit(do_not_specialize=["documents", "time", "piece", "tokens", "decay_token", "decay_head"])
def differentiate(  # type: ignore[no-untyped-def]
    x1, x2, w1, w2, z1, z2, p1, p2, y1, y2, beta, dbeta, partial, terms, anchors, dlog, log_decay,
    before, between, met, met_between, cu_seqlens, ends, document, documents, time, piece, tokens,
    x1_token, x1_head, x2_token, x2_head, w1_token, w1_head, w2_token, w2_head, z1_token, z1_head, z2_token, z2_head,
    p1_token, p1_head, p2_token, p2_head, beta_token, beta_head, decay_token, decay_head,
    before_document, before_head, before_k, before_v,
    HEADS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, ANCHOR: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr,
    PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):
    # fmt: on
    """One piece, head and block of key columns; the state, or its gradient, is (V, BLOCK) here."""
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, number = program % BLOCKS, (program // BLOCKS) % HEADS, program // (BLOCKS * HEADS)
    head = head.to(tl.int64)
    own = find_piece(number, document, cu_seqlens, time, piece)
    if own >= documents:
        return
    start, length, pieces, slot = find_document(own, cu_seqlens, ends, time, piece)
    index = number - slot - own
    order = pieces - 1 - index if REVERSE else index
    size = tl.minimum(piece, length - index * piece)
    rows, wide, columns = tl.arange(0, CHUNK), tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    places, inside = wide[:, None] + columns[None, :] * V, (wide < V)[:, None] & (columns < K)[None, :]
    state = tl.zeros((WIDTH, BLOCK), tl.float32)
    state = _initial(
        state, before, between, own, slot, order, head, places, inside, wide[:, None], before_v,
        columns[None, :], before_k, before_document, before_head, HEADS, K * V,
    )  # fmt: skip
    which, kept_columns, entries = columns, columns < K, K
    if not PER_CHANNEL:
        which, kept_columns, entries = block + tl.arange(0, 1), tl.arange(0, 1) < 1, BLOCKS
    owed = tl.zeros(which.shape, tl.float32)
    if REVERSE:
        if met_between is not None:
            if order > 0:
                at = ((slot + index).to(tl.int64) * HEADS + head) * (K * V)
                owed = _met(tl.load(met_between + at + places, mask=inside, other=0.0), state, PER_CHANNEL)
        if met is not None:
            if order == 0:
                at = (own.to(tl.int64) * HEADS + head) * (K * V)
                owed = _met(tl.load(met + at + places, mask=inside, other=0.0), state, PER_CHANNEL)

    for step in range(tl.cdiv(size, CHUNK)):
        chunk = tl.cdiv(size, CHUNK) - 1 - step if REVERSE else step
        since_start = index * piece + chunk * CHUNK
        token, count = start + since_start, size - chunk * CHUNK
        anchor = anchors + (token // ANCHOR * HEADS + head) * (K * V) + places if anchors is not None else None
        anchored = (since_start % ANCHOR == 0) & (since_start > 0)
        if anchors is not None and not REVERSE:
            if anchored:
                tl.store(anchor, state, mask=inside)
        x1s = _at(x1, token, head, x1_token, x1_head, rows[:, None], wide[None, :], count, V).to(tl.float32)
        w1s = _at(w1, token, head, w1_token, w1_head, rows[None, :], wide[:, None], count, V).to(tl.float32)
        z1s = _at(z1, token, head, z1_token, z1_head, rows[:, None], columns[None, :], count, K).to(tl.float32)
        if beta is not None:
            betas = _betas(beta, token, head, beta_token, beta_head, rows, count)[:, None]
            if not REVERSE:
                z1s *= betas
        rates, rate_stride = rates_at(log_decay, own, token, head, decay_token, decay_head, cu_seqlens, PER_TOKEN)
        if PER_CHANNEL:
            now, later = fades(rates, rate_stride, rows[:, None], columns[None, :], count, K)
            into, left, last = since(now, CHUNK, 0), until(later, CHUNK, 0), tl.exp(tl.sum(now, 0))[None, :]
            seen = rows[:, None] < rows[None, :] if REVERSE else rows[:, None] > rows[None, :]
        else:
            sums, total = running(rates, decay_token, rows, count, PER_TOKEN)
            into, left = tl.exp(sums.to(tl.float32))[:, None], tl.exp((total - sums).to(tl.float32))[:, None]
            last = tl.exp(total.to(tl.float32))
            seen = weights(sums, rows[:, None] < rows[None, :] if REVERSE else rows[:, None] > rows[None, :], REVERSE)
            now, later = 0, 0
        if REVERSE:
            into, left = left, into

        near, own1 = _pair(x1s, w1s, z1s, seen, into, now, later, rows, LEVELS, REVERSE, PER_CHANNEL, PRECISION)
        out1 = into * tl.dot(x1s, state, input_precision=PRECISION) + near
        if x2 is not None:
            x2s = _at(x2, token, head, x2_token, x2_head, rows[:, None], wide[None, :], count, V).to(tl.float32)
            near, own2 = _pair(x2s, w1s, z1s, seen, into, now, later, rows, LEVELS, REVERSE, PER_CHANNEL, PRECISION)
            out2 = into * tl.dot(x2s, state, input_precision=PRECISION) + near
        state = state * last + tl.dot(w1s, z1s * left, input_precision=EXACT)
        if w2 is not None:
            w2s = _at(w2, token, head, w2_token, w2_head, rows[None, :], wide[:, None], count, V).to(tl.float32)
            z2s = _at(z2, token, head, z2_token, z2_head, rows[:, None], columns[None, :], count, K).to(tl.float32)
            near, alone = _pair(x1s, w2s, z2s, seen, into, now, later, rows, LEVELS, REVERSE, PER_CHANNEL, PRECISION)
            out1 -= near
            if not REVERSE:
                own1 -= alone
            if x2 is not None:
                near, _ = _pair(x2s, w2s, z2s, seen, into, now, later, rows, LEVELS, REVERSE, PER_CHANNEL, PRECISION)
                out2 -= near
            state -= tl.dot(w2s, z2s * left, input_precision=EXACT)

        p1s = _at(p1, token, head, p1_token, p1_head, rows[:, None], columns[None, :], count, K)
        read_now = p1s.to(tl.float32) * out1
        if beta is not None:
            if REVERSE:
                read_now *= betas
        spots = (token * HEADS + head) * K + rows[:, None] * (HEADS * K) + columns[None, :]
        stored = (rows < count)[:, None] & (columns < K)[None, :]
        out1 += own1
        if dbeta is not None:
            at = (block.to(tl.int64) * tokens + token) * HEADS + head + rows * HEADS
            tl.store(dbeta + at, tl.sum(p1s.to(tl.float32) * out1, 1), mask=rows < count)
            out1 = out1 * betas + tl.load(partial + spots, mask=stored, other=0.0)
        tl.store(y1 + spots, out1.to(y1.dtype.element_ty), mask=stored)
        if x2 is not None:
            p2s = _at(p2, token, head, p2_token, p2_head, rows[:, None], columns[None, :], count, K)
            read_now -= p2s.to(tl.float32) * out2
            if REVERSE:
                out2 += own2
            tl.store(y2 + spots, (-out2).to(y2.dtype.element_ty), mask=stored)
        if terms is not None:
            if not PER_CHANNEL:
                read_now = tl.sum(read_now, 1)[:, None]
            spots = (token * HEADS + head) * entries + rows[:, None] * (HEADS * entries) + which[None, :]
            stored = (rows < count)[:, None] & kept_columns[None, :]
            if REVERSE:
                read_now = tl.load(terms + spots, mask=stored, other=0.0) - read_now
                tl.store(dlog + spots, owed[None, :] + tl.cumsum(read_now, 0, reverse=True), mask=stored)
                owed += tl.sum(read_now, 0)
                if anchored:
                    owed = _met(tl.load(anchor, mask=inside, other=0.0), state, PER_CHANNEL)
            else:
                tl.store(terms + spots, read_now, mask=stored)


@triton.jit
def _pair(  # type: ignore[no-untyped-def]
    xs, ws, zs, seen, into, now, later, rows,
    LEVELS: tl.constexpr, REVERSE: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What rows x read of the other tokens of the chunk, and of their own."""
    scores = tl.dot(xs, ws, input_precision=PRECISION)
    alone = tl.sum(tl.where(rows[:, None] == rows[None, :], scores, 0.0), 1)
    near = _weighed(scores, zs, seen, into, now, later, rows, LEVELS, REVERSE, PER_CHANNEL, PRECISION)
    return near, alone[:, None] * zs


@triton.jit
def _weighed(  # type: ignore[no-untyped-def]
    scores, zs, seen, into, now, later, rows,
    LEVELS: tl.constexpr, REVERSE: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_j scores_ij e^{-|L_i - L_j|} z_j over the other tokens that row i sees."""
    if PER_CHANNEL:
        if tl.min(tl.sum(now, 0)) > -SAFE:
            near = tl.dot(tl.where(seen, scores, 0.0), zs / into, input_precision=PRECISION) * into
        else:
            near = weighed(scores, zs, now, later, rows, LEVELS, REVERSE, PRECISION)
        return near
    else:
        return tl.dot(scores * seen, zs, input_precision=PRECISION)


@triton.jit
def _met(kept, state, PER_CHANNEL: tl.constexpr):  # type: ignore[no-untyped-def]
    """S · G, channel by channel or of all in the block: (BLOCK,) or (1,)."""
    each = tl.sum(kept * state, 0)
    if PER_CHANNEL:
        return each
    else:
        return tl.sum(each, 0, keep_dims=True)
