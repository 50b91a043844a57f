"""Gates that say how much is kept of the past, log_decay ≤ 0, in units of steps: Mamba's parametrisation.

log_decay = -e^A softplus(z + b)             A and b spread over heads and channels: some forget in a few tokens,
log_decay = bound · sigmoid(e^A (z + b))     others in thousands; with a bound < 0 no token erases all
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Stream
from isotach.ops.recurrence import state_dtype

STEPS = (1e-3, 1e-1)  # softplus(b) at the beginning
LEAST_STEP = 1e-4


class Forget(nn.Module):
    """`channels` gates for each head. `rates`: the range of e^A at the beginning; with a bound it begins at 1."""

    def __init__(self, heads: int, channels: int, *, rates: tuple[float, float], bound: float | None = None) -> None:
        super().__init__()
        self.channels, self.rates, self.bound = channels, rates, bound
        # A and b; released weights call them A_log and dt_bias.
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.step_bias = nn.Parameter(torch.empty(heads * channels))

    def initialize(self, stream: Stream, std: float) -> None:
        """Rates uniform, steps log-uniform in STEPS but at least LEAST_STEP."""
        with torch.no_grad():
            if self.bound is None:
                self.log_rate.uniform_(*self.rates, generator=stream("log_rate")).log_()
            else:
                self.log_rate.zero_()
            low, high = (math.log(step) for step in STEPS)
            step = self.step_bias.uniform_(low, high, generator=stream("step_bias")).exp_().clamp_(min=LEAST_STEP)
            step.add_((-torch.expm1(-step)).log())  # softplus inverted

    def forward(self, z: Float[Tensor, "B T HK"]) -> Float[Tensor, "B T H K"]:
        """log_decay in float32 at least."""
        dtype = state_dtype(z)
        z = (z.to(dtype) + self.step_bias.to(dtype)).unflatten(-1, (-1, self.channels))
        rate = self.log_rate.to(dtype).exp().unsqueeze(-1)
        return -rate * F.softplus(z) if self.bound is None else self.bound * torch.sigmoid(rate * z)
