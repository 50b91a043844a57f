"""Softmax attention over a growing history through PyTorch's scaled_dot_product_attention."""

import torch
from torch import Tensor

from isotach.ops.backends import register
from isotach.ops.history import History, attend
from isotach.ops.recurrence import rows

_family = History()


@register(History, "torch")
def history(
    rec: History, x: History.Inputs, s: History.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, History.State]:
    """Documents of one length go through attention as one batch; chunk_size has no meaning here."""
    if cu_seqlens is None:
        return _batch(x, s)
    output = x.v.new_empty(1, x.q.shape[1], x.q.shape[2], x.v.shape[3]).to(x.q.dtype)
    pieces: list[History.State] = []
    order: list[Tensor] = []
    lengths = cu_seqlens.diff()
    for size in lengths.unique().tolist():
        chosen = (lengths == size).nonzero()[:, 0]
        order.append(chosen)
        if size == 0:
            pieces.append(rows(s, chosen))
            continue
        tokens = cu_seqlens[chosen, None] + torch.arange(size, device=cu_seqlens.device)
        part, after = _batch(History.Inputs(*(leaf[0, tokens] for leaf in x)), rows(s, chosen))
        output = output.index_put((torch.zeros_like(tokens), tokens), part)
        pieces.append(after)
    return output, rows(_family.concatenate(pieces), torch.cat(order).argsort())


def _batch(x: History.Inputs, s: History.State) -> tuple[Tensor, History.State]:
    if s.k.shape[1] == 0:
        return _family.read(x, s), _family.apply(_family.summarize(x), s)
    after = _family.apply(_family.summarize(x), s)
    return attend(x.q, after.k, after.v, s.length), after
