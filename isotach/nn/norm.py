"""SimpleRMSNorm, x / √(mean(x²) + eps): no gain, no mean (TransNormerLLM, arXiv:2307.14995)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

WIDE = (torch.float32, torch.float64)


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


def l2norm(x: Float[Tensor, "... D"], *, eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """x / √(Σ x² + eps) over the last axis, in float32 at least, in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
