"""When a supernet has learned enough: once it ranks the same models the same way twice."""

from collections.abc import Sequence

import numpy as np


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's τ_b of two lists of scores of the same models: 1 for the same ranking, -1 for the reverse.

    Pairs that are tied in a list say nothing about it; 0 where all are.
    """
    i, j = np.triu_indices(len(a), 1)
    x, y = (np.sign(np.take(scores, i) - np.take(scores, j)) for scores in (a, b))
    pairs = np.sqrt(np.abs(x).sum() * np.abs(y).sum())
    return float((x * y).sum() / pairs) if pairs else 0.0


def settled(taus: Sequence[float], *, enough: float, patience: int) -> bool:
    """Whether the last τ is `enough`, or none of the last `patience` exceeds the largest before them.

    The released code of the published search counts successive rises of τ instead, the opposite of its comment.
    """
    if not taus:
        return False
    return taus[-1] >= enough or len(taus) - 1 - int(np.argmax(taus)) >= patience
