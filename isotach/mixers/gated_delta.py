"""Gated DeltaNet: the delta rule over a memory that also fades, at a rate that each head draws from each token.

    q, k, v = silu(conv(x Wq)), silu(conv(x Wk)), silu(conv(x Wv))      q, k ← q / |q|, k / |k|      β = sigmoid(x Wb)
    S ← a_t S_{t-1}      S_t = S + β_t k_t (v_t - kᵀ_t S)                a_t = exp(-e^A softplus(x_t Wa + b))
    o_t = q_t S_t / √K                                                   y = (RMSNorm(o) ∘ silu(x Wg)) Wo

The memory fades before it is read. Values are twice as wide as keys, so that a layer has 6 width² parameters; several
value heads may share a key head. Each head has its own norm, with one gain for all heads.

Gated Delta Networks (arXiv:2412.06464), initialised as released code is, but for rates below 1/1000: they may be drawn
as 0 there, a gate that never moves. The Kimi Linear report (arXiv:2510.26692) finds a sigmoid output gate better.
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

RATES = (1e-3, 16.0)  # e^A at the beginning


class GatedDelta(Mixer):
    class Config(MixerConfig):
        """expand_k, expand_v: widths of all keys and of all values, as multiples of the model's; value_heads: a
        multiple of heads, which are those of q and k, None for as many; conv_size: tokens the convolution reads; gate:
        whether and how the output is gated by x; negative_eigenvalues: β up to 2 instead of 1; beta_bias: one of the
        two released codes has it.
        """

        expand_k: float = Field(0.75, gt=0)
        expand_v: float = Field(1.5, gt=0)
        value_heads: int | None = Field(None, ge=1)
        conv_size: int = Field(4, ge=1)
        gate: Literal["silu", "sigmoid", "none"] = "silu"
        negative_eigenvalues: bool = False
        beta_bias: bool = False

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
        self.key_heads, self.heads, self.recurrence = config.heads, config.value_heads or config.heads, Delta()
        self.keys, self.values = round(config.width * config.expand_k), round(config.width * config.expand_v)
        self.read = linear(config.width, 2 * self.keys + self.values)  # q, k and v
        self.conv = ShortConv(2 * self.keys + self.values, size=config.conv_size)
        self.beta = linear(config.width, self.heads, bias=config.beta_bias)
        self.strongest = 2.0 if config.negative_eigenvalues else 1.0
        self.decay, self.forget = linear(config.width, self.heads), Forget(self.heads, 1, rates=RATES)
        self.gate = None if config.gate == "none" else linear(config.width, self.values)
        self.activation = config.gate
        self.norm = nn.RMSNorm(self.values // self.heads, eps=1e-5)
        self.out = linear(self.values, config.width)

    def project(self, x: Tensor, scan: Scan) -> tuple[Delta.Inputs, Tensor]:
        q, k, v = self.conv(self.read(x), scan, "conv").split((self.keys, self.keys, self.values), -1)
        q, k = self._for_every_value_head(q), self._for_every_value_head(k)
        beta = self.strongest * torch.sigmoid(self.beta(x).to(state_dtype(x))).unsqueeze(-1)
        log_decay = self.forget(self.decay(x))
        return Delta.Inputs(q * q.shape[-1] ** -0.5, k, self.split(v), beta, log_decay), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(self.norm, o, None if self.gate is None else self.gate(x), self.activation))

    def _for_every_value_head(self, x: Tensor) -> Tensor:
        """(B, T, keys) of length 1 per key head, each repeated for the value heads it serves."""
        return l2norm(x.unflatten(-1, (self.key_heads, -1))).repeat_interleave(self.heads // self.key_heads, 2)
