"""The products inside a chunk that decay weighs: P_ij = Σ_c x_ic y_jc e^{L_ic - L_jc} for i ≥ j, and their gradients.

    MaskedScores   x and y carry their decay already (where the whole chunk decays by less than e^60): P = tril(x yᵀ)
    HeadScores     one decay per head: it comes out of the sum, P = (x yᵀ) ∘ D
    ChannelScores  one per channel: it does not, and e^{L_i} · e^{-L_j} would overflow over a chunk; the factors are
                   measured from a base between j and i

Rows x are s sets of a chunk's m tokens, one below the other, (N, H, s m, K), columns y are t sets; P (N, H, s m, t m)
weighs every pair of sets alike.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isotach.ops.torch.scratch import Buffer, Scratch

SAFE = 60.0  # e^60 = 1e26 leaves rows and columns a factor of 1e12 in float32
REACH = 42.0  # a block of rows measured from its middle spans e^84: its smallest product is still a normal float32
FORGOTTEN = 36.0  # e^-36 is float64's resolution; the product of two such weights is still a normal float32


def flushed(x: Tensor) -> Tensor:
    """x without what is so small that products with it would be denormal: those take a hundred times as long."""
    return torch.hardshrink(x, _smallest(x.dtype))


def weight(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """e^exponent, or 0 below e^-36. Clamped first, because exp itself takes a hundred times as long to underflow."""
    return torch.threshold_(exponent.to(dtype, copy=True).clamp_min_(-FORGOTTEN - 1).exp_(), math.exp(-FORGOTTEN), 0.0)


def _smallest(dtype: torch.dtype) -> float:
    return 1e8 * torch.finfo(dtype).tiny


class MaskedScores:
    """`length`: m."""

    def __init__(self, length: int) -> None:
        self.length = length

    def forward(self, rows: Buffer, columns: Buffer, scores: Buffer) -> None:
        """P into `scores`."""
        torch.bmm(rows.flat, columns.turned, out=scores.flat)
        _sets(scores.wide, self.length).squeeze(3).tril_()

    def backward(
        self, grad: Buffer, rows: Buffer, columns: Buffer, drows: Buffer, dcolumns: Buffer, *, strict: bool
    ) -> None:
        """drows, dcolumns from the gradient of P, which is overwritten; `strict` leaves out i = j."""
        _sets(grad.wide, self.length).squeeze(3).tril_(-1 if strict else 0)
        torch.bmm(grad.flat, columns.flat, out=drows.flat)
        torch.bmm(grad.turned, rows.flat, out=dcolumns.flat)


class HeadScores:
    """`running`: L (N or 1, H, m, 1) in float64."""

    def __init__(self, running: Tensor, scratch: Scratch) -> None:
        gaps = (running - running.transpose(-1, -2)).tril_()  # the future's would overflow
        self.weights = weight(gaps, scratch.dtype).tril_()

    def forward(self, rows: Buffer, columns: Buffer, scores: Buffer) -> None:
        """P into `scores`."""
        torch.bmm(rows.flat, columns.turned, out=scores.flat)
        _weigh(scores.wide, self.weights)

    def backward(
        self, grad: Buffer, rows: Buffer, columns: Buffer, drows: Buffer, dcolumns: Buffer, *, strict: bool
    ) -> None:
        """drows, dcolumns from the gradient of P, which is overwritten; `strict` leaves out i = j."""
        _weigh(grad.wide, self.weights.tril(-1) if strict else self.weights)
        torch.bmm(grad.flat, columns.flat, out=drows.flat)
        torch.bmm(grad.turned, rows.flat, out=dcolumns.flat)


class ChannelScores:
    """`running`: L (N or 1, H, m, K) in float64.

    The chunk is halved. What rows of its second half owe to columns of the first is measured from the boundary between
    them: neither factor of e^{L_i - L_boundary} · e^{L_boundary - L_j} exceeds 1. Each half is halved again, down to
    blocks that decay by less than e^84, which are measured from their middle; a block of one row always is such.
    """

    def __init__(self, running: Tensor, scratch: Scratch) -> None:
        self.length = running.shape[2]
        self.full = 1 << (self.length - 1).bit_length()
        if self.full > self.length:
            running = torch.cat([running, running[:, :, -1:].expand(-1, -1, self.full - self.length, -1)], 2)
        size = self.full
        while _spread(running, size) >= REACH:
            size //= 2

        def fade(exponent: Tensor) -> Tensor:
            return weight(exponent, scratch.dtype).unsqueeze(3)

        whole, block = slice(0, size), running.unflatten(2, (-1, size))
        base = block[..., size // 2, None, :]
        own = (gap.to(scratch.dtype).exp_().unsqueeze(3) for gap in (block - base, base - block))
        self.parts = [_Part(size, whole, whole, *own)]
        while size < self.full:
            first, second = running.unflatten(2, (-1, 2 * size)).split(size, 3)
            base = first[..., -1:, :]
            halves = slice(size, 2 * size), slice(0, size)
            self.parts.append(_Part(2 * size, *halves, fade(second - base), fade(base - first)))
            size *= 2

    def forward(self, rows: Buffer, columns: Buffer, scores: Buffer) -> None:
        """P into `scores`."""
        x, y, p = self._padded(rows.wide), self._padded(columns.wide), _sets(scores.wide, self.length)
        out = p if self.full == self.length else p.new_empty(*p.shape[:4], self.full, self.full)
        out.zero_()
        for part in self.parts:
            part.region(out).copy_(part.unfold(part.left(x) @ part.right(y).mT, x.shape[2]))
        out.tril_()
        if out is not p:
            p.copy_(out[..., : self.length, : self.length])

    def backward(
        self, grad: Buffer, rows: Buffer, columns: Buffer, drows: Buffer, dcolumns: Buffer, *, strict: bool
    ) -> None:
        """drows, dcolumns from the gradient of P, which is overwritten; `strict` leaves out i = j."""
        x, y, g = self._padded(rows.wide), self._padded(columns.wide), _sets(grad.wide, self.length)
        g.tril_(-1 if strict else 0)
        spare = self.full - self.length
        g = F.pad(g, (0, spare, 0, spare)) if spare else g
        dx, dy = self._padded(drows.wide.zero_()), self._padded(dcolumns.wide.zero_())
        for part in self.parts:
            block = part.fold(part.region(g))
            part.rows_of(dx).addcmul_((block @ part.right(y)).unflatten(3, (x.shape[2], -1)), part.row_fade)
            part.columns_of(dy).addcmul_((block.mT @ part.left(x)).unflatten(3, (y.shape[2], -1)), part.column_fade)
        if spare:
            for target, padded in ((drows, dx), (dcolumns, dy)):
                target.wide.unflatten(2, (-1, self.length)).copy_(padded[..., : self.length, :])

    def _padded(self, x: Tensor) -> Tensor:
        """(N, H, s m, K) as (N, H, s, full, K)."""
        x = x.unflatten(2, (-1, self.length))
        return F.pad(x, (0, 0, 0, self.full - self.length)) if self.full > self.length else x


class _Part(NamedTuple):
    """Every block of so many tokens: its `rows` against its `columns`, and by what (N or 1, H, blocks, 1, ·, K)."""

    block: int
    rows: slice
    columns: slice
    row_fade: Tensor
    column_fade: Tensor

    def rows_of(self, x: Tensor) -> Tensor:
        """(N, H, s, full, K) as (N, H, blocks, s, rows, K)."""
        return x.unflatten(3, (-1, self.block)).transpose(2, 3)[..., self.rows, :]

    def columns_of(self, y: Tensor) -> Tensor:
        return y.unflatten(3, (-1, self.block)).transpose(2, 3)[..., self.columns, :]

    def left(self, x: Tensor) -> Tensor:
        """(N, H, blocks, s rows, K)."""
        x = self.rows_of(x)
        return torch.mul(x, self.row_fade, out=x.new_empty(x.shape)).flatten(3, 4)

    def right(self, y: Tensor) -> Tensor:
        y = self.columns_of(y)
        return torch.mul(y, self.column_fade, out=y.new_empty(y.shape)).flatten(3, 4)

    def region(self, p: Tensor) -> Tensor:
        """(N, H, s, t, full, full) as (N, H, blocks, s, t, rows, columns)."""
        p = p.unflatten(5, (-1, self.block)).unflatten(4, (-1, self.block)).diagonal(dim1=4, dim2=6)
        return p.movedim(-1, 2)[..., self.rows, self.columns]

    @staticmethod
    def fold(region: Tensor) -> Tensor:
        """(N, H, blocks, s, t, rows, columns) as matrices (N, H, blocks, s rows, t columns)."""
        return region.transpose(4, 5).flatten(5, 6).flatten(3, 4)

    def unfold(self, products: Tensor, sets: int) -> Tensor:
        columns = self.columns.stop - self.columns.start
        return products.unflatten(4, (-1, columns)).unflatten(3, (sets, -1)).transpose(4, 5)


def _spread(running: Tensor, size: int) -> float:
    """The largest exponent that blocks of `size` rows need, measured from their middle."""
    block = running.unflatten(2, (-1, size))
    base = block[..., size // 2, :]
    return float(torch.maximum(block[..., 0, :] - base, base - block[..., -1, :]).max())


def _sets(scores: Tensor, m: int) -> Tensor:
    """(N, H, s m, t m) as (N, H, s, t, m, m)."""
    return scores.unflatten(3, (-1, m)).unflatten(2, (-1, m)).transpose(3, 4)


def _weigh(scores: Tensor, weights: Tensor) -> None:
    _sets(scores, weights.shape[-1]).mul_(weights[:, :, None, None])
