"""Higher-order linear attention: a token attends through other tokens' similarities.

With γ_t = e^{log_decay_t}, W_ti = q_t·k_i Π_{i<r≤t} γ_r for i ≤ t (else 0), and "lower" the mask of j ≤ t:

    second order   o = ((W Wᵀ) ∘ lower) v      S ← γ² S + k kᵀ    y = Sᵀ q    H ← γ H + y vᵀ    o = Hᵀ q
    asymmetric     o = W W v                   P ← γ P + k vᵀ     z = Pᵀ q    E ← γ E + k zᵀ    o = Eᵀ q
    third order    o = ((W Wᵀ) ∘ lower) W v    S, P, y, z as above            F ← γ F + y zᵀ    o = Fᵀ q

y and z are themselves linear attention with decay, over (q, k, k) at twice the log_decay and over (q, k, v), and each
operator is linear attention once more, over (q, y, v), (q, k, z) or (q, y, z). So the closed forms are those of
ops/decay.py, nested, and W Wᵀ is never formed. A sum is named by what it adds: kk is S, yv H, kv P, kz E, yz F.

A segment acts on the state before it as follows, with a_t = Π_{r≤t} γ_r, ρ = a_m, and y and z read from within:

    second order   S ← ρ² S + kk    H ← ρ H + Sᵀ qv + yv              qv = ρ Σ a q vᵀ
    asymmetric     P ← ρ P + kv     E ← ρ (E + kq P) + kz             kq = Σ k qᵀ
    third order    S, P as above    F ← ρ F + Sᵀ (qz + qq P) + yq P + yz
                                    qz = ρ Σ a q zᵀ    yq = ρ Σ y qᵀ    qq = ρ Σ a² q qᵀ

Source: Higher-order Linear Attention (arXiv:2510.27258). Some of its printed formulas contradict its operators and are
not followed: the decayed second orders (three, all different, one with a scan that is not associative), the chunk of
the second order (q_j does not read the S before it), the chunk of the asymmetric form (z_t lacks token t) and its
decayed scan (kq fades), the prefix sums of the third order (only triples whose largest index occurs twice). The decayed
third order is ours.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from isotach import shapes
from isotach.ops.decay import Decay
from isotach.ops.recurrence import FADING, Recurrence, Tensors, length, state_dtype

# Linear attention with decay: (inputs, state before) -> (outputs, state after).
Attend = Callable[[Decay.Inputs, Decay.State], tuple[Tensor, Decay.State]]
N = TypeVar("N", bound=tuple[Any, ...])

SEGMENT = 64  # tokens that `summarize` takes at a time: its work is linear in T

_decay = Decay()
_ranges = {"log_decay": shapes.uniform(-1.0, 0.0)}
_hard = {"log_decay": shapes.one_of(0.0, -1e-8, -5.0, -20.0)}
_variants = {"head": {"log_decay": frozenset("T")}, "token": {}}


class Tokens(NamedTuple):
    """log_decay ≤ 0, natural logarithm: one number per head, or per token and head."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T H K"]
    v: Float[Tensor, "B T H V"]
    log_decay: Annotated[Float[Tensor, "B #T H 1"], FADING]


class SecondOrder(Recurrence):
    Inputs = Tokens

    class Summary(NamedTuple):
        log_decay: Float[Tensor, "B H 1"]
        qv: Float[Tensor, "B H K V"]
        kk: Float[Tensor, "B H K K"]
        yv: Float[Tensor, "B H K V"]

    class State(NamedTuple):
        kk: Float[Tensor, "B H K K"]
        yv: Float[Tensor, "B H K V"]

    ranges, hard, variants = _ranges, _hard, _variants

    def lift(self, x: Tensors) -> Summary:
        q, k, v, log_decay = _every_token(x)
        y = k * _dot(k, q)
        return self.Summary(log_decay, _fade(log_decay) ** 2 * _outer(q, v), _outer(k, k), _outer(y, v))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        qv = _fade(b.log_decay) * a.qv + _fade(a.log_decay) ** 2 * b.qv
        return self.Summary(a.log_decay + b.log_decay, qv, *self.apply(b, self.State(a.kk, a.yv)))

    def apply(self, a: Tensors, s: Tensors) -> State:
        kk = _fade(a.log_decay) ** 2 * s.kk + a.kk
        return self.State(kk, _fade(a.log_decay) * s.yv + s.kk.mT @ a.qv + a.yv)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        return _emit(x, s.yv)

    def neutral(self, x: Tensors) -> Summary:
        return _zeros(self.Summary, x, x.k.shape[0])

    def initial(self, x: Tensors, rows: int) -> State:
        return _zeros(self.State, x, rows)

    def summarize(self, x: Tensors) -> Summary:
        total = self.neutral(x)
        for (q, k, v, log_decay), a, log_total in _segments(x):
            y = _attended(q, k, k, 2 * log_decay)
            qv = _fade(log_total) * _product(a * q, v)
            own = self.Summary(log_total, qv, _added(k, k, 2 * log_decay), _added(y, v, log_decay))
            total = self.compose(total, own)
        return total

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        return self.nest(x, s, _closed)[0]

    def step(self, x: Tensors, s: Tensors) -> tuple[Tensor, State]:
        return self.nest(x, s, _decay.step)  # without the products of whole segments

    def nest(self, x: Tensors, s: Tensors, attend: Attend) -> tuple[Tensor, State]:
        """Outputs and the state after the last token, by any implementation of linear attention with decay."""
        q, k, v, log_decay = _wide(x)
        y, kk = attend(Decay.Inputs(q, k, k, _twice(log_decay)), Decay.State(s.kk))
        o, yv = attend(Decay.Inputs(q, y, v, log_decay), Decay.State(s.yv))
        return o.to(x.q.dtype), self.State(kk.state, yv.state)


class Asymmetric(Recurrence):
    Inputs = Tokens

    class Summary(NamedTuple):
        log_decay: Float[Tensor, "B H 1"]
        kq: Float[Tensor, "B H K K"]
        kv: Float[Tensor, "B H K V"]
        kz: Float[Tensor, "B H K V"]

    class State(NamedTuple):
        kv: Float[Tensor, "B H K V"]
        kz: Float[Tensor, "B H K V"]

    ranges, hard, variants = _ranges, _hard, _variants

    def lift(self, x: Tensors) -> Summary:
        q, k, v, log_decay = _every_token(x)
        return self.Summary(log_decay, _outer(k, q), _outer(k, v), _outer(k, _dot(k, q) * v))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        after = self.apply(b, self.State(a.kv, a.kz))
        return self.Summary(a.log_decay + b.log_decay, a.kq + b.kq, *after)

    def apply(self, a: Tensors, s: Tensors) -> State:
        rho = _fade(a.log_decay)
        return self.State(rho * s.kv + a.kv, rho * (s.kz + a.kq @ s.kv) + a.kz)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        return _emit(x, s.kz)

    def neutral(self, x: Tensors) -> Summary:
        return _zeros(self.Summary, x, x.k.shape[0])

    def initial(self, x: Tensors, rows: int) -> State:
        return _zeros(self.State, x, rows)

    def summarize(self, x: Tensors) -> Summary:
        total = self.neutral(x)
        for (q, k, v, log_decay), _, log_total in _segments(x):
            z = _attended(q, k, v, log_decay)
            own = self.Summary(log_total, _product(k, q), _added(k, v, log_decay), _added(k, z, log_decay))
            total = self.compose(total, own)
        return total

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        return self.nest(x, s, _closed)[0]

    def step(self, x: Tensors, s: Tensors) -> tuple[Tensor, State]:
        return self.nest(x, s, _decay.step)  # without the products of whole segments

    def nest(self, x: Tensors, s: Tensors, attend: Attend) -> tuple[Tensor, State]:
        """Outputs and the state after the last token, by any implementation of linear attention with decay."""
        q, k, v, log_decay = _wide(x)
        z, kv = attend(Decay.Inputs(q, k, v, log_decay), Decay.State(s.kv))
        o, kz = attend(Decay.Inputs(q, k, z, log_decay), Decay.State(s.kz))
        return o.to(x.q.dtype), self.State(kv.state, kz.state)


class ThirdOrder(Recurrence):
    Inputs = Tokens

    class Summary(NamedTuple):
        log_decay: Float[Tensor, "B H 1"]
        qq: Float[Tensor, "B H K K"]
        yq: Float[Tensor, "B H K K"]
        qz: Float[Tensor, "B H K V"]
        kk: Float[Tensor, "B H K K"]
        kv: Float[Tensor, "B H K V"]
        yz: Float[Tensor, "B H K V"]

    class State(NamedTuple):
        kk: Float[Tensor, "B H K K"]
        kv: Float[Tensor, "B H K V"]
        yz: Float[Tensor, "B H K V"]

    ranges, hard, variants = _ranges, _hard, _variants

    def lift(self, x: Tensors) -> Summary:
        q, k, v, log_decay = _every_token(x)
        y, z = k * _dot(k, q), _dot(k, q) * v
        gamma = log_decay.exp()
        qq, yq, qz = _outer(gamma**3 * q, q), _outer(gamma * y, q), _outer(gamma**2 * q, z)
        return self.Summary(log_decay, qq, yq, qz, _outer(k, k), _outer(k, v), _outer(y, z))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        before, after = _fade(a.log_decay), _fade(b.log_decay)
        qq = after * a.qq + before**3 * b.qq
        yq = after * a.yq + before * (b.yq + a.kk.mT @ b.qq)
        qz = after * a.qz + before**2 * (b.qz + b.qq @ a.kv)
        return self.Summary(a.log_decay + b.log_decay, qq, yq, qz, *self.apply(b, self.State(a.kk, a.kv, a.yz)))

    def apply(self, a: Tensors, s: Tensors) -> State:
        rho = _fade(a.log_decay)
        yz = rho * s.yz + s.kk.mT @ (a.qz + a.qq @ s.kv) + a.yq @ s.kv + a.yz
        return self.State(rho**2 * s.kk + a.kk, rho * s.kv + a.kv, yz)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        return _emit(x, s.yz)

    def neutral(self, x: Tensors) -> Summary:
        return _zeros(self.Summary, x, x.k.shape[0])

    def initial(self, x: Tensors, rows: int) -> State:
        return _zeros(self.State, x, rows)

    def summarize(self, x: Tensors) -> Summary:
        total = self.neutral(x)
        for (q, k, v, log_decay), a, log_total in _segments(x):
            y, z = _attended(q, k, k, 2 * log_decay), _attended(q, k, v, log_decay)
            rho = _fade(log_total)
            qq, yq, qz = rho * _product(a**2 * q, q), rho * _product(y, q), rho * _product(a * q, z)
            kk, kv, yz = _added(k, k, 2 * log_decay), _added(k, v, log_decay), _added(y, z, log_decay)
            own = self.Summary(log_total, qq, yq, qz, kk, kv, yz)
            total = self.compose(total, own)
        return total

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        return self.nest(x, s, _closed)[0]

    def step(self, x: Tensors, s: Tensors) -> tuple[Tensor, State]:
        return self.nest(x, s, _decay.step)  # without the products of whole segments

    def nest(self, x: Tensors, s: Tensors, attend: Attend) -> tuple[Tensor, State]:
        """Outputs and the state after the last token, by any implementation of linear attention with decay."""
        q, k, v, log_decay = _wide(x)
        y, kk = attend(Decay.Inputs(q, k, k, _twice(log_decay)), Decay.State(s.kk))
        z, kv = attend(Decay.Inputs(q, k, v, log_decay), Decay.State(s.kv))
        o, yz = attend(Decay.Inputs(q, y, z, log_decay), Decay.State(s.yz))
        return o.to(x.q.dtype), self.State(kk.state, kv.state, yz.state)


def _wide(x: Tensors) -> Tokens:
    """In the dtype of states and gates."""
    return Tokens(*(leaf.to(state_dtype(x.q)) for leaf in x))


def _every_token(x: Tensors) -> Tokens:
    """Wide, with a log_decay (B, T, H, 1) whatever it shares."""
    wide = _wide(x)
    return wide._replace(log_decay=wide.log_decay.expand(-1, length(x), -1, -1))


def _twice(log_decay: Tensor) -> Tensor:
    """2 log_decay, still one memory for the whole batch where it was: such decay is prepared once."""
    if log_decay.stride(0) == 0:
        return (2 * log_decay[:1]).expand_as(log_decay)
    return 2 * log_decay


def _segments(x: Tensors) -> Iterator[tuple[Tokens, Tensor, Tensor]]:
    """Stretches of the tokens, each with a (B, T, H, 1) and its total log_decay (B, H, 1)."""
    wide, steps = _wide(x), length(x)
    for at in range(0, steps, SEGMENT):
        part = shapes.time_slice(wide, at, min(at + SEGMENT, steps))
        running = part.log_decay.double().expand(-1, length(part), -1, -1).cumsum(1)
        yield part, running.to(part.q.dtype).exp(), running[:, -1].to(part.q.dtype)


def _closed(x: Decay.Inputs, s: Decay.State) -> tuple[Tensor, Decay.State]:
    """Outputs only: `read` has no use for the state after."""
    return _decay.read(x, s), s


def _attended(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Linear attention with decay from an empty past."""
    x = Decay.Inputs(q, k, v, log_decay)
    return _decay.read(x, _decay.initial(x, len(q)))


def _added(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Σ k vᵀ, faded to the end of the segment."""
    update: Tensor = _decay.summarize(Decay.Inputs(k, k, v, log_decay)).update
    return update


def _emit(x: Tensors, state: Tensor) -> Tensor:
    return _decay.emit(Decay.Inputs(*x), Decay.State(state))


def _zeros(cls: type[N], x: Tensors, rows: int) -> N:
    """Expanded, not filled, like those of the decay family."""
    sizes = {"B": rows, "H": x.k.shape[2], "K": x.k.shape[3], "V": x.v.shape[3], "1": 1}
    zero = x.k.new_zeros((), dtype=state_dtype(x.q))
    return cls(*(zero.expand([sizes[axis.name] for axis in declared]) for declared in shapes.axes(cls).values()))


def _fade(log_decay: Tensor) -> Tensor:
    """ρ (..., H, 1, 1) of log_decay (..., H, 1)."""
    return log_decay.exp().unsqueeze(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of every token."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Σ_t a bᵀ."""
    return torch.einsum("bthk,bthv->bhkv", a, b)
