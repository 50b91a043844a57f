"""Softmax attention with grouped heads: the comparison, whose memory grows.

    o_t = Σ_{s≤t} softmax_s(q_t · k_s / √K + bias(t, s)) v_s,    y = o Wo

`positions` says what tells tokens apart that are alike: a rotation of q and k, or the bias.

    rope               q, k turned by t θ_j                                                  (arXiv:2104.09864)
    grape_m            the same, θ learned per head                                          (arXiv:2512.07805)
    grape_ctx          turned by Φ_t θ_j, Φ_t = Σ_{l<t} softplus(x_l w_h + b_h)
    grape_ctx_released the same with sigmoid((x_l w_h + b_h) / 16), as the released code has it
    alibi              bias = -(t - s) m_h                                                   (arXiv:2108.12409)
    fox                bias = Σ_{s<l≤t} ln sigmoid(x_l w_h + b_h)                            (arXiv:2503.02130)
    grape_aq, grape_ak, grape_aqk
                       bias = -(t - s) times a slope from q_t, from k_s, from both           (arXiv:2512.07805)
    rpe:NAME           bias = ln b_NAME(m_h (t - s)), NAME one of isotach.nn.receptive.ENCODINGS
    none

m_h are ALiBi's slopes. Whatever the bias is made of, it is formed from distances and from what each token left, tile by
tile, so decoding and training agree. qk_norm comes before the rotation, with which a gain per channel does not commute.
GRAPE's path-integral bias, which needs T × T gates, and its key-value shift are not here.

Attention Is All You Need (arXiv:1706.03762), grouped heads (arXiv:2305.13245).
"""

from typing import Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.config import nearest
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.positions import Rope, Slopes, Turning, alibi_slopes
from isotach.nn.receptive import ENCODINGS, log_bias
from isotach.ops.history import Forgetting, History, Sloped
from isotach.ops.recurrence import Recurrence, Tensors, state_dtype

TURNS: dict[str, Turning] = {
    "rope": "fixed",
    "grape_m": "learned",
    "grape_ctx": "contextual",
    "grape_ctx_released": "released",
}
SLOPED = {"grape_aq": "q", "grape_ak": "k", "grape_aqk": "qk"}
BOTH_WAYS = ("rope", "grape_m", "none")
POSITIONS = (*TURNS, *SLOPED, "alibi", "fox", "none", *(f"rpe:{name}" for name in ENCODINGS))


class Softmax(Mixer):
    class Config(MixerConfig):
        """kv_heads: heads of k and v, each serving heads / kv_heads query heads; None for as many as heads;
        positions: see above; rope_base: channel pair j turns by rope_base^(-2j / K) per token, or per unit of Φ;
        qk_norm: RMSNorm with a learned gain on every head's q and k; causal: false where tokens look both ways, which
        takes positions that turn q and k, or none.
        """

        kv_heads: int | None = Field(None, ge=1)
        positions: str = "rope"
        rope_base: float = Field(10000.0, gt=1)
        qk_norm: bool = False
        causal: bool = True

        @field_validator("positions")
        @classmethod
        def _known(cls, value: str) -> str:
            if value not in POSITIONS:
                raise ValueError(f"{value!r} is not known; {nearest(value, POSITIONS)}")
            return value

        @model_validator(mode="after")
        def _groups(self) -> Self:
            if self.heads % (self.kv_heads or self.heads):
                raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; choose a divisor")
            if self.width // self.heads % 2 and self.positions in TURNS:
                raise ValueError(
                    f"width / heads = {self.width // self.heads} is odd, and RoPE turns pairs; make it even"
                )
            if not self.causal and self.positions not in BOTH_WAYS:
                choice = ", ".join(BOTH_WAYS)
                raise ValueError(
                    f"positions = {self.positions!r} looks back only, and causal is false; choose {choice}"
                )
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence = config.heads, _family(config)
        self.causal = config.causal
        self.kv_heads = config.kv_heads or config.heads
        width, head, kind = config.width, config.width // config.heads, config.positions
        self.q, self.out = linear(width, width), linear(width, width)
        self.k, self.v = (linear(width, self.kv_heads * head) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(head, eps=1e-5) if config.qk_norm else nn.Identity() for _ in range(2))
        self.rope = Rope(width, self.kv_heads, head, kind=TURNS[kind], base=config.rope_base) if kind in TURNS else None
        self.forget = linear(width, config.heads, bias=True) if kind == "fox" else None
        by = SLOPED.get(kind, "")
        self.q_slope, self.k_slope = (Slopes(config.heads, head) if side in by else None for side in "qk")

    def project(self, x: Tensor, scan: Scan) -> tuple[Tensors, None]:
        q = self.q_norm(self.split(self.q(x)))
        k, v = (f(x).unflatten(-1, (self.kv_heads, -1)) for f in (self.k, self.v))
        k = self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, k, x, scan)
        if self.forget is not None:
            gate = self.forget(x)
            return Forgetting.Inputs(q, k, v, F.logsigmoid(gate.to(state_dtype(gate)))), None
        if self.q_slope is None and self.k_slope is None:
            return History.Inputs(q, k, v), None
        none = q.new_zeros(q.shape[:3], dtype=state_dtype(q))
        own = none if self.q_slope is None else self.q_slope(q)
        theirs = none if self.k_slope is None else self.k_slope(k.repeat_interleave(self.heads // self.kv_heads, 2))
        return Sloped.Inputs(q, k, v, own, theirs), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        return self.out(o.flatten(-2))


def _family(config: Softmax.Config) -> Recurrence:
    if config.positions == "fox":
        return Forgetting()
    if config.positions in SLOPED:
        return Sloped()
    name = "exponential" if config.positions == "alibi" else config.positions.removeprefix("rpe:")
    return History(log_bias(ENCODINGS[name], alibi_slopes(config.heads)) if name in ENCODINGS else None)
