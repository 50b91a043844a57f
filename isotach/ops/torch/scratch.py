"""Buffers that a chunk loop reuses: no allocation, and no view computed twice, inside the loop."""

from typing import NamedTuple

import torch
from torch import Tensor


class Buffer(NamedTuple):
    """One piece of memory seen three ways, so that a step costs its products and little else."""

    wide: Tensor  # (N, H, m, X), for elementwise work
    flat: Tensor  # (N H, m, X), for torch.bmm
    turned: Tensor  # (N H, X, m)


class Scratch:
    """Named buffers that grow to the largest shape asked for; every shape handed out is contiguous."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int, int, int], Buffer] = {}

    def take(self, name: str, n: int, heads: int, m: int, width: int) -> Buffer:
        """Uninitialised memory; it is the caller's until `name` is taken again."""
        key = (name, n, heads, m, width)
        if key not in self._views:
            size = n * heads * m * width
            if name not in self._memory or self._memory[name].numel() < size:
                self._memory[name] = torch.empty(size, dtype=self.dtype, device=self.device)
            wide = self._memory[name][:size].view(n, heads, m, width)
            flat = wide.flatten(0, 1)
            self._views[key] = Buffer(wide, flat, flat.transpose(1, 2))
        return self._views[key]
