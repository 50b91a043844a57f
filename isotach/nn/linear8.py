"""Matrices in eight bits for inference: a row of integers per output, and a scale for each.

    W_oi ≈ s_o n_oi,  n_oi = round(W_oi / s_o) in -127..127,  s_o = max_i |W_oi| / 127 in bfloat16
    y_o = s_o Σ_i n_oi x_i       x rounded to bfloat16, sums in float32, y rounded to bfloat16

Integers up to 127 are exact in bfloat16, and W is divided by a scale that was rounded before. So what is lost is the
rounding of W, half a step at most, and that of x and y, the same for one row and for many. In float64 nothing but W is
rounded. There are no gradients.
"""

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.errors import UserError

FEW = 16  # rows up to which the product that unpacks weights as it reads them is the faster one; docs/log.md


class Linear8(nn.Module):
    """weight (outputs, inputs) int8, scale (outputs,) bfloat16; what else mixers ask of an nn.Linear is there too."""

    scale: Tensor

    def __init__(self, weight: Int[Tensor, "O I"], scale: Float[Tensor, "O"], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, *layers: nn.Linear, empty: bool = False) -> Self:
        """The rounded weights of layers that read the same, outputs one behind the other; `empty`: room for them.

        Only a layer alone may have a bias.
        """
        parts = [rounded(layer.weight, empty=empty) for layer in layers]
        weight, scale = (torch.cat(each) for each in zip(*parts, strict=True))
        return cls(weight, scale, layers[0].bias)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        y = self.product(x).view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "R O"]:
        """x Wᵀ as it is computed: every row of x in one axis, in bfloat16, or in float64 where x is."""
        return product(x, self.weight, self.scale)


class Embedding8(nn.Module):
    """Rows of an embedding, and as a tied head their products: weight (vocab, D) int8, scale (vocab,) bfloat16."""

    scale: Tensor

    def __init__(self, weight: Int[Tensor, "vocab D"], scale: Float[Tensor, "vocab"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, layer: nn.Embedding, *, empty: bool = False) -> Self:
        return cls(*rounded(layer.weight, empty=empty))

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        dtype = torch.promote_types(self.scale.dtype, torch.float32)
        return self.weight[tokens].to(dtype) * self.scale[tokens].to(dtype).unsqueeze(-1)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... vocab"]:
        return product(hidden, self.weight, self.scale).view(*hidden.shape[:-1], -1).to(hidden.dtype)


def rounded(weight: Float[Tensor, "O I"], *, empty: bool = False) -> tuple[Int[Tensor, "O I"], Float[Tensor, "O"]]:
    """Integers and scales of a matrix, or room for them; UserError where it holds what is not a number."""
    if empty:
        return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.bfloat16)
    wide = weight.detach().float()
    scale = (wide.abs().amax(1) / 127).to(torch.bfloat16).clamp_min(torch.finfo(torch.bfloat16).tiny)
    if not bool(torch.isfinite(scale).all()):
        raise UserError("int8: expected finite weights, got inf or nan; use another checkpoint")
    return (wide / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def product(x: Float[Tensor, "... I"], weight: Int[Tensor, "O I"], scale: Float[Tensor, "O"]) -> Float[Tensor, "R O"]:
    """x Wᵀ for W = scale ∘ weight; every row of x in one axis, in bfloat16, or in float64 where x is."""
    rows, on_cpu = x.reshape(-1, x.shape[-1]), x.device.type == "cpu"
    if x.dtype == torch.float64:
        return F.linear(rows, weight.double()) * scale.double()
    rows, scale = rows.to(torch.bfloat16), scale.to(torch.bfloat16)
    if on_cpu and rows.shape[0] <= FEW:
        return torch._weight_int8pack_mm(rows, weight, scale)
    if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return (F.linear(rows.float(), weight.float()) * scale).to(torch.bfloat16)
    return F.linear(rows, weight.to(torch.bfloat16)) * scale
