"""Running moments of all documents of a pack, a batch for every power of two of their lengths."""

from torch import Tensor

from isotach.ops.backends import register
from isotach.ops.moments import Moments, prefixes
from isotach.ops.recurrence import Tensors, at_time
from isotach.ops.torch.packs import by_document


@register(Moments, "torch")
def moments(
    rec: Moments, x: Moments.Inputs, s: Moments.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Moments.State]:
    """chunk_size has no meaning here."""
    if cu_seqlens is None:
        states = prefixes(x, s)
        return rec.emit(x, states), rec.State(*at_time(states, -1))

    def scan(tokens: Tensor, own: Tensors) -> tuple[list[Tensor], Tensors]:
        rows = rec.Inputs(x.v[0, tokens])
        states = prefixes(rows, own)
        return [rec.emit(rows, states)], states

    (output,), state = by_document(rec, s, cu_seqlens, scan)
    return output.unsqueeze(0), state
