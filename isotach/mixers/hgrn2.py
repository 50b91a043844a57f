"""HGRN2: HGRN's gates around a matrix per head; what a channel forgets is the key it writes with.

    v, q, z = x Wi        f_t = γ + (1 - γ) sigmoid(z_t)
    S_t = diag(f_t) S_{t-1} + (1 - f_t)ᵀ v_t        o_t = silu(q_t) S_t        y = SRMSNorm(o) Wo

γ is the layer's floor (nn/bounds.py). It is gated linear attention whose key 1 - f costs no parameters; width / heads
is the paper's expand ratio, 128 in its large models. The norm spans all heads. In a pattern of mixers, floors rise over
the layers of all of them; hgrn learns floors of its own.

HGRN2: Gated Linear RNNs with State Expansion (arXiv:2404.07904). The released language models and the WikiText-103
modules differ in activations, norm and biases: `variant` says which.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.bounds import Bound, LowerBounds
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.nn.norm import SRMSNorm
from isotach.ops.decay import Decay
from isotach.ops.recurrence import state_dtype


class Hgrn2(Mixer):
    class Config(MixerConfig):
        """variant: lm has v as it is, silu(q), SRMSNorm and no biases, wikitext silu(v), sigmoid(q), LayerNorm and
        biases; bound: how floors are summed up over the layers.
        """

        variant: Literal["lm", "wikitext"] = "lm"
        bound: Bound = "inclusive-minus-first"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, self.wikitext = config.width, config.variant == "wikitext"
        self.heads, self.recurrence = config.heads, Decay()
        self.place, self.bound = place, config.bound
        self.read, self.out = (linear(width, n * width, bias=self.wikitext) for n in (3, 1))
        self.norm = nn.LayerNorm(width) if self.wikitext else SRMSNorm(width)
        self.bounds()

    def bounds(self) -> LowerBounds:
        width = self.out.out_features
        return self.place.shared.once("hgrn2_bounds", lambda: LowerBounds(self.place.depth, width))

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, None]:
        v, q, z = self.read(x).chunk(3, -1)
        q, v = (F.sigmoid(q), F.silu(v)) if self.wikitext else (F.silu(q), v)
        log_decay, k = self.bounds().forget(z.to(state_dtype(x)), self.place.index, self.bound)
        return Decay.Inputs(*map(self.split, (q, k, v, log_decay))), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        return self.out(self.norm(o.flatten(-2)))
