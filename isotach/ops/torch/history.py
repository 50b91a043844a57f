"""Memories of keys and values: a batch goes through PyTorch's attention at once, a pack as one batch per length.

Documents of one length are one batch, so nothing is padded, and no mask says where documents end.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from isotach.ops.attention import common
from isotach.ops.backends import register
from isotach.ops.growing import attend, is_empty
from isotach.ops.history import Blocks, Forgetting, History, Sliding, Sloped
from isotach.ops.recurrence import Recurrence, Tensors, rows

Batch = Callable[[Tensors, Tensors], tuple[Tensor, Tensors]]


@register(History, "torch")
@register(Forgetting, "torch")
@register(Sloped, "torch")
def growing(
    rec: History | Forgetting | Sloped, x: Tensors, s: Tensors, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensors]:
    """Appends first and reads what is there then; chunk_size has no meaning here."""

    def batch(x: Tensors, s: Tensors) -> tuple[Tensor, Tensors]:
        after = rec.apply(rec.summarize(x), s)
        return attend(rec, x, after, None if is_empty(s) else s.length), after

    return by_length(rec, batch, x, s, cu_seqlens)


@register(Sliding, "torch")
def sliding(
    rec: Sliding, x: Tensors, s: Tensors, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensors]:
    def batch(x: Tensors, s: Tensors) -> tuple[Tensor, Tensors]:
        return rec.read(x, s, chunk_size=chunk_size), rec.apply(rec.summarize(x), s)

    return by_length(rec, batch, x, s, cu_seqlens)


@register(Blocks, "torch")
def blocks(
    rec: Blocks, x: Tensors, s: Tensors, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensors]:
    """chunk_size has no meaning here."""

    def batch(x: Tensors, s: Tensors) -> tuple[Tensor, Tensors]:
        return rec.read(x, s), rec.apply(rec.summarize(x), s)

    return by_length(rec, batch, x, s, cu_seqlens)


def by_length(
    rec: Recurrence, batch: Batch, x: Tensors, s: Tensors, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensors]:
    """batch(x, s) -> (outputs, state) for all rows at once; of a pack, for all documents of one length at once."""
    if cu_seqlens is None:
        return batch(x, s)
    lengths = cu_seqlens.diff()
    if (size := common(lengths)) is not None and size > 0:  # already one batch, in order
        output, after = batch(type(x)(*(leaf[0].unflatten(0, (-1, size)) for leaf in x)), s)
        return output.flatten(0, 1)[None], after
    outputs: list[Tensor] = []
    tokens: list[Tensor] = []
    pieces: list[Tensors] = []
    order: list[Tensor] = []
    for size in lengths.unique().tolist():
        chosen = (lengths == size).nonzero()[:, 0]
        order.append(chosen)
        own = rows(s, chosen)
        if size > 0:
            at = cu_seqlens[chosen, None] + torch.arange(size, device=cu_seqlens.device)
            output, own = batch(type(x)(*(leaf[0, at] for leaf in x)), own)
            outputs.append(output.flatten(0, 1))
            tokens.append(at.flatten())
        pieces.append(own)
    output = torch.cat(outputs)[torch.cat(tokens).argsort()][None]
    return output, rows(rec.concatenate(pieces), torch.cat(order).argsort())
