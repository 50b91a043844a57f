"""Sums of rotations over whole documents: a causal convolution with the impulse response, and one Fourier transform per
document for what the state before it adds, one for the state after it. No loop over tokens or documents.
"""

import torch
from torch import Tensor

from isotach.ops.backends import register
from isotach.ops.etsc import ETSC, places
from isotach.ops.torch.toeplitz import convolution


@register(ETSC, "torch")
def etsc(
    rec: ETSC, x: ETSC.Inputs, s: ETSC.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, ETSC.State]:
    """chunk_size has no meaning here."""
    if cu_seqlens is None:
        lengths, (row, place) = x.v.new_full(x.v.shape[:1], x.v.shape[1], dtype=torch.int64), places(x)
        longest = x.v.shape[1]
    else:
        lengths = cu_seqlens.diff()
        row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=x.v.shape[1])
        place = torch.arange(1, x.v.shape[1] + 1, device=lengths.device) - cu_seqlens[row]
        longest = int(lengths.max())
    v = rec.wide(x).v.flatten(2)
    kernel = rec.kernel(x, longest).flip(0).flatten(1)
    within = convolution(v, kernel, v.new_empty(len(lengths), 0, v.shape[2]), cu_seqlens)
    output = within.view(x.v.shape) + rec.recalled(x, s, row, place).view(x.v.shape)
    return output.to(x.v.dtype), rec.apply(rec.summary(x, lengths, row, place), s)
