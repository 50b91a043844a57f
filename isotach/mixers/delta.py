"""DeltaNet: linear attention that takes out what a key holds before writing there, so that a key can be overwritten.

    q, k, v = silu(conv(x Wq)), silu(conv(x Wk)), silu(conv(x Wv))      q, k ← q / |q|, k / |k|      β = sigmoid(x Wb)
    S_t = S_{t-1} + β_t k_t (v_t - kᵀ_t S_{t-1})      o_t = q_t S_t / √K      y = RMSNorm(o) Wo

Nothing is forgotten but what is overwritten. Keys need their norm: with longer ones the memory grows without bound.
Each head has its own norm, with one gain for all heads.

Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484); β up to 2 as in arXiv:2411.12537. The paper
calls SiLU with the L2 norm the best features; its own table has ELU + 1 ahead on WikiText: both are options.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.conv import ShortConv
from isotach.nn.feature_maps import feature_map
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, check_expanded, linear
from isotach.nn.norm import gated, l2norm
from isotach.ops.delta import Delta
from isotach.ops.recurrence import state_dtype


class DeltaNet(Mixer):
    class Config(MixerConfig):
        """expand_k, expand_v: widths of all keys and of all values, as multiples of the model's; conv_size: tokens the
        convolution reads; features: what q and k go through after it; norm: of q and k then, to length 1 or to sum 1;
        gate: whether and how the output is gated by x; negative_eigenvalues: β up to 2 instead of 1.
        """

        expand_k: float = Field(1.0, gt=0)
        expand_v: float = Field(1.0, gt=0)
        conv_size: int = Field(4, ge=1)
        features: Literal["silu", "relu", "elu1"] = "silu"
        norm: Literal["l2", "sum"] = "l2"
        gate: Literal["none", "silu", "sigmoid"] = "none"
        negative_eigenvalues: bool = False

        @model_validator(mode="after")
        def _divides_expanded(self) -> Self:
            for option in ("expand_k", "expand_v"):
                check_expanded(self, option, self.heads, "heads")
            if self.norm == "sum" and self.features == "silu":
                raise ValueError(
                    "norm = 'sum' divides by a sum that may vanish with features = 'silu'; take relu or elu1"
                )
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        self.heads, self.recurrence = config.heads, Delta()
        self.keys, self.values = round(config.width * config.expand_k), round(config.width * config.expand_v)
        self.read = linear(config.width, 2 * self.keys + self.values)  # q, k and v
        self.conv = ShortConv(2 * self.keys + self.values, size=config.conv_size, activation="none")
        self.features = feature_map(config.features, heads=config.heads, width=self.keys // config.heads)
        self.to_sum, self.strongest = config.norm == "sum", 2.0 if config.negative_eigenvalues else 1.0
        self.beta = linear(config.width, config.heads)
        self.gate = None if config.gate == "none" else linear(config.width, self.values)
        self.activation = config.gate
        self.norm = nn.RMSNorm(self.values // config.heads, eps=1e-5)
        self.out = linear(self.values, config.width)

    def project(self, x: Tensor, scan: Scan) -> tuple[Delta.Inputs, Tensor]:
        q, k, v = self.conv(self.read(x), scan, "conv").split((self.keys, self.keys, self.values), -1)
        q, k = (self._normalised(self.features(self.split(part))) for part in (q, k))
        beta = self.strongest * torch.sigmoid(self.beta(x).to(state_dtype(x))).unsqueeze(-1)
        never = beta.new_zeros(()).expand(len(x), 1, self.heads, 1)
        return Delta.Inputs(q * q.shape[-1] ** -0.5, k, self.split(F.silu(v)), beta, never), x

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(gated(self.norm, o, None if self.gate is None else self.gate(x), self.activation))

    def _normalised(self, x: Tensor) -> Tensor:
        return x / (x.sum(-1, keepdim=True) + 1e-6) if self.to_sum else l2norm(x)
