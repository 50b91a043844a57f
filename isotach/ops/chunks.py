"""How documents are cut for a chunk loop: documents → pieces → chunks, with equal chunks of many pieces in one step.

    tokens   |---------- document 0 ----------|- doc 1 -|------ document 2 ------|
    pieces   |---- lane 0 ----|---- lane 1 ---|- lane 2-|-------- lane 3 --------|
    step i   the i-th chunk of every lane that has one, as one batch

A *lane* is a piece of one document that is processed front to back. A document is one lane unless there are too few
documents to fill a step; then it is split into pieces whose states are chained afterwards. Chunks never straddle
documents and are never padded: full chunks come first, then what is left of each lane, cut into powers of two so that
any set of lengths needs at most log2(chunk) more steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Step:
    """Equally long chunks of several lanes, `repeats` times: lane j's chunks follow each other from starts[j] on."""

    lanes: slice | Tensor  # of the block
    count: int
    length: int
    repeats: int
    first: int
    stride: int | None  # distance between starts, None where they are not evenly spaced
    index: Tensor | None  # then: the token numbers, (count * length,), and repeats is 1

    def load(self, flat: Tensor, i: int, repeats: int, out: Tensor, scale: Tensor | None = None) -> Tensor:
        """Copy repeats i.. of flat (tokens, H, X) into out (repeats * count, H, length, X), repeat after repeat.

        `scale`, broadcast to out, multiplies on the way.
        """
        if self.index is not None:
            chosen = flat[self.index].unflatten(0, (self.count, self.length)).transpose(1, 2)
            return out.copy_(chosen) if scale is None else torch.mul(chosen, scale, out=out)
        view, wide = self._view(flat, i, repeats), out.unflatten(0, (repeats, self.count))
        if scale is None:
            wide.copy_(view)
        else:
            torch.mul(view, self._by_repeat(scale, repeats), out=wide)
        return out

    def store(self, flat: Tensor, i: int, repeats: int, value: Tensor, scale: Tensor | None = None) -> None:
        """Copy value, shaped as `out` of load, to its place in flat, times `scale` where it is given."""
        if self.index is not None:
            value = value if scale is None else value * scale
            flat.index_copy_(0, self.index, value.transpose(1, 2).flatten(0, 1).to(flat.dtype))
            return
        view, wide = self._view(flat, i, repeats), value.unflatten(0, (repeats, self.count))
        if scale is None:
            view.copy_(wide)
        elif flat.dtype == value.dtype:
            torch.mul(wide, self._by_repeat(scale, repeats), out=view)
        else:
            view.copy_(wide * self._by_repeat(scale, repeats))

    def _by_repeat(self, scale: Tensor, repeats: int) -> Tensor:
        return scale.unsqueeze(0) if scale.shape[0] == 1 else scale.unflatten(0, (repeats, self.count))

    def _view(self, flat: Tensor, i: int, repeats: int) -> Tensor:
        assert self.stride is not None
        token, head, channel = flat.stride()
        return flat.as_strided(
            (repeats, self.count, flat.shape[1], self.length, flat.shape[2]),
            (self.length * token, self.stride * token, head, token, channel),
            flat.storage_offset() + (self.first + i * self.length) * token,
        )

    def pick(self, lanes: Tensor) -> Tensor:
        """The rows of this step's lanes: a view, or a copy that `put` writes back."""
        return lanes[self.lanes]

    def put(self, lanes: Tensor, value: Tensor) -> None:
        if not isinstance(self.lanes, slice):
            lanes.index_copy_(0, self.lanes, value)


@dataclass(frozen=True)
class Block:
    """Lanes that are processed together because their states and buffers fit in cache."""

    lanes: slice
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    document: Tensor  # (lanes,) the document each lane belongs to
    opens: Tensor  # (lanes,) whether the lane begins its document
    closes: Tensor  # (lanes,) whether it ends it
    empty: Tensor  # documents without tokens
    links: tuple[tuple[Tensor, Tensor], ...]  # (lanes, the lanes that continue them), in order of rank
    blocks: tuple[Block, ...]


@lru_cache(maxsize=64)
def plan(bounds: tuple[int, ...], chunk: int, *, piece: int | None, lanes_per_block: int, device: torch.device) -> Plan:
    """Cut documents bounds[n]..bounds[n+1] into lanes of at most `piece` tokens (a multiple of chunk) and chunks."""

    def tensor(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(device)

    edges = np.asarray(bounds, np.int64)
    lengths = np.diff(edges)
    pieces = np.ones_like(lengths) if piece is None else -(-lengths // piece)
    pieces[lengths == 0] = 0
    document = np.repeat(np.arange(len(lengths)), pieces)
    rank = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = edges[document] + rank * (piece or 0)
    stop = edges[document + 1] if piece is None else np.minimum(start + piece, edges[document + 1])
    size = stop - start

    # Longest first, so that the lanes still running are always a prefix.
    order = np.lexsort((np.arange(len(size)), -(size // chunk)))
    document, rank, start, size = document[order], rank[order], start[order], size[order]
    lane = np.empty(len(order), np.int64)
    lane[order] = np.arange(len(order))  # lane number of the i-th piece in reading order
    before = np.cumsum(pieces) - pieces  # pieces of earlier documents
    links = []
    for r in range(int(pieces.max(initial=0)) - 1):
        at = before[pieces > r + 1] + r
        links.append((tensor(lane[at]), tensor(lane[at + 1])))

    blocks = []
    for a in range(0, len(start), lanes_per_block):
        own = slice(a, min(a + lanes_per_block, len(start)))
        blocks.append(Block(own, tuple(_steps(start[own], size[own], chunk, device))))
    return Plan(
        document=tensor(document),
        opens=tensor(rank == 0),
        closes=tensor(rank == pieces[document] - 1),
        empty=tensor(np.flatnonzero(pieces == 0)),
        links=tuple(links),
        blocks=tuple(blocks),
    )


def _steps(start: Ints, size: Ints, chunk: int, device: torch.device) -> Iterator[Step]:
    full, rest = size // chunk, size % chunk
    done = 0
    for until in np.unique(full[full > 0]).tolist():  # the lanes that run until then are a prefix
        running = int((full >= until).sum())
        yield from _step(slice(0, running), start[:running] + done * chunk, chunk, until - done, device)
        done = until
    at = start + full * chunk
    left = np.unique(rest[rest > 0])
    cuts = left if len(left) == 1 else [1 << bit for bit in reversed(range(int(left.max(initial=0)).bit_length()))]
    for cut in cuts:
        chosen = np.flatnonzero(rest == cut if len(left) == 1 else rest & cut)
        if len(chosen):
            lanes = slice(0, len(start)) if len(chosen) == len(start) else torch.from_numpy(chosen).to(device)
            yield from _step(lanes, at[chosen], int(cut), 1, device)
            at[chosen] += cut


def _step(lanes: slice | Tensor, starts: Ints, length: int, repeats: int, device: torch.device) -> Iterator[Step]:
    """One step for all repeats where the chunks can be viewed, else one per repeat."""
    gaps = np.unique(np.diff(starts))
    if len(gaps) == 0 or (len(gaps) == 1 and gaps[0] > 0):
        stride = int(gaps[0]) if len(gaps) else length
        yield Step(lanes, len(starts), length, repeats, int(starts[0]), stride, None)
        return
    for i in range(repeats):
        index = (starts[:, None] + i * length + np.arange(length)).reshape(-1)
        first = int(starts[0]) + i * length
        yield Step(lanes, len(starts), length, 1, first, None, torch.from_numpy(index).to(device))
