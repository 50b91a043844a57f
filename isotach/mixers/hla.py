"""Higher-order linear attention: tokens attend through the similarities that other tokens have among themselves.

    q, k = unit(x Wq), unit(x Wk)      v = x Wv      W_ti = γ_h^{t-i} q_t·k_i for i ≤ t, else 0
    second        o = ((W Wᵀ) ∘ lower) v
    asymmetric    o = W W v
    third         o = ((W Wᵀ) ∘ lower) W v             y = (RMSNorm(o) ∘ silu(x Wg)) Wo

"lower" keeps j ≤ t, so nothing is read from the future. The norm is over each head. Normalised, q and k are elu(·) + 1
before their length is divided out, and o is divided by what the same operator makes of v = 1.

The source states operators and no architecture: no code, experiments or hyperparameters. What surrounds o is ours and
unverified: unit lengths and the norm per head (o grows as T², T² and T³), the gate, RetNet's rates γ_h = 1 - 2^(-5-h).

Higher-order Linear Attention (arXiv:2510.27258), in the corrected form of ops/higher_order.py.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from isotach.nn.feature_maps import elu1
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.norm import gated, l2norm
from isotach.ops.higher_order import Asymmetric, SecondOrder, ThirdOrder, Tokens
from isotach.ops.recurrence import Recurrence

FAMILIES: dict[str, Recurrence] = {"second": SecondOrder(), "asymmetric": Asymmetric(), "third": ThirdOrder()}
EPS = 1e-6  # of the ratio, whose weights are at most 1 each


class HLA(Mixer):
    class Config(MixerConfig):
        """order: which operator; decay: rates as in RetNet, or none as in the paper's main form; gate: the output gate;
        normalise: divide by the sum of weights, which are then nonnegative.
        """

        order: Literal["second", "asymmetric", "third"] = "second"
        decay: Literal["retnet", "none"] = "retnet"
        gate: bool = True
        normalise: bool = False

    log_decay: Tensor

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width = config.width
        self.heads, self.recurrence = config.heads, FAMILIES[config.order]
        self.normalise = config.normalise
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.gate = linear(width, width) if config.gate else None
        self.norm = nn.RMSNorm(width // config.heads, eps=1e-6)
        gone = 2.0 ** (-5 - torch.arange(config.heads, dtype=torch.float64)) * (config.decay == "retnet")
        self.register_buffer("log_decay", torch.log1p(-gone).float(), persistent=False)

    def project(self, x: Tensor, scan: Scan) -> tuple[Tokens, Tensor]:
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        if self.normalise:
            q, k, v = elu1(q), elu1(k), torch.cat([v, torch.ones_like(v[..., :1])], -1)
        log_decay = self.log_decay.view(1, 1, self.heads, 1).expand(x.shape[0], -1, -1, -1)
        return Tokens(l2norm(q), l2norm(k), v, log_decay), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.normalise:
            o = o[..., :-1] / (o[..., -1:] + EPS)
        return self.out(gated(self.norm, o, None if self.gate is None else self.gate(x), "silu"))
