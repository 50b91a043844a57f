"""Batches of packed documents: batch(step) is a pure function of the tokens, the seed and the step.

In an epoch the documents, in a random order, lie end to end on a ring, which is cut into rows of seq_len tokens from
a random place on; the rows are read in a random order. Step i reads rows i·n to (i + 1)·n of the epochs, one after
another, so any step is found without replaying those before it, and ranks and micro-batches only divide its rows.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isotach.data.cache import Tokens
from isotach.errors import UserError
from isotach.rng import seed_of

if TYPE_CHECKING:
    from isotach.ops.engine import Span

Indices = NDArray[np.int64]
AHEAD = 2  # batches in preparation for each worker


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows, all int64.

    - `tokens`, `targets`, `positions`: (1, T). The target is the next token of the same document, its last one the
      end-of-document.
    - `cu_seqlens`: (N + 1,); a segment ends wherever a document or a row does, and positions restart at 0 there.
    - `bytes`: bytes of text that the targets stand for.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    bytes: int

    @property
    def span(self) -> "Span":
        from isotach.ops.engine import Span

        return Span(self.positions, self.cu_seqlens)


@dataclass(frozen=True)
class _Epoch:
    """One order of the split: where each document in turn begins in the ids and on the ring, and which row is when."""

    sources: Indices  # (documents,)
    places: Indices  # (documents + 1,)
    phase: int
    rows: Indices | None  # (rows,); None: in order


@final
class Packer:
    """Cuts a split into batches of `batch_tokens` tokens in rows of `seq_len`.

    - `shuffle=True`, for training: epochs without end. An epoch yields each pair of a token and the next one at most
      once; less than one row of them is left over, elsewhere each epoch.
    - `shuffle=False`, for validation: documents in order, each pair exactly once in batch(0) to batch(steps - 1); the
      last row, and so the last batch, may be shorter, and a split shorter than a row is one short row.
    - `steps`: batches that read the split once, the last one counted whole.

    Raises UserError if the sizes do not divide or, for training, the split is shorter than one row.
    """

    def __init__(self, tokens: Tokens, *, seq_len: int, batch_tokens: int, seed: int, shuffle: bool = True) -> None:
        if seq_len < 1 or batch_tokens < seq_len or batch_tokens % seq_len:
            raise UserError(
                f"batches: batch_tokens must be a multiple of seq_len = {seq_len}, got {batch_tokens}; "
                f"use {max(1, round(batch_tokens / max(seq_len, 1))) * seq_len}"
            )
        self.seq_len = seq_len
        self._ids = np.asarray(tokens.ids)
        self._bounds = np.asarray(tokens.bounds)
        self._byte_lengths = tokens.byte_lengths
        self._seed = seed
        self._shuffle = shuffle
        # The end-of-document is a target and never an input: it has nothing to predict.
        self._size = len(self._ids) - (len(self._bounds) - 1)
        self._rows = self._size // seq_len if shuffle else -(-self._size // seq_len)
        if self._rows == 0:
            raise UserError(
                f"batches: expected a text of at least one sequence of {seq_len} tokens, got {self._size}; "
                "use a longer text or a shorter seq_len"
            )
        self._step_rows = batch_tokens // seq_len
        self.steps = -(-self._rows // self._step_rows)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def batch(self, step: int, *, rank: int = 0, ranks: int = 1, micro: int = 0, micros: int = 1) -> Batch:
        """Micro-batch `micro` of `micros` of rank `rank` of `ranks`: an equal, consecutive part of the step's rows.

        For validation the parts of the last step may differ by a row, and be empty.
        """
        parts, part = ranks * micros, rank * micros + micro
        if not (0 <= rank < ranks and 0 <= micro < micros):
            raise ValueError(f"batches: expected rank < {ranks} and micro < {micros}, got rank {rank}, micro {micro}")
        if self._shuffle and self._step_rows % parts:
            raise UserError(
                f"batches: the {self._step_rows} sequences of a step cannot be divided equally between {ranks} ranks "
                f"and {micros} micro-batches; change batch_tokens or the number of micro-batches"
            )
        if step < 0 or (not self._shuffle and step >= self.steps):
            raise IndexError(f"batches: expected a step from 0 to {self.steps - 1}, got {step}")
        first = step * self._step_rows
        count = self._step_rows if self._shuffle else min(self._step_rows, self._rows - first)
        begin, end = first + count * part // parts, first + count * (part + 1) // parts
        pieces = []
        while begin < end:
            epoch = begin // self._rows
            stop = min(end, (epoch + 1) * self._rows)
            offset = epoch * self._rows
            pieces.append(self._segments(self._epoch(epoch), np.arange(begin - offset, stop - offset)))
            begin = stop
        if not pieces:
            pieces.append((np.zeros(0, np.int64), np.zeros(0, np.int64)))
        return self._gather(np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces]))

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                self._epochs = {kept: epoch for kept, epoch in self._epochs.items() if abs(kept - number) == 1}
                self._epochs[number] = self._draw(number)
            return self._epochs[number]

    def _draw(self, number: int) -> _Epoch:
        """The order of epoch `number`, from its own generator."""
        sizes = np.diff(self._bounds) - 1
        sources, phase, rows = self._bounds[:-1], 0, None
        if self._shuffle:
            random = np.random.Generator(np.random.Philox(key=seed_of(self._seed, "epoch", number)))
            order = random.permutation(len(sizes))
            sizes, sources = sizes[order], sources[order]
            phase = int(random.integers(self._size))
            rows = random.permutation(self._rows)
        places = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        return _Epoch(sources, places, phase, rows)

    def _segments(self, epoch: _Epoch, turns: Indices) -> tuple[Indices, Indices]:
        """Where in the ids each segment of the rows read at `turns` begins, and how long it is."""
        rows = turns if epoch.rows is None else epoch.rows[turns]
        begin = rows * self.seq_len
        end = np.minimum(begin + self.seq_len, self._size)
        # On the ring; a row that passes the end of the last document goes on with the first one.
        begin, end = begin + epoch.phase, end + epoch.phase
        over = begin >= self._size
        begin, end = np.where(over, begin - self._size, begin), np.where(over, end - self._size, end)
        arcs = np.stack([begin, np.minimum(end, self._size), np.zeros_like(end), np.maximum(end - self._size, 0)], 1)
        begin, end = arcs.reshape(-1, 2).T
        begin, end = begin[begin < end], end[begin < end]
        # The documents that each arc meets.
        first = np.searchsorted(epoch.places, begin, "right") - 1
        counts = np.searchsorted(epoch.places, end, "left") - first
        arc = np.repeat(np.arange(len(begin)), counts)
        document = first[arc] + np.arange(len(arc)) - (np.cumsum(counts) - counts)[arc]
        place = np.maximum(epoch.places[document], begin[arc])
        lengths = np.minimum(epoch.places[document + 1], end[arc]) - place
        return epoch.sources[document] + place - epoch.places[document], lengths

    def _gather(self, sources: Indices, lengths: Indices) -> Batch:
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        places = positions + np.repeat(sources, lengths)
        targets = self._ids[places + 1].astype(np.int64)
        return Batch(
            tokens=_row(self._ids[places].astype(np.int64)),
            targets=_row(targets),
            positions=_row(positions),
            cu_seqlens=torch.from_numpy(bounds),
            bytes=int(self._byte_lengths[targets].sum()),
        )


def prefetch(
    packer: Packer, steps: Iterable[int], workers: int, *, rank: int = 0, ranks: int = 1, micros: int = 1
) -> Generator[Batch, None, None]:
    """The batches of `steps` in order, each as its `micros` micro-batches, prepared ahead by `workers` threads.

    The batches do not depend on `workers`; 0 prepares each when it is asked for. Closing the iterator ends the threads.
    """
    calls = (
        {"step": step, "rank": rank, "ranks": ranks, "micro": i, "micros": micros}
        for step in steps
        for i in range(micros)
    )
    if workers == 0:
        for call in calls:
            yield packer.batch(**call)
        return
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="isotach-data")
    try:
        for call in calls:
            pending.append(pool.submit(packer.batch, **call))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _row(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values)[None]
