"""The delta rule: a memory that takes out what is stored under a key before it writes there.

    S ← e^{log_decay_t} ∘ S_{t-1}          S_t = S + β_t k_t (v_t - kᵀ_t S)          o_t = q_t S_t

The unit axes of log_decay say which kind it is: (B, 1, H, 1) filled with zeros is DeltaNet, (B, T, H, 1) Gated
DeltaNet, (B, T, H, K) Kimi Delta Attention. The eigenvalue along k is 1 - β |k|²: with unit keys β in 0..1 only
forgets, β up to 2 also reflects.

SplitDelta is the general form, with three keys where Delta has one: it reads along r, takes what it read out along e
and writes along k. Delta is read = k, erase = k = β k.

    S_t = S - e_t (r_tᵀ S) + k_t v_tᵀ

In a segment of m tokens with L the running sum of log_decay, D_ij = e^{L_i - L_j}, a_i = e^{L_i}, b_i = e^{L_m - L_i},
the rows u_i = r_iᵀ S that are read come out of one triangular system, and the rest is matrix products:

    (1 + tril(R Eᵀ ∘ D, -1)) U = tril(R Kᵀ ∘ D, -1) V + (a ∘ R) S
    O = tril(Q Kᵀ ∘ D) V - tril(Q Eᵀ ∘ D) U + (a ∘ Q) S
    S ← e^{L_m} ∘ S + (b ∘ K)ᵀ V - (b ∘ E)ᵀ U

Sources: DeltaNet (arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464), Kimi Linear (arXiv:2510.26692).
"""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from isotach import shapes
from isotach.ops.recurrence import FADING, Recurrence, Tensors, length, state_dtype

# With unit keys the eigenvalue along k is 1 - beta: beyond ±1 what is stored grows without bound.
ERASING = shapes.Within(0.0, 2.0, "form it as sigmoid(x), or as 2 * sigmoid(x) where eigenvalues may be negative")
SEGMENT = 16  # tokens that `summarize` solves for at a time: longer ones lose digits of a transition that erases much


def unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Vectors of length 1 along the last axis."""
    return F.normalize(shapes.normal(shape, generator), dim=-1)


def repeated(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Vectors of length 1, every token's one of three: the memory is overwritten again and again."""
    choices = unit((shape[0], 3, *shape[2:]), generator)
    return choices[:, torch.randint(3, (shape[1],), generator=generator)]


class SplitDelta(Recurrence):
    class Inputs(NamedTuple):
        """log_decay ≤ 0, natural logarithm. There is no beta: `erase` and `k` contain it."""

        q: Float[Tensor, "B T H K"]
        read: Float[Tensor, "B T H K"]
        erase: Float[Tensor, "B T H K"]
        k: Float[Tensor, "B T H K"]
        v: Float[Tensor, "B T H V"]
        log_decay: Annotated[Float[Tensor, "B #T H #K"], FADING]

    class Summary(NamedTuple):
        """S ↦ transition · S + update."""

        transition: Float[Tensor, "B H K K"]
        update: Float[Tensor, "B H K V"]

    class State(NamedTuple):
        state: Float[Tensor, "B H K V"]

    # Products of 1 - β k kᵀ stay bounded for unit keys and β ≤ 2; those of 1 - e rᵀ only for short e.
    ranges = {"read": unit, "erase": lambda *how: 0.5 * unit(*how), "log_decay": shapes.uniform(-1.0, 0.0)}
    hard = {"log_decay": shapes.one_of(0.0, -1e-8, -5.0, -20.0)}
    variants = {
        "head": {"log_decay": frozenset("TK")},
        "token": {"log_decay": frozenset("K")},
        "channel": {},
        "fixed channel": {"log_decay": frozenset("T")},
    }

    def lift(self, x: Tensors) -> Summary:
        x = _wide(x)
        decay = x.log_decay.exp().expand(x.k.shape)
        erased = x.erase.unsqueeze(-1) * (decay * x.read).unsqueeze(-2)
        return self.Summary(decay.diag_embed() - erased, x.k.unsqueeze(-1) * x.v.unsqueeze(-2))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        return self.Summary(b.transition @ a.transition, b.transition @ a.update + b.update)

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(a.transition @ s.state + a.update)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        q = x.q.to(s.state.dtype)
        if s.state.shape[1] == 1:  # one state for all tokens is not copied for each
            return torch.einsum("bthk,bhkv->bthv", q, s.state[:, 0]).to(x.q.dtype)
        return torch.einsum("bthk,bthkv->bthv", q, s.state).to(x.q.dtype)

    def neutral(self, x: Tensors) -> Summary:
        batch, _, heads, width = x.k.shape
        one = torch.eye(width, dtype=state_dtype(x.q), device=x.k.device)
        update = one.new_zeros(()).expand(batch, heads, width, x.v.shape[-1])
        return self.Summary(one.expand(batch, heads, -1, -1), update)

    def initial(self, x: Tensors, rows: int) -> State:
        # Expanded, not filled: a pack of many short documents would spend its time on zeros.
        zero = x.k.new_zeros((), dtype=state_dtype(x.q))
        return self.State(zero.expand(rows, x.k.shape[2], x.k.shape[3], x.v.shape[3]))

    def step(self, x: Tensors, s: Tensors) -> tuple[Tensor, State]:
        """Through vectors: lift would form a transition of K × K."""
        q, read, erase, k, v, log_decay = (leaf[:, 0] for leaf in _wide(x))
        state = log_decay.exp().unsqueeze(-1) * s.state
        erased = read.unsqueeze(-2) @ state
        state = state + k.unsqueeze(-1) * v.unsqueeze(-2) - erase.unsqueeze(-1) * erased
        return (q.unsqueeze(-2) @ state).transpose(1, 2).to(x.q.dtype), self.State(state)

    def summarize(self, x: Tensors) -> Summary:
        """The update is what the empty state turns into; the transition, the identity where nothing is written."""
        x = _wide(x)
        width, values, one = x.k.shape[-1], x.v.shape[-1], self.neutral(x)
        x = x._replace(v=F.pad(x.v, (0, width)))
        state = torch.cat([one.update, one.transition], -1)
        for t in range(0, length(x), SEGMENT):
            state = _Segment(shapes.time_slice(x, t, min(t + SEGMENT, length(x)))).advance(state)
        return self.Summary(state[..., values:], state[..., :values])

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        return _Segment(_wide(x)).outputs(s.state).transpose(1, 2).to(x.q.dtype)


class Delta(Recurrence):
    class Inputs(NamedTuple):
        """log_decay ≤ 0, natural logarithm; 0 ≤ beta ≤ 2, and |k| = 1, or what is stored may grow without bound."""

        q: Float[Tensor, "B T H K"]
        k: Float[Tensor, "B T H K"]
        v: Float[Tensor, "B T H V"]
        beta: Annotated[Float[Tensor, "B T H 1"], ERASING]
        log_decay: Annotated[Float[Tensor, "B #T H #K"], FADING]

    Summary = SplitDelta.Summary
    State = SplitDelta.State

    ranges = {"k": unit, "beta": shapes.uniform(0.0, 2.0), "log_decay": shapes.uniform(-1.0, 0.0)}
    hard = {"k": repeated, "beta": shapes.one_of(0.0, 1.0, 2.0), "log_decay": shapes.one_of(0.0, -1e-8, -5.0, -20.0)}
    variants = SplitDelta.variants

    def lift(self, x: Tensors) -> SplitDelta.Summary:
        return _split.lift(_general(x))

    def compose(self, a: Tensors, b: Tensors) -> SplitDelta.Summary:
        return _split.compose(a, b)

    def apply(self, a: Tensors, s: Tensors) -> SplitDelta.State:
        return _split.apply(a, s)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        return _split.emit(x, s)

    def neutral(self, x: Tensors) -> SplitDelta.Summary:
        return _split.neutral(x)

    def initial(self, x: Tensors, rows: int) -> SplitDelta.State:
        return _split.initial(x, rows)

    def step(self, x: Tensors, s: Tensors) -> tuple[Tensor, SplitDelta.State]:
        q, k, v, beta, log_decay = (leaf[:, 0].to(state_dtype(x.q)) for leaf in x)
        state = log_decay.exp().unsqueeze(-1) * s.state
        error = v.unsqueeze(-2) - k.unsqueeze(-2) @ state
        state = state + (beta * k).unsqueeze(-1) * error
        return (q.unsqueeze(-2) @ state).transpose(1, 2).to(x.q.dtype), SplitDelta.State(state)

    def summarize(self, x: Tensors) -> SplitDelta.Summary:
        return _split.summarize(_general(x))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        return _split.read(_general(x), s).to(x.q.dtype)


_split = SplitDelta()


def _general(x: Tensors) -> SplitDelta.Inputs:
    """Delta's inputs in the general form, wide: β k rounded to a narrow dtype would be another model."""
    q, k, v, beta, log_decay = (leaf.to(state_dtype(x.q)) for leaf in x)
    written = beta * k
    return SplitDelta.Inputs(q, k, written, written, v, log_decay)


def _wide(x: Tensors) -> SplitDelta.Inputs:
    return SplitDelta.Inputs(*(leaf.to(state_dtype(x.q)) for leaf in x))


class _Segment:
    """The equations at the top for one segment, head by head: (B, H, m, ·)."""

    def __init__(self, x: SplitDelta.Inputs) -> None:
        steps = length(x)
        self.q, self.r, self.e, self.k, self.v, log_decay = (leaf.transpose(1, 2) for leaf in x)
        # float64: differences of float32 sums would be as coarse as the sums are large.
        self.running = log_decay.double().expand(-1, -1, steps, -1).cumsum(2)
        gaps = self.running.unsqueeze(3) - self.running.unsqueeze(2)
        future = torch.ones(steps, steps, dtype=torch.bool, device=x.q.device).triu(1)
        self.between = gaps.masked_fill(future.unsqueeze(-1), -torch.inf).to(x.q.dtype).exp()

    def outputs(self, state: Tensor) -> Tensor:
        before = (self.q * self._fade(self.running)) @ state
        return before + self._scores(self.q, self.k) @ self.v - self._scores(self.q, self.e) @ self._erased(state)

    def advance(self, state: Tensor) -> Tensor:
        total = self.running[:, :, -1:]
        fading = self._fade(total - self.running)
        written = (self.k * fading).mT @ self.v - (self.e * fading).mT @ self._erased(state)
        return self._fade(total).mT * state + written

    def _erased(self, state: Tensor) -> Tensor:
        """U (B, H, m, V)."""
        known = self._scores(self.r, self.k).tril(-1) @ self.v + (self.r * self._fade(self.running)) @ state
        return torch.linalg.solve_triangular(
            self._scores(self.r, self.e).tril(-1), known, upper=False, unitriangular=True
        )

    def _scores(self, rows: Tensor, columns: Tensor) -> Tensor:
        if self.between.shape[-1] == 1:
            return rows @ columns.mT * self.between.squeeze(-1)
        return torch.einsum("bhik,bhjk,bhijk->bhij", rows, columns, self.between)

    def _fade(self, exponent: Tensor) -> Tensor:
        return exponent.to(self.q.dtype).exp()
