"""Who is let in, and who reads how much in the next round: pure functions of numbers.

A round writes one token in every row, and then reads one call's worth of tokens. Three things pull at the size of the
call. Large ones read fastest. While others write, their next token waits for it. And whoever arrives meanwhile waits
for it too, unless it is broken off.

    nobody writes      up to ALONE tokens; a call may be broken off between two layers when somebody arrives
    somebody writes    up to SHARED tokens, and then none until writing has had as much time as reading took

Who has the least left goes first, and a longer one joins it only where both can be read to the end: a short request
waits for a long one no longer than the layer in progress takes, and for those who write no longer than a step. So that
a long one is never starved by ever new short ones, whoever got nothing in PATIENCE calls gets half of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# On one CPU thread tnl-44m reads 950 tokens a second in calls of 1024, 900 of 512, 650 of 128, 580 of 64; tnl-1m reads
# 23, 20, 11 and 9 thousand.
ALONE = 512
SHARED = 128
PATIENCE = 3
ROWS = 256  # a step of more is bound by arithmetic already: they would only slow each other down


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request still has to read.

    - left: tokens in all; piece: up to the next place where its state is to be kept, at most `left`.
    - skipped: calls in a row in which it got nothing.
    """

    left: int
    piece: int
    skipped: int


def plan(demands: Sequence[Demand], *, writing: bool, owed: float = 0.0) -> list[tuple[int, int]]:
    """The next call: (index of the demand, tokens), each index once; empty where nothing is to be read now.

    - writing: whether anybody does; owed: seconds that reading has had more than writing since anybody did.
    """
    budget = room = SHARED if writing else ALONE
    slices: dict[int, int] = {}
    late = max(range(len(demands)), key=lambda i: demands[i].skipped, default=None)
    if late is not None and demands[late].skipped >= PATIENCE:
        slices[late] = min(demands[late].piece, budget // 2)
        room -= slices[late]
    first = True
    for i in sorted(range(len(demands)), key=lambda i: demands[i].left):
        if i in slices:
            continue
        count, short = min(demands[i].piece, room), demands[i].left <= budget
        if count == 0 or (not first and count < demands[i].left) or (writing and owed > 0 and not short):
            break
        slices[i] = count
        room, first = room - count, False
    return list(slices.items())


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
