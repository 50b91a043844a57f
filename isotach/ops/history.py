"""Memory that is a list of keys and values, read by softmax attention; the families differ in what stays on the list.

    o_t = Σ_s w_s v_s        w = softmax_s(q_t · k_s / √K + bias(t, s))  over the tokens s that are kept

    History      all tokens                                 bias 0, or a function of the distance t - s
    Forgetting   all tokens                                 bias Σ_{s<l≤t} log_decay_l                    FoX
    Sloped       all tokens                                 bias -(t - s)(q_slope_t + k_slope_s)      GRAPE-A
    Sliding      the first `sinks` and the last `window`
    Blocks       those of t's own block of `size` tokens    also with w = relu(q_t · k_s / √K)

Places t and s count a document's tokens from 0. `G` key/value heads serve H query heads, H / G each (grouped heads,
arXiv:2305.13245). The first three grow with the tokens read; what they share is in ops/growing.py. A bias needs nothing
but what its tokens leave, and is formed from differences, so it is as precise after a million tokens as after ten.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from isotach import shapes
from isotach.ops import growing
from isotach.ops.attention import attention, attention_by_distance, common, sdpa, unvalued, with_channels
from isotach.ops.recurrence import FADING, Recurrence, Tensors, length, state_dtype

AWAY = shapes.Within(0.0, math.inf, "distance only takes away; form it with softplus")
CHUNK = 256  # queries that Sliding takes at once where its window is smaller; measured


class History(Recurrence):
    """`bias`: distances (n,) int64 to what they add to the scores, (H, n) float; without gradient."""

    class Inputs(NamedTuple):
        q: Float[Tensor, "B T H K"]
        k: Float[Tensor, "B T G K"]
        v: Float[Tensor, "B T G V"]

    class Summary(NamedTuple):
        """Row b holds length[b] tokens; the rest of S is zero."""

        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        length: Int[Tensor, "B"]

    class State(NamedTuple):
        """As Summary, with spare room behind length[b]; `filled` is how much of the buffer any state has written."""

        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        length: Int[Tensor, "B"]
        filled: Int[Tensor, "B"]

    def __init__(self, bias: Callable[[Tensor], Tensor] | None = None) -> None:
        self.bias = bias
        self.both_ways = bias is None  # a bias is a function of how far back

    @classmethod
    def instances(cls) -> Mapping[str, Self]:
        return {"": cls(), "biased": cls(lambda distance: -torch.tensor([[0.5], [0.1]]) * distance)}

    lift, summarize, compose, apply, read = (
        growing.lift, growing.summarize, growing.compose, growing.apply, growing.read,
    )  # fmt: skip
    neutral, initial = growing.neutral, growing.initial
    compact, concatenate = staticmethod(growing.compact), staticmethod(growing.concatenate)
    reserve = staticmethod(growing.reserve)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        if self.bias is not None or s.length.shape[1] > 1:
            return growing.emit(self, x, s)
        # All of x reads one state: a single token, or tokens without order.
        k, v, count = s.k[:, 0], s.v[:, 0], s.length[:, 0]
        if (stop := common(count)) is not None:
            return sdpa(x.q, k[:, :stop], v[:, :stop])
        stop = k.shape[1] if torch.compiler.is_compiling() else int(count.max())
        mask = torch.arange(stop, device=k.device) < count[:, None, None, None]
        return sdpa(x.q, k[:, :stop], v[:, :stop], mask)

    def attend(self, x: Tensors, kept: Tensors, first: int) -> Tensor:
        if self.bias is None:
            return attention(x.q, kept.k, kept.v, first=first)
        bias = self.bias(torch.arange(first + length(x), device=x.q.device))
        return attention_by_distance(x.q, kept.k, kept.v, bias, first=first)


class Forgetting(Recurrence):
    """The Forgetting Transformer (arXiv:2503.02130); what a token leaves is also its own log_decay."""

    class Inputs(NamedTuple):
        """log_decay ≤ 0, natural logarithm: how much token t fades all before it."""

        q: Float[Tensor, "B T H K"]
        k: Float[Tensor, "B T G K"]
        v: Float[Tensor, "B T G V"]
        log_decay: Annotated[Float[Tensor, "B T H"], FADING]

    class Summary(NamedTuple):
        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        log_decay: Float[Tensor, "B S H"]
        length: Int[Tensor, "B"]

    class State(NamedTuple):
        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        log_decay: Float[Tensor, "B S H"]
        length: Int[Tensor, "B"]
        filled: Int[Tensor, "B"]

    ranges = {"log_decay": shapes.uniform(-1.0, 0.0)}
    hard = {"log_decay": shapes.one_of(0.0, -1e-8, -5.0, -20.0)}

    lift, summarize, compose, apply, emit, read = (
        growing.lift, growing.summarize, growing.compose, growing.apply, growing.emit, growing.read,
    )  # fmt: skip
    neutral, initial = growing.neutral, growing.initial
    compact, concatenate = staticmethod(growing.compact), staticmethod(growing.concatenate)
    reserve = staticmethod(growing.reserve)

    def attend(self, x: Tensors, kept: Tensors, first: int) -> Tensor:
        stop = first + length(x)
        q, k, v = x.q, kept.k[:, :stop], kept.v[:, :stop]
        # float64: differences of float32 sums would be as coarse as the sums are large.
        total = kept.log_decay[:, :stop].double().cumsum(1)
        sums = total.detach().transpose(1, 2).contiguous()

        def fill(start: int, end: int, out: Tensor) -> None:
            now, before = sums[..., start:end], sums[..., :start]
            # Through the first of these queries both parts are ≤ 0; among the queries they would cancel.
            out[..., :start].copy_((sums[..., start, None] - before)[:, :, None]).add_((now - now[..., :1])[..., None])
            out[..., start:].copy_(now[..., None] - now[:, :, None])

        if not (torch.is_grad_enabled() and total.requires_grad):
            return attention(q, k, v, first=first, fill=fill)
        wide = with_channels(q, k, v, [(torch.ones_like(q[..., 0]), unvalued(-total))])
        return attention(*wide, first=first, fill=fill, scale=q.shape[-1] ** -0.5)[..., : v.shape[-1]]


class Sloped(Recurrence):
    """GRAPE-A with gates (arXiv:2512.07805): A-Q, A-K and A-QK; a token leaves its k_slope."""

    class Inputs(NamedTuple):
        """q_slope, k_slope ≥ 0: what one token of distance takes off the scores of this query, of this key."""

        q: Float[Tensor, "B T H K"]
        k: Float[Tensor, "B T G K"]
        v: Float[Tensor, "B T G V"]
        q_slope: Annotated[Float[Tensor, "B T H"], AWAY]
        k_slope: Annotated[Float[Tensor, "B T H"], AWAY]

    class Summary(NamedTuple):
        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        k_slope: Float[Tensor, "B S H"]
        length: Int[Tensor, "B"]

    class State(NamedTuple):
        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        k_slope: Float[Tensor, "B S H"]
        length: Int[Tensor, "B"]
        filled: Int[Tensor, "B"]

    ranges = {"q_slope": shapes.uniform(0.0, 1.0), "k_slope": shapes.uniform(0.0, 1.0)}
    hard = {"q_slope": shapes.one_of(0.0, 1e-8, 5.0), "k_slope": shapes.one_of(0.0, 1e-8, 5.0)}

    lift, summarize, compose, apply, emit, read = (
        growing.lift, growing.summarize, growing.compose, growing.apply, growing.emit, growing.read,
    )  # fmt: skip
    neutral, initial = growing.neutral, growing.initial
    compact, concatenate = staticmethod(growing.compact), staticmethod(growing.concatenate)
    reserve = staticmethod(growing.reserve)

    def attend(self, x: Tensors, kept: Tensors, first: int) -> Tensor:
        stop = first + length(x)
        q, k, v, slope = x.q, kept.k[:, :stop], kept.v[:, :stop], kept.k_slope[:, :stop]
        wide = state_dtype(q)
        place = torch.arange(stop, dtype=wide, device=q.device)
        ours, theirs = (leaf.detach().to(wide).transpose(1, 2).contiguous() for leaf in (x.q_slope, slope))

        def fill(start: int, end: int, out: Tensor) -> None:
            distance = place[:end] - place[start:end, None]
            out.copy_(theirs[:, :, None, :end]).add_(ours[..., start - first : end - first, None]).mul_(distance)

        if not (torch.is_grad_enabled() and (slope.requires_grad or x.q_slope.requires_grad)):
            return attention(q, k, v, first=first, fill=fill)
        # -(t - s)(a + b) up to -t a, which all of a row's scores share; from the middle, for smaller numbers.
        middle = (place - stop // 2).expand(len(q), q.shape[2], -1).transpose(1, 2)
        one, a, b = torch.ones_like(x.q_slope), unvalued(x.q_slope), unvalued(slope)
        channels = [(a, middle), (one, middle * b), (-middle[:, first:], b)]
        wide_qkv = with_channels(q, k, v, channels)
        return attention(*wide_qkv, first=first, fill=fill, scale=q.shape[-1] ** -0.5)[..., : v.shape[-1]]


class Sliding(Recurrence):
    """`window`: the newest tokens that are read, t itself among them; `sinks`: the first ones, read for ever.

    The tokens kept are exactly those read: in order, at the right of the buffer, zeros before them. The sinks that
    still lie in the window are kept once. (StreamingLLM, arXiv:2309.17453)
    """

    Inputs: TypeAlias = History.Inputs

    class Summary(NamedTuple):
        """The first `sinks` and the last `window` of the segment's tokens, in order; all rows have the same number."""

        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        length: Int[Tensor, "B"]

    class State(NamedTuple):
        """The last min(length[b], W) of W = sinks + window rows hold tokens."""

        k: Float[Tensor, "B W G K"]
        v: Float[Tensor, "B W G V"]
        length: Int[Tensor, "B"]

    def __init__(self, window: int, sinks: int = 0) -> None:
        if window < 1 or sinks < 0:
            raise ValueError(
                f"sliding: window must be at least 1 and sinks at least 0; got {window} and {sinks}; "
                "a window of 1 reads only the token itself"
            )
        self.window, self.sinks, self.size = window, sinks, window + sinks

    @classmethod
    def instances(cls) -> Mapping[str, Self]:
        return {"": cls(5), "sinks": cls(5, 3), "wide": cls(64, 2), "one": cls(1, 1)}

    def lift(self, x: Tensors) -> Summary:
        ones = torch.ones(x.k.shape[:2], dtype=torch.int64, device=x.k.device)
        return self.Summary(x.k.unsqueeze(2), x.v.unsqueeze(2), ones)

    def summarize(self, x: Tensors) -> Summary:
        return self.Summary(self._keep(x.k), self._keep(x.v), torch.full(x.k.shape[:1], length(x), device=x.k.device))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        k, v = (self._keep(torch.cat(pair, 1)) for pair in ((a.k, b.k), (a.v, b.v)))
        return self.Summary(k, v, a.length + b.length)

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(self._append(s.k, a.k, s.length), self._append(s.v, a.v, s.length), s.length + a.length)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        outputs = []
        for t in range(length(x)):
            now = min(t, s.length.shape[1] - 1)
            kept = s.length[:, now].clamp(max=self.size)
            outputs.append(_read_last(x.q[:, t : t + 1], s.k[:, now], s.v[:, now], kept))
        return torch.cat(outputs, 1)

    def neutral(self, x: Tensors) -> Summary:
        return self.Summary(x.k[:, :0], x.v[:, :0], torch.zeros(len(x.k), dtype=torch.int64, device=x.k.device))

    def initial(self, x: Tensors, rows: int) -> State:
        k, v = (leaf.new_zeros(rows, self.size, *leaf.shape[2:]) for leaf in (x.k, x.v))
        return self.State(k, v, torch.zeros(rows, dtype=torch.int64, device=x.k.device))

    def read(self, x: Tensors, s: Tensors, *, chunk_size: int | None = None) -> Tensor:
        """Queries go in chunks, over the keys from window - 1 before the chunk to its end: O(T window)."""
        before, time = common(s.length), length(x)
        if before == 0 and time <= self.window:
            return sdpa(x.q, x.k, x.v, causal=True)
        size = min(chunk_size or max(CHUNK, self.window), time)
        streams = (torch.cat([old[:, self.sinks + 1 :], new], 1) for old, new in ((s.k, x.k), (s.v, x.v)))
        k, v = (_overlapping(stream, size, self.window - 1) for stream in streams)
        if self.sinks:
            free = (self.size - s.length).clamp(min=0)
            sinks = [_pick(old, new, free, self.sinks) for old, new in ((s.k, x.k), (s.v, x.v))]
            k, v = ([torch.cat([first, part], 1) for part in parts] for first, parts in zip(sinks, (k, v), strict=True))
        past = s.length if before is None else s.length[:1]
        outputs = []
        for i, q in enumerate(x.q.split(size, 1)):
            outputs.append(sdpa(q, k[i], v[i], self._mask(past + i * size, q.shape[1])))
        return torch.cat(outputs, 1)

    def _mask(self, first: Tensor, time: int) -> Tensor:
        """(B, 1, T, sinks + window - 1 + T): what the queries first[b].. read of the sinks and of the keys around."""
        query = first[:, None] + torch.arange(time, device=first.device)
        key = first[:, None] + torch.arange(1 - self.window, time, device=first.device)
        query, key = query[:, :, None], key[:, None]
        around = (key >= 0) & (key <= query) & (key > query - self.window)
        sinks = torch.arange(self.sinks, device=first.device) <= query - self.window
        return torch.cat([sinks, around], -1)[:, None]

    def _keep(self, leaf: Tensor) -> Tensor:
        """Of a whole segment (B, S, ...), the tokens that a state can still need."""
        if leaf.shape[1] <= self.size:
            return leaf
        return torch.cat([leaf[:, : self.sinks], leaf[:, -self.window :]], 1)

    def _append(self, old: Tensor, new: Tensor, before: Tensor) -> Tensor:
        """The buffer `old`, whose rows have read before[b] tokens, after the summary `new`."""
        added = new.shape[1]
        if not added:
            return old
        recent = (old[:, self.sinks + added :], new[:, -self.window :])
        if not self.sinks:
            return torch.cat(recent, 1)
        past = common(before)
        if past is not None and past >= self.size:
            return torch.cat([old[:, : self.sinks], *recent], 1)
        # While there is room, everything moves left; once there is none, the document's first tokens stay.
        free = (self.size - before).clamp(min=0)
        return torch.cat([_pick(old, new, torch.clamp(free, max=added), self.sinks), *recent], 1)


class Blocks(Recurrence):
    """Every document is cut into blocks of `size` tokens; a token reads its own block up to itself.

    weights   "softmax", or "relu": w_s = relu(q_t · k_s / √K), not normalised
    DiagAttention (arXiv:2210.10340)
    """

    Inputs: TypeAlias = History.Inputs

    class Summary(NamedTuple):
        """The last min(length, size) tokens of the segment; all rows have the same number."""

        k: Float[Tensor, "B S G K"]
        v: Float[Tensor, "B S G V"]
        length: Int[Tensor, "B"]

    class State(NamedTuple):
        """The last W = size tokens, at the right; those of earlier blocks are there, and not read."""

        k: Float[Tensor, "B W G K"]
        v: Float[Tensor, "B W G V"]
        length: Int[Tensor, "B"]

    def __init__(self, size: int, weights: Literal["softmax", "relu"] = "softmax") -> None:
        if size < 1 or weights not in ("softmax", "relu"):
            raise ValueError(
                f"blocks: size must be at least 1 and weights softmax or relu; got {size} and {weights!r}; "
                "DiagAttention is published with blocks of 64"
            )
        self.size, self.weights = size, weights

    @classmethod
    def instances(cls) -> Mapping[str, Self]:
        return {"": cls(5), "relu": cls(4, "relu"), "one": cls(1), "wide": cls(64)}

    def lift(self, x: Tensors) -> Summary:
        ones = torch.ones(x.k.shape[:2], dtype=torch.int64, device=x.k.device)
        return self.Summary(x.k.unsqueeze(2), x.v.unsqueeze(2), ones)

    def summarize(self, x: Tensors) -> Summary:
        count = torch.full(x.k.shape[:1], length(x), device=x.k.device)
        return self.Summary(x.k[:, -self.size :], x.v[:, -self.size :], count)

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        k, v = (torch.cat(pair, 1)[:, -self.size :] for pair in ((a.k, b.k), (a.v, b.v)))
        return self.Summary(k, v, a.length + b.length)

    def apply(self, a: Tensors, s: Tensors) -> State:
        k, v = (torch.cat([old[:, new.shape[1] :], new], 1) for old, new in ((s.k, a.k), (s.v, a.v)))
        return self.State(k, v, s.length + a.length)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        outputs = []
        for t in range(length(x)):
            now = min(t, s.length.shape[1] - 1)
            open_block = (s.length[:, now] - 1) % self.size + 1
            outputs.append(_read_last(x.q[:, t : t + 1], s.k[:, now], s.v[:, now], open_block, self.weights))
        return torch.cat(outputs, 1)

    def neutral(self, x: Tensors) -> Summary:
        return self.Summary(x.k[:, :0], x.v[:, :0], torch.zeros(len(x.k), dtype=torch.int64, device=x.k.device))

    def initial(self, x: Tensors, rows: int) -> State:
        k, v = (leaf.new_zeros(rows, self.size, *leaf.shape[2:]) for leaf in (x.k, x.v))
        return self.State(k, v, torch.zeros(rows, dtype=torch.int64, device=x.k.device))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        """All blocks are one batch: the open one's earlier tokens before x, zeros behind to fill the last."""
        before, time = common(s.length), length(x)
        used = self.size - 1 if before is None else before % self.size
        count = -(-(used + time) // self.size)
        none = x.q.new_zeros(len(x.q), self.size, *x.q.shape[2:])
        at = self.size - s.length[:, None] % self.size + torch.arange(count * self.size, device=s.length.device)

        def cut(old: Tensor, new: Tensor) -> Tensor:
            stream = torch.cat([old, new, new.new_zeros(len(new), count * self.size - time, *new.shape[2:])], 1)
            start = self.size - used
            own = _rows_of(stream, at) if before is None else stream[:, start : start + count * self.size]
            return own.unflatten(1, (count, self.size)).flatten(0, 1)

        q, k, v = cut(none, x.q), cut(s.k, x.k), cut(s.v, x.v)
        output = sdpa(q, k, v, causal=True) if self.weights == "softmax" else _rectified(q, k, v, causal=True)
        output = output.unflatten(0, (len(x.q), count)).flatten(1, 2)
        if before is not None:
            return output[:, used : used + time]
        return _rows_of(output, s.length[:, None] % self.size + torch.arange(time, device=s.length.device))


def _read_last(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, weights: str = "softmax") -> Tensor:
    """What one token reads of the last kept[b] of k and v."""
    size, mask = k.shape[1], None
    if (count := common(kept)) is not None:
        k, v = k[:, size - count :], v[:, size - count :]
    else:
        mask = (torch.arange(size, device=k.device) >= size - kept[:, None])[:, None, None]
    return sdpa(q, k, v, mask) if weights == "softmax" else _rectified(q, k, v, mask)


def _rectified(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Σ_s relu(q_t · k_s / √K) v_s, over s ≤ t where causal, and where mask (B, 1, 1, S) is true."""
    dtype, wide = q.dtype, state_dtype(q)
    per_head = q.shape[2] // k.shape[2]
    k, v = (leaf.to(wide).repeat_interleave(per_head, 2) if per_head > 1 else leaf.to(wide) for leaf in (k, v))
    weights = F.relu(torch.einsum("bthk,bshk->bhts", q.to(wide), k) * q.shape[-1] ** -0.5)
    weights = weights.tril() if causal else weights
    if mask is not None:
        weights = weights * mask
    return torch.einsum("bhts,bshv->bthv", weights, v).to(dtype)


def _overlapping(stream: Tensor, size: int, extra: int) -> list[Tensor]:
    """Stretches of `size` tokens, the last maybe shorter, each after the `extra` tokens before it; views."""
    full = (stream.shape[1] - extra) // size
    parts = list(stream[:, : full * size + extra].unfold(1, size + extra, size).movedim(-1, 2).unbind(1))
    return parts if full * size + extra == stream.shape[1] else [*parts, stream[:, full * size :]]


def _pick(old: Tensor, new: Tensor, skip: Tensor, count: int) -> Tensor:
    """`count` tokens of each row of old followed by new, from skip[b] on; what lies behind the end is never used."""
    at = skip[:, None] + torch.arange(count, device=skip.device)
    size = old.shape[1]
    later = _rows_of(new, (at - size).clamp(0, new.shape[1] - 1))
    return torch.where((at < size)[..., None, None], _rows_of(old, at.clamp(max=size - 1)), later)


def _rows_of(leaf: Tensor, at: Tensor) -> Tensor:
    """leaf (B, S, ...) at the places at (B, N): (B, N, ...)."""
    return leaf[torch.arange(len(at), device=at.device)[:, None], at]
