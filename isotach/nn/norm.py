"""SimpleRMSNorm, x / √(mean(x²) + eps): no gain, no mean (TransNormerLLM, arXiv:2307.14995)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SRMSNorm(nn.Module):
    """Normalises the last axis; the mean square is taken in float32 at least."""

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.rms_norm(x, (self.width,), eps=self.eps)
