"""Standardisation by what has been read so far: count, mean and spread of a stream, merged exactly.

    o_t = (x_t - mean_t) / √(M2_t / n_t + 10⁻⁶),    over tokens 1..t of the document

A segment's summary is (n, mean, M2), M2 the sum of squared deviations from the mean. Two segments merge without ever
subtracting large sums: with δ = mean_b - mean_a and n = n_a + n_b,

    mean = mean_a + δ n_b / n        M2 = M2_a + M2_b + δ² n_a n_b / n

Updating formulae for sample variances (Chan, Golub and LeVeque 1982).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotach.ops.recurrence import Recurrence, Tensors, length, state_dtype

EPS = 1e-6  # added to the variance: the first token's is zero


class Moments(Recurrence):
    class Inputs(NamedTuple):
        v: Float[Tensor, "B T H V"]

    class Summary(NamedTuple):
        tokens: Int[Tensor, "B"]
        mean: Float[Tensor, "B H V"]
        spread: Float[Tensor, "B H V"]

    class State(NamedTuple):
        """`spread`: M2."""

        tokens: Int[Tensor, "B"]
        mean: Float[Tensor, "B H V"]
        spread: Float[Tensor, "B H V"]

    def lift(self, x: Tensors) -> Summary:
        v = x.v.to(state_dtype(x.v))
        ones = torch.ones(v.shape[:2], dtype=torch.int64, device=v.device)
        return self.Summary(ones, v, torch.zeros_like(v))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        return self.Summary(*_merge(a, b))

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(*_merge(s, a))

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        v = x.v.to(s.mean.dtype)
        variance = s.spread / s.tokens.clamp_min(1).to(v.dtype)[..., None, None]
        return ((v - s.mean) * (variance + EPS).rsqrt()).to(x.v.dtype)

    def neutral(self, x: Tensors) -> Summary:
        return self.Summary(*self.initial(x, x.v.shape[0]))

    def initial(self, x: Tensors, rows: int) -> State:
        zero = x.v.new_zeros(rows, *x.v.shape[2:], dtype=state_dtype(x.v))
        return self.State(torch.zeros(rows, dtype=torch.int64, device=zero.device), zero, zero)

    def summarize(self, x: Tensors) -> Summary:
        v = x.v.to(state_dtype(x.v))
        mean = v.mean(1)
        count = torch.full(v.shape[:1], length(x), dtype=torch.int64, device=v.device)
        return self.Summary(count, mean, (v - mean.unsqueeze(1)).square().sum(1))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        return self.emit(x, prefixes(x, s))


def prefixes(x: Moments.Inputs, s: Moments.State) -> Moments.State:
    """The states after every token, leaves (B, T, ...).

    Running sums of the deviations from the first mean there is: float64, and small where the values are alike.
    """
    v = x.v.double()
    before = s.tokens.double()[:, None, None, None]
    around = torch.where(before > 0, s.mean.double().unsqueeze(1), v[:, :1]).detach()
    shifted = v - around
    offset = s.mean.double().unsqueeze(1) - around
    count = s.tokens[:, None] + torch.arange(1, v.shape[1] + 1, device=v.device)
    total = shifted.cumsum(1) + before * offset
    mean = total / count.double()[..., None, None]
    squares = shifted.square().cumsum(1) + s.spread.double().unsqueeze(1) + before * offset.square()
    spread = (squares - mean * total).clamp_min(0)
    dtype = s.mean.dtype
    return Moments.State(count, (mean + around).to(dtype), spread.to(dtype))


def _merge(a: Tensors, b: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of a's tokens and b's together."""
    count = a.tokens + b.tokens
    share = (b.tokens.double() / count.clamp_min(1)).to(a.mean.dtype)[..., None, None]
    gap = b.mean - a.mean
    mean = a.mean + gap * share
    spread = a.spread + b.spread + gap.square() * share * a.tokens[..., None, None]
    return count, mean, spread
