"""Causal softmax attention with rotary positions and grouped heads: the comparison, whose memory grows.

    o_t = Σ_{s≤t} softmax_s(q_t · k_s / √K) v_s,    q, k rotated by RoPE,    y = o Wo

Attention Is All You Need (arXiv:1706.03762), RoPE (arXiv:2104.09864), grouped heads (arXiv:2305.13245).
"""

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.positions import angles, ladder, rope
from isotach.ops.history import History


class Softmax(Mixer):
    class Config(MixerConfig):
        """kv_heads: heads of k and v, each serving heads / kv_heads query heads; None for as many as heads;
        rope_base: channel pair j turns by rope_base^(-2j / K) per token.
        """

        kv_heads: int | None = Field(None, ge=1)
        rope_base: float = Field(10000.0, gt=1)

        @model_validator(mode="after")
        def _groups(self) -> Self:
            if self.heads % (self.kv_heads or self.heads):
                raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; choose a divisor")
            if self.width // self.heads % 2:
                raise ValueError(
                    f"width / heads = {self.width // self.heads} is odd, and RoPE turns pairs; make it even"
                )
            return self

    theta: Tensor

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence = config.heads, History()
        self.kv_heads = config.kv_heads or config.heads
        head = config.width // config.heads
        self.q, self.out = linear(config.width, config.width), linear(config.width, config.width)
        self.k, self.v = (linear(config.width, self.kv_heads * head) for _ in range(2))
        self.register_buffer("theta", ladder(head, base=config.rope_base)[: head // 2], persistent=False)

    def project(self, x: Tensor, scan: Scan) -> tuple[History.Inputs, None]:
        q = self.split(self.q(x))
        k, v = (f(x).unflatten(-1, (self.kv_heads, -1)) for f in (self.k, self.v))
        angle = angles(scan.span.positions, self.theta)[:, :, None]
        return History.Inputs(rope(q, angle), rope(k, angle), v), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        return self.out(o.flatten(-2))
