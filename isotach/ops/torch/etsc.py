"""Sums of rotations over stretches of a document: inside one a causal convolution with the impulse response, one
Fourier transform for what the state before it adds, and one for the state after it.

A long row is read stretch by stretch, so that a token costs the same however long it is. The documents of a pack are a
stretch each, and all are read together.
"""

import torch
from torch import Tensor

from isotach import shapes
from isotach.ops.backends import register
from isotach.ops.etsc import ETSC, places
from isotach.ops.torch.toeplitz import convolution

STRETCH = 2048  # tokens, or one period where that is longer, as its transforms cost as much as a period's tokens


@register(ETSC, "torch")
def etsc(
    rec: ETSC, x: ETSC.Inputs, s: ETSC.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, ETSC.State]:
    """chunk_size has no meaning here."""
    time = x.v.shape[1]
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=time)
        place = torch.arange(1, time + 1, device=lengths.device) - cu_seqlens[row]
        return _stretch(rec, x, s, rec.kernel(x, int(lengths.max())), lengths, row, place, cu_seqlens)
    size, outputs = max(STRETCH, rec.period), []
    kernel = rec.kernel(x, min(size, time))
    for start in range(0, time, size):
        own = shapes.time_slice(x, start, min(start + size, time))
        lengths = own.v.new_full(own.v.shape[:1], own.v.shape[1], dtype=torch.int64)
        output, s = _stretch(rec, own, s, kernel[: own.v.shape[1]], lengths, *places(own), None)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), s


def _stretch(
    rec: ETSC,
    x: ETSC.Inputs,
    s: ETSC.State,
    kernel: Tensor,
    lengths: Tensor,
    row: Tensor,
    place: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ETSC.State]:
    """Documents of these lengths, whose tokens are the place[i]-th of document row[i]; kernel (L, H, V)."""
    v = rec.wide(x).v.flatten(2)
    within = convolution(v, kernel.flip(0).flatten(1), v.new_empty(len(lengths), 0, v.shape[2]), cu_seqlens)
    output = within.view(x.v.shape) + rec.recalled(x, s, row, place).view(x.v.shape)
    return output.to(x.v.dtype), rec.apply(rec.summary(x, lengths, row, place), s)
