"""What every chunk loop does around its family's mathematics: cut, load, store, hand states on, revisit them.

A call's tensors are cut into lanes and chunks (ops/chunks.py). A *run* is a number of successive chunks of the same
lanes: only the state passes from one to the next, all else is one batch, sized to stay in cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from isotach.ops.chunks import Block, Step, plan
from isotach.ops.torch.scratch import Buffer, Scratch

# Measured: docs/log.md.
RUN_BYTES = 16 << 20  # of chunks that are one batch but for their states
BLOCK_BYTES = 16 << 20  # states and buffers of the lanes that are processed together
STATE_BYTES = 64 << 20  # recomputed states the backward holds at a time

States = tuple[Tensor, ...]  # of a block's lanes: (lanes, H, ...)
Sweep = Callable[["list[Run]", Block, States, bool], list[States]]


class Run(NamedTuple):
    """Chunks i .. i + repeats - 1 of a step."""

    step: Step
    i: int
    repeats: int

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Per repeat, from a tensor whose first axis holds one repeat after the other."""
        return flat.unflatten(0, (self.repeats, -1)).unbind(0)


class Loop:
    """One call: its tensors (B, T, H, X) by name, its plan and its buffers.

    bounds      of the documents in the flattened B·T tokens
    piece       tokens per lane where documents are to be split, else None
    lane_bytes  of one lane's state and the buffers of one of its chunks, for a chunk length
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        bounds: tuple[int, ...],
        *,
        chunk: int,
        piece: int | None,
        lane_bytes: Callable[[int], int],
        dtype: torch.dtype,
    ) -> None:
        self.tensors = {name: x.flatten(0, 1) for name, x in tensors.items()}
        first = next(iter(self.tensors.values()))
        self.heads, self.scratch, self.lane_bytes = first.shape[1], Scratch(dtype, first.device), lane_bytes
        self.plan = plan(
            bounds,
            chunk,
            piece=piece,
            lanes_per_block=max(1, BLOCK_BYTES // lane_bytes(chunk)),
            device=first.device,
        )

    def runs(self, block: Block) -> "list[Run]":
        """The block's chunks in order, as many at a time as fit in cache."""
        runs = []
        for step in block.steps:
            size = max(1, RUN_BYTES // (step.count * self.lane_bytes(step.length)))
            runs += [Run(step, i, min(size, step.repeats - i)) for i in range(0, step.repeats, size)]
        return runs

    # ---- one run's chunks: (repeats * lanes, H, length, X)

    def chunk(self, name: str, run: Run, width: int) -> Buffer:
        return self.scratch.take(name, run.repeats * run.step.count, self.heads, run.step.length, width)

    def load(self, name: str, run: Run, *, scale: Tensor | None = None) -> Buffer:
        """The tensor called `name`, times `scale` (broadcast to the buffer) where it is given."""
        source = self.tensors[name]
        buffer = self.chunk(name, run, source.shape[-1])
        run.step.load(source, run.i, run.repeats, buffer.wide, scale)
        return buffer

    def store(self, name: str, run: Run, value: Buffer, *, scale: Tensor | None = None) -> None:
        """Write the chunks, times `scale` where it is given, to their places in the tensor called `name`."""
        run.step.store(self.tensors[name], run.i, run.repeats, value.wide, scale)

    # ---- states: a row per document outside, a row per lane inside

    def lanes_of(self, documents: States, block: Block) -> States:
        """Every lane's copy of its document's row."""
        index = self.plan.document[block.lanes]
        return tuple(x[index].to(self.scratch.dtype) for x in documents)

    def documents_like(self, states: States) -> States:
        """A row per document for `keep` to fill; an empty document's row is copied."""
        documents = tuple(torch.empty(x.shape, dtype=self.scratch.dtype, device=x.device) for x in states)
        for document, x in zip(documents, states, strict=True):
            document[self.plan.empty] = x[self.plan.empty].to(document.dtype)
        return documents

    def keep(self, documents: States, block: Block, lanes: States, which: Tensor) -> None:
        """Write the block's lanes where `which` is set to their documents' rows."""
        chosen = which[block.lanes]
        index = self.plan.document[block.lanes][chosen]
        for document, lane in zip(documents, lanes, strict=True):
            document[index] = lane[chosen]

    def reversed_states(self, block: Block, lanes: States, sweep: Sweep) -> Iterator[tuple[Run, States]]:
        """The block's runs from last to first, each with the states before its chunks; `lanes` is overwritten.

        sweep(runs, block, lanes, keep) advances lanes over runs and returns, where they are to be kept, the states
        before every chunk of each run, (repeats * lanes, H, ...). They are all kept where they fit, else in groups.
        """
        runs = self.runs(block)
        chunks = sum(run.repeats for run in runs)
        fits = chunks * sum(x.nbytes for x in lanes) <= STATE_BYTES
        size = len(runs) if fits else math.ceil(math.sqrt(len(runs)))
        groups = [runs[i : i + size] for i in range(0, len(runs), size)]
        starts = []
        for group in groups[:-1]:
            starts.append([x.clone() for x in lanes])
            sweep(group, block, lanes, False)
        for group in reversed(groups):
            states = sweep(group, block, lanes, True)
            while states:
                yield group[len(states) - 1], states.pop()
            if starts:
                for x, start in zip(lanes, starts.pop(), strict=True):
                    x.copy_(start)


def document_bounds(batch: int, time: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Where documents begin and end in the flattened B·T tokens."""
    return tuple(range(0, batch * time + 1, time)) if cu_seqlens is None else tuple(cu_seqlens.tolist())
