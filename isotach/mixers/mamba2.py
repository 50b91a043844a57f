"""Mamba-2: linear attention whose step size, drawn from the token, sets both how much is written and how much fades.

    z, (u, B, C), dt = x Win        u, B, C ← silu(conv(u, B, C))        Δ_t = softplus(dt_t + b)
    S_t = e^{-Δ_t e^{A}} S_{t-1} + B_tᵀ (Δ_t u_t)        o_t = C_t S_t + D u_t        y = RMSNorm(o ∘ silu(z)) Wout

A, b and D are one number per head. B and C, the keys and queries, are shared by the heads of a group; the norm spans a
group's heads and comes after the gate. Published sizes: heads = expand · width / 64.

Transformers are SSMs (arXiv:2405.21060), initialised as its released code is.
"""

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.conv import ShortConv
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream, linear
from isotach.nn.norm import gated_before
from isotach.ops.decay import Decay
from isotach.ops.recurrence import state_dtype

RATES = (1.0, 16.0)  # e^A at the beginning
STEPS = (1e-3, 1e-1)  # softplus(b) at the beginning


class Mamba2(Mixer):
    class Config(MixerConfig):
        """expand: width of u and z as a multiple of the model's; state_size: channels of B and of C; groups: of heads
        that share them; conv_size: tokens the convolution reads.
        """

        expand: int = Field(2, ge=1)
        state_size: int = Field(128, ge=1)
        groups: int = Field(1, ge=1)
        conv_size: int = Field(4, ge=1)

        @model_validator(mode="after")
        def _groups(self) -> Self:
            if self.heads % self.groups:
                raise ValueError(f"groups = {self.groups} does not divide heads = {self.heads}; choose a divisor")
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.groups, self.recurrence = config.heads, config.groups, Decay()
        inner, keys = config.expand * config.width, config.groups * config.state_size
        self.inner, self.keys = inner, keys
        self.read = linear(config.width, 2 * inner + 2 * keys + config.heads)
        self.conv = ShortConv(inner + 2 * keys, size=config.conv_size, bias=True)
        # A, b and D of the equations; released weights call them A_log, dt_bias and D.
        self.log_rate, self.step_bias, self.skip = (nn.Parameter(torch.empty(config.heads)) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(inner))
        self.out = linear(inner, config.width)

    def initialize(self, stream: Stream, std: float) -> None:
        """Rates uniform in RATES, steps log-uniform in STEPS, D one."""
        super().initialize(stream, std)
        with torch.no_grad():
            self.log_rate.uniform_(*RATES, generator=stream("log_rate")).log_()
            low, high = (math.log(step) for step in STEPS)
            step = self.step_bias.uniform_(low, high, generator=stream("step_bias")).exp_()
            step.add_((-torch.expm1(-step)).log())  # softplus inverted
            self.skip.fill_(1)

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, tuple[Tensor, Tensor]]:
        z, mixed, dt = self.read(x).split((self.inner, self.inner + 2 * self.keys, self.heads), -1)
        u, b, c = self.conv(mixed, scan, "conv").split((self.inner, self.keys, self.keys), -1)
        u, wide = self.split(u), state_dtype(x)
        step = F.softplus(dt.to(wide) + self.step_bias.to(wide)).unsqueeze(-1)
        log_decay = -step * self.log_rate.to(wide).exp()[:, None]
        return Decay.Inputs(self._per_head(c), self._per_head(b), u * step, log_decay), (u, z)

    def output(self, o: Tensor, aux: tuple[Tensor, Tensor]) -> Tensor:
        u, z = aux
        y = (o + self.skip[:, None] * u).flatten(-2)
        return self.out(gated_before(y, z, self.gain, groups=self.groups, eps=1e-5))

    def _per_head(self, shared: Tensor) -> Tensor:
        """(B, T, groups · K) for every head: a view where there is one group."""
        groups = shared.unflatten(-1, (self.groups, 1, -1))
        return groups.expand(-1, -1, -1, self.heads // self.groups, -1).flatten(2, 3)
