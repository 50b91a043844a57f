"""SimpleRMSNorm, x / √(mean(x²) + eps): no gain, no mean (TransNormerLLM, arXiv:2307.14995). And a norm with a gate."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.ops import sharding
from isotach.ops.backends import has_kernels

Activation = Literal["none", "silu", "sigmoid"]

WIDE = (torch.float32, torch.float64)
WIDEST = 1 << 14  # channels that a kernel holds at once
ACTIVATIONS = {"none": lambda gate: gate, "silu": F.silu, "sigmoid": torch.sigmoid}


class SRMSNorm(nn.Module):
    """Normalises the last axis; the mean square is taken in float32 at least."""

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self._eps = {dtype: torch.full((1, 1, 1), eps, dtype=dtype, device="cpu") for dtype in WIDE}

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        one_token = x.dim() == 3 and x.shape[1] == 1 and x.device.type == "cpu" and x.dtype in self._eps
        if one_token and not torch.is_autocast_enabled("cpu"):
            # It costs what operations cost before they do anything: three of them here, in rms_norm six.
            return x * torch.baddbmm(self._eps[x.dtype], x, x.mT, alpha=1 / self.width).rsqrt()
        return F.rms_norm(x, (self.width,), eps=self.eps)


def gated(
    norm: SRMSNorm | nn.RMSNorm,
    o: Float[Tensor, "B T H V"],
    gate: Float[Tensor, "B T HV"] | None,
    activation: Activation,
) -> Float[Tensor, "B T HV"]:
    """norm(o) ∘ activation(gate), heads side by side: every head for itself, or all of them where norm is that wide.

    On a GPU one pass over memory instead of three, and two instead of six with gradients.
    """
    width, gain = (norm.width, None) if isinstance(norm, SRMSNorm) else (norm.normalized_shape[0], norm.weight)
    rows = o.flatten(2) if o.shape[2] * o.shape[3] == width else o
    if gate is None:
        return norm(rows).flatten(2)
    if _fused(rows, gate, width):
        return _kernel(rows, gate, gain, norm.eps, activation, width=width, before=False)
    return norm(rows).flatten(2) * ACTIVATIONS[activation](gate)


def gated_before(
    o: Float[Tensor, "B T D"], gate: Float[Tensor, "B T D"], gain: Float[Tensor, "D"], *, groups: int, eps: float
) -> Float[Tensor, "B T D"]:
    """gain ∘ norm(o ∘ silu(gate)), every one of `groups` for itself, as in Mamba-2."""
    width = o.shape[-1] // groups
    if groups == 1 and _fused(o, gate, width):
        return _kernel(o, gate, gain, eps, "silu", width=width, before=True)
    y = (o * F.silu(gate)).unflatten(-1, (groups, width))
    return gain * F.rms_norm(y, (width,), eps=eps).flatten(-2)


def _kernel(
    o: Tensor, gate: Tensor, gain: Tensor | None, eps: float | None, activation: Activation, *, width: int, before: bool
) -> Tensor:
    if sharding.spread((o, gate)):
        sharding.engage()
    heads = o.unflatten(-1, (-1, width)) if o.dim() == 3 else o
    given = (heads, gate.view(heads.shape), gain, eps, activation, before)
    fused: Tensor = torch.ops.isotach.gated_norm_triton(*given)
    return fused.flatten(2)


def _fused(o: Tensor, gate: Tensor, width: int) -> bool:
    """Whether a kernel takes these."""
    wide = width > WIDEST or torch.float64 in (o.dtype, gate.dtype)
    return not wide and has_kernels("gated_norm", o.device.type)


def l2norm(x: Float[Tensor, "... D"], *, eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """x / √(Σ x² + eps) over the last axis, in float32 at least, in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
