"""A pack's documents as rows of a few padded batches, for families whose work is a scan that has no chunks.

Documents whose lengths share a power of two share a batch, so padding at most doubles the tokens; it comes last and is
never read. No document's numbers meet another's.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from isotach.ops.recurrence import Recurrence, Tensors, rows

Scan = Callable[[Tensor, Tensors], tuple[Sequence[Tensor], Tensors]]


def by_document(rec: Recurrence, state: Tensors, cu_seqlens: Tensor, scan: Scan) -> tuple[list[Tensor], Tensors]:
    """Per-token results (tokens, ...) and the state after every document.

    scan(tokens, s) is given the token numbers (n, m) of n documents and their states, and returns results (n, m, ...)
    and the states after every token, leaves (n, m, ...).
    """
    order, pieces, places, parts = [], [], [], []
    lengths = cu_seqlens.diff()
    empty = (lengths == 0).nonzero()[:, 0]
    if len(empty):
        order.append(empty)
        pieces.append(rows(state, empty))
    for documents in _alike(lengths):
        own = lengths[documents]
        inside = torch.arange(int(own.max()), device=own.device).expand(len(own), -1)
        valid = inside < own[:, None]
        tokens = cu_seqlens[documents, None] + torch.minimum(inside, own[:, None] - 1)
        results, states = scan(tokens, rows(state, documents))
        every = torch.arange(len(own), device=own.device)
        order.append(documents)
        pieces.append(type(state)(*(leaf[every, own - 1] for leaf in states)))
        places.append(tokens[valid])
        parts.append([result[valid] for result in results])
    back = torch.cat(places).argsort()
    outputs = [torch.cat(part)[back] for part in zip(*parts, strict=True)]
    return outputs, rows(rec.concatenate(pieces), torch.cat(order).argsort())


def _alike(lengths: Tensor) -> Iterator[Tensor]:
    """Documents that are not empty, grouped by the power of two at or above their length."""
    power = (lengths - 1).clamp_min(0).double().add(0.5).log2().floor()
    for value in power[lengths > 0].unique().tolist():
        yield ((power == value) & (lengths > 0)).nonzero()[:, 0]
