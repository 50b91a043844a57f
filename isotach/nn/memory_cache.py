"""Memory caching: a copy of the state at every segment's end, and later tokens read all copies.

Token t lies in segment s = t // L. With M_t the running memory and M⁽ⁱ⁾ the memory that segment i left, i < s,

    residual   y_t = M_t(q_t) + Σ_i M⁽ⁱ⁾(q_t)
    gated      y_t = γ_s M_t(q_t) + Σ_i γ_i M⁽ⁱ⁾(q_t)        γ = softmax(u_t · c / √D)
    soup       one memory γ_s M_t + Σ_i γ_i M⁽ⁱ⁾ is read: the same numbers, since every memory here is read linearly
    sparse     gated, with the `top` segments of the largest score and the running one

u_t = W x_t asks, c_i is the mean of x over segment i, and over the running segment up to t. Each segment starts from
an empty memory (restart) or goes on with the one before it (checkpoint). Memory grows as T / L: between a recurrence
and attention.

Memory Caching (arXiv:2602.24281); no official code was found, so the scale of the scores and the running mean are ours.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from isotach import shapes
from isotach.config import Config
from isotach.ops.engine import Span, advance
from isotach.ops.history import History
from isotach.ops.recurrence import Apart, Recurrence, Tensors, rows, state_dtype, stored_fields
from isotach.ops.running import Running

if TYPE_CHECKING:
    from isotach.nn.mixer import Scan


class CacheConfig(Config):
    """segment: tokens per cached memory; read, start: see the module; top: cached memories that `sparse` reads."""

    segment: Annotated[int, Field(ge=1)] = 256
    read: Literal["residual", "gated", "soup", "sparse"] = "gated"
    start: Literal["restart", "checkpoint"] = "restart"
    top: Annotated[int, Field(ge=1)] = 4


class MemoryCache(nn.Module):
    """cache(rec, inputs, x, scan) -> outputs (B, T, H, V), in place of scan("main", rec, inputs)."""

    def __init__(self, width: int, config: CacheConfig) -> None:
        super().__init__()
        self.config = config
        self.route: nn.Linear | None = None
        if config.read != "residual":
            self.route = nn.utils.skip_init(nn.Linear, width, width, bias=False, device=torch.get_default_device())

    @staticmethod
    def check(name: str, rec: Recurrence, *, causal: bool) -> None:
        """ValueError where `rec` keeps every token anyway, and where tokens have no order."""
        if not causal:
            raise ValueError(f"{name}: memory caching cuts a sequence, and causal is false; leave `cache` out")
        if stored_fields(rec.State):
            raise ValueError(
                f"{name}: memory caching copies states of constant size, and {rec.name} grows; leave it out"
            )

    def forward(self, rec: Recurrence, inputs: Tensors, x: Float[Tensor, "B T D"], scan: "Scan") -> Tensor:
        batch, time = x.shape[:2]
        pieces = _cut(scan.span, self.config.segment)
        flat = _in_one_row(inputs)
        wide = x.to(state_dtype(x))
        running = Running.Inputs(wide.flatten(0, 1).unsqueeze(0))
        online, states = self._run("main", rec, flat, pieces, scan, restart=self.config.start == "restart")
        sums, totals = self._run("summary", Running(), running, pieces, scan, restart=True)
        high, low = sums.chunk(2, -1)
        within = (scan.span.positions % self.config.segment + 1).unsqueeze(-1)
        means = (high + low).view(wide.shape) / within
        kept = self._keep(pieces, states, totals, scan)
        online = online.view(batch, time, *online.shape[2:])
        if scan.span.cu_seqlens is None and len(set(pieces.starts)) == 1 and not isinstance(kept, Apart):
            return self._read(rec, inputs, online, wide, means, kept, pieces.starts[0])
        parts = []
        for row, (a, b) in enumerate(pieces.extents):
            if a == b:
                continue
            one = shapes.time_slice(flat, a, b)
            own, hidden, summary = (leaf.flatten(0, 1)[None, a:b] for leaf in (online, wide, means))
            memories = kept[row] if isinstance(kept, Apart) else rows(kept, slice(row, row + 1))
            parts.append(self._read(rec, one, own, hidden, summary, memories, pieces.starts[row]))
        return torch.cat(parts, 1).view(online.shape)

    def _run(
        self, name: str, rec: Recurrence, flat: Tensors, pieces: "_Pieces", scan: "Scan", *, restart: bool
    ) -> tuple[Tensor, Tensors]:
        """Outputs (1, B·T, ...) and the states after every piece; keeps each row's last state under `name`."""
        count = len(pieces.row)
        before = scan.before(name)
        before = rec.initial(flat, len(pieces.starts)) if before is None else before
        state = rec.initial(flat, count)
        device = state[0].device

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def put(into: Tensors, at: list[int], those: Tensors) -> Tensors:
            return type(into)(*(a.index_copy(0, index(at), b.to(a.dtype)) for a, b in zip(into, those, strict=True)))

        def take(state: Tensors, at: list[int]) -> Tensors:
            return type(state)(*(leaf[index(at)] for leaf in state))

        carried = [i for i in range(count) if pieces.rank[i] == 0 and (pieces.carries[i] or not restart)]
        state = put(state, carried, take(before, [pieces.row[i] for i in carried]))
        if restart:
            bounds = index(pieces.bounds)
            output, state = advance(rec, flat, state, Span.packed(bounds))
        else:
            output = flat[0].new_empty(0)
            for rank in range(max(pieces.rank, default=-1) + 1):
                now = [i for i in range(count) if pieces.rank[i] == rank]
                if rank:
                    state = put(state, now, take(state, [i - 1 for i in now]))
                tokens = index([t for i in now for t in range(pieces.bounds[i], pieces.bounds[i + 1])])
                lengths = index([0, *(pieces.bounds[i + 1] - pieces.bounds[i] for i in now)])
                part, after = advance(rec, _at_times(flat, tokens), take(state, now), Span.packed(lengths.cumsum(0)))
                state = put(state, now, after)
                if rank == 0:
                    output = part.new_zeros(1, pieces.bounds[-1], *part.shape[2:])
                output = output.index_copy(1, tokens, part)
        last = [i for i in range(count) if i + 1 == count or pieces.row[i + 1] != pieces.row[i]]
        scan.after[name] = put(before, [pieces.row[i] for i in last], take(state, last))
        return output, state

    def _keep(self, pieces: "_Pieces", states: Tensors, totals: Running.State, scan: "Scan") -> Tensors:
        """Append what closed pieces leave to the rows' caches: k their mean inputs, v their states, flattened."""
        memories = torch.cat([leaf.flatten(1) for leaf in states], 1)
        means = (totals.high + totals.low) / self.config.segment
        count = len(pieces.starts)
        closed = [[i for i, row in enumerate(pieces.row) if row == n and pieces.closes[i]] for n in range(count)]
        history, kept = History(), scan.before("cache")
        if kept is None:
            none = History.Inputs(*(leaf[:1, None, None] for leaf in (means, means, memories)))
            kept = history.initial(none, count)

        def append(closed: list[list[int]], kept: Tensors) -> Tensors:
            if not any(closed):
                return kept
            k, v = (
                pad_sequence([leaf[own] for own in closed], batch_first=True).unsqueeze(2) for leaf in (means, memories)
            )
            lengths = torch.tensor([len(own) for own in closed], dtype=torch.int64, device=k.device)
            return history.apply(history.Summary(k, v, lengths), kept)

        if isinstance(kept, Apart):
            kept = Apart(append([own], state) for own, state in zip(closed, kept, strict=True))
        else:
            kept = append(closed, kept)
        scan.after["cache"] = kept
        return kept

    def _read(
        self,
        rec: Recurrence,
        x: Tensors,
        online: Tensor,
        hidden: Tensor,
        means: Tensor,
        kept: History.State,
        start: int,
    ) -> Tensor:
        """Outputs of rows that all begin at position `start`: the running memory's, and every cached one's."""
        time, segment = online.shape[1], self.config.segment
        at = torch.arange(start, start + time, device=online.device) // segment
        cached = (start + time - 1) // segment
        if cached == 0:
            return online
        summaries, memories = kept.k[:, :cached, 0], kept.v[:, :cached, 0]
        own, gates = self._gates(hidden, summaries, means, torch.arange(cached, device=at.device) < at[:, None])
        output = online * own.to(online.dtype)[..., None, None]
        template = rec.initial(x, len(online))
        for i in range(cached):
            first = max(0, (i + 1) * segment - start)
            memory = _unflattened(template, memories[:, i])
            part = rec.emit(shapes.time_slice(x, first, time), type(memory)(*(leaf.unsqueeze(1) for leaf in memory)))
            part = part * gates[:, first:, i, None, None].to(part.dtype)
            output = output + F.pad(part, (0, 0, 0, 0, first, 0))
        return output

    def _gates(self, hidden: Tensor, summaries: Tensor, means: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """γ of the running memory (B, T) and of the cached ones (B, T, N); visible (T, N)."""
        if self.route is None:
            return hidden.new_ones(hidden.shape[:2]), visible.to(hidden.dtype).expand(len(hidden), -1, -1)
        asks = F.linear(hidden, self.route.weight.to(hidden.dtype)) * hidden.shape[-1] ** -0.5
        scores = (asks @ summaries.to(asks.dtype).transpose(1, 2)).masked_fill(~visible, -torch.inf)
        if self.config.read == "sparse" and scores.shape[-1] > self.config.top:
            chosen = scores.topk(self.config.top, -1).indices
            scores = scores.masked_fill(
                torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, False), -torch.inf
            )
        own = (asks * means).sum(-1, keepdim=True)
        gates = torch.cat([own, scores], -1).softmax(-1)
        return gates[..., 0], gates[..., 1:]


@dataclass(frozen=True)
class _Pieces:
    """Rows cut at multiples of the segment length. Pieces lie in reading order; bounds (P + 1) in flattened tokens."""

    starts: list[int]  # of every row: the position of its first token
    extents: list[tuple[int, int]]  # of every row, in flattened tokens
    bounds: list[int]
    row: list[int]
    rank: list[int]  # place among the pieces of its row
    carries: list[bool]  # begins inside a segment
    closes: list[bool]  # ends one


def _cut(span: Span, segment: int) -> _Pieces:
    time = span.positions.shape[1]
    edges = range(0, span.positions.numel() + 1, time) if span.cu_seqlens is None else span.cu_seqlens.tolist()
    extents = list(itertools.pairwise(edges))
    first = span.positions.flatten()
    begins = torch.tensor([min(a, first.numel() - 1) for a, _ in extents], device=first.device)
    starts = [position if a < b else 0 for position, (a, b) in zip(first[begins].tolist(), extents, strict=True)]
    bounds, row, rank, carries, closes = [0], [], [], [], []
    for n, (start, (a, b)) in enumerate(zip(starts, extents, strict=True)):
        at, r = start, 0
        while at < start + b - a:
            until = min(start + b - a, (at // segment + 1) * segment)
            bounds.append(a + until - start)
            row.append(n)
            rank.append(r)
            carries.append(at % segment != 0)
            closes.append(until % segment == 0)
            at, r = until, r + 1
    return _Pieces(starts, extents, bounds, row, rank, carries, closes)


def _in_one_row(x: Tensors) -> Tensors:
    """Inputs (B, T, ...) as (1, B·T, ...)."""
    fields = []
    for field, declared in shapes.axes(type(x)).items():
        leaf, names = getattr(x, field), [axis.name for axis in declared]
        if names[:2] != ["B", "T"]:
            fields.append(leaf)
        elif leaf.shape[1] == 1 and (len(leaf) == 1 or leaf.stride(0) == 0) and declared[1].shared:
            fields.append(leaf[:1])
        else:
            time = max(getattr(x, other).shape[1] for other in x._fields)
            leaf = leaf.expand(-1, time, *leaf.shape[2:]) if declared[1].shared else leaf
            fields.append(leaf.flatten(0, 1).unsqueeze(0))
    return type(x)(*fields)


def _at_times(x: Tensors, tokens: Tensor) -> Tensors:
    """The tokens of one row, wherever a field has them."""
    fields = []
    for field, declared in shapes.axes(type(x)).items():
        leaf = getattr(x, field)
        own = [axis.name for axis in declared][:2] == ["B", "T"] and not (declared[1].shared and leaf.shape[1] == 1)
        fields.append(leaf[:, tokens] if own else leaf)
    return type(x)(*fields)


def _unflattened(template: Tensors, memory: Tensor) -> Tensors:
    """The state whose leaves, flattened and laid side by side, are memory (B, P)."""
    sizes = [leaf[0].numel() for leaf in template]
    parts = memory.split(sizes, 1)
    return type(template)(*(part.view(leaf.shape) for part, leaf in zip(parts, template, strict=True)))
