"""Causal convolution by groups of stretches, each of which reaches those behind it through Fourier transforms.

    lags 0..63   a triangular matrix per channel and block of 64 tokens
    size 64      |--0--|--1--|--2--|--3--| of every group: 0 reaches 1, 2 and 3, 1 reaches 2 and 3, 2 reaches 3
    size 256     |-----------0-----------|-----------1-----------| ... and so on until a document is one group

One transform over everything would need fewer operations, but it mixes all tokens: later ones would change earlier
outputs by rounding, which grows with the largest of them. In groups no output is touched by a later token at all, and
channels are processed a few at a time, so that buffers stay in cache. Equal groups of all documents are one batch; an
earlier past is laid before its document. A stretch of m tokens is transformed with as many zeros beside it. With X_i
the transform of stretch i, M_d that of the lags between stretches d apart, G_i that of the gradients at stretch i:

    o_i = irfft(Σ_d M_d X_{i-d})        dx_i = irfft(Σ_d M_d* G_{i+d})        dkernel_d = irfft(Σ_i X_{i-d}* G_i)

The backward transforms the inputs again instead of keeping spectra, which are twice as large as they.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from isotach.ops.backends import no_second_derivative, register
from isotach.ops.recurrence import state_dtype
from isotach.ops.toeplitz import Toeplitz

# Measured: docs/log.md.
NEAR = 64  # lags that are a matrix product
BLOCK_ELEMENTS = 1 << 19  # inputs of the channels that are processed together ...
LINE = 16  # ... which are whole cache lines
RADIX = 4  # stretches of a group at most


@register(Toeplitz, "torch")
def toeplitz(
    rec: Toeplitz, x: Toeplitz.Inputs, s: Toeplitz.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Toeplitz.State]:
    """chunk_size has no meaning here."""
    past = rec.recent(s)
    output = convolution(x.v.flatten(2), rec.taps(x).flatten(1), past.flatten(2), cu_seqlens).view(x.v.shape)
    if cu_seqlens is None:
        return output, rec.apply(rec.summarize(x), s)
    return output, _after(rec, x.v[0], past, s.length, cu_seqlens)


def _after(rec: Toeplitz, v: Tensor, past: Tensor, before: Tensor, cu_seqlens: Tensor) -> Toeplitz.State:
    """The states of a pack: row n holds what is left of document n's past and then its tokens, to the buffer's end."""
    lengths, kept = cu_seqlens.diff(), past.shape[1]
    size = kept + int(lengths.max())
    size = min(size, rec.window or size)
    place = lengths[:, None] - torch.arange(size, 0, -1, device=v.device)  # in the document; negative in its past
    number = torch.arange(len(lengths), device=v.device)[:, None]
    index = torch.where(place < 0, len(v) + (number + 1) * kept + place, cu_seqlens[:-1, None] + place)
    index = index.masked_fill(place < -kept, len(v) + len(lengths) * kept)
    source = torch.cat([v, past.flatten(0, 1).to(v.dtype), torch.zeros_like(v[:1])])
    after, stop = before + lengths, torch.full_like(lengths, size)
    return Toeplitz.State(source[index], stop, after.clamp_max(rec.window) if rec.window else after, stop.clone())


@torch.library.custom_op("isotach::toeplitz", mutates_args=())
def convolution(v: Tensor, kernel: Tensor, past: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """v (B, T, C), kernel (L, C), past (N, S, C), all the oldest first -> (B, T, C)."""
    output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    layout = _layout(v, kernel, past, cu_seqlens)
    rows = layout.rows(v)
    for own in layout.channels(v.shape[2]):
        x, taps = layout.load(v, past, own, rows), layout.taps(kernel, own)
        y = torch.bmm(x, _triangles(taps))
        for level in layout.levels:
            spectra = level.spectra(taps)
            level.add(y, level.targets, level.products(torch.fft.rfft(level.take(x, level.sources)), spectra))
        layout.store(output, y, own)
    return output


@convolution.register_fake
def _(v, kernel, past, cu_seqlens):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


@torch.library.custom_op("isotach::toeplitz_backward", mutates_args=())
def _backward(
    grad: Tensor, v: Tensor, kernel: Tensor, past: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, kernel and past."""
    dv, dpast = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (v, past))
    dkernel = torch.zeros(kernel.shape, dtype=kernel.dtype, device=kernel.device)
    layout = _layout(v, kernel, past, cu_seqlens)
    rows, grad_rows = layout.rows(v), layout.rows(v)
    for own in layout.channels(v.shape[2]):
        x, taps = layout.load(v, past, own, rows), layout.taps(kernel, own)
        g = layout.load(grad, past[:, :0], own, grad_rows)
        dx, dtaps = torch.bmm(g, _triangles(taps).transpose(1, 2)), torch.zeros_like(taps)
        dtaps[:, :NEAR] = _diagonals(torch.bmm(x.transpose(1, 2), g))
        for level in layout.levels:
            given = torch.fft.rfft(level.take(g, level.targets))
            level.add_lags(dtaps, torch.fft.rfft(level.take(x, level.sources)), given)
            level.add(dx, level.sources, level.transposed(given, level.spectra(taps)))
        layout.store(dv, dx, own)
        layout.store_past(dpast, dx, own)
        lags = min(len(kernel), dtaps.shape[1])
        dkernel[len(kernel) - lags :, own] = dtaps[:, :lags].t().flip(0)
    return dv, dkernel, dpast


@_backward.register_fake
def _(grad, v, kernel, past, cu_seqlens):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), kernel.new_empty(kernel.shape), past.new_empty(past.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    return (*_backward(grad, *ctx.saved_tensors), None)


convolution.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("toeplitz", "torch"))


@dataclass(frozen=True, eq=False)
class _Level:
    """Groups of `radix` stretches of `size` tokens: the inputs of each reach the outputs of those behind it.

    Stretches are lists of blocks; beside each stands as much of the spare block, so that transforms do not wrap.
    """

    size: int
    radix: int
    sources: Tensor  # (groups, radix - 1, 2 size / NEAR) flat: the stretches but the last, then the spare block
    targets: Tensor  # likewise: the spare block, then the stretches but the first

    def take(self, x: Tensor, blocks: Tensor) -> Tensor:
        """(C, groups, radix - 1, 2 size) of x (C, blocks, NEAR)."""
        return x.index_select(1, blocks).view(len(x), -1, self.radix - 1, 2 * self.size)

    def add(self, y: Tensor, blocks: Tensor, spectra: Tensor) -> None:
        y.index_add_(1, blocks, torch.fft.irfft(spectra).view(len(y), -1, NEAR))

    def spectra(self, taps: Tensor) -> Tensor:
        """(C, 1, radix - 1, ·): of the lags between stretches that are 1, 2, ... apart."""
        return torch.fft.rfft(taps.unfold(1, 2 * self.size, self.size)[:, None, : self.radix - 1])

    def products(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Σ_d M_d X_{i-d} for the stretches but the first, of X for those but the last."""
        y = x * kernel[:, :, :1]
        for apart in range(1, self.radix - 1):
            y[:, :, apart:].addcmul_(x[:, :, :-apart], kernel[:, :, apart, None])
        return y

    def transposed(self, y: Tensor, kernel: Tensor) -> Tensor:
        """Σ_d M_d* G_{i+d} for the stretches but the last, of G for those but the first."""
        kernel = kernel.conj_physical()
        x = y * kernel[:, :, :1]
        for apart in range(1, self.radix - 1):
            x[:, :, :-apart].addcmul_(y[:, :, apart:], kernel[:, :, apart, None])
        return x

    def add_lags(self, dtaps: Tensor, x: Tensor, y: Tensor) -> None:
        """Add the gradient of the kernel, lag by lag; lag 0 of a transform belongs to no pair."""
        x = x.conj_physical()
        for apart in range(self.radix - 1):
            product = (x[:, :, : self.radix - 1 - apart] * y[:, :, apart:]).sum((1, 2))
            own = slice(apart * self.size + 1, (apart + 2) * self.size)
            dtaps[:, own] += torch.fft.irfft(product)[:, 1:]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Documents channel by channel, (C, blocks, NEAR): each one's past and tokens, begun on a block of its own.

    The last block is spare, zero in what is loaded and never stored; targets behind a document's end are there too.
    """

    blocks: int
    ahead: int  # places from a document's begin to its first token
    even: tuple[int, int] | None  # places and tokens of a document, where all are alike
    tokens: Tensor  # (B T,) where each token is laid
    past: Tensor  # (N S,) where each earlier input is
    levels: tuple[_Level, ...]

    def channels(self, width: int) -> list[slice]:
        """Groups of channels whose buffers stay in cache."""
        size = max(1, BLOCK_ELEMENTS // (self.blocks * NEAR * LINE)) * LINE
        return [slice(i, min(i + size, width)) for i in range(0, width, size)]

    def rows(self, v: Tensor) -> Tensor:
        """Memory for `load`, zero wherever no token and no past is laid."""
        width = self.channels(v.shape[2])[0].stop
        return v.new_zeros(self.blocks * NEAR, width, dtype=state_dtype(v))

    def load(self, v: Tensor, past: Tensor, own: slice, rows: Tensor) -> Tensor:
        rows = rows[:, : own.stop - own.start]
        if self.even is None:
            rows.index_copy_(0, self.tokens, v[0, :, own].to(rows.dtype))
        else:
            self._inside(rows, self.even).copy_(v[..., own].reshape(-1, self.even[1], rows.shape[1]))
        if past.shape[1]:
            rows.index_copy_(0, self.past, past[..., own].flatten(0, 1).to(rows.dtype))
        return _turned(rows)

    def store(self, v: Tensor, y: Tensor, own: slice) -> None:
        rows = y.permute(1, 2, 0).contiguous().flatten(0, 1)
        if self.even is None:
            v[0, :, own] = rows[self.tokens]
        else:
            v.view(-1, self.even[1], v.shape[2])[..., own] = self._inside(rows, self.even)

    def store_past(self, past: Tensor, y: Tensor, own: slice) -> None:
        past[..., own] = y.flatten(1).t()[self.past].view(*past.shape[:2], len(y))

    def _inside(self, rows: Tensor, even: tuple[int, int]) -> Tensor:
        """The tokens of even documents (N, T, C) among their places (N P, C) and the spare block's."""
        places, time = even
        return rows[:-NEAR].view(-1, places, rows.shape[1])[:, self.ahead : self.ahead + time]

    def taps(self, kernel: Tensor, own: slice) -> Tensor:
        """The kernel channel by channel and by lag, (C, lags), zero behind its end."""
        reach = max([NEAR, *(level.radix * level.size for level in self.levels)])
        kernel = kernel[-reach:, own].flip(0).to(state_dtype(kernel))
        return _turned(F.pad(kernel, (0, 0, 0, reach - len(kernel)))).flatten(1)


def _turned(rows: Tensor) -> Tensor:
    """(places, C) as (C, blocks, NEAR). Torch turns rows that lie side by side five times as fast as a slice of wider
    ones, and blocks of them twice as fast as all at once.
    """
    return rows.unflatten(0, (-1, NEAR)).permute(2, 0, 1).contiguous()


def _triangles(taps: Tensor) -> Tensor:
    """(C, NEAR, NEAR): what block input j adds to block output i is taps[i - j]."""
    return F.pad(taps[:, :NEAR], (NEAR - 1, 0)).unfold(1, NEAR, 1).flip(1)


def _diagonals(product: Tensor) -> Tensor:
    """The sums over i - j = 0, 1, ... of (C, NEAR, NEAR): what `_triangles` takes from."""
    rows = F.pad(product.flip(1), (0, NEAR)).flatten(1)
    return rows[:, :-NEAR].view(len(rows), NEAR, 2 * NEAR - 1).sum(1)[:, NEAR - 1 :]


def _layout(v: Tensor, kernel: Tensor, past: Tensor, cu_seqlens: Tensor | None) -> _Layout:
    batch, time = v.shape[:2]
    bounds = range(0, (batch + 1) * time, time) if cu_seqlens is None else cu_seqlens.tolist()
    return _plan(tuple(bounds), past.shape[1], len(kernel), v.device)


@lru_cache(maxsize=64)
def _plan(bounds: tuple[int, ...], past: int, lags: int, device: torch.device) -> _Layout:
    """Lay out documents bounds[n]..bounds[n+1], each after `past` earlier inputs, for a kernel of so many lags."""

    def tensor(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(device)

    edges = np.asarray(bounds, np.int64)
    lengths = np.diff(edges)
    ahead = -(-past // NEAR) * NEAR  # the past ends where a block ends
    ends = ahead + lengths
    counts = -(-ends // NEAR)
    first = np.cumsum(counts) - counts
    blocks = int(counts.sum()) + 1
    tokens = np.arange(edges[-1]) + np.repeat(first * NEAR + ahead - edges[:-1], lengths)
    before = (first * NEAR + ahead - past)[:, None] + np.arange(past)
    even = (int(counts[0]) * NEAR, int(lengths[0])) if len(set(lengths.tolist())) == 1 else None

    levels = []
    size, longest = NEAR, int(ends.max(initial=0))
    while size < longest and lags > 1:
        last = size >= lags - 1  # then only neighbours are in reach, and all of them are left
        radix = 2 if last else min(RADIX, -(-longest // size))
        step = size if last else radix * size
        begin = max(0, (ahead - size) // step)  # groups whose targets end in the past are of no use
        number = np.maximum(0, -(-(ends - size) // step) - begin)
        document = np.repeat(np.arange(len(ends)), number)
        rank = np.arange(len(document)) - np.repeat(np.cumsum(number) - number, number) + begin
        place = (
            (rank * step)[:, None, None] + np.arange(0, (radix - 1) * size, size)[:, None] + np.arange(0, size, NEAR)
        )
        stretches = []
        for shift in (0, size):
            block = (place + shift) // NEAR
            inside = block < counts[document, None, None]
            stretches.append(np.where(inside, first[document, None, None] + block, blocks - 1))
        spare = np.full_like(stretches[0], blocks - 1)
        sources, targets = (np.concatenate(pair, 2) for pair in ((stretches[0], spare), (spare, stretches[1])))
        if len(document):
            levels.append(_Level(size, radix, tensor(sources.reshape(-1)), tensor(targets.reshape(-1))))
        if last:
            break
        size *= radix
    return _Layout(blocks, ahead, even, tensor(tokens), tensor(before.reshape(-1)), tuple(levels))
