"""Running sums of all documents of a pack, a batch for every power of two of their lengths."""

import torch
from torch import Tensor

from isotach.ops.backends import register
from isotach.ops.recurrence import Tensors, state_dtype
from isotach.ops.running import Running, joined, split
from isotach.ops.torch.packs import by_document


@register(Running, "torch")
def running(
    rec: Running, x: Running.Inputs, s: Running.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Running.State]:
    """chunk_size has no meaning here."""
    if cu_seqlens is None:
        return rec.read(x, s), rec.apply(rec.summarize(x), s)

    def scan(tokens: Tensor, own: Tensors) -> tuple[list[Tensor], Tensors]:
        total = joined(own)[:, None] + x.x[0, tokens].double().cumsum(1)
        return [torch.cat(split(total, x.x.dtype), -1)], Running.State(*split(total, state_dtype(x.x)))

    (output,), state = by_document(rec, s, cu_seqlens, scan)
    return output.unsqueeze(0), state
