"""RWKV-7 "Goose": a delta rule that removes along one key, writes along another, and fades at a rate per channel.

    x^c_t = x_t + μ_c ∘ (x_{t-1} - x_t)        for each of c = q, w, k, v, a, g
    q, k, v = x^q Wq, x^k Wk, x^v Wv           v ← v + σ(ν(x^v)) ∘ (v¹ - v),  v¹ of the first such layer
    w = exp(-e^{-1/2} σ(ω(x^w)))               a = σ(α(x^a)),  the rate at which the memory learns
    κ = (ξ ∘ k) / |ξ ∘ k|                      k ← k ∘ (1 + ζ ∘ (a - 1))
    S_t = diag(w_t) S_{t-1} - (a_t ∘ κ_t)ᵀ (κ_t S_{t-1}) + k_tᵀ v_t        o_t = q_t S_t
    y = ((GroupNorm(o) + (q ∘ ρ · k) v) ∘ g) Wo

ω, α, ν and g are pairs of thin matrices around tanh, nothing, nothing and a sigmoid; all but g add a bias. What is
removed is read before the memory fades: after it, along κ / w, which is safe since w > 0.545. Layer 0 has no ν, and a
layer that finds no v¹ leaves its own. κ has length 1 in every head; published heads have 64 channels.

RWKV-7 (arXiv:2503.14456), initialised as in its authors' training code (github.com/BlinkDL/RWKV-LM, RWKV-v5/src); that
of embedding and head is the decoder's. It is published with the channel mixer `ffn = "rwkv7"`.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream, linear
from isotach.nn.shift import TokenShift
from isotach.ops.delta import SplitDelta
from isotach.ops.recurrence import state_dtype

FASTEST = -math.exp(-0.5)  # log_decay at its lowest
POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)  # of the shares of q, w, k, v, a, g in the first layer
NORM_EPS = 64e-5


class Rwkv7(Mixer):
    class Config(MixerConfig):
        """decay_rank, rate_rank, blend_rank, gate_rank: inner widths of ω, α, ν and g; None for the published ones, the
        multiples of 32 nearest to 1.8 √width, 1.8 √width, 1.3 √width and 0.6 width^0.8.
        """

        decay_rank: int | None = Field(None, ge=1)
        rate_rank: int | None = Field(None, ge=1)
        blend_rank: int | None = Field(None, ge=1)
        gate_rank: int | None = Field(None, ge=1)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, self.heads, self.recurrence = config.width, config.heads, SplitDelta()
        late, early = place.index / max(place.depth - 1, 1), 1 - place.index / place.depth
        along = torch.arange(width) / max(width - 1, 1)  # 0 in the first channel, 1 in the last
        in_head = torch.linspace(-1, 1, width // config.heads).repeat(config.heads)
        bent = in_head * in_head.abs()

        self.shift = TokenShift(width, [power * early for power in POWERS])
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        slow_to_fast = -5.5 + 6 * along ** (1 + late**0.3) + 2.5 * bent
        self.decay = Thin(width, config.decay_rank or rank(1.8 * width**0.5), nn.Tanh(), bias=slow_to_fast)
        self.rate = Thin(width, config.rate_rank or rank(1.8 * width**0.5), bias=0.3 * bent + 0.4 * along - 0.39)
        self.blend: Thin | None = None
        if place.index > 0:
            self.blend = Thin(width, config.blend_rank or rank(1.3 * width**0.5), bias=0.93 - 0.4 * along)
        self.gate = Thin(width, config.gate_rank or rank(0.6 * width**0.8), nn.Sigmoid())
        # ξ, ζ and ρ; released weights call them k_k, k_a and r_k, and q receptance.
        self.removal = nn.Parameter(0.76 - 0.1 * along)
        self.replacement = nn.Parameter(torch.full((width,), 1.02))
        self.bonus = nn.Parameter(torch.full((config.heads, width // config.heads), -0.04))
        self.norm = nn.GroupNorm(config.heads, width, eps=NORM_EPS)
        nn.init.constant_(self.norm.weight, ((place.index + 1) / place.depth) ** 0.7)

    def initialize(self, stream: Stream, std: float) -> None:
        """Matrices orthogonal, that of keys a tenth as long, the output zero; `std` is for what is drawn otherwise."""
        super().initialize(stream, std)
        for name, gain in (("q", 1.0), ("k", 0.1), ("v", 1.0)):
            nn.init.orthogonal_(getattr(self, name).weight, gain, generator=stream(f"{name}.weight"))
        nn.init.zeros_(self.out.weight)

    def project(self, x: Tensor, scan: Scan) -> tuple[SplitDelta.Inputs, tuple[Tensor, ...]]:
        dtype = state_dtype(x)
        xq, xw, xk, xv, xa, xg = self.shift(x, scan, "shift")
        q, k, v = self.q(xq), self.k(xk), self.v(xv)
        first = scan.shared.setdefault("rwkv7_first_value", v)
        if self.blend is not None:
            v = v + torch.sigmoid(self.blend(xv)) * (first - v)
        log_decay = self.split(FASTEST * torch.sigmoid(self.decay(xw).to(dtype)))
        rate = torch.sigmoid(self.rate(xa).to(dtype))
        removed = F.normalize(self.split((k * self.removal).to(dtype)), dim=-1)
        k = (k * (1 + (rate - 1) * self.replacement)).to(q.dtype)
        q, k, v = self.split(q), self.split(k), self.split(v)
        read, erase = removed * (-log_decay).exp(), removed * self.split(rate)
        return SplitDelta.Inputs(q, read, erase, k, v, log_decay), (q, k, v, self.gate(xg))

    def output(self, o: Tensor, aux: tuple[Tensor, ...]) -> Tensor:
        q, k, v, gate = aux
        normed = self.norm(o.flatten(0, 1).flatten(1)).view_as(o)
        y = normed + (q * self.bonus * k).sum(-1, keepdim=True) * v
        return self.out(y.flatten(-2) * gate)


class Thin(nn.Module):
    """up(act(down(x))) + bias, `rank` wide inside; it begins as its bias, which is none where there is none."""

    def __init__(
        self, width: int, rank: int, activation: nn.Module | None = None, *, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.down, self.up = linear(width, rank), linear(rank, width)
        self.activation = nn.Identity() if activation is None else activation
        self.bias = None if bias is None else nn.Parameter(bias)

    def initialize(self, stream: Stream, std: float) -> None:
        """down zero, up orthogonal and a tenth as long; `std` is for linear maps that are drawn otherwise."""
        nn.init.zeros_(self.down.weight)
        longer = max(1.0, (self.up.in_features / self.up.out_features) ** 0.5)
        nn.init.orthogonal_(self.up.weight, 0.1 * longer, generator=stream("up.weight"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.activation(self.down(x)))
        return y if self.bias is None else y + self.bias


def rank(size: float) -> int:
    """The nearest multiple of 32, at least 32."""
    return max(32, round(size / 32) * 32)
