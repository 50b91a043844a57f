"""Toeplitz neural network: a gated unit whose mixing is a Toeplitz matrix made by a small network of the distance.

    u, v = silu(x Wu + bu), silu(x Wv + bv)       expand · D channels each
    o_t  = Σ_{s≤t} k_{t-s} ∘ v_s                  k_j = γ^j RPE(j)
    y    = (u ∘ o) Wo + bo

RPE reads the plain distance: a linear map from it to R channels, then `rpe_layers` times and once more to all channels
a linear map of relu(SRMSNorm(·)). The first norm makes it free of scale, so far distances are all alike to it: what
sets them apart is γ^j alone, and what sets near ones apart are the first map's biases. Parameters do not grow with the
text, and neither does the kernel change with its length, as it would with the released options that divide by it.

Training multiplies spectra in O(T log² T). A step reads every earlier input, or the last `window`; `isotach convert`
makes a layer of constant state (mixers/etsc.py). Tokens that look both ways, as patches of an image in their order
may, use k_{-j} = γ^j RPE(-j) for what is ahead.

Toeplitz Neural Network (arXiv:2305.04749); defaults of its causal language model, RPE width D / 8 but at least 32.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.gtu import GTU, initialize_uniform
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream, linear
from isotach.nn.norm import SRMSNorm
from isotach.ops.recurrence import Apart, state_dtype
from isotach.ops.toeplitz import Toeplitz

BLOCK = 256  # lags whose kernel is computed together while no gradient is wanted


class TNN(Mixer):
    recurrence: Toeplitz

    class Config(MixerConfig):
        """expand: channels that are mixed, as a multiple of width; rpe_width, rpe_layers: of the network of distances,
        width None for D / 8 but at least 32; gamma: γ; decay: one γ, or one learned per channel between γ and 1;
        window: the lags that count, None for all; two_sided: whether tokens look ahead as well.
        """

        expand: int = Field(3, ge=1)
        rpe_width: int | None = Field(None, ge=1)
        rpe_layers: int = Field(6, ge=0)
        gamma: float = Field(0.99, gt=0, le=1)
        decay: Literal["fixed", "learned"] = "fixed"
        window: int | None = Field(None, ge=1)
        two_sided: bool = False

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, mixed = config.width, config.expand * config.width
        self.heads, self.causal = config.heads, not config.two_sided
        self.recurrence = Toeplitz(window=config.window, two_sided=config.two_sided)
        self.gtu = GTU(width, mixed)
        self.rpe = RPE(config.rpe_width or max(width // 8, 32), config.rpe_layers, mixed)
        self.gamma = config.gamma
        self.rate = nn.Parameter(torch.empty(mixed)) if config.decay == "learned" else None
        self._known: _Known | None = None

    def initialize(self, stream: Stream, std: float) -> None:
        """As released: linear maps as PyTorch begins them, the rates of learned decays from N(0, 1)."""
        super().initialize(stream, std)
        if self.rate is not None:
            with torch.no_grad():
                self.rate.normal_(generator=stream("rate"))

    def project(self, x: Tensor, scan: Scan) -> tuple[Toeplitz.Inputs, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has not all integers above 256
            kernel = self.kernel(self._lags(scan))
        v, u = self.gtu.project(x)
        return Toeplitz.Inputs(self.split(v), kernel), u

    def output(self, o: Tensor, u: Tensor) -> Tensor:
        return self.gtu.output(o.flatten(-2), u)

    def kernel(self, lags: int) -> Float[Tensor, "L H V"]:
        """k_{lags-1} .. k_0, in float32 at least; where tokens look both ways k_{lags-1} .. k_{1-lags}."""
        if self.causal and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.split(self._remembered(lags))
        return self.split(self._at(range(lags - 1, -1 if self.causal else -lags, -1)))

    def log_gamma(self) -> Float[Tensor, "#C"]:
        """log γ, of every channel where it is learned; float64."""
        if self.rate is None:
            return torch.tensor([math.log(self.gamma)], dtype=torch.float64, device=self.gtu.out.weight.device)
        return torch.log(self.gamma + (1 - self.gamma) * torch.sigmoid(self.rate.double()))

    def _at(self, distances: range) -> Float[Tensor, "L C"]:
        distance = torch.arange(distances.start, distances.stop, distances.step, device=self.gtu.out.weight.device)
        kernel: Tensor = self.rpe(distance)
        return kernel * (distance.abs()[:, None] * self.log_gamma().to(kernel)).exp()

    def _remembered(self, lags: int) -> Float[Tensor, "L C"]:
        """The kernel in blocks that are computed once: a token would pay for all distances again, and its last bits
        would tell how many were computed with it.
        """
        weights = [*self.rpe.parameters(), *([] if self.rate is None else [self.rate])]
        flat = torch.cat([weight.detach().flatten() for weight in weights])
        if self._known is None or not self._known.is_of(flat):
            self._known = _Known(flat)
        kernel = self._known.kernel
        done = 0 if kernel is None else len(kernel)
        if kernel is None or done < lags:
            blocks = [self._at(range(i + BLOCK - 1, i - 1, -1)) for i in range(done, lags, BLOCK)][::-1]
            kernel = self._known.kernel = torch.cat(blocks if kernel is None else [*blocks, kernel])
        return kernel[len(kernel) - lags :]

    def _lags(self, scan: Scan) -> int:
        """The lags at which the call can look back, or a few more."""
        span, before = scan.span, scan.before("main")
        longest = span.positions.shape[1] * (1 if span.group is None else span.group.size())
        if span.cu_seqlens is not None and not torch.compiler.is_compiling():
            longest = int(span.cu_seqlens.diff().max())
        if before is None:
            past = 0
        elif torch.compiler.is_compiling():  # which cannot ask how much of a buffer is in use
            past = before.past.shape[1]
        else:
            states = before if isinstance(before, Apart) else (before,)
            past = max(self.recurrence.recent(state).shape[1] for state in states)
        lags = longest + past
        return min(lags, self.recurrence.window or lags)


class RPE(nn.Module):
    """Distances to kernels: (L,) integers -> (L, C), in float32 at least."""

    def __init__(self, width: int, layers: int, channels: int) -> None:
        super().__init__()
        self.distance = linear(1, width, bias=True)
        self.layers = nn.ModuleList(linear(width, width, bias=True) for _ in range(layers))
        self.out = linear(width, channels, bias=True)
        self.norm = SRMSNorm(width, eps=1e-16)  # as released, where 1e-8 is added behind the root

    def initialize(self, stream: Stream, std: float) -> None:
        """As released; `std` is for linear maps that are drawn otherwise."""
        initialize_uniform(self, stream)

    def forward(self, distance: Tensor) -> Float[Tensor, "L C"]:
        dtype = state_dtype(self.distance.weight)
        z = _affine(self.distance, distance.to(dtype)[:, None])
        for layer in (*self.layers, self.out):
            z = _affine(layer, F.relu(self.norm(z)))
        return z


def _affine(layer: nn.Module, z: Tensor) -> Tensor:
    """The layer in z's precision, whatever its weights are kept in."""
    assert isinstance(layer, nn.Linear)
    return F.linear(z, layer.weight.to(z.dtype), layer.bias.to(z.dtype))


class _Known:
    """A kernel, as far as it has been computed from some weights.

    Weights are told by their values: a fused optimizer writes to them without a trace.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.kernel: Tensor | None = None

    def is_of(self, weights: Tensor) -> bool:
        there = (self.weights.dtype, self.weights.device) == (weights.dtype, weights.device)
        return there and torch.equal(self.weights, weights)
