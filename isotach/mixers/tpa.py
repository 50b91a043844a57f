"""Tensor Product Attention, the attention of T6: queries, keys and values are sums of a few outer products.

    Q_t = 1/P Σ_p a_p(x_t)ᵀ b_p(x_t)      a over heads, b over features, all linear; K_t and V_t with R and U such terms
    o_t = Σ_{s≤t} softmax_s(Q_t · K_s / √K) V_s per head,    y = o Wo

Only factors are kept, R (H + K) + U (H + V) numbers a token, and RoPE turns b_q and b_k alone. A factor's map has its
rows term by term: for a (term, head), for b (term, feature).

Tensor Product Attention Is All You Need (arXiv:2501.06425). Paper and code differ in how factors begin: the paper draws
every map as Xavier does, `init = "released"` with the code's narrower bounds, which makes early queries about fifteen
times smaller. T6 also begins Wo at zero, and raises heads until it has as many parameters as plain attention: 34 heads
of 64 for a width of 768.
"""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream, linear
from isotach.nn.positions import angles, ladder, rope
from isotach.ops.factored import Factored


class TPA(Mixer):
    class Config(MixerConfig):
        """own_heads, head_width: where they are not the model's heads and width / heads; query_rank, key_rank,
        value_rank: terms of Q, K and V, query_rank None for an ordinary projection (KV-only); init: as the paper says
        or as the code does; rope_base: channel pair j turns by rope_base^(-2j / K) per token.
        """

        own_heads: int | None = Field(None, ge=1)
        head_width: int | None = Field(None, ge=2)
        query_rank: int | None = Field(6, ge=1)
        key_rank: int = Field(2, ge=1)
        value_rank: int = Field(2, ge=1)
        init: Literal["paper", "released"] = "paper"
        rope_base: float = Field(10000.0, gt=1)

        @model_validator(mode="after")
        def _pairs(self) -> Self:
            if (size := self.head_width or self.width // self.heads) % 2:
                raise ValueError(f"heads of {size} are odd, and RoPE turns pairs; make head_width even")
            return self

    theta: Tensor
    eye: Tensor

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence, self.init = config.own_heads or config.heads, Factored(), config.init
        size = config.head_width or config.width // config.heads
        self.ranks = {"q": config.query_rank or self.heads, "k": config.key_rank, "v": config.value_rank}
        self.a_q = linear(config.width, self.ranks["q"] * self.heads) if config.query_rank else None
        self.a_k, self.a_v = (linear(config.width, self.ranks[side] * self.heads) for side in "kv")
        self.b_q, self.b_k, self.b_v = (linear(config.width, self.ranks[side] * size) for side in "qkv")
        self.out = linear(self.heads * size, config.width)
        self.register_buffer("theta", ladder(size, base=config.rope_base)[: size // 2], persistent=False)
        # An ordinary query has one term per head, whose head vector is that head's, times the terms it is divided by.
        self.register_buffer("eye", self.heads * torch.eye(self.heads), persistent=False)

    def initialize(self, stream: Stream, std: float) -> None:
        """Factors uniform as Xavier has it, Wo zero; `std` is not used."""
        torch.nn.init.zeros_(self.out.weight)
        for name in ("a_q", "b_q", "a_k", "b_k", "a_v", "b_v"):
            if (factor := getattr(self, name)) is not None:
                bound = self._bound(name, *factor.weight.shape)
                torch.nn.init.uniform_(factor.weight, -bound, bound, generator=stream(f"{name}.weight"))

    def _bound(self, name: str, outputs: int, inputs: int) -> float:
        """Xavier's; the code takes a factor's map for a tensor (inputs, heads, terms) or (inputs, terms, features)."""
        if self.init == "paper" or (name == "b_q" and self.a_q is None):
            return math.sqrt(6 / (inputs + outputs))
        terms = self.ranks[name[-1]]
        size = outputs // terms
        return math.sqrt(6 / ((inputs + size) * terms if name[0] == "a" else (inputs + terms) * size))

    def project(self, x: Tensor, scan: Scan) -> tuple[Factored.Inputs, None]:
        a_k, b_k, a_v, b_v = (
            factor(x).unflatten(-1, (self.ranks[side], -1))
            for side, pair in (("k", (self.a_k, self.b_k)), ("v", (self.a_v, self.b_v)))
            for factor in pair
        )
        b_q = self.b_q(x).unflatten(-1, (self.ranks["q"], -1))
        a_q = self.eye.to(x.dtype).expand(*x.shape[:2], -1, -1)
        if self.a_q is not None:
            a_q = self.a_q(x).unflatten(-1, (self.ranks["q"], -1))
        angle = angles(scan.span.positions, self.theta)[:, :, None]
        return Factored.Inputs(a_q, rope(b_q, angle), a_k, rope(b_k, angle), a_v, b_v), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        return self.out(o.flatten(-2))
