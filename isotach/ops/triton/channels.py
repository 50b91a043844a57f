"""One decay per channel inside a chunk, where weights e^{L_i - L_j} do not come out of sums over channels.

The chunk is halved, and each half again, down to single tokens. What tokens of a second half read of a first half is
measured from the boundary between them: neither factor of e^{L_i - L_boundary} · e^{L_boundary - L_j} exceeds 1,
whatever the decay. Every pair of tokens is parted at one level, so a weighed product is one product per level. Sums of
log_decay reach from the boundary to the token and no further: nothing that is large is subtracted.
"""

import triton
import triton.language as tl

from isotach.ops.triton.arithmetic import tile


@triton.jit
def rates_at(log_decay, own, token, head, decay_token, decay_head, cu_seqlens, PER_TOKEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a chunk's log_decay begins, and how far tokens are apart there."""
    log_decay += head * decay_head
    far = decay_token
    if PER_TOKEN:
        log_decay += token * decay_token
    else:
        far = decay_token * 0
        if cu_seqlens is None:
            log_decay += own.to(tl.int64) * decay_token
    return log_decay, far


@triton.jit
def fades(rates, stride, rows, channels, count, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """log_decay of each token and of the next; as rows and channels lie."""
    return (
        tile(rates, rows, stride, channels, count, WIDTH).to(tl.float32),
        tile(rates + stride, rows, stride, channels, count - 1, WIDTH).to(tl.float32),
    )


@triton.jit
def since(now, HALF: tl.constexpr, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """e^{log_decay summed from the begin of each block of HALF tokens, which lie along AXIS, up to each token}."""
    if AXIS == 0:
        blocks = tl.reshape(now, (now.shape[0] // HALF, HALF, now.shape[1]))
    else:
        blocks = tl.reshape(now, (now.shape[0], now.shape[1] // HALF, HALF))
    return tl.exp(tl.reshape(tl.cumsum(blocks, 1 + AXIS), now.shape))


@triton.jit
def until(later, HALF: tl.constexpr, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same from after each token to the end of its block, of what `fades` has of the next tokens."""
    inner = tl.arange(0, HALF) < HALF - 1
    if AXIS == 0:
        blocks = tl.reshape(later, (later.shape[0] // HALF, HALF, later.shape[1]))
        blocks = tl.where(inner[None, :, None], blocks, 0.0)
    else:
        blocks = tl.reshape(later, (later.shape[0], later.shape[1] // HALF, HALF))
        blocks = tl.where(inner[None, None, :], blocks, 0.0)
    return tl.exp(tl.reshape(tl.cumsum(blocks, 1 + AXIS, reverse=True), later.shape))


@triton.jit
def parted(rows, HALF: tl.constexpr, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which pairs (reader, writer) of tokens stand in two halves of a block of 2 HALF; REVERSE reads from the first."""
    block, late = rows // (2 * HALF), rows // HALF % 2 == 1
    reads = ~late if REVERSE else late
    return (block[:, None] == block[None, :]) & reads[:, None] & ~reads[None, :]


@triton.jit
def weighed(  # type: ignore[no-untyped-def]
    scores, columns, now, later, rows, LEVELS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr
):
    """Σ_j scores_ij e^{L_i - L_j} columns_jc over j < i; backwards j > i and e^{L_j - L_i}."""
    total = tl.zeros(columns.shape, tl.float32)
    for level in tl.static_range(LEVELS):
        early, late = until(later, 1 << level, 0), since(now, 1 << level, 0)
        of_reader, of_writer = (early, late) if REVERSE else (late, early)
        near = tl.where(parted(rows, 1 << level, REVERSE), scores, 0.0)
        total += of_reader * tl.dot(near, columns * of_writer, input_precision=PRECISION)
    return total
