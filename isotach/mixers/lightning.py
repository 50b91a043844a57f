"""Lightning Attention as in TransNormerLLM: linear attention that fades at a fixed rate per head and layer.

    q, k = silu(x Wq), silu(x Wk)      v, u = x Wv, x Wu
    S_t = λ S_{t-1} + k_tᵀ v_t         o_t = q_t S_t         y = (SRMSNorm(o) ∘ u) Wo

LRPE turns q and k by a learned angle per head and channel, in the first layer only as published. The norm spans all
heads and comes before the gate; q is not scaled by 1/√K.

TransNormerLLM (arXiv:2307.14995), Various Lengths, Constant Speed (arXiv:2405.17381). Where the papers' formula for λ
and every released model differ, `decay = "released"` follows the models: larger heads fade more slowly. MiniMax-01
(arXiv:2501.08313) is lrpe = "none", decay = "minimax", values = "silu", gate_activation = "sigmoid", norm_gain = true.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.norm import SRMSNorm, gated
from isotach.nn.positions import alibi_slopes, angles, ladder, lrpe
from isotach.ops.decay import Decay


class Lightning(Mixer):
    class Config(MixerConfig):
        """lrpe: the layers that encode positions; decay: rates as TransNormerLLM's released models have them, as the
        papers print them, or as MiniMax-01 has them; values: silu on v as well; gate: the output gate u;
        gate_activation: what u goes through; norm_gain: a learned gain in the norm.
        """

        lrpe: Literal["first", "all", "none"] = "first"
        decay: Literal["released", "paper", "minimax"] = "released"
        values: Literal["linear", "silu"] = "linear"
        gate: bool = True
        gate_activation: Literal["none", "sigmoid"] = "none"
        norm_gain: bool = False

        @model_validator(mode="after")
        def _gated(self) -> Self:
            if self.gate_activation != "none" and not self.gate:
                raise ValueError(f"gate_activation = {self.gate_activation!r} without a gate; set gate = true")
            return self

    log_decay: Tensor

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width = config.width
        self.heads, self.recurrence = config.heads, Decay()
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.gate = linear(width, width) if config.gate else None
        self.norm = nn.RMSNorm(width, eps=1e-6) if config.norm_gain else SRMSNorm(width)
        encodes = config.lrpe == "all" or (config.lrpe == "first" and place.index == 0)
        # One ladder over all heads, from 1 down to 1e-8, as released.
        self.theta = nn.Parameter(ladder(width).view(config.heads, -1)) if encodes else None
        self.activate_values, self.activation = config.values == "silu", config.gate_activation
        self.register_buffer("log_decay", -RATES[config.decay](config.heads, place), persistent=False)

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, Tensor]:
        q, k, v = self.split(F.silu(self.q(x))), self.split(F.silu(self.k(x))), self.split(self.v(x))
        if self.activate_values:
            v = F.silu(v)
        if self.theta is not None:
            angle = angles(scan.span.positions, self.theta)
            q, k = lrpe(q, angle), lrpe(k, angle)
        log_decay = self.log_decay.view(1, 1, self.heads, 1).expand(x.shape[0], -1, -1, -1)
        return Decay.Inputs(q, k, v, log_decay), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(self.norm, o, None if self.gate is None else self.gate(x), self.activation))


def released_rates(heads: int, place: Place) -> Tensor:
    """-log λ (H,) float32: ALiBi's slope of the head, scaled down towards the last layer, which hardly fades."""
    factor = 1.0 if place.depth == 1 else 1 - place.index / (place.depth - 1) + 1e-5
    return torch.tensor(alibi_slopes(heads), dtype=torch.float64).mul(factor).float()


def paper_rates(heads: int, place: Place) -> Tensor:
    """-log λ (H,) float32: (8h / H)(1 - l / L), h = 1..H, as the papers print it."""
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    return (8 * head / heads * (1 - place.index / place.depth)).float()


def minimax_rates(heads: int, place: Place) -> Tensor:
    """-log λ (H,) float32: the slope 2^(-8h / H), h = 1..H, scaled as MiniMax-01 rounds it, also in its only layer."""
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    return (2 ** (-8 * head / heads) * (1 - place.index / (place.depth - 1 + 1e-5) + 1e-5)).float()


RATES = {"released": released_rates, "paper": paper_rates, "minimax": minimax_rates}
