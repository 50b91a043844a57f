"""Linear attention: softmax's e^{q·k} replaced by a product of features, so that the past is a matrix of fixed size.

    S_t = S_{t-1} + φ(k_t)ᵀ v_t        z_t = z_{t-1} + φ(k_t)        y = o Wo

    normaliser = "sum"     o_t = φ(q_t) S_t / (φ(q_t) · z_t + 1e-6): a weighted mean of the values, as published
    normaliser = "norm"    o_t = RMSNorm(φ(q_t) S_t), per head
    normaliser = "none"    o_t = φ(q_t) S_t, which grows with t

Nothing is forgotten and nothing says where a token stood. With causal = false every token reads all the others, as
patches of an image do. fixation = true with features = "relu_plus" is the attention of the Linear Video Transformer:
before the products, q and k are reweighted per channel by a gate that sees q, k and v.

Transformers are RNNs (arXiv:2006.16236), with the feature maps of isotach.nn.feature_maps; RMSNorm in place of the sum
as in flash-linear-attention; feature fixation (arXiv:2210.08164).
"""

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

from isotach.nn.feature_maps import POSITIVE, Features, Fixation, feature_map, undecayed
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.ops.decay import Decay

EPS = 1e-6  # of the sum, as released
NORM_EPS = 1e-5  # of the norm, as in flash-linear-attention


class Linear(Mixer):
    class Config(MixerConfig):
        """features: φ; normaliser: what bounds the output; fixation: reweight the channels of q and k by a gate;
        causal: false where tokens have no order.
        """

        features: Features = "elu1"
        normaliser: Literal["sum", "norm", "none"] = "sum"
        fixation: bool = False
        causal: bool = True

        @model_validator(mode="after")
        def _positive(self) -> Self:
            if self.normaliser == "sum" and self.features not in POSITIVE:
                raise ValueError(
                    f'features = "{self.features}" has both signs, so the sum of weights that normaliser = "sum" '
                    f'divides by may vanish; set normaliser = "norm", or features to one of {", ".join(POSITIVE)}'
                )
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, head = config.width, config.width // config.heads
        self.heads, self.recurrence, self.causal = config.heads, Decay(), config.causal
        self.sums = config.normaliser == "sum"
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.map_q, self.map_k = (feature_map(config.features, heads=config.heads, width=head) for _ in range(2))
        self.fixation = Fixation(head) if config.fixation else None
        self.norm = nn.RMSNorm(head, eps=NORM_EPS) if config.normaliser == "norm" else None

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, None]:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        q, k = self.map_q(q), self.map_k(k)
        if self.fixation is not None:
            q, k = self.fixation(q, k, v)
        return undecayed(q, k, v, count=self.sums), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        if self.sums:
            o = o[..., :-1] / (o[..., -1:] + EPS)
        if self.norm is not None:
            o = self.norm(o)
        return self.out(o.flatten(-2))
