"""Linear attention whose memory fades: the family of Lightning Attention, RetNet, Mamba-2 and GLA.

    S_t = e^{log_decay_t} ∘ S_{t-1} + k_tᵀ v_t        o_t = q_t S_t

The unit axes of log_decay say which kind it is: (B, 1, H, 1) constant per head, (B, T, H, 1) per token and head,
(B, T, H, K) per token and channel. With L_r the running sum of log_decay in a segment of m tokens, r = 1..m:

    read       o_r = Σ_{s≤r} (q_r ∘ e^{L_r - L_s}) · k_s v_s  +  (q_r ∘ e^{L_r}) S
    summarize  (L_m, Σ_s (k_s ∘ e^{L_m - L_s})ᵀ v_s)

Every exponent is ≤ 0, so nothing overflows whatever the decay; e^{L_r} / e^{L_s} is never formed.

Sources: Lightning Attention-2 (arXiv:2401.04658), RetNet (arXiv:2307.08621), GLA (arXiv:2312.06635).
"""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from isotach import shapes
from isotach.ops.recurrence import FADING, Recurrence, Tensors, length, state_dtype


class Decay(Recurrence):
    class Inputs(NamedTuple):
        """log_decay ≤ 0, natural logarithm."""

        q: Float[Tensor, "B T H K"]
        k: Float[Tensor, "B T H K"]
        v: Float[Tensor, "B T H V"]
        log_decay: Annotated[Float[Tensor, "B #T H #K"], FADING]

    class Summary(NamedTuple):
        """S ↦ e^{log_decay} ∘ S + update."""

        log_decay: Float[Tensor, "B H #K"]
        update: Float[Tensor, "B H K V"]

    class State(NamedTuple):
        state: Float[Tensor, "B H K V"]

    ranges = {"log_decay": shapes.uniform(-1.0, 0.0)}
    hard = {"log_decay": shapes.one_of(0.0, -1e-8, -5.0, -20.0)}
    variants = {
        "head": {"log_decay": frozenset("TK")},
        "token": {"log_decay": frozenset("K")},
        "channel": {},
        "fixed channel": {"log_decay": frozenset("T")},
    }
    both_ways = True

    def lift(self, x: Tensors) -> Summary:
        x = _wide(x)
        log_decay = x.log_decay.expand(-1, length(x), -1, -1)
        return self.Summary(log_decay, x.k.unsqueeze(-1) * x.v.unsqueeze(-2))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        return self.Summary(a.log_decay + b.log_decay, _fade(b.log_decay, a.update) + b.update)

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(_fade(a.log_decay, s.state) + a.update)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        q = x.q.to(s.state.dtype)
        if s.state.shape[1] == 1:  # one state for all tokens is not copied for each
            return torch.einsum("bthk,bhkv->bthv", q, s.state[:, 0]).to(x.q.dtype)
        return torch.einsum("bthk,bthkv->bthv", q, s.state).to(x.q.dtype)

    def neutral(self, x: Tensors) -> Summary:
        batch, _, heads, width = x.k.shape
        zero = x.k.new_zeros((), dtype=state_dtype(x.q))
        return self.Summary(
            zero.expand(batch, heads, x.log_decay.shape[-1]), zero.expand(batch, heads, width, x.v.shape[-1])
        )

    def initial(self, x: Tensors, rows: int) -> State:
        # Expanded, not filled: a pack of many short documents would spend its time on zeros.
        zero = x.k.new_zeros((), dtype=state_dtype(x.q))
        return self.State(zero.expand(rows, x.k.shape[2], x.k.shape[3], x.v.shape[3]))

    def step(self, x: Tensors, s: Tensors) -> tuple[Tensor, State]:
        """In three passes over one new state: it fades, it is written, and it is read."""
        dtype, x = x.q.dtype, _wide(x)
        (batch, _, heads, width), values = x.k.shape, x.v.shape[-1]
        each = batch * heads
        state = s.state.contiguous() * x.log_decay.exp().reshape(batch, heads, -1, 1)
        matrices = state.view(each, width, values)
        matrices.baddbmm_(x.k.reshape(each, width, 1), x.v.reshape(each, 1, values))
        o = torch.bmm(x.q.reshape(each, 1, width), matrices)
        return o.view(batch, 1, heads, values).to(dtype), self.State(state)

    def summarize(self, x: Tensors) -> Summary:
        x = _wide(x)
        total = _running(x)
        fading = x.k * (total[:, -1:] - total).to(x.k.dtype).exp()
        return self.Summary(total[:, -1].to(x.k.dtype), torch.einsum("bthk,bthv->bhkv", fading, x.v))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        dtype = x.q.dtype
        x = _wide(x)
        total = _running(x)
        future = torch.ones(length(x), length(x), dtype=torch.bool, device=x.q.device).triu(1)
        between = (total.unsqueeze(2) - total.unsqueeze(1)).masked_fill(future[..., None, None], -torch.inf)
        between = between.to(x.q.dtype).exp()
        if between.shape[-1] == 1:
            scores = torch.einsum("bthk,bshk->btsh", x.q, x.k) * between.squeeze(-1)
        else:
            scores = torch.einsum("bthk,bshk,btshk->btsh", x.q, x.k, between)
        within = torch.einsum("btsh,bshv->bthv", scores, x.v)
        before = torch.einsum("bthk,bhkv->bthv", x.q * total.to(x.q.dtype).exp(), s.state)
        return (within + before).to(dtype)


def _wide(x: Tensors) -> Decay.Inputs:
    dtype = state_dtype(x.q)
    return Decay.Inputs(*(leaf if leaf.dtype == dtype else leaf.to(dtype) for leaf in x))


def _running(x: Decay.Inputs) -> Tensor:
    """L (B, T, H, #K) in float64: differences of float32 sums would be as coarse as the sums are large."""
    steps = length(x)
    if x.log_decay.shape[1] == 1:
        count = torch.arange(1, steps + 1, device=x.q.device, dtype=torch.float64)
        return x.log_decay.double() * count[:, None, None]
    return x.log_decay.double().cumsum(1)


def _fade(log_decay: Tensor, state: Tensor) -> Tensor:
    return log_decay.exp().unsqueeze(-1) * state
