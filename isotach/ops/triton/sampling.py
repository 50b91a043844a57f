"""Draws fused with the output projection on a GPU: logits live in registers, tile by tile (isotach/ops/sampling.py).

Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU.

    _tiles   one program per tile of the vocabulary and block of rows: the product, then tilt, noise and the largest
    _whole   one program per row and sample: the largest of the tiles, and the row's mass

Weights are read once from memory; rows beyond one block are taken by neighbouring programs, while the tile is in the
cache. What passes between the two kernels is 12 bytes per tile, row and sample. Four tokens share a Philox counter, so
a tile is split into four quarters, one per word, and begins at a multiple of four ids. No atomics; every sum has one
order; nothing waits for the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops.sampling import Drawn, Key, Tilt
from isotach.ops.triton import device
from isotach.ops.triton.arithmetic import OPERANDS

COLDEST = tl.constexpr(1e-6)  # as in isotach.ops.sampling, which a test compares
LARGEST = tl.constexpr(1 - 2.0**-24)


class Config(NamedTuple):
    """rows, tokens: of a program's tile; step: channels at a time; warps, stages, registers: Triton's num_warps,
    num_stages and maxnreg; shared: bytes of fast memory, as compiled for Hopper.
    """

    rows: int
    tokens: int
    step: int
    warps: int
    stages: int
    registers: int
    shared: int


# By bytes of a weight and the rows that there are, at most. In 16 bits two programs or three fit a processor, so that
# one reads weights while another adds noise; for that, the two configurations of most rows spill some registers behind
# the product, 444 and 1,500 bytes a thread. Reasoned from what the compiler reports, not measured.
CONFIGS = {
    (2, 16): Config(16, 128, 64, 4, 5, 168, 72 << 10),
    (2, 32): Config(32, 128, 64, 4, 5, 255, 80 << 10),
    (2, 64): Config(64, 128, 64, 8, 4, 128, 96 << 10),
    (2, None): Config(128, 128, 64, 8, 3, 128, 96 << 10),
    (4, 16): Config(16, 64, 32, 4, 4, 255, 30 << 10),
    (4, None): Config(32, 64, 32, 4, 3, 255, 24 << 10),
}


# fmt: off
@triton.jit(do_not_specialize=["rows", "count", "start", "tiles", "samples"])
def _tiles(  # type: ignore[no-untyped-def]
    hidden, weight, seed, position, number, temperature, bias, seen, penalty, score, token, value, mass,
    rows, count, start, tiles, samples, hidden_row, weight_row, bias_row, seen_row,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """score, token, value (rows, samples, tiles) and mass (rows, tiles) of one tile; value is l / τ of the token."""
    blocks = tl.cdiv(rows, ROWS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, place = block * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    there = row < rows
    first = start // 4 * 4 + tile * TOKENS
    own = first - start + place  # of the weights given
    valid = (own >= 0) & (own < count)
    own = tl.minimum(tl.maximum(own, 0), count - 1)

    logits = tl.zeros((ROWS, TOKENS), tl.float32)
    lefts = hidden + row[:, None] * hidden_row
    rights = weight + own.to(tl.int64)[None, :] * weight_row
    for k in range(0, DEPTH, STEP):
        channel = k + tl.arange(0, STEP)
        if DEPTH % STEP == 0:
            left = tl.load(lefts + channel[None, :], mask=there[:, None], other=0.0)
            right = tl.load(rights + channel[:, None])
        else:
            left = tl.load(lefts + channel[None, :], mask=there[:, None] & (channel < DEPTH)[None, :], other=0.0)
            right = tl.load(rights + channel[:, None], mask=(channel < DEPTH)[:, None], other=0.0)
        logits = tl.dot(left, right, logits, input_precision=PRECISION)

    inside = there[:, None] & valid[None, :]
    wide = row.to(tl.int64)[:, None]
    if bias is not None:
        logits += tl.load(bias + wide * bias_row + own[None, :], mask=inside, other=0.0).to(tl.float32)
    if seen is not None:
        before = tl.load(seen + wide * seen_row + own[None, :], mask=inside, other=0) != 0
        rate = tl.load(penalty + row, mask=there, other=1.0).to(tl.float32)[:, None]
        logits = tl.where(before, tl.where(logits > 0, logits / rate, logits * rate), logits)
    logits = tl.where(valid[None, :], logits, -float("inf"))

    warmth = tl.load(temperature + row, mask=there, other=1.0).to(tl.float32)
    scale, softness = tl.where(warmth < COLDEST, 0.0, warmth), tl.where(warmth < COLDEST, 1.0, warmth)
    tl.store(mass + row * tiles + tile, _mass(logits, 1.0 / softness), mask=there)

    even, odd = tl.split(tl.reshape(logits, (ROWS, TOKENS // 4, 2, 2)))
    logits_0, logits_2 = tl.split(even)
    logits_1, logits_3 = tl.split(odd)
    quarter = tl.arange(0, TOKENS // 4)
    counter = (first // 4 + quarter).to(tl.uint32)[None, :]
    seeds = tl.load(seed + row, mask=there, other=0)[:, None]
    low, high = (seeds & 0xFFFFFFFF).to(tl.uint32), (seeds >> 32).to(tl.uint32)
    positions = tl.load(position + row, mask=there, other=0).to(tl.uint32)[:, None]
    numbers = tl.load(number + row, mask=there, other=0).to(tl.uint32)[:, None]
    for sample in range(samples):
        drawn = tl.full((1, 1), sample, tl.int32).to(tl.uint32)
        word_0, word_1, word_2, word_3 = tl.philox_impl(positions, numbers, drawn, counter, low, high)
        best, chosen = logits_0 + scale[:, None] * _gumbel(word_0), logits_0
        which = tl.zeros((ROWS, TOKENS // 4), tl.int32)
        best, chosen, which = _larger(best, chosen, which, logits_1, word_1, scale, 1)
        best, chosen, which = _larger(best, chosen, which, logits_2, word_2, scale, 2)
        best, chosen, which = _larger(best, chosen, which, logits_3, word_3, scale, 3)
        top, at = tl.max(best, 1, return_indices=True)
        hit = quarter[None, :] == at[:, None]
        spot = (row.to(tl.int64) * samples + sample) * tiles + tile
        tl.store(score + spot, top, mask=there)
        tl.store(token + spot, first + 4 * at + tl.sum(tl.where(hit, which, 0), 1), mask=there)
        tl.store(value + spot, tl.sum(tl.where(hit, chosen, 0.0), 1) / softness, mask=there)


@triton.jit
def _larger(best, chosen, which, logits, word, scale, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same with the tokens of another word; the smaller id among equals."""
    score = logits + scale[:, None] * _gumbel(word)
    better = score > best
    return tl.where(better, score, best), tl.where(better, logits, chosen), tl.where(better, NUMBER, which)


@triton.jit
def _gumbel(word):  # type: ignore[no-untyped-def]
    """-log(-log1p(-u)) with log1p from log: what 1 - u rounds away is put back as a factor (Kahan)."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, LARGEST)
    rest = 1.0 - u
    lost = 1.0 - rest  # exact
    exponential = tl.where(lost == 0.0, u, -tl.log(rest) * (u / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(exponential)


@triton.jit
def _mass(logits, sharpness):  # type: ignore[no-untyped-def]
    """log Σ e^{l / τ} of every row from l and 1 / τ: -inf of nothing but -inf, not a number where one is none."""
    peak = tl.max(logits, 1)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp((logits - peak[:, None]) * sharpness[:, None]), 1)
    return tl.where(total == 0.0, -float("inf"), peak * sharpness + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit(do_not_specialize=["rows", "tiles", "samples"])
def _whole(  # type: ignore[no-untyped-def]
    score, token, value, mass, whole_token, whole_logprob, whole_score, whole_mass, rows, tiles, samples,
    TILES: tl.constexpr,
):  # fmt: skip
    """Drawn of one row and sample; merge of isotach.ops.sampling in one pass."""
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, TILES)
    inside = place < tiles
    masses = tl.load(mass + row * tiles + place, mask=inside, other=-float("inf"))
    all_mass = tl.max(_mass(masses[None, :], tl.full((1,), 1.0, tl.float32)), 0)
    spot = (row * samples + sample) * tiles
    top, at = tl.max(tl.load(score + spot + place, mask=inside, other=-float("inf")), 0, return_indices=True)
    there = tl.abs(all_mass) < float("inf")
    logprob = tl.load(value + spot + at) - tl.where(there, all_mass, 0.0)
    out = row * samples + sample
    tl.store(whole_token + out, tl.where(there, tl.load(token + spot + at), -1).to(tl.int64))
    tl.store(whole_logprob + out, tl.where(there, logprob, -float("inf")))
    tl.store(whole_score + out, top)
    if sample == 0:
        tl.store(whole_mass + row, all_mass)


def sample(
    hidden: Tensor, weight: Tensor, key: Key, tilt: Tilt, *, samples: int = 1, start: int = 0
) -> Drawn:
    """isotach.ops.sampling.sample on a GPU. ValueError for what the kernels do not take."""
    if weight.dtype not in OPERANDS:
        raise ValueError(f"sample: expected weights of {[*OPERANDS]}; got {weight.dtype}; use backend='torch'")
    if refused := device.refusal(hidden.device, _config(weight, len(hidden)).shared):
        raise ValueError(f"sample: the triton backend {refused}; use backend='torch'")
    return Drawn(*_sample(hidden, weight, *key, *tilt, samples, start))


def _config(weight: Tensor, rows: int) -> Config:
    fitting = (config for (size, most), config in CONFIGS.items() if size == weight.itemsize and rows <= (most or rows))
    return next(fitting)


@torch.library.custom_op("isotach::sample_triton", mutates_args=())
def _sample(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    row: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    penalty: Tensor | None,
    samples: int,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of Drawn."""
    rows, config = len(hidden), _config(weight, len(hidden))
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden.to(weight.dtype), weight))
    tiles = triton.cdiv(len(weight) + start % 4, config.tokens)
    score, value = (hidden.new_empty((rows, samples, tiles), dtype=torch.float32) for _ in range(2))
    token, mass = torch.empty_like(score, dtype=torch.int32), hidden.new_empty((rows, tiles), dtype=torch.float32)
    drawn = _empty(hidden, samples)
    columns = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (bias, seen)]
    keys = (leaf.contiguous() for leaf in (seed, position, row, temperature))
    if rows and samples:
        with torch.cuda.device_of(hidden):
            _tiles[(tiles * triton.cdiv(rows, config.rows),)](
                hidden, weight, *keys, *columns, penalty if penalty is None else penalty.contiguous(),
                score, token, value, mass, rows, len(weight), start, tiles, samples,
                hidden.stride(0), weight.stride(0), *(_apart(x) for x in columns),
                DEPTH=hidden.shape[1], ROWS=config.rows, TOKENS=config.tokens, STEP=config.step,
                PRECISION=OPERANDS[weight.dtype].precision, num_warps=config.warps, num_stages=config.stages,
                maxnreg=config.registers,
            )  # fmt: skip
            _whole[(rows, samples)](
                score, token, value, mass, *drawn, rows, tiles, samples, TILES=triton.next_power_of_2(tiles)
            )
    return drawn


@_sample.register_fake
def _(hidden, weight, seed, position, row, temperature, bias, seen, penalty, samples, start):  # type: ignore[no-untyped-def]
    return _empty(hidden, samples)


def _empty(hidden: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token = hidden.new_empty((len(hidden), samples), dtype=torch.int64)
    logprob, score = (hidden.new_empty(token.shape, dtype=torch.float32) for _ in range(2))
    return token, logprob, score, hidden.new_empty(len(hidden), dtype=torch.float32)


def _apart(columns: Tensor | None) -> int:
    """How far the rows are apart; 0 where all share one."""
    return 0 if columns is None or len(columns) == 1 else columns.stride(0)
