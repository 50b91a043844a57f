"""HGRN: one complex number per channel, which forgets as much as it takes in, and the less the higher its layer.

    c_t = silu(x Wc) ∈ ℂ^D        f_t = γ + (1 - γ) sigmoid(x Wf)
    h_t = f_t e^{iθ} ∘ h_{t-1} + (1 - f_t) ∘ c_t        y = (LayerNorm([Re h, Im h]) ∘ silu(x Wg)) Wo

γ is the layer's floor (nn/bounds.py) and θ a learned angle per channel. The state is e^{-iθt} h_t, with t the position:
in that frame nothing turns, and real and imaginary part are two real memories with one decay. `heads` has no meaning
here. In a pattern of mixers, floors rise over the layers of all of them; hgrn2 learns floors of its own.

Hierarchically Gated Recurrent Neural Network (arXiv:2311.04823), as its language models' code has it: the norm comes
before the gate, and the gate is a silu. The README gates before the norm, and the paper's gate is a sigmoid.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.bounds import Bound, LowerBounds
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.positions import angles, ladder, rope
from isotach.ops.elementwise import Elementwise
from isotach.ops.recurrence import state_dtype


class Hgrn(Mixer):
    class Config(MixerConfig):
        """complex: false for real numbers, which do not turn; bound: how floors are summed up over the layers;
        gate: activation of the output gate.
        """

        complex: bool = True
        bound: Bound = "inclusive-minus-first"
        gate: Literal["silu", "sigmoid"] = "silu"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, parts = config.width, 2 if config.complex else 1
        self.heads, self.recurrence = parts, Elementwise()
        self.place, self.bound = place, config.bound
        self.content, self.forget = linear(width, parts * width, bias=True), linear(width, width, bias=True)
        self.gate, self.out = linear(width, parts * width, bias=True), linear(parts * width, width, bias=True)
        self.activation = F.silu if config.gate == "silu" else F.sigmoid
        self.norm = nn.LayerNorm(parts * width)
        self.theta = nn.Parameter(ladder(width)) if config.complex else None
        self.bounds()

    def bounds(self) -> LowerBounds:
        width = self.forget.out_features
        return self.place.shared.once("hgrn_bounds", lambda: LowerBounds(self.place.depth, width))

    def project(self, x: Tensor, scan: Scan) -> tuple[Elementwise.Inputs, tuple[Tensor, Tensor | None]]:
        wide = state_dtype(x)
        log_decay, opening = self.bounds().forget(self.forget(x).to(wide), self.place.index, self.bound)
        # Released weights interleave real and imaginary parts here, and concatenate them in the norm and after.
        content = F.silu(self.content(x)).to(wide).unflatten(-1, (-1, self.heads)).transpose(-1, -2)
        v, angle = opening.unsqueeze(2) * content, None
        if self.theta is not None:
            angle = angles(scan.span.positions, self.theta)
            v = rope(v.flatten(2), -angle).unflatten(-1, (self.heads, -1))
        return Elementwise.Inputs(v, log_decay.unsqueeze(2)), (x, angle)

    def output(self, o: Tensor, aux: tuple[Tensor, Tensor | None]) -> Tensor:
        x, angle = aux
        h = o.flatten(2)
        if angle is not None:
            h = rope(h, angle)
        return self.out(self.norm(h.to(x.dtype)) * self.activation(self.gate(x)))
