"""Vicinity attention: linear attention between patches of an image, weighted by how near they are in rows and columns.

    w_ij = (q'_i · k'_j) (cos(a_i - a_j) + cos(b_i - b_j))      q' = relu(x Wq + bq), k' = relu(x Wk + bk)
    o_i  = Σ_j w_ij v_j / (Σ_j w_ij + 1e-4)                     a, b = (π/2) row / rows, (π/2) column / columns
    y    = u + u ∘ σ(relu(mean(x) W1) W2)                       u = o Wo + bo

The cosines of differences split into products of cosines and sines, so each w_ij is a product of features of i and j
and the cost is linear in the patches. form = "product" takes cos(a_i - a_j) cos(b_i - b_j) instead of the sum.

Features are reduced: q, k and v have width / reduction channels. What that loses, the feature-preserving connection
gives back: a gate per channel from the mean over all patches of x, the layer's input.

Patches have no order, so the mixer is not causal. Positions count patches row by row. The released code also clamps
six intermediate magnitudes to 1e-4..1e4; here states are float32 and the sum alone is kept off zero.

Vicinity Vision Transformer (arXiv:2206.10552).
"""

import math
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.errors import UserError
from isotach.nn.feature_maps import undecayed
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, linear
from isotach.ops.decay import Decay

EPS = 1e-4  # as released


class Vicinity(Mixer):
    causal = False

    class Config(MixerConfig):
        """rows: of the grid of patches; columns: of the same; form: how nearness in rows and in columns combines;
        reduction: q, k and v have width / reduction channels; preserve: the feature-preserving connection.
        """

        rows: int = Field(14, ge=1)
        columns: int = Field(14, ge=1)
        form: Literal["sum", "product"] = "sum"
        reduction: int = Field(2, ge=1)
        preserve: bool = True

        @model_validator(mode="after")
        def _reduces(self) -> Self:
            if self.width % (self.heads * self.reduction):
                raise ValueError(
                    f"heads × reduction = {self.heads * self.reduction} does not divide width = {self.width}; "
                    "choose a divisor"
                )
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, reduced = config.width, config.width // config.reduction
        self.heads, self.recurrence = config.heads, Decay()
        self.rows, self.columns, self.form = config.rows, config.columns, config.form
        self.q, self.k, self.v = (linear(width, reduced, bias=True) for _ in range(3))
        self.out = linear(reduced, width, bias=True)
        self.preserve = Preserve(width) if config.preserve else None

    def project(self, x: Tensor, scan: Scan) -> tuple[Decay.Inputs, Tensor | None]:
        row, column = self._angles(scan.span.positions)
        q, k = (self._spread(F.relu(self.split(f(x))), row, column) for f in (self.q, self.k))
        gate = None if self.preserve is None else self.preserve(x, scan)
        return undecayed(q, k, self.split(self.v(x)), count=True), gate

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        y = self.out((o[..., :-1] / (o[..., -1:] + EPS)).flatten(-2))
        return y if gate is None else y + y * gate

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of every patch, (B, T, 1, 1) float64 each."""
        if not torch.compiler.is_compiling() and positions.numel() and int(positions.max()) >= self.rows * self.columns:
            raise UserError(
                f"vicinity: expected positions below rows × columns = {self.rows} × {self.columns}, "
                f"got {int(positions.max())}; give the image's own grid of patches"
            )
        positions = positions[..., None, None]
        row, column = torch.div(positions, self.columns, rounding_mode="floor"), positions % self.columns
        return row.double() * (math.pi / 2 / self.rows), column.double() * (math.pi / 2 / self.columns)

    def _spread(self, x: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """(B, T, H, K) -> (B, T, H, 4K)."""
        factors: tuple[Tensor, ...] = (row.cos(), row.sin(), column.cos(), column.sin())
        if self.form == "product":
            factors = tuple(a * b for a in factors[:2] for b in factors[2:])
        return torch.cat([x * factor.to(x.dtype) for factor in factors], -1)


class Preserve(nn.Module):
    """The feature-preserving connection's gate: a weight per channel from the mean over the whole image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = linear(width, width), linear(width, width)

    def forward(self, x: Float[Tensor, "B T D"], scan: Scan) -> Float[Tensor, "B #T D"]:
        """One row per image; in a pack, where tokens are of several images, one per token."""
        # The mean is undecayed attention with q = k = 1: counted per document, with a state.
        ones = torch.ones_like(x[..., :1]).unsqueeze(2)
        total = scan("mean", Decay(), undecayed(ones, ones, x.unsqueeze(2), count=True), causal=False).squeeze(2)
        if scan.span.cu_seqlens is None:
            total = total[:, :1]
        return torch.sigmoid(self.excite(F.relu(self.squeeze(total[..., :-1] / total[..., -1:]))))
