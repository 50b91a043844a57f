"""Lightning Attention as in TransNormerLLM: linear attention that fades at a fixed rate per head and layer.

    q, k = silu(x Wq), silu(x Wk)      v, u = x Wv, x Wu
    S_t = λ S_{t-1} + k_tᵀ v_t         o_t = q_t S_t         y = (SRMSNorm(o) ∘ u) Wo

LRPE turns q and k by a learned angle per head and channel, in the first layer only as published. The norm spans all
heads and comes before the gate; q is not scaled by 1/√K.

TransNormerLLM (arXiv:2307.14995), Various Lengths, Constant Speed (arXiv:2405.17381). Where the papers' formula for λ
and every released model differ, `decay = "released"` follows the models: larger heads fade more slowly.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.norm import SRMSNorm
from isotach.nn.positions import angles, ladder, lrpe
from isotach.ops.decay import Decay


class Lightning(Mixer):
    class Config(MixerConfig):
        """lrpe: the layers that encode positions; decay: rates as in the released models, or as the papers print them;
        gate: the output gate u.
        """

        lrpe: Literal["first", "all", "none"] = "first"
        decay: Literal["released", "paper"] = "released"
        gate: bool = True

    log_decay: Tensor

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width = config.width
        self.heads, self.recurrence = config.heads, Decay()
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.gate = linear(width, width) if config.gate else None
        self.norm = SRMSNorm(width)
        encodes = config.lrpe == "all" or (config.lrpe == "first" and place.index == 0)
        # One ladder over all heads, from 1 down to 1e-8, as released.
        self.theta = nn.Parameter(ladder(width).view(config.heads, -1)) if encodes else None
        rates = released_rates(config.heads, place) if config.decay == "released" else paper_rates(config.heads, place)
        self.register_buffer("log_decay", -rates, persistent=False)

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, Tensor]:
        q, k, v = self.split(F.silu(self.q(x))), self.split(F.silu(self.k(x))), self.split(self.v(x))
        if self.theta is not None:
            angle = angles(scan.span.positions, self.theta)
            q, k = lrpe(q, angle), lrpe(k, angle)
        log_decay = self.log_decay.view(1, 1, self.heads, 1).expand(x.shape[0], -1, -1, -1)
        return Decay.Inputs(q, k, v, log_decay), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        y = self.norm(o.flatten(-2))
        return self.out(y if self.gate is None else y * self.gate(x))


def released_rates(heads: int, place: Place) -> Tensor:
    """-log λ (H,) float32: ALiBi's slope of the head, scaled down towards the last layer, which hardly fades."""
    factor = 1.0 if place.depth == 1 else 1 - place.index / (place.depth - 1) + 1e-5
    return torch.tensor(alibi_slopes(heads), dtype=torch.float64).mul(factor).float()


def paper_rates(heads: int, place: Place) -> Tensor:
    """-log λ (H,) float32: (8h / H)(1 - l / L), h = 1..H, as the papers print it."""
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    return (8 * head / heads * (1 - place.index / place.depth)).float()


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8(h+1)/H); for other H, those of the lower power of two, then every second one of the next."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2 ** (-4 * (h + 1) / power) for h in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]
