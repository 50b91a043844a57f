"""Steps of a batch without the work of launching every operation: on a GPU, graphs of a decoder's step, replayed.

    a → b, b → a        two states of fixed places in memory, and a graph from each to the other

Nothing is copied between steps of the same rows, but for states that are to stay. When rows come or go, theirs are
copied into `a` once. There is a pair of graphs for every number of rows that is a power of two; the rows between are
stepped along and left out.

A graph does what was recorded, whatever the numbers. So a decoder is recorded only if its step looks at none (`swa`
asks how much is in its window): that is found out by a step on tensors that have no values.

Checked with another device's stand-in for a graph; not yet run or measured on a GPU (docs/numerics.md).
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isotach.infer.calls import step
from isotach.models.decoder import Decoder
from isotach.models.state import DecoderState
from isotach.nn.mixer import MixerState
from isotach.ops.recurrence import Paired

_log = logging.getLogger("isotach")

Work = Callable[[], Tensor]
# What a work gives, and how it is done again: with what then is in the memory that it reads, into that it writes.
Capture = Callable[[Work], tuple[Tensor, Callable[[], object]]]


class Stepper:
    """`calls.step` for one decoder, as fast as its device allows.

    values: whether a state that was given stays as it is. Otherwise the second step after it overwrites it: whoever
        keeps it longer copies it. What grows, or looks at values, is stepped as `calls.step` does, and so stays valid.
    capture: how a work is recorded; None for CUDA graphs on a GPU, and for nothing of all this elsewhere.
    """

    def __init__(self, decoder: Decoder, *, values: bool, capture: Capture | None = None) -> None:
        self._decoder, self._values = decoder, values
        self._capture = _Pool().capture if capture is None and decoder.device.type == "cuda" else capture
        self._records: bool | None = None  # once there was a state
        self._halves: tuple[DecoderState, DecoderState] | None = None  # with room for as many rows as there ever were
        self._graphs: dict[int, _Graphs] = {}
        self._given: tuple[DecoderState, int] | None = None  # the last state that was given, and which half it is

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], state: DecoderState) -> tuple[Float[Tensor, "R vocab"], DecoderState]:
        """Logits for the token after each row's, which the next step overwrites, and the state after it."""
        if self._capture is not None and self._records is None:
            self._records = not state.grows and _looks_at_nothing(self._decoder, state)
        if self._capture is None or not self._records:
            return step(self._decoder, tokens, state)
        graphs, half = self._for(state), 0
        if self._given is not None and self._given[0] is state:
            half = self._given[1]
        else:
            graphs.enter(state)
        logits, after = graphs.step(half, tokens)
        if self._values:
            after = _each(after, Tensor.clone)
        self._given = after, 1 - half
        return logits, after

    def _for(self, state: DecoderState) -> "_Graphs":
        rows = 1 << (state.rows - 1).bit_length()
        if self._halves is None or self._halves[0].rows < rows:
            self._graphs, self._halves = {}, (_room(state, rows), _room(state, rows))
        if rows not in self._graphs:
            assert self._capture is not None
            self._graphs[rows] = _Graphs(self._decoder, [_first(half, rows) for half in self._halves], self._capture)
        return self._graphs[rows]


class _Graphs:
    """The two graphs of a number of rows."""

    def __init__(self, decoder: Decoder, halves: Sequence[DecoderState], capture: Capture) -> None:
        self._decoder, self._halves = decoder, halves
        self._tokens = torch.zeros(halves[0].rows, 1, dtype=torch.int64, device=decoder.device)
        self._recorded = [capture(partial(self._work, half)) for half in range(2)]

    def enter(self, state: DecoderState) -> None:
        """Copy a state into the first half."""
        _copy(_first(self._halves[0], state.rows), state)

    def step(self, half: int, tokens: Sequence[int]) -> tuple[Tensor, DecoderState]:
        logits, replay = self._recorded[half]
        self._tokens[: len(tokens), 0].copy_(torch.tensor(tokens))
        replay()
        return logits[: len(tokens)], _first(self._halves[1 - half], len(tokens))

    def _work(self, half: int) -> Tensor:
        """One token from a half to the other."""
        now, after = self._halves[half], self._halves[1 - half]
        logits, found = self._decoder(self._tokens, _paired(now, after))
        written: list[MixerState] = []
        for block in found.blocks:
            written.append({name: one.now if isinstance(one, Paired) else one for name, one in block.items()})
        _copy(after, DecoderState(tuple(written), found.positions))
        return logits[:, -1]


class _Pool:
    """CUDA graphs that share what memory they need in between, for they are never replayed at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, work: Work) -> tuple[Tensor, Callable[[], object]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # kernels are compiled and libraries find their memory, which cannot be done while it is recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others may load states
            result = work()
        return result, graph.replay


def _looks_at_nothing(decoder: Decoder, state: DecoderState) -> bool:
    """Whether a step is the same operations whatever the numbers."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = itertools.chain(decoder.named_parameters(), decoder.named_buffers())
    without = _each(state, mode.from_tensor)
    with mode:
        tokens = torch.zeros(state.rows, 1, dtype=torch.int64, device=decoder.device)
        after = _each(without, torch.empty_like)
        try:
            torch.func.functional_call(
                decoder, {name: mode.from_tensor(weight) for name, weight in weights}, (tokens, _paired(without, after))
            )
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            _log.info("steps are not recorded as graphs: one looks at a value (%s)", error)
            return False
    return True


def _paired(now: DecoderState, after: DecoderState) -> DecoderState:
    blocks: list[MixerState] = []
    for own, into in zip(now.blocks, after.blocks, strict=True):
        blocks.append({name: Paired(own[name], into[name]) for name in own})
    return DecoderState(tuple(blocks), now.positions)


def _room(like: DecoderState, rows: int) -> DecoderState:
    """Zeros for so many rows."""
    return _each(like, lambda leaf: leaf.new_zeros((rows, *leaf.shape[1:])))


def _first(state: DecoderState, rows: int) -> DecoderState:
    """The first rows, in the same memory."""
    return _each(state, lambda leaf: leaf[:rows])


def _copy(into: DecoderState, state: DecoderState) -> None:
    """Into other memory; what lies there already is left alone."""
    for there, here in zip(_leaves(into), _leaves(state), strict=True):
        if there.data_ptr() != here.data_ptr():
            there.copy_(here)


def _each(state: DecoderState, change: Callable[[Tensor], Tensor]) -> DecoderState:
    blocks: list[MixerState] = []
    for block in state.blocks:
        blocks.append({name: type(own)(*map(change, own)) for name, own in block.items()})
    return DecoderState(tuple(blocks), change(state.positions))


def _leaves(state: DecoderState) -> list[Tensor]:
    return [state.positions, *(leaf for block in state.blocks for own in block.values() for leaf in own)]
