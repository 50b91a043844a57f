"""Running sum that stays exact over millions of tokens: the clock of positions that depend on what is read.

    S_t = S_{t-1} + x_t        o_t = S_t as (high, low), with high + low = S_t

A sum that has grown large has no room in float32 for the next small term: at 4e4 the spacing is 4e-3. So it is kept,
and put out, as an unevaluated pair of numbers, high the nearest to the sum and low what is left, 48 bits together.
Add them in float64. In float64 low is zero.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from isotach.ops.recurrence import Recurrence, Tensors, length, state_dtype


class Running(Recurrence):
    """Outputs are (B, T, 2 D): D times high, then D times low; their sum carries the gradient."""

    class Inputs(NamedTuple):
        x: Float[Tensor, "B T D"]

    class Summary(NamedTuple):
        high: Float[Tensor, "B D"]
        low: Float[Tensor, "B D"]

    class State(NamedTuple):
        high: Float[Tensor, "B D"]
        low: Float[Tensor, "B D"]

    def lift(self, x: Tensors) -> Summary:
        return self.Summary(*split(x.x.double(), state_dtype(x.x)))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        return self.Summary(*split(joined(a) + joined(b), b.high.dtype))

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(*split(joined(s) + joined(a), a.high.dtype))

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        return torch.cat([s.high, s.low], -1).expand(-1, length(x), -1).to(x.x.dtype)

    def neutral(self, x: Tensors) -> Summary:
        return self.Summary(*self.initial(x, len(x.x)))

    def initial(self, x: Tensors, rows: int) -> State:
        zero = x.x.new_zeros(rows, x.x.shape[2], dtype=state_dtype(x.x))
        return self.State(zero, zero.clone())

    def summarize(self, x: Tensors) -> Summary:
        return self.Summary(*split(x.x.double().sum(1), state_dtype(x.x)))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        total = joined(s)[:, None] + x.x.double().cumsum(1)
        return torch.cat(split(total, x.x.dtype), -1)


def joined(pair: Tensors) -> Tensor:
    """The float64 sum of a summary or state."""
    return pair.high.double() + pair.low.double()


def split(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(high, low) in dtype of a float64 sum."""
    high = total.to(dtype)
    return high, (total - high.double()).to(dtype)
