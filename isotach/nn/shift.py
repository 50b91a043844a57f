"""Token shift: channels that take a share of the token before, x_t + μ ∘ (x_{t-1} - x_t); before the first are zeros.

One layer may make several such mixtures, each with shares of its own (RWKV, arXiv:2305.13048).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isotach.nn.mixer import Scan
from isotach.ops.window import Window


class TokenShift(nn.Module):
    """One mixture per power p; its shares begin at 1 - (i / D)^p as RWKV-7's do, all of x_{t-1} in channel 0."""

    def __init__(self, width: int, powers: Sequence[float]) -> None:
        super().__init__()
        channel = torch.arange(width) / width
        self.share = nn.Parameter(torch.stack([1 - channel**power for power in powers]))
        self.window = Window(2)

    def forward(self, x: Float[Tensor, "B T D"], scan: Scan, name: str) -> list[Float[Tensor, "B T D"]]:
        """The mixtures; `name` is the state's in the layer."""
        only_the_older = torch.eye(2, 1, dtype=x.dtype, device=x.device).expand(-1, x.shape[-1])
        away = scan(name, self.window, Window.Inputs(x, only_the_older)) - x
        return [x + away * share for share in self.share]
