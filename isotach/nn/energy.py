"""Energy gating: a token's keys count by its salience, for every later reader alike.

    e_j = w·x_j + b        z_j = e_j standardised        g_j = σ(α (z_j - τ))        one w, b, α, τ per key head

Softmax weights become A_ij g_j / Σ_j A_ij g_j, which is a bias log g_j on the logits of key j; linear attention writes
g_j k_j instead of k_j.

What e_j is standardised by decides whether the layer may look ahead:

    prefix     mean and spread of tokens 0..j: causal, and g_j never changes; the default, ours
    published  of all tokens of the call, those after j too: an output depends on its future, so a loss measured with
               it is not a next-token loss, and reading in pieces differs from reading at once. For re-tests only.

Energy-Gated Attention (arXiv:2605.21842); the key-bias form and the prefix statistics are derived here.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.config import Config
from isotach.ops.history import Blocks, Forgetting, History, Sliding, Sloped
from isotach.ops.moments import EPS, Moments
from isotach.ops.recurrence import Recurrence, Tensors

if TYPE_CHECKING:
    from isotach.nn.mixer import Scan

SOFTMAX = (History, Forgetting, Sloped, Sliding)  # what is added to a score multiplies its weight


class EnergyConfig(Config):
    """statistics: what a token's energy is measured against; see the module."""

    statistics: Literal["prefix", "published"] = "prefix"


class EnergyGate(nn.Module):
    """gate(rec, inputs, x, scan) -> inputs with gated keys."""

    def __init__(self, width: int, heads: int, config: EnergyConfig) -> None:
        super().__init__()
        self.heads, self.config = heads, config
        self.energy = nn.utils.skip_init(nn.Linear, width, heads, device=torch.get_default_device())
        self.threshold = nn.Parameter(torch.zeros(heads))
        self.sharpness = nn.Parameter(torch.full((heads,), 2.0))

    @staticmethod
    def check(name: str, rec: Recurrence) -> None:
        """ValueError where `rec` has no keys to gate."""
        if "k" not in rec.Inputs.__annotations__:
            raise ValueError(f"{name}: energy gating weighs keys, and {rec.name} has none; leave `energy` out")

    def forward(self, rec: Recurrence, inputs: Tensors, x: Float[Tensor, "B T D"], scan: "Scan") -> Tensors:
        log_gate = F.logsigmoid(self.sharpness * (self._standardised(x, scan) - self.threshold))
        if isinstance(rec, SOFTMAX) or (isinstance(rec, Blocks) and rec.weights == "softmax"):
            return _bias_keys(inputs, log_gate)
        return inputs._replace(k=inputs.k * log_gate.exp().unsqueeze(-1))

    def _standardised(self, x: Tensor, scan: "Scan") -> Float[Tensor, "B T H"]:
        energy = self.energy(x)
        if self.config.statistics == "prefix":
            z: Tensor = scan("energy", Moments(), Moments.Inputs(energy.unsqueeze(-1))).squeeze(-1)
            return z
        if scan.span.cu_seqlens is None:
            return _by_all(energy)
        lengths = scan.span.cu_seqlens.diff().tolist()
        return torch.cat([_by_all(part) for part in energy.split(lengths, 1)], 1)


def _by_all(energy: Tensor) -> Tensor:
    wide = energy if energy.dtype == torch.float64 else energy.float()
    centred = wide - wide.mean(1, keepdim=True)
    return (centred * (centred.square().mean(1, keepdim=True) + EPS).rsqrt()).to(energy.dtype)


def _bias_keys(inputs: Tensors, log_gate: Tensor) -> Tensors:
    """Keys with log g as one more channel, queries with a constant there: q·k / √(K + 1) is then q·k / √K + log g."""
    width = inputs.q.shape[-1]
    q = torch.cat(
        [inputs.q * math.sqrt((width + 1) / width), torch.full_like(inputs.q[..., :1], math.sqrt(width + 1))], -1
    )
    return inputs._replace(q=q, k=torch.cat([inputs.k, log_gate.unsqueeze(-1).to(inputs.k.dtype)], -1))
