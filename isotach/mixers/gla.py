"""Gated Linear Attention: linear attention that learns how fast each key channel forgets, token by token.

    q, k, v = x Wq, x Wk, x Wv        a_t = sigmoid(x Wa₁ Wa₂ + b)^{1/16}
    S_t = diag(a_t) S_{t-1} + k_tᵀ v_t        o_t = q_t S_t / √K        y = (RMSNorm(o) ∘ silu(x Wg)) Wo

The gate is a product of two thin matrices; its temperature 16 lets a layer with small weights remember for 16 tokens
(half-life). Each head has its own norm, with one gain for all heads.

Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635).
"""

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, check_expanded, linear
from isotach.nn.norm import gated
from isotach.ops.decay import Decay
from isotach.ops.recurrence import state_dtype


class Gla(Mixer):
    class Config(MixerConfig):
        """expand_k, expand_v: widths of all keys and of all values, as multiples of the model's; gate_rank: width
        between the gate's two matrices; temperature: the gate's logarithm is divided by it.
        """

        expand_k: float = Field(0.5, gt=0)
        expand_v: float = Field(1.0, gt=0)
        gate_rank: int = Field(16, ge=1)
        temperature: float = Field(16.0, gt=0)

        @model_validator(mode="after")
        def _divides_expanded(self) -> Self:
            for option in ("expand_k", "expand_v"):
                check_expanded(self, option, self.heads, "heads")
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence, self.temperature = config.heads, Decay(), config.temperature
        width, keys, values = config.width, round(config.width * config.expand_k), round(config.width * config.expand_v)
        self.q, self.k, self.v = linear(width, keys), linear(width, keys), linear(width, values)
        self.decay_down, self.decay_up = linear(width, config.gate_rank), linear(config.gate_rank, keys, bias=True)
        self.gate, self.out = linear(width, values), linear(values, width)
        self.norm = nn.RMSNorm(values // config.heads, eps=1e-5)
        self.scale = (keys // config.heads) ** -0.5

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, Tensor]:
        q, k, v = self.split(self.q(x)) * self.scale, self.split(self.k(x)), self.split(self.v(x))
        logits = self.split(self.decay_up(self.decay_down(x)))
        return Decay.Inputs(q, k, v, F.logsigmoid(logits.to(state_dtype(x))) / self.temperature), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(self.norm, o, self.gate(x), "silu"))
