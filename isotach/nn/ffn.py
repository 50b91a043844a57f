"""Gated linear unit, W₃(act(W₁x) ∘ W₂x); without an activation it is TransNormerLLM's SGLU (arXiv:2307.14995)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import linear

Activation = Literal["none", "silu"]


class GLU(nn.Module):
    def __init__(self, width: int, hidden: int, *, activation: Activation = "none") -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gate = self.gate(x)
        if self.activation == "silu":
            gate = F.silu(gate)
        return self.down(gate * self.up(x))
