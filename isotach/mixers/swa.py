"""Softmax attention through a sliding window, and to the first tokens of the document, the sinks: constant memory.

    o_t = Σ_s softmax_s(q_t · k_s / √K) v_s  over s < sinks and t - window < s ≤ t,    y = o Wo

RoPE turns q and k by the token's place in the document, in the window as in the sinks: a sink is ever farther away, as
in full attention under a mask, and not at the window's edge, where StreamingLLM moves it.

Sliding windows (Longformer, arXiv:2004.05150), attention sinks (arXiv:2309.17453).
"""

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.positions import Rope
from isotach.ops.history import Sliding


class SWA(Mixer):
    class Config(MixerConfig):
        """window: tokens read, the token itself among them; sinks: first tokens that are always read; kv_heads: heads
        of k and v, each serving heads / kv_heads query heads, None for as many as heads; rope_base: channel pair j
        turns by rope_base^(-2j / K) per token.
        """

        window: int = Field(512, ge=1)
        sinks: int = Field(4, ge=0)
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

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence = config.heads, Sliding(config.window, config.sinks)
        self.kv_heads = config.kv_heads or config.heads
        width, head = config.width, config.width // config.heads
        self.q, self.out = linear(width, width), linear(width, width)
        self.k, self.v = (linear(width, self.kv_heads * head) for _ in range(2))
        self.rope = Rope(width, self.kv_heads, head, kind="fixed", base=config.rope_base)

    def project(self, x: Tensor, scan: Scan) -> tuple[Sliding.Inputs, None]:
        k, v = (f(x).unflatten(-1, (self.kv_heads, -1)) for f in (self.k, self.v))
        q, k = self.rope(self.split(self.q(x)), k, x, scan)
        return Sliding.Inputs(q, k, v), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        return self.out(o.flatten(-2))
