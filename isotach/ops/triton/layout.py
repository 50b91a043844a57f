"""How tensors are handed to kernels."""

import triton
from torch import Tensor


def flat(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """(B, T, H, X) as tokens with adjacent channels; how far tokens and heads are apart."""
    if x is None:
        return None, 0, 0
    x = x.flatten(0, 1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def sides(state: Tensor | None, turned: bool = False) -> tuple[int, ...]:
    """How far documents, heads and the two sides of a state are apart."""
    return (0, 0, 0, 0) if state is None else (state.mT if turned else state).stride()


def padded(width: int) -> int:
    """As products want it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))
