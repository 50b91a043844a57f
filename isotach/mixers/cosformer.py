"""cosFormer: linear attention whose weights fall with distance like a cosine, which splits into two products.

    w_ts = (q'_t · k'_s) cos(π (t - s) / 2M)      q' = relu(x Wq + bq), k' = relu(x Wk + bk)
         = q~_t · k~_s                            q~_t = [q'_t sin α_t, q'_t cos α_t],  α_t = π t / 2M
    o_t  = Σ_{s≤t} w_ts v_s / max(Σ_{s≤t} w_ts, 1e-6)                                   y = o Wo + bo

No weight is negative as long as all distances are below M, so longer text is refused. The released code takes M to be
the length at hand, which changes every earlier output as text arrives; here it is an option, and outputs stream. At
distances far below M the cosine is flat: set `length` to the longest text that the model is to read.

cosFormer (arXiv:2202.08791).
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from isotach.errors import UserError
from isotach.nn.feature_maps import feature_map, undecayed
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream, linear
from isotach.ops.decay import Decay

EPS = 1e-6  # as released


class CosFormer(Mixer):
    class Config(MixerConfig):
        """length: M, the tokens over which the cosine falls from 1 to 0; features: relu, or elu + 1;
        causal: false where tokens have no order.
        """

        length: int = Field(65536, ge=1)
        features: Literal["relu", "elu1"] = "relu"
        causal: bool = True

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence, self.causal = config.heads, Decay(), config.causal
        self.length = config.length
        self.q, self.k, self.v, self.out = (linear(config.width, config.width, bias=True) for _ in range(4))
        self.map = feature_map(config.features, heads=config.heads, width=config.width // config.heads)

    def initialize(self, stream: Stream, std: float) -> None:
        """PyTorch's own, as released: weights and biases uniform within ±1/√D."""
        super().initialize(stream, std)
        for name, layer in (("q", self.q), ("k", self.k), ("v", self.v), ("out", self.out)):
            bound = layer.in_features**-0.5
            with torch.no_grad():
                layer.weight.uniform_(-bound, bound, generator=stream(f"{name}.weight"))
                layer.bias.uniform_(-bound, bound, generator=stream(f"{name}.bias"))

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, None]:
        angle = self._angle(scan.span.positions)
        q, k = (self._spread(self.map(self.split(f(x))), angle) for f in (self.q, self.k))
        return undecayed(q, k, self.split(self.v(x)), count=True), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        return self.out((o[..., :-1] / o[..., -1:].clamp_min(EPS)).flatten(-2))

    def _angle(self, positions: Tensor) -> Tensor:
        """α (B, T, 1, 1) float64."""
        if not torch.compiler.is_compiling() and positions.numel() and int(positions.max()) >= self.length:
            raise UserError(
                f"cosformer: expected positions below length = {self.length}, got {int(positions.max())}; "
                "read less, or train with a larger model.cosformer.length"
            )
        return positions.double().mul(math.pi / (2 * self.length))[..., None, None]

    @staticmethod
    def _spread(x: Tensor, angle: Tensor) -> Tensor:
        """(B, T, H, K) -> (B, T, H, 2K)."""
        return torch.cat([x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)], -1)
