"""What `isotach convert` makes of tnn: the same gated unit, whose kernel is now a sum of decaying rotations.

    u, v = silu(x Wu + bu), silu(x Wv + bv)       expand · D channels each
    s_t  = p ∘ s_{t-1} + v_t                      p_k = γ e^{-2πik / m}, the same for all channels but for γ
    o_t  = Re Σ_k w_k ∘ s_t[k]                    = Σ_j γ^j c_j ∘ v_{t-j}, with c_{j+m} = c_j
    y    = (u ∘ o) Wo + bo

A state of m numbers per channel replaces all earlier inputs, and no network of distances is left. At lags 0..m-1 the
kernel is the converted layer's, so text up to m tokens reads as before. Behind them the same c come again, fainter by
γ^m, where tnn would have gone on with its own: choose m so that γ^m is small.

Published is m = n + 1 for n lags of tnn's, with c_n = -Σ_{j<n} c_j, so that w_0 = 0: one value as large as all others
together, at lag n and again with them. It is not needed, and `isotach convert` leaves it out unless asked. A ring
buffer of the last m inputs has the same size, takes half the time, and ends where this repeats itself; which of the two
is nearer to tnn there depends on the kernel, and the verb measures it. Trained kernels are largest at near lags.

Accelerating Toeplitz Neural Network with Constant-time Inference Complexity (arXiv:2311.08756).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotach.nn.gtu import GTU
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream
from isotach.ops.etsc import ETSC


class ConvertedTNN(Mixer):
    class Config(MixerConfig):
        """expand: channels that are mixed, as a multiple of width; period: m; decay: one γ, or one per channel."""

        expand: int = Field(3, ge=1)
        period: int = Field(512, ge=1)
        decay: Literal["fixed", "learned"] = "fixed"

    recurrence: ETSC
    log_gamma: Tensor

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        mixed = config.expand * config.width
        self.heads, self.recurrence = config.heads, ETSC(config.period)
        self.gtu = GTU(config.width, mixed)
        self.real, self.imag = (nn.Parameter(torch.empty(self.recurrence.rotations, mixed)) for _ in range(2))
        self.register_buffer("log_gamma", torch.empty(mixed if config.decay == "learned" else 1))

    def initialize(self, stream: Stream, std: float) -> None:
        """Something to convert into: the response is noise that fades by γ = 0.99."""
        super().initialize(stream, std)
        with torch.no_grad():
            for name, part in (("real", self.real), ("imag", self.imag)):
                part.normal_(0, len(part) ** -0.5, generator=stream(name))
            self.log_gamma.fill_(0.99).log_()

    def project(self, x: Tensor, scan: Scan) -> tuple[ETSC.Inputs, Tensor]:
        v, u = self.gtu.project(x)
        log_decay = self.log_gamma.view(1, 1) if len(self.log_gamma) == 1 else self.split(self.log_gamma)
        return ETSC.Inputs(self.split(v), self.split(self.real), self.split(self.imag), log_decay), u

    def output(self, o: Tensor, u: Tensor) -> Tensor:
        return self.gtu.output(o.flatten(-2), u)
