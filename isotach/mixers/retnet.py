"""Multi-scale retention: linear attention with rotary positions in which head h fades by γ_h = 1 - 2^{-5-h} per token.

    q, k = rope(x Wq), rope(x Wk)      v = x Wv
    S_t = γ_h S_{t-1} + k_tᵀ v_t       o_t = q_t S_t / √K       y = (norm(o) ∘ silu(x Wg)) Wo

Values are twice as wide as keys. Rotation is by the absolute position, so it continues across calls.

Retentive Network (arXiv:2307.08621). The paper normalises each head by GroupNorm; released code by RMSNorm with one
gain for all heads, which is the default.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, check_expanded, linear
from isotach.nn.norm import gated
from isotach.nn.positions import angles, ladder, rope
from isotach.ops.decay import Decay


class Retnet(Mixer):
    class Config(MixerConfig):
        """expand_k, expand_v: widths of all keys and of all values, as multiples of the model's; norm: of each head, as
        in released code or as in the paper; rope_base: channel pair j turns by rope_base^(-2j / K) per token.
        """

        expand_k: float = Field(1.0, gt=0)
        expand_v: float = Field(2.0, gt=0)
        norm: Literal["rms", "group"] = "rms"
        rope_base: float = Field(10000.0, gt=1)

        @model_validator(mode="after")
        def _divides_expanded(self) -> Self:
            check_expanded(self, "expand_k", 2 * self.heads, "twice heads (RoPE turns pairs)")
            check_expanded(self, "expand_v", self.heads, "heads")
            return self

    theta: Tensor
    log_decay: Tensor

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence = config.heads, Decay()
        width, keys, values = config.width, round(config.width * config.expand_k), round(config.width * config.expand_v)
        self.q, self.k, self.v = linear(width, keys), linear(width, keys), linear(width, values)
        self.gate, self.out = linear(width, values), linear(values, width)
        rms = config.norm == "rms"
        self.norm = nn.RMSNorm(values // self.heads, eps=1e-5) if rms else nn.GroupNorm(self.heads, values, eps=1e-5)
        head = keys // self.heads
        self.scale = head**-0.5
        self.register_buffer("theta", ladder(head, base=config.rope_base)[: head // 2], persistent=False)
        gone = 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float64))
        self.register_buffer("log_decay", torch.log1p(-gone).float(), persistent=False)

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, Tensor]:
        q, k, v = self.split(self.q(x)) * self.scale, self.split(self.k(x)), self.split(self.v(x))
        angle = angles(scan.span.positions, self.theta)[:, :, None]
        log_decay = self.log_decay.view(1, 1, self.heads, 1).expand(x.shape[0], -1, -1, -1)
        return Decay.Inputs(rope(q, angle), rope(k, angle), v, log_decay), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self.gate(x)
        if isinstance(self.norm, nn.RMSNorm):
            return self.out(gated(self.norm, o, gate, "silu"))
        y = self.norm(o.flatten(0, 1).flatten(1)).unflatten(0, x.shape[:2])
        return self.out(y * F.silu(gate))
