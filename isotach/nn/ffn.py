"""Channel mixers, the other half of a block: x -> y of the same width. What they keep of earlier tokens is state too.

    glu     W₃(act(W₁x) ∘ W₂x)                          without an activation the SGLU of TransNormerLLM
    rwkv7   W₂ relu(W₁(x_t + μ ∘ (x_{t-1} - x_t)))²     nn/shift.py

TransNormerLLM (arXiv:2307.14995), RWKV-7 (arXiv:2503.14456).
"""

from abc import ABC, abstractmethod
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Place, Scan, Stream, linear
from isotach.nn.shift import TokenShift

Kind = Literal["glu", "rwkv7"]
Activation = Literal["none", "silu"]


class ChannelMixer(nn.Module, ABC):
    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"], scan: Scan) -> Float[Tensor, "B T D"]:
        """`scan` is the block's: names of states begin with ffn."""


class GLU(ChannelMixer):
    def __init__(self, width: int, hidden: int, *, activation: Activation = "none", bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = linear(width, hidden, bias=bias), linear(width, hidden, bias=bias)
        self.down = linear(hidden, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, scan: Scan) -> Tensor:
        gate = self.gate(x)
        if self.activation == "silu":
            gate = F.silu(gate)
        return self.down(gate * self.up(x))


class ShiftedMLP(ChannelMixer):
    """Initialised as RWKV-7's authors do: `up` orthogonal, `down` zero, and shares that fall from layer to layer."""

    def __init__(self, width: int, hidden: int, place: Place) -> None:
        super().__init__()
        self.shift = TokenShift(width, [(1 - place.index / place.depth) ** 4])
        self.up, self.down = linear(width, hidden), linear(hidden, width)

    def initialize(self, stream: Stream, std: float) -> None:
        """`std` is for linear maps that are drawn otherwise."""
        nn.init.orthogonal_(self.up.weight, generator=stream("up.weight"))
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, scan: Scan) -> Tensor:
        (mixed,) = self.shift(x, scan, "ffn_shift")
        return self.down(F.relu(self.up(mixed)).square())


def channel_mixer(
    kind: Kind, width: int, hidden: int, place: Place, *, activation: Activation, bias: bool
) -> ChannelMixer:
    """The channel mixer called `kind`; ValueError where it does not have these options."""
    if kind == "glu":
        return GLU(width, hidden, activation=activation, bias=bias)
    if activation != "none" or bias:
        raise ValueError(f"ffn = {kind} has neither activation nor ffn_bias, which belong to glu; leave them out")
    return ShiftedMLP(width, hidden, place)
