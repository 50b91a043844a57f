"""Feature maps φ of linear attention, whose weight of token s for token t is φ(q_t) · φ(k_s).

    identity    x
    relu        max(x, 0)                                     cosFormer (arXiv:2202.08791)
    relu_plus   max(x, 0) + 1/√K                              Linear Video Transformer (arXiv:2210.08164)
    elu         elu(x), signed                                TransNormer T1 (arXiv:2210.10340)
    elu1        elu(x) + 1                                    Transformers are RNNs (arXiv:2006.16236), TransNormer T2
    silu        x σ(x), signed                                TransNormerLLM (arXiv:2307.14995)
    softmax     softmax of x over its channels                Efficient Attention's queries (arXiv:1812.01243)
    dpfp        r ∘ roll(r, j), j = 1..3, r = relu([x, -x])   fast weight programmers (arXiv:2102.11174); 6K features
    t2r         relu(x W + b), learned                        Finetuning Transformers into RNNs (arXiv:2103.13076)
    hedgehog    [softmax(x W), softmax(-x W)], learned        Hedgehog (arXiv:2402.04347); 2K features

The learned maps have their own W (K, K) per head, and for q and k apart. Hedgehog is in the normalised form, which its
authors went on to use (LoLCATs, arXiv:2410.10254): exp(x W) alone overflows.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Stream, linear
from isotach.ops.decay import Decay

Positive = Literal["relu", "relu_plus", "elu1", "softmax", "dpfp", "t2r", "hedgehog"]
Signed = Literal["identity", "elu", "silu"]
Features = Positive | Signed

POSITIVE: tuple[str, ...] = get_args(Positive)  # φ ≥ 0: their weights may be divided by their sum
ROLLS = 3  # the paper's ν, which it leaves open
FLOOR = 1e-12  # of hedgehog, as in LoLCATs


def feature_map(name: Features, *, heads: int, width: int) -> Callable[[Tensor], Tensor]:
    """φ by name, (B, T, heads, width) -> (B, T, heads, features); a module where φ is learned."""
    if name == "t2r":
        return T2R(heads, width)
    if name == "hedgehog":
        return Hedgehog(heads, width)
    return _FIXED[name]


def relu_plus(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    """relu(x) + 1/√K: strictly positive, so that no token's weights vanish together."""
    return F.relu(x) + x.shape[-1] ** -0.5


def elu1(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    """elu(x) + 1 as max(x, 0) + e^min(x, 0), which stays positive: F.elu(x) + 1 rounds to 0 below -17 in float32."""
    return F.relu(x) + x.clamp_max(0).exp()


def elu(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    # Not F.elu: torch.compile expects other strides of its backward than it gives (torch 2.13).
    return F.relu(x) + x.clamp_max(0).expm1()


def softmax(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    return F.softmax(x, -1)


def dpfp(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H 6K"]:
    """Products of rectified channels ±x_i with those one, two and three places on: sparse, and nearly orthogonal."""
    rectified = F.relu(torch.cat([x, -x], -1))
    return torch.cat([rectified * rectified.roll(j, -1) for j in range(1, ROLLS + 1)], -1)


def identity(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    return x


_FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "relu_plus": relu_plus,
    "elu": elu,
    "elu1": elu1,
    "silu": F.silu,
    "softmax": softmax,
    "dpfp": dpfp,
}


class T2R(nn.Module):
    """relu(x W + b) per head; begins as relu(x)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(heads, width, width)), nn.Parameter(torch.empty(heads, width))

    def initialize(self, stream: Stream, std: float) -> None:
        _begin_as_identity(self.weight)
        with torch.no_grad():
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
        return F.relu(_per_head(x, self.weight) + self.bias)


class Hedgehog(nn.Module):
    """[softmax(x W), softmax(-x W)] per head, each softmax over the features; begins with W the identity."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, width))

    def initialize(self, stream: Stream, std: float) -> None:
        _begin_as_identity(self.weight)

    def forward(self, x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H 2K"]:
        logits = _per_head(x, self.weight)
        return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], -1).clamp_min(FLOOR)


class Fixation(nn.Module):
    """Feature fixation: q ∘ g, k ∘ g with g = σ([q, k, v] Wg + bg), a weight per channel that sees all three.

    One Wg for all heads, and for q and k (Linear Video Transformer with Feature Fixation, arXiv:2210.08164).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = linear(3 * width, width, bias=True)

    def forward(
        self, q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H K"]
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        gate = torch.sigmoid(self.gate(torch.cat([q, k, v], -1)))
        return q * gate, k * gate


def undecayed(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H V"], *, count: bool = False
) -> Decay.Inputs:
    """Inputs of the decay family that forget nothing: o_t = Σ_s (q_t · k_s) v_s.

    count  give v a last column of ones, so that o's last column is the sum of the weights, Σ_s q_t · k_s
    """
    if count:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return Decay.Inputs(q, k, v, v.new_zeros(v.shape[0], 1, v.shape[2], 1))


def _per_head(x: Float[Tensor, "B T H K"], weight: Float[Tensor, "H K F"]) -> Float[Tensor, "B T H F"]:
    return torch.einsum("bthk,hkf->bthf", x, weight)


def _begin_as_identity(weight: Float[Tensor, "H K K"]) -> None:
    with torch.no_grad():
        weight.copy_(torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device).expand_as(weight))
