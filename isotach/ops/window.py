"""Short convolution as a memory: a causal filter with its own taps per channel reads the last W inputs.

    S_t = last W of (S_{t-1}, x_t)        o_t = Σ_{j<W} w_j ∘ S_t[j]

w_{W-1} weighs the token itself, w_0 the oldest, as in a convolution layer's weight; the empty past is zeros. The
summary of a segment is its last min(T, W) inputs, and composing is concatenation cut to W: the affine map that shifts
the window and writes where it became free.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from isotach.ops.recurrence import Recurrence, Tensors, state_dtype


class Window(Recurrence):
    """`size`: the inputs that are kept, the filter's W. Outputs are (B, T, D)."""

    class Inputs(NamedTuple):
        x: Float[Tensor, "B T D"]
        weight: Float[Tensor, "W D"]

    class Summary(NamedTuple):
        """The oldest first."""

        inputs: Float[Tensor, "B S D"]

    class State(NamedTuple):
        """The oldest first."""

        inputs: Float[Tensor, "B W D"]

    def __init__(self, size: int = 4) -> None:
        if size < 1:
            raise ValueError(f"window: size must be at least 1; got {size}; a filter of size 1 only scales")
        self.size = size

    def lift(self, x: Tensors) -> Summary:
        return self.Summary(self.wide(x).x.unsqueeze(2))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        return self.Summary(self._last(a, b))

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(self._last(s, a))

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        read = (s.inputs * self.wide(x).weight).sum(-2)
        return read.expand(-1, x.x.shape[1], -1).to(x.x.dtype)

    def neutral(self, x: Tensors) -> Summary:
        return self.Summary(self.wide(x).x[:, :0])

    def initial(self, x: Tensors, rows: int) -> State:
        return self.State(x.x.new_zeros(rows, self.size, x.x.shape[2], dtype=state_dtype(x.x)))

    def summarize(self, x: Tensors) -> Summary:
        return self.Summary(self.wide(x).x[:, -self.size :])

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        taken, weight = self.wide(x)
        seen = torch.cat([s.inputs[:, 1:], taken], 1).unfold(1, self.size, 1)
        return torch.einsum("btdw,wd->btd", seen, weight).to(x.x.dtype)

    def wide(self, x: Tensors) -> Inputs:
        """Inputs as they are kept and accumulated; ValueError where the filter is not of this size."""
        if len(x.weight) != self.size:
            raise ValueError(
                f"window: weight must be (W, D) with W = {self.size}; got {tuple(x.weight.shape)}; "
                f"build the family as Window({len(x.weight)})"
            )
        dtype = state_dtype(x.x)
        return self.Inputs(x.x.to(dtype), x.weight.to(dtype))

    def _last(self, a: Tensors, b: Tensors) -> Tensor:
        return torch.cat([a.inputs, b.inputs], -2)[..., -self.size :, :]
