"""The products inside a chunk that decay weighs: P_rs = Σ_c q_rc k_sc e^{L_rc - L_sc} for r ≥ s, and their gradients.

One decay per head: the weight comes out of the sum, P = (q kᵀ) ∘ D. One per channel: it does not, and
e^{L_r} · e^{-L_s} would overflow, so each block of rows is measured from the sum just before it: for keys of earlier
blocks both factors are ≤ 1, and inside the block the key's factor is bounded by the block's own decay. A block that
decays by more than e^60 forms its weights one by one.
"""

import torch
from torch import Tensor

from isotach.ops.torch.scratch import Buffer, Scratch

BLOCK = 16  # rows measured from a common base
SAFE = 60.0  # e^60 = 1e26 leaves products of q and k a factor of 1e12 in float32


class HeadScores:
    """`running`: L (N or 1, H, m, 1) in float64."""

    def __init__(self, running: Tensor, scratch: Scratch) -> None:
        gaps = (running - running.transpose(-1, -2)).to(scratch.dtype)
        self.weights = gaps.masked_fill_(_future(gaps.shape[-1], gaps.device), -torch.inf).exp_()
        self.strict = self.weights.tril(-1)

    def forward(self, q: Buffer, k: Buffer, scores: Buffer) -> None:
        """P (N, H, m, m) into `scores`."""
        torch.bmm(q.flat, k.turned, out=scores.flat)
        scores.wide.mul_(self.weights)

    def backward(self, grad: Buffer, q: Buffer, k: Buffer, dq: Buffer, dk: Buffer, *, strict: bool) -> None:
        """dq, dk from grad = do vᵀ, which is overwritten; `strict` leaves out each token's product with itself."""
        grad.wide.mul_(self.strict if strict else self.weights)
        torch.bmm(grad.flat, k.flat, out=dq.flat)
        torch.bmm(grad.turned, q.flat, out=dk.flat)


class ChannelScores:
    """`running`: L (N or 1, H, m, K) in float64."""

    def __init__(self, running: Tensor, scratch: Scratch) -> None:
        self.running, self.scratch = running, scratch
        zero = running[..., :1, :] * 0
        starts = range(0, running.shape[-2], BLOCK)
        self.bases = [running[..., a - 1 : a, :] if a else zero for a in starts]
        ends = [running[..., min(a + BLOCK, running.shape[-2]) - 1, None, :] for a in starts]
        self.safe = all(float((base - end).max()) < SAFE for base, end in zip(self.bases, ends, strict=True))

    def forward(self, q: Buffer, k: Buffer, scores: Buffer) -> None:
        """P (N, H, m, m) into `scores`."""
        out = scores.wide.zero_()
        for a, b, stop, rows, keys in self._blocks():
            now, past = q.wide[..., a:b, :], k.wide[..., :stop, :]
            out[..., a:b, :stop] = (now * rows) @ (past * keys).transpose(-1, -2)
            if not self.safe:
                out[..., a:b, a:b] = torch.einsum(
                    "nhrc,nhsc,nhrsc->nhrs", now, k.wide[..., a:b, :], self._weights(a, b)
                )
        out.tril_()

    def backward(self, grad: Buffer, q: Buffer, k: Buffer, dq: Buffer, dk: Buffer, *, strict: bool) -> None:
        """dq, dk from grad = do vᵀ, which is overwritten; `strict` leaves out each token's product with itself."""
        grad.wide.tril_(-1 if strict else 0)
        dk.wide.zero_()
        for a, b, stop, rows, keys in self._blocks():
            now, block = q.wide[..., a:b, :], grad.wide[..., a:b, :stop]
            dq_now, dk_now = dq.wide[..., a:b, :], dk.wide[..., a:b, :]
            torch.mul(block @ (k.wide[..., :stop, :] * keys), rows, out=dq_now)
            dk.wide[..., :stop, :].addcmul_(block.transpose(-1, -2) @ (now * rows), keys)
            if not self.safe:
                weights = self._weights(a, b) * grad.wide[..., a:b, a:b, None]
                dq_now += torch.einsum("nhrsc,nhsc->nhrc", weights, k.wide[..., a:b, :])
                dk_now += torch.einsum("nhrsc,nhrc->nhsc", weights, now)

    def _blocks(self):  # type: ignore[no-untyped-def]
        """(a, b, stop, e^{L_r - base} of rows a..b, e^{base - L_s} of keys ..stop); stop = b where that is safe."""
        m = self.running.shape[-2]
        for base, a in zip(self.bases, range(0, m, BLOCK), strict=True):
            b = min(a + BLOCK, m)
            stop = b if self.safe else a
            rows = (self.running[..., a:b, :] - base).to(self.scratch.dtype).exp_()
            keys = (base - self.running[..., :stop, :]).to(self.scratch.dtype).exp_()
            yield a, b, stop, rows, keys

    def _weights(self, a: int, b: int) -> Tensor:
        part = self.running[..., a:b, :]
        gaps = (part.unsqueeze(-2) - part.unsqueeze(-3)).to(self.scratch.dtype)
        return gaps.masked_fill_(_future(b - a, gaps.device).unsqueeze(-1), -torch.inf).exp_()


def _future(m: int, device: torch.device) -> Tensor:
    return torch.ones(m, m, dtype=torch.bool, device=device).triu(1)
