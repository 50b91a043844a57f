"""How kernels share out a call's tokens: documents → pieces, one program per piece, head and block of value channels.

    tokens    |---------- document 0 ----------|- doc 1 -|------ document 2 ------|
    pieces    |--- 0 ---|--- 1 ---|---- 2 -----|--- 3 ---|---- 4 ----|---- 5 -----|

A program sweeps its piece chunk by chunk and keeps the state on chip; only what passes between the pieces of a document
goes through memory. Documents are cut where batch and heads alone would leave processors idle. A document without
tokens is one piece.

The host knows how many tokens and documents there are, not where a pack's documents begin: it starts as many programs
as any bounds can need, and those that find no piece stop at once. So nothing waits for the device, and no length is
compiled in.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops.triton.device import processors
from isotach.ops.triton.layout import sides

# Reasoned, not measured.
PROGRAMS = 2  # that a processor should have
CHAINED = 1024  # numbers of a state that one program chains
SHORTEST = 1024  # tokens of a piece: the states between take as much memory traffic as its rows where K = V = 128


class Pieces(NamedTuple):
    """A call's pieces.

    documents   how many: rows, or those of a pack
    limit       of programs that find every piece
    between     of pieces that others of their document follow, at most
    tokens      of a piece, but for a document's last
    time        of a row
    cu_seqlens  (documents + 1,), or None where documents are rows
    ends        (documents,) pieces up to the end of each document; None where no document is cut, or all are alike
    document    (limit,) that each piece belongs to, `documents` where there is no such piece; None where ends is
    """

    documents: int
    limit: int
    between: int
    tokens: int
    time: int
    cu_seqlens: Tensor | None
    ends: Tensor | None = None
    document: Tensor | None = None


def cut(batch: int, time: int, cu_seqlens: Tensor | None, *, programs: int, chunk: int, device: torch.device) -> Pieces:
    """Pieces of whole chunks, for sweeps with `programs` programs per piece, so many that every processor has work."""
    packed, wanted, there = cu_seqlens is not None, 1, processors(device)
    least = max(1, programs * (1 if packed else batch))  # a pack may be one long document
    if least < there:
        wanted = triton.cdiv(PROGRAMS * there, least)
    tokens = triton.cdiv(max(SHORTEST, triton.cdiv(time, wanted)), chunk) * chunk
    return divide(batch, time, cu_seqlens, tokens=tokens, device=device)


def divide(batch: int, time: int, cu_seqlens: Tensor | None, *, tokens: int, device: torch.device) -> Pieces:
    """Pieces of so many tokens."""
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if tokens >= time:
        return Pieces(documents, documents, 0, tokens, time, cu_seqlens)
    if cu_seqlens is None:
        each = triton.cdiv(time, tokens)
        return Pieces(documents, batch * each, batch * (each - 1), tokens, time, None)
    between = time // tokens
    ends = (cu_seqlens.diff() + (tokens - 1)).div(tokens, rounding_mode="floor").clamp_min(1).cumsum(0)
    every = torch.arange(documents + between, device=device)
    document = torch.searchsorted(ends, every, right=True)
    return Pieces(documents, len(every), between, tokens, time, cu_seqlens, ends, document)


@triton.jit
def find_piece(number, document, cu_seqlens, time, piece):  # type: ignore[no-untyped-def]
    """The document that a piece belongs to."""
    if document is not None:
        own = tl.load(document + number).to(tl.int32)
    elif cu_seqlens is not None:
        own = number
    else:
        own = number // tl.maximum(tl.cdiv(time, piece), 1)
    return own


@triton.jit
def find_document(own, cu_seqlens, ends, time, piece):  # type: ignore[no-untyped-def]
    """A document's first token, how many tokens and pieces it has, and the slot of the state after its first piece.

    A document of p pieces has p - 1 slots, so its first piece is number slot + own.
    """
    if cu_seqlens is None:
        start, length = own.to(tl.int64) * time, time
    else:
        start = tl.load(cu_seqlens + own)
        length = (tl.load(cu_seqlens + own + 1) - start).to(tl.int32)
    pieces = tl.maximum(tl.cdiv(length, piece), 1)
    if ends is not None:
        slot = tl.load(ends + own).to(tl.int32) - pieces - own
    elif cu_seqlens is not None:
        slot = own * 0
    else:
        slot = own * (pieces - 1)
    return start, length, pieces, slot


# fmt: off
@triton.jit(do_not_specialize=["time", "piece"])
def _chain(  # type: ignore[no-untyped-def]
    before, between, totals, cu_seqlens, ends, time, piece, before_document, before_head, before_x, before_z,
    HEADS: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    # fmt: on
    """A document's states after its pieces, in their order, in the place of what each adds to a state of zeros."""
    BLOCKS: tl.constexpr = (X * Z + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, own = program % BLOCKS, (program // BLOCKS) % HEADS, program // (BLOCKS * HEADS)
    _, _, pieces, slot = find_document(own, cu_seqlens, ends, time, piece)
    places = block * BLOCK + tl.arange(0, BLOCK)
    inside = places < X * Z
    state = tl.zeros((BLOCK,), tl.float32)
    if before is not None:
        if pieces > 1:
            at = own.to(tl.int64) * before_document + head * before_head
            spots = before + at + places // Z * before_x + places % Z * before_z
            state = tl.load(spots, mask=inside, other=0.0).to(tl.float32)
    for order in range(pieces - 1):
        at = (slot + order).to(tl.int64) * HEADS + head
        added = tl.load(between + at * (X * Z) + places, mask=inside, other=0.0)
        if PER_CHANNEL:
            total = tl.load(totals + at * X + places // Z, mask=inside, other=0.0)
        else:
            total = tl.load(totals + at)
        state = state * tl.exp(total) + added
        tl.store(between + at * (X * Z) + places, state, mask=inside)


def chain(pieces: Pieces, before: Tensor | None, between: Tensor, totals: Tensor) -> None:
    """States after pieces into `between` (·, H, X, Z), from what each adds and `totals` (·, H) or (·, H, X) of its
    log_decay; `before` is of documents."""
    _, heads, wide, columns = between.shape
    _chain[(pieces.documents * heads * triton.cdiv(wide * columns, CHAINED),)](
        before, between, totals, pieces.cu_seqlens, pieces.ends, pieces.time, pieces.tokens, *sides(before),
        HEADS=heads, X=wide, Z=columns, BLOCK=CHAINED, PER_CHANNEL=totals.dim() == 3,
    )  # fmt: skip
