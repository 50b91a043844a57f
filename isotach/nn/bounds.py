"""Forget gates with a floor that rises from layer to layer: low layers may forget, high ones must remember (HGRN).

    P = softmax over layers of Γ (L, D)          γ_0 = 0 ≤ γ_1 ≤ … < 1, per channel
    "inclusive-minus-first"   γ_l = Σ_{i≤l} P_i - P_0       language models and HGRN2, as released
    "exclusive"               γ_l = Σ_{i<l} P_i             HGRN's README and its Long Range Arena code
    f = γ_l + (1 - γ_l) sigmoid(z)

Equal at initialisation, where Γ is constant and γ_l = l / L, different ever after: weights trained with one do not fit
the other. HGRN (arXiv:2311.04823), HGRN2 (arXiv:2404.07904).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Bound = Literal["inclusive-minus-first", "exclusive"]


class LowerBounds(nn.Module):
    """Γ, one row per layer of the model; kept once, in Place.shared."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.ones(depth, width))

    def floor(self, layer: int, bound: Bound) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"]]:
        """ln γ and ln(1 - γ) of a layer: each a sum of its own rows of P, so neither is one minus the other."""
        first, last = (1, layer + 1) if bound == "inclusive-minus-first" else (0, layer)
        rest = torch.cat([self.logits[:first], self.logits[last:]])
        total = self.logits.logsumexp(0)
        return self.logits[first:last].logsumexp(0) - total, rest.logsumexp(0) - total

    def forget(self, z: Float[Tensor, "B T D"], layer: int, bound: Bound) -> tuple[Tensor, Tensor]:
        """ln f ≤ 0 and 1 - f of a layer, in z's dtype; relatively accurate where f is near 0, 1 or its floor."""
        if layer == 0:
            return F.logsigmoid(z), torch.sigmoid(-z)
        log_floor, log_room = (row.to(z.dtype) for row in self.floor(layer, bound))
        closed = log_room.exp() * torch.sigmoid(-z)
        # ln(1 - closed) is exact where f is near 1, the sum where f is small; clamped, for where() differentiates both.
        near_one = torch.log1p(-closed.clamp_max(0.5))
        small = torch.logaddexp(log_floor, log_room + F.logsigmoid(z))
        return torch.where(closed < 0.5, near_one, small), closed
