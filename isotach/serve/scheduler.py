"""Who is let in, and who reads how much in the next call: pure functions of numbers.

A turn reads one call's worth of tokens, and then writes one token in every row. Large calls read fastest, and are no
slower for anybody else: between two operations of a call, whoever may not wait for its end has a turn of their own
(serve.rounds). So a call is as large as reads fast, unless one of its operations alone would take too long (`pace`).

Who has the least left goes first, and a longer one joins it only where both can be read to the end. So that a long one
is never starved by ever new short ones, whoever got nothing in PATIENCE calls gets half of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# On one CPU thread tnl-44m reads 950 tokens a second in calls of 1024, 900 of 512, 650 of 128, 580 of 64; tnl-1m reads
# 23, 20, 11 and 9 thousand.
CALL = 512  # tokens of a call at most
LEAST = 32  # tokens of a call, however long its operations take
SOON = 0.005  # seconds: an operation that ends so soon keeps nobody waiting, however quick a step of the model is
PATIENCE = 3
ROWS = 256  # a step of more is bound by arithmetic already: they would only slow each other down


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request still has to read.

    - left: tokens in all; piece: how many may be read at once, at most `left`.
    - skipped: calls in a row in which it got nothing.
    """

    left: int
    piece: int
    skipped: int = 0


def plan(demands: Sequence[Demand], *, room: int = CALL) -> list[tuple[int, int]]:
    """The next call, of at most `room` tokens: (index of the demand, tokens), each index once."""
    slices: dict[int, int] = {}
    late = max(range(len(demands)), key=lambda i: demands[i].skipped, default=None)
    if late is not None and demands[late].skipped >= PATIENCE:
        slices[late] = min(demands[late].piece, max(1, room // 2))
        room -= slices[late]
    first = True
    for i in sorted(range(len(demands)), key=lambda i: demands[i].left):
        if i in slices:
            continue
        count = min(demands[i].piece, room)
        if count == 0 or (not first and count < demands[i].left):
            break
        slices[i] = count
        room, first = room - count, False
    return list(slices.items())


def pace(tokens: int, *, stretch: float, step: float) -> int:
    """How many tokens the next call of a request should have, after one of `tokens`.

    - stretch: seconds that its longest operation took, which nothing can interrupt; step: that a step takes alone.

    Attention over all that was read takes longer the more that is; half a step is what everybody else can wait for.
    """
    most = max(SOON, step / 2)
    if stretch > most:
        return max(LEAST, tokens // 2)
    return min(CALL, 2 * tokens) if stretch < most / 2 else tokens


def admit(needs: Sequence[int], *, free: int, rows: int) -> int:
    """How many of those who wait, in the order in which they came, are let in: all before the first that does not fit.

    - needs: bytes of each; free: bytes that nobody has reserved; rows: places left.

    Nobody is overtaken: a large request that waits for memory would otherwise wait for ever.
    """
    admitted = 0
    while admitted < min(len(needs), rows) and needs[admitted] <= free:
        free -= needs[admitted]
        admitted += 1
    return admitted
