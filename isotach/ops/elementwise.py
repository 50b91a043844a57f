"""A memory of one number per channel, faded and added to: the family of HGRN.

    h_t = e^{log_decay_t} ∘ h_{t-1} + v_t        o_t = h_t

Heads may share one decay, (B, T, 1, V). A complex memory that also turns, h_t = e^{log_decay_t + iθ} h_{t-1} + v_t, is
no other family: in the frame that turns along, e^{-iθt} h_t, its real and its imaginary part are two heads that share
a decay, and whoever knows the positions turns v there and o back (mixers/hgrn.py). With L_r the running sum of
log_decay in a segment of m tokens, r = 1..m:

    read       o_r = Σ_{s≤r} e^{L_r - L_s} ∘ v_s  +  e^{L_r} ∘ h
    summarize  (L_m, Σ_s e^{L_m - L_s} ∘ v_s)

HGRN (arXiv:2311.04823).
"""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from isotach import shapes
from isotach.ops.recurrence import FADING, Recurrence, Tensors, length, state_dtype


class Elementwise(Recurrence):
    class Inputs(NamedTuple):
        """log_decay ≤ 0, natural logarithm."""

        v: Float[Tensor, "B T H V"]
        log_decay: Annotated[Float[Tensor, "B T #H V"], FADING]

    class Summary(NamedTuple):
        """h ↦ e^{log_decay} ∘ h + update."""

        log_decay: Float[Tensor, "B #H V"]
        update: Float[Tensor, "B H V"]

    class State(NamedTuple):
        state: Float[Tensor, "B H V"]

    ranges = {"log_decay": shapes.uniform(-1.0, 0.0)}
    hard = {"log_decay": shapes.one_of(0.0, -1e-8, -5.0, -20.0)}
    variants = {"head": {}, "shared": {"log_decay": frozenset("H")}}

    def lift(self, x: Tensors) -> Summary:
        x = self.wide(x)
        return self.Summary(x.log_decay, x.v)

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        return self.Summary(a.log_decay + b.log_decay, b.log_decay.exp() * a.update + b.update)

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(a.log_decay.exp() * s.state + a.update)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        return s.state.expand(-1, length(x), -1, -1).to(x.v.dtype)

    def neutral(self, x: Tensors) -> Summary:
        zero = x.v.new_zeros((), dtype=state_dtype(x.v))
        return self.Summary(zero.expand_as(x.log_decay[:, 0]), zero.expand_as(x.v[:, 0]))

    def initial(self, x: Tensors, rows: int) -> State:
        zero = x.v.new_zeros((), dtype=state_dtype(x.v))
        return self.State(zero.expand(rows, *x.v.shape[2:]))

    def summarize(self, x: Tensors) -> Summary:
        x = self.wide(x)
        total = _running(x)
        fade = (total[:, -1:] - total).to(x.v.dtype).exp()
        return self.Summary(total[:, -1].to(x.v.dtype), (fade * x.v).sum(1))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        dtype = x.v.dtype
        x = self.wide(x)
        total = _running(x)
        future = torch.ones(length(x), length(x), dtype=torch.bool, device=x.v.device).triu(1)
        between = (total.unsqueeze(2) - total.unsqueeze(1)).masked_fill(future[..., None, None], -torch.inf)
        within = (between.to(x.v.dtype).exp() * x.v.unsqueeze(1)).sum(2)
        return (within + total.to(x.v.dtype).exp() * s.state.unsqueeze(1)).to(dtype)

    def wide(self, x: Tensors) -> Inputs:
        """The inputs as they are accumulated."""
        dtype = state_dtype(x.v)
        return self.Inputs(x.v.to(dtype), x.log_decay.to(dtype))


def _running(x: Elementwise.Inputs) -> Tensor:
    """L (B, T, #H, V) in float64: differences of float32 sums would be as coarse as the sums are large."""
    return x.log_decay.double().cumsum(1)
