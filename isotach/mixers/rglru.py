"""RG-LRU: one real number per channel that fades and takes in by two gates, scaled so that its size never grows.

    u = conv(x Wu)      r_t, i_t = sigmoid(u_t Wr + br), sigmoid(u_t Wi + bi)      log a_t = -8 softplus(Λ) ∘ r_t
    h_t = a_t ∘ h_{t-1} + √(1 - a_t²) ∘ (i_t ∘ u_t)                                 y = (h ∘ gelu(x Wg + bg)) Wo + bo

Wr and Wi mix the channels of a head only. The first token of a sequence is written whole, without the root.

Griffin (arXiv:2402.19427), as its released code has it: there e^{-softplus(Λ)} begins between 0.9 and 0.999; the paper
says so of its eighth power.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.conv import ShortConv
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream, linear
from isotach.ops.elementwise import Elementwise
from isotach.ops.recurrence import state_dtype

SHARPNESS = 8.0
RADII = (0.9, 0.999)  # e^{-softplus(Λ)} at the beginning
LEAST = 1e-6  # of 1 - a²: its root has an infinite slope at 0; the released code bounds the slope by 1000


class Rglru(Mixer):
    class Config(MixerConfig):
        """conv_size: tokens the convolution reads."""

        conv_size: int = Field(4, ge=1)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence = config.heads, Elementwise()
        width, head = config.width, config.width // config.heads
        self.read, self.gate, self.out = (linear(width, width, bias=True) for _ in range(3))
        self.conv = ShortConv(width, size=config.conv_size, activation="none", bias=True)
        self.forget, self.take = (nn.Parameter(torch.empty(config.heads, head, head)) for _ in range(2))
        self.forget_bias, self.take_bias = (nn.Parameter(torch.zeros(config.heads, head)) for _ in range(2))
        self.rate = nn.Parameter(torch.empty(config.heads, head))  # Λ

    def initialize(self, stream: Stream, std: float) -> None:
        """Gates normal with variance 1/K; squared radii uniform between those of RADII."""
        super().initialize(stream, std)
        with torch.no_grad():
            for name, weight in (("forget", self.forget), ("take", self.take)):
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=stream(name))
            squared = self.rate.uniform_(*(radius**2 for radius in RADII), generator=stream("rate"))
            squared.log_().mul_(-0.5).expm1_().log_()  # softplus inverted

    def project(self, x: Tensor, scan: Scan) -> tuple[Elementwise.Inputs, Tensor]:
        u = self.split(self.conv(self.read(x), scan, "conv"))
        forget = torch.einsum("bthk,hkl->bthl", u, self.forget) + self.forget_bias
        take = torch.einsum("bthk,hkl->bthl", u, self.take) + self.take_bias
        wide = state_dtype(x)
        log_decay = -SHARPNESS * F.softplus(self.rate.to(wide)) * forget.to(wide).sigmoid()
        room = (-torch.expm1(2 * log_decay)).clamp_min(LEAST).sqrt()
        room = torch.where((scan.span.positions == 0)[..., None, None], 1.0, room)
        return Elementwise.Inputs(room * take.to(wide).sigmoid() * u.to(wide), log_decay), x

    def output(self, o: Tensor, aux: Tensor) -> Tensor:
        return self.out(o.flatten(2).to(aux.dtype) * F.gelu(self.gate(aux), approximate="tanh"))
