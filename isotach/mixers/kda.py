"""Kimi Delta Attention: the delta rule over a memory that fades at a rate of its own in every key channel.

    q, k, v = silu(conv(x Wq)), silu(conv(x Wk)), silu(conv(x Wv))      q, k ← q / |q|, k / |k|      β = sigmoid(x Wb)
    S ← diag(a_t) S_{t-1}      S_t = S + β_t k_t (v_t - kᵀ_t S)          a_t = exp(-e^A softplus(x_t Wa₁ Wa₂ + b))
    o_t = q_t S_t / √K                                                   y = (RMSNorm(o) ∘ sigmoid(x Wg₁ Wg₂ + c)) Wo

The memory fades before it is read. Both gates are products of two thin matrices, as thin as a value head; A is one
number per head, b one per channel. Several value heads may share a key head. Each head has its own norm, with one gain
for all heads. Kimi Linear puts one layer of softmax attention without positions after three of these.

Kimi Linear (arXiv:2510.26692), initialised as its released code is. Bounded, a_t = exp(bound · sigmoid(e^A (· + b))),
as in the fast variant of that code, which takes -5.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotach.nn.conv import ShortConv
from isotach.nn.forget import Forget
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, check_expanded, linear
from isotach.nn.norm import gated, l2norm
from isotach.ops.delta import Delta
from isotach.ops.recurrence import state_dtype

RATES = (1.0, 16.0)  # e^A at the beginning


class Kda(Mixer):
    class Config(MixerConfig):
        """expand_k, expand_v: widths of all keys and of all values, as multiples of the model's; value_heads: a
        multiple of heads, which are those of q and k, None for as many; conv_size: tokens the convolution reads; bound:
        the lowest log_decay, None for none; gate: whether and how the output is gated by x; negative_eigenvalues: β up
        to 2 instead of 1.
        """

        expand_k: float = Field(1.0, gt=0)
        expand_v: float = Field(1.0, gt=0)
        value_heads: int | None = Field(None, ge=1)
        conv_size: int = Field(4, ge=1)
        bound: float | None = Field(None, lt=0)
        gate: Literal["sigmoid", "silu", "none"] = "sigmoid"
        negative_eigenvalues: bool = False

        @model_validator(mode="after")
        def _divides_expanded(self) -> Self:
            value_heads = self.value_heads or self.heads
            if value_heads % self.heads:
                raise ValueError(f"value_heads = {value_heads} is not a multiple of heads = {self.heads}; choose one")
            check_expanded(self, "expand_k", self.heads, "heads")
            check_expanded(self, "expand_v", value_heads, "value_heads")
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, self.key_heads, self.heads = config.width, config.heads, config.value_heads or config.heads
        self.recurrence = Delta()
        self.keys, self.values = round(width * config.expand_k), round(width * config.expand_v)
        channels, thin = self.keys // self.key_heads, self.values // self.heads
        self.read = linear(width, 2 * self.keys + self.values)  # q, k and v
        self.conv = ShortConv(2 * self.keys + self.values, size=config.conv_size)
        self.beta, self.strongest = linear(width, self.heads), 2.0 if config.negative_eigenvalues else 1.0
        self.decay = nn.Sequential(linear(width, thin), linear(thin, self.heads * channels))
        self.forget = Forget(self.heads, channels, rates=RATES, bound=config.bound)
        gated = config.gate != "none"
        self.gate = nn.Sequential(linear(width, thin), linear(thin, self.values, bias=True)) if gated else None
        self.activation = config.gate
        self.norm = nn.RMSNorm(thin, eps=1e-5)
        self.out = linear(self.values, width)

    def project(self, x: Tensor, scan: Scan) -> tuple[Delta.Inputs, Tensor]:
        q, k, v = self.conv(self.read(x), scan, "conv").split((self.keys, self.keys, self.values), -1)
        q, k = self._for_every_value_head(q), self._for_every_value_head(k)
        beta = self.strongest * torch.sigmoid(self.beta(x).to(state_dtype(x))).unsqueeze(-1)
        return Delta.Inputs(q * q.shape[-1] ** -0.5, k, self.split(v), beta, self.forget(self.decay(x))), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(self.norm, o, None if self.gate is None else self.gate(x), self.activation))

    def _for_every_value_head(self, x: Tensor) -> Tensor:
        """(B, T, keys) of length 1 per key head, each repeated for the value heads it serves."""
        return l2norm(x.unflatten(-1, (self.key_heads, -1))).repeat_interleave(self.heads // self.key_heads, 2)
