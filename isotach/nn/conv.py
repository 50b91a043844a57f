"""Short convolution: every channel mixes its last few tokens, act(Σ_j w_j ∘ x_{t-W+1+j} + b), with its own state."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Scan, Stream
from isotach.ops.window import Window


class ShortConv(nn.Module):
    """Depthwise causal convolution over `size` tokens, weight (D, W) with the newest token last."""

    def __init__(
        self, width: int, *, size: int = 4, activation: Literal["silu", "none"] = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.window, self.activation = Window(size), activation
        self.weight = nn.Parameter(torch.empty(width, size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def initialize(self, stream: Stream, std: float) -> None:
        """Uniform within ±1/√W, as convolution layers begin in every released model; `std` is for linear maps."""
        bound = self.window.size**-0.5
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=stream("weight"))
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=stream("bias"))

    def forward(self, x: Float[Tensor, "B T D"], scan: Scan, name: str) -> Float[Tensor, "B T D"]:
        """The convolved x; `name` is the state's in the layer."""
        y = scan(name, self.window, Window.Inputs(x, self.weight.t()))
        if self.bias is not None:
            y = y + self.bias
        return F.silu(y) if self.activation == "silu" else y
