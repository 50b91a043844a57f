"""Positions: rotations of q and k, after which a score depends on the distance t - s; slopes that scores fall by.

    RoPE      each pair of channels is turned by t θ_j                                  (arXiv:2104.09864)
    LRPE      x -> Λ^t P x with P unitary and Λ^t a rotation, a permutation or e^{itθ}  (arXiv:2307.09270)
    GRAPE-M   x -> exp(t L) x with L = a bᵀ - b aᵀ, or with a learned θ per head, or with a phase
              Φ_t = Σ_{l<t} ω(x_l) for t, which tokens set as they are read             (arXiv:2512.07805)
    GRAPE-A   scores fall by (t - s) w_h softplus(u_h · q_t / √K), or by the same of k_s
    ALiBi     scores fall by (t - s) m_h                                                (arXiv:2108.12409)

Only what depends on distances survives q·k: (Λ^t P q)·(Λ^s P k) = q·(P† Λ^{s-t} P k). Keys are kept turned. A learned
gain per channel must come before a turn, not after: it does not commute with it.

Angles are formed in float64 and reduced to one turn: in float32, t·θ is off by a hundredth of a turn at t = 10⁶.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Scan, Stream, linear
from isotach.ops.recurrence import state_dtype
from isotach.ops.running import Running


def ladder(width: int, *, base: float = 10000.0) -> Float[Tensor, "K"]:
    """base^(-2j / width) for j = 0..width-1, float32."""
    exponent = torch.arange(width, dtype=torch.float64) * (-2.0 / width)
    return (base**exponent).float()


def angles(positions: Int[Tensor, "B T"], theta: Float[Tensor, "..."]) -> Float[Tensor, "B T ..."]:
    """positions · theta within one turn, in theta's dtype; differentiable in theta."""
    turns = positions.to(torch.float64)[(..., *(None,) * theta.dim())] * theta.to(torch.float64)
    return torch.remainder(turns, 2 * math.pi).to(theta.dtype)


def lrpe(x: Float[Tensor, "B T H K"], angle: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H 2K"]:
    """LRPE's complex core on real channels."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([x * cos, x * sin], -1)


def rope(x: Float[Tensor, "B T H K"], angle: Float[Tensor, "B T 1 K/2"]) -> Float[Tensor, "B T H K"]:
    """Channel j is paired with channel j + K/2."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8(h+1)/H); for other H, those of the lower power of two, then every second one of the next."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2 ** (-4 * (h + 1) / power) for h in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]


def plane_rotation(
    x: Float[Tensor, "... K"], a: Float[Tensor, "... K"], b: Float[Tensor, "... K"], turns: Float[Tensor, "..."]
) -> Float[Tensor, "... K"]:
    """exp(turns · L) x with L = a bᵀ - b aᵀ, in O(K): GRAPE-M's general generator.

    A rotation in the plane of a and b by turns · √(|a|²|b|² - (a·b)²), from b towards a; the identity elsewhere, and
    where a and b are parallel. With (e_{j+K/2}, e_j) for (a, b) and turns = t θ_j, plane after plane, it is RoPE.
    """
    dtype = x.dtype
    x, a, b, turns = (value.double() for value in (x, a, b, turns))
    alpha, beta, gamma = a.square().sum(-1), b.square().sum(-1), (a * b).sum(-1)
    angle = turns * (alpha * beta - gamma.square()).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    # sin(z)/z and (1 - cos z)/z² without a case for small z.
    first = turns * torch.sinc(angle / math.pi)
    second = turns.square() / 2 * torch.sinc(angle / (2 * math.pi)).square()
    u, v = (a * x).sum(-1), (b * x).sum(-1)
    along_a = first * v + second * (gamma * v - beta * u)
    along_b = second * (gamma * u - alpha * v) - first * u
    return (x + along_a[..., None] * a + along_b[..., None] * b).to(dtype)


Turning = Literal["fixed", "learned", "contextual", "released"]


class Rope(nn.Module):
    """Turns q and k by what `kind` says.

    fixed         t θ_j
    learned       t θ_hj, θ learned per head from the same start (GRAPE-M, non-contextual)
    contextual    Φ_t θ_j, Φ_t the sum over earlier tokens of ω = softplus(x w_h + b_h), at first 1e-3
    released      the same with ω = sigmoid((x w_h + b_h) / 16), as GRAPE's code has it: at first 0.394

    `heads` are those of k, each with the θ and Φ of the query heads it serves.
    """

    theta: Tensor

    def __init__(self, width: int, heads: int, size: int, *, kind: Turning, base: float) -> None:
        super().__init__()
        theta = ladder(size, base=base)[: size // 2]
        self.kind, self.rate, self.log_theta = kind, None, None
        if kind == "learned":
            self.log_theta = nn.Parameter(theta.log().expand(heads, -1).clone())
        else:
            self.register_buffer("theta", theta, persistent=False)
        if kind in ("contextual", "released"):
            self.rate, self.clock = linear(width, heads, bias=True), Running()

    def initialize(self, stream: Stream, std: float) -> None:
        """Every token turns alike at first, as released; `std` is not used."""
        if self.rate is not None:
            nn.init.zeros_(self.rate.weight)
            nn.init.constant_(self.rate.bias, math.log(math.expm1(1e-3)))

    def forward(
        self, q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T G K"], x: Float[Tensor, "B T D"], scan: Scan
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T G K"]]:
        if self.log_theta is not None:
            angle = angles(scan.span.positions, self.log_theta.exp())
        elif self.rate is not None:
            angle = torch.remainder(self._phase(self.rate(x), scan)[..., None] * self.theta.double(), 2 * math.pi)
        else:
            angle = angles(scan.span.positions, self.theta)[:, :, None]
        own = angle if angle.shape[2] == 1 else angle.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return rope(q, own), rope(k, angle)

    def _phase(self, rate: Tensor, scan: Scan) -> Tensor:
        """Φ (B, T, G), float64."""
        rate = rate.to(state_dtype(rate))
        step = F.softplus(rate) if self.kind == "contextual" else torch.sigmoid(rate / 16)
        high, low = scan("phase", self.clock, Running.Inputs(step)).double().chunk(2, -1)
        return high + low - step.double()


class Slopes(nn.Module):
    """GRAPE-A's gate, what a query or key takes off per token of distance: w_h softplus(u_h · x_h / √K) ≥ 0.

    u_h is used at length 1; w_h = softplus(scale_h) times the head's ALiBi slope, at first the slope itself.
    """

    slopes: Tensor

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(heads, size))
        self.scale = nn.Parameter(torch.full((heads,), math.log(math.expm1(1.0))))
        self.register_buffer("slopes", torch.tensor(alibi_slopes(heads)), persistent=False)

    def initialize(self, stream: Stream, std: float) -> None:
        """u from N(0, 1/K); `std` is for linear maps."""
        nn.init.normal_(self.direction, std=self.direction.shape[1] ** -0.5, generator=stream("direction"))

    def forward(self, x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H"]:
        wide = state_dtype(x)
        along = (x.to(wide) * F.normalize(self.direction, dim=-1)).sum(-1) * x.shape[-1] ** -0.5
        return F.softplus(along) * F.softplus(self.scale) * self.slopes


Core = Literal["rotation", "mixed", "permutation", "complex"]
Basis = Literal["identity", "dct", "householder", "odd_even", "dft"]


class LRPE(nn.Module):
    """x -> Λ^t P x for every head alike.

    core    rotation     channels 2j and 2j + 1 are turned by t θ_j
            mixed        the same in the first half of the channels, the rest as they are
            permutation  channels are reordered by the t-th power of a random permutation; periodic, so positions alias
            complex      channel j times e^{i t θ_j}; real and imaginary parts side by side, so the width doubles
    basis   P: identity, orthonormal DCT-II, the reflection along a random direction, even channels before odd ones, or
            the orthonormal DFT, for the complex core
    learned  whether θ, from 10000^(-2j / K), is a parameter

    Random directions and permutations are drawn once and saved with the weights.
    """

    matrix: Tensor | None
    mirror: Tensor | None
    cycles: Tensor | None

    def __init__(self, size: int, *, core: Core = "rotation", basis: Basis = "identity", learned: bool = True) -> None:
        super().__init__()
        if basis == "dft" and core != "complex":
            raise ValueError(f"lrpe: basis dft is complex; got core {core!r}; use core='complex'")
        if core == "rotation" and size % 2:
            raise ValueError(f"lrpe: core rotation turns pairs; got {size} channels; make them even")
        self.size, self.core, self.basis = size, core, basis
        self.turned = {"rotation": size, "mixed": size // 2 // 2 * 2, "permutation": 0, "complex": 2 * size}[core]
        theta = ladder(size)[: self.turned // 2]
        self.theta = nn.Parameter(theta, requires_grad=learned)
        matrix = _dct(size) if basis == "dct" else _dft(size) if basis == "dft" else None
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("mirror", torch.empty(size) if basis == "householder" else None)
        cycles = torch.empty(4, size, dtype=torch.int64)
        self.register_buffer("cycles", cycles if core == "permutation" else None)

    def initialize(self, stream: Stream, std: float) -> None:
        """Draw the reflection's direction and the permutation; `std` is for linear maps."""
        if self.mirror is not None:
            self.mirror.normal_(generator=stream("mirror"))
        if self.cycles is not None:
            self.cycles.copy_(_cycles(torch.randperm(self.size, generator=stream("permutation")).tolist()))

    def forward(self, x: Float[Tensor, "B T H K"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T H E"]:
        """E is K, or 2 K for the complex core."""
        x = self._in_basis(x)
        if self.cycles is not None:
            member, start, offset, size = self.cycles
            source = member[start + (offset + positions[..., None]) % size]
            return x.gather(-1, source[:, :, None].expand_as(x))
        angle = angles(positions, self.theta)[:, :, None]
        if self.basis == "dft":
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            real, imaginary = x.chunk(2, -1)
            return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
        if self.core == "complex":
            return lrpe(x, angle)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., : self.turned].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([turned, x[..., self.turned :]], -1)

    def _in_basis(self, x: Tensor) -> Tensor:
        """P x; for the DFT its real and imaginary parts side by side."""
        if self.matrix is not None:
            return x @ self.matrix.to(x.dtype).T
        if self.mirror is not None:
            mirror = F.normalize(self.mirror.to(x.dtype), dim=0)
            return x - 2 * (x @ mirror)[..., None] * mirror
        return torch.cat([x[..., ::2], x[..., 1::2]], -1) if self.basis == "odd_even" else x


def _dct(size: int) -> Float[Tensor, "K K"]:
    """The orthonormal DCT-II, float64."""
    at = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * at[:, None] * (at + 0.5)) * (2 / size) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix


def _dft(size: int) -> Float[Tensor, "2K K"]:
    """The orthonormal DFT, float64: real rows, then imaginary ones."""
    at = torch.arange(size, dtype=torch.float64)
    angle = -2 * math.pi / size * at[:, None] * at
    return torch.cat([angle.cos(), angle.sin()]) / size**0.5


def _cycles(permutation: list[int]) -> Int[Tensor, "4 K"]:
    """Channels cycle by cycle; and for every channel where its cycle begins there, its place in it, its length."""
    member: list[int] = []
    table = torch.empty(4, len(permutation), dtype=torch.int64)
    for channel in range(len(permutation)):
        if channel in member:
            continue
        cycle, start = [channel], len(member)
        while (following := permutation[cycle[-1]]) != channel:
            cycle.append(following)
        for offset, each in enumerate(cycle):
            table[1:, each] = torch.tensor([start, offset, len(cycle)])
        member += cycle
    table[0] = torch.tensor(member)
    return table
