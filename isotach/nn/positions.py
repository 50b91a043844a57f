"""Positions that enter through q and k alone, so that a score depends on the distance t - s.

    RoPE   each pair of channels is rotated by t·θ_j                      (arXiv:2104.09864)
    LRPE   x -> [x cos(tθ), x sin(tθ)], so q·k becomes Σ_j q_j k_j cos((t-s)θ_j); width doubles
           (linearized relative positional encoding, core 4 with the identity basis)

Angles are formed in float64 and reduced to one turn: in float32, t·θ is off by a hundredth of a turn at t = 10⁶.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ladder(width: int, *, base: float = 10000.0) -> Float[Tensor, "K"]:
    """base^(-2j / width) for j = 0..width-1, float32."""
    exponent = torch.arange(width, dtype=torch.float64) * (-2.0 / width)
    return (base**exponent).float()


def angles(positions: Int[Tensor, "B T"], theta: Float[Tensor, "..."]) -> Float[Tensor, "B T ..."]:
    """positions · theta within one turn, in theta's dtype; differentiable in theta."""
    turns = positions.to(torch.float64)[(..., *(None,) * theta.dim())] * theta.to(torch.float64)
    return torch.remainder(turns, 2 * math.pi).to(theta.dtype)


def lrpe(x: Float[Tensor, "B T H K"], angle: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H 2K"]:
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([x * cos, x * sin], -1)


def rope(x: Float[Tensor, "B T H K"], angle: Float[Tensor, "B T 1 K/2"]) -> Float[Tensor, "B T H K"]:
    """Channel j is paired with channel j + K/2."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
