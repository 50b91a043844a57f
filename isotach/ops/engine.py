"""One door to every recurrence: run(rec, x, state, span) -> (outputs, state after the last token).

recurrent   s_t = apply(lift(x_t), s_{t-1}),  o_t = emit(x_t, s_t)                    backend "reference"
chunked     o = read(x, s),  s = apply(summarize(x), s), chunk after chunk            backend "torch"
packed      the same for every document between two cu_seqlens, each with a state of its own
set         every token reads the state after the last one (causal=False)

`advance` is what lies behind the door: mixers, whose projections cannot leave the range of a decay or of a beta, are
spared a look at every value.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from isotach import shapes
from isotach.ops import backends
from isotach.ops.backends import Backend
from isotach.ops.exchange import exchange
from isotach.ops.recurrence import Apart, Paired, Recurrence, Tensors, at_time, length, rows, with_time

CHUNK = 64  # of the engine's own loop; families measure theirs


@dataclass(frozen=True)
class Span:
    """Where a call's tokens sit.

    positions   (B, T) int64: the place of each token in its document
    cu_seqlens  (N + 1,) int64: document n is tokens cu_seqlens[n]..cu_seqlens[n+1]; then B = 1 and states have N rows
    group       sequence parallelism: this rank holds one stretch of the sequence, in rank order
    """

    positions: Int[Tensor, "B T"]
    cu_seqlens: Int[Tensor, "bounds"] | None = None
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, batch: int, time: int, *, start: int | Tensor = 0, device: torch.device | str = "cpu") -> Self:
        """Rows of `time` tokens that follow the first `start` tokens (an int, or one per row) of their documents."""
        first = torch.as_tensor(start, device=device).expand(batch)
        return cls(first[:, None] + torch.arange(time, device=device))

    @classmethod
    def packed(cls, cu_seqlens: Tensor, *, start: Tensor | None = None) -> Self:
        """Documents laid end to end in one row; document n follows start[n] earlier tokens (default: none).

        ValueError where bounds do not rise from 0. On a GPU they are waited for, and `run` does not look again.
        """
        time = _last_bound("Span.packed", cu_seqlens)
        lengths = cu_seqlens.diff()
        shift = (torch.zeros_like(lengths) if start is None else start) - cu_seqlens[:-1]
        every = torch.arange(time, device=cu_seqlens.device)
        return cls((every + shift.repeat_interleave(lengths, output_size=time))[None], cu_seqlens)

    def row(self, n: int) -> Self:
        """Where the tokens of row or document n sit, without the others."""
        if self.cu_seqlens is None:
            return type(self)(self.positions[n : n + 1])
        start, stop = self.cu_seqlens[n : n + 2].tolist()
        return type(self)(self.positions[:, start:stop])

    @property
    def rows(self) -> int:
        """How many states the span reads and writes."""
        return self.positions.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def run(
    rec: Recurrence,
    x: Tensors,
    state: Tensors | None,
    span: Span,
    *,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensors]:
    """Outputs (B, T, H, V) of `rec` over `x`, and the state after the last token of every row or document.

    state       the state before the first token, one row per sequence or document; None for the empty past; where it is
                Apart or Paired, so is the one after
    chunk_size  tokens per chunk; None for the family's measured choice
    causal      False: every token reads the state after the last token of its document

    Raises UserError for values outside what the family declares, on the CPU alone: a GPU would have to be waited for.
    Raises ValueError for shapes that do not fit, for a backend that cannot serve the family or the device, and for
    causal=False where what a token reads depends on coming last.
    """
    if _device(x).type == "cpu" and not torch.compiler.is_compiling():
        shapes.check_values(rec.name, x)
    return advance(rec, x, state, span, backend=backend, chunk_size=chunk_size, causal=causal)


def advance(
    rec: Recurrence,
    x: Tensors,
    state: Tensors | None,
    span: Span,
    *,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensors]:
    """As `run`, for values that are known to be in range."""
    if torch.is_autocast_enabled(_device(x).type):  # gates, states and sums are float32 whatever the projections are
        with torch.autocast(_device(x).type, enabled=False):
            return advance(rec, x, state, span, backend=backend, chunk_size=chunk_size, causal=causal)
    if isinstance(state, Apart):
        return _apart(rec, x, state, span, backend=backend, chunk_size=chunk_size, causal=causal)
    if isinstance(state, Paired):
        return _between(rec, x, state, span, backend)
    if not torch.compiler.is_compiling():
        _check(rec, x, state, span, chunk_size)
    if state is None:
        state = rec.initial(x, span.rows)
    if span.group is not None:
        return _across_ranks(rec, x, state, span, span.group, backend=backend, chunk_size=chunk_size, causal=causal)
    if not causal:
        return _set(rec, x, state, span.cu_seqlens)
    if length(x) == 1 and span.cu_seqlens is None:
        step = backends.find_step(rec, backend, x, state)
        return rec.step(x, state) if step is None else step(rec, x, state, None)
    if backend == "reference":
        return _documents(rec, x, state, span.cu_seqlens, 1, recurrent)
    kernel = backends.find(rec, backend, x, chunk_size)
    if kernel is None:
        return _documents(rec, x, state, span.cu_seqlens, chunk_size or CHUNK, chunked)
    return kernel(rec, x, state, span.cu_seqlens, chunk_size)


def _apart(rec: Recurrence, x: Tensors, states: Apart, span: Span, **how: Any) -> tuple[Tensor, Tensors]:
    """Every row or document with its own state; an empty document leaves its state as it was."""
    if len(states) != span.rows:
        raise ValueError(
            f"{rec.name}: state must have one row per sequence or document = {span.rows}; got {len(states)}; "
            "select the rows that belong to this span"
        )
    outputs, after = [], []
    for n, state in enumerate(states):
        if span.cu_seqlens is None:
            own = shapes.batch_slice(x, n)
            output, state = rec.step(own, state) if length(x) == 1 else advance(rec, own, state, span.row(n), **how)
            outputs.append(output)
        else:
            start, stop = span.cu_seqlens[n : n + 2].tolist()
            if stop > start:
                output, state = advance(rec, shapes.time_slice(x, start, stop), state, span.row(n), **how)
                outputs.append(output)
        after.append(state)
    return torch.cat(outputs, 0 if span.cu_seqlens is None else 1), Apart(after)


def _between(rec: Recurrence, x: Tensors, state: Paired, span: Span, backend: Backend) -> tuple[Tensor, Paired]:
    """One token, from one half of a pair to the other."""
    if length(x) != 1 or span.cu_seqlens is not None or span.group is not None:
        raise ValueError(
            f"{rec.name}: a pair of states takes one token of every row; got a span of {tuple(span.positions.shape)}; "
            "pass a state alone"
        )
    if not torch.compiler.is_compiling():
        _check(rec, x, state.now, span, None)
    step = backends.find_step(rec, backend, x, state.now)
    if step is not None:
        output, after = step(rec, x, *state)
    else:
        output, found = rec.step(x, state.now)
        after = type(found)(*(into.copy_(leaf) for into, leaf in zip(state.after, found, strict=True)))
    return output, Paired(after, state.now)


def recurrent(rec: Recurrence, x: Tensors, state: Tensors, chunk_size: int) -> tuple[Tensor, Tensors]:
    """The definition, token by token."""
    outputs = []
    for t in range(length(x)):
        now = shapes.time_slice(x, t, t + 1)
        state = rec.apply(at_time(rec.lift(now), 0), state)
        outputs.append(rec.emit(now, with_time(state)))
    return torch.cat(outputs, 1), state


def chunked(rec: Recurrence, x: Tensors, state: Tensors, chunk_size: int) -> tuple[Tensor, Tensors]:
    """The closed forms, chunk by chunk; the last chunk runs at its own length."""
    outputs = []
    for start in range(0, length(x), chunk_size):
        part = shapes.time_slice(x, start, min(start + chunk_size, length(x)))
        outputs.append(rec.read(part, state))
        state = rec.apply(rec.summarize(part), state)
    return torch.cat(outputs, 1), state


def _documents(rec, x, state, cu_seqlens, chunk_size, form):  # type: ignore[no-untyped-def]
    """`form` on every document with its own row of the state."""
    if cu_seqlens is None:
        return form(rec, x, state, chunk_size)
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        own = rows(state, slice(n, n + 1))
        if stop > start:
            output, own = form(rec, shapes.time_slice(x, start, stop), own, chunk_size)
            outputs.append(output)
        states.append(own)
    return torch.cat(outputs, 1), rec.concatenate(states)


def _set(rec: Recurrence, x: Tensors, state: Tensors, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensors]:
    if not rec.both_ways:
        raise ValueError(
            f"{rec.name}: causal must be True, for its tokens only look back; got causal=False; "
            "leave it out, or take a family that reads both ways, as decay does"
        )

    def form(rec: Recurrence, x: Tensors, state: Tensors, _: int) -> tuple[Tensor, Tensors]:
        state = rec.apply(rec.summarize(x), state)
        return rec.emit(x, with_time(state)), state

    return _documents(rec, x, state, cu_seqlens, 0, form)


def _across_ranks(
    rec: Recurrence, x: Tensors, state: Tensors, span: Span, group: dist.ProcessGroup, **how: Any
) -> tuple[Tensor, Tensors]:
    if span.cu_seqlens is not None or not how["causal"]:
        raise ValueError(
            f"{rec.name}: sequence parallelism takes unpacked causal spans; got cu_seqlens or causal=False; "
            "pack on one rank, or pass group=None"
        )
    before, after = exchange(rec, rec.summarize(x), state, group=group)
    output, _ = advance(rec, x, before, Span(span.positions), **how)
    return output, after


def _device(x: Tensors) -> torch.device:
    device: torch.device = x[0].device
    return device


def _check(rec: Recurrence, x: Tensors, state: Tensors | None, span: Span, chunk_size: int | None) -> None:
    sizes = shapes.check(rec.name, x)
    expected = (sizes["B"], length(x))
    if tuple(span.positions.shape) != expected:
        raise ValueError(
            f"{rec.name}: span.positions must be (B, T) = {expected}; got {tuple(span.positions.shape)}; "
            "build it with Span.of or Span.packed"
        )
    if span.cu_seqlens is not None:
        _check_bounds(rec.name, span.cu_seqlens, *expected)
    if state is not None:
        got = shapes.check(f"{rec.name} state", state)["B"]
        if got != span.rows:
            raise ValueError(
                f"{rec.name}: state must have one row per sequence or document = {span.rows}; got {got}; "
                "select the rows that belong to this span"
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{rec.name}: chunk_size must be at least 1; got {chunk_size}; leave it out for the default")


def _check_bounds(who: str, bounds: Tensor, batch: int, time: int) -> None:
    if batch != 1:
        raise ValueError(
            f"{who}: packing takes B = 1; got B = {batch}; flatten the rows and add their ends to cu_seqlens"
        )
    if bounds.is_cuda and bounds.dtype == torch.int64:
        return  # `Span.packed` has looked at them; here every layer would wait for the device
    if (last := _last_bound(who, bounds)) != time:
        raise ValueError(
            f"{who}: cu_seqlens must end at T = {time}; got {last}; pass the running sum of document lengths"
        )


def _last_bound(who: str, bounds: Tensor) -> int:
    """Where the last document ends; ValueError where these are no bounds."""
    first = last = least = 0
    if bounds.numel() > 1:
        first, last, least = map(int, torch.stack((bounds[0], bounds[-1], bounds.diff().min())).cpu())
    if bounds.dtype != torch.int64 or first != 0 or least < 0:
        raise ValueError(
            f"{who}: cu_seqlens must be int64, start at 0 and never fall; got {bounds.dtype} from {first} to {last}; "
            "pass the running sum of document lengths"
        )
    return last
