"""Memory that grows: every key and value is kept, and read by softmax attention.

    S_t = S_{t-1} ⊕ (k_t, v_t)        o_t = Σ_s softmax_s(q_t · k_s / √K) v_s  over all s ≤ t

The summary of a segment is its keys and values; composing is concatenation. `G` key/value heads serve H query heads,
H / G each (grouped heads, arXiv:2305.13245).

Values in, values out, like every family, although memory is appended to in place where that cannot be noticed: a state
carries `filled`, shared with the states its buffer was handed on to. Only the newest of them may write behind its end;
an older one, continued again, copies first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from isotach.ops.recurrence import Recurrence, Tensors, length

MASK_ELEMENTS = 1 << 24  # attention scores whose mask is held at a time


class History(Recurrence):
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

    def lift(self, x: Tensors) -> Summary:
        ones = torch.ones(x.k.shape[:2], dtype=torch.int64, device=x.k.device)
        return self.Summary(x.k.unsqueeze(2), x.v.unsqueeze(2), ones)

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        return self.Summary(*_join(a, b))

    def apply(self, a: Tensors, s: Tensors) -> State:
        """Append segment a to s, in place where s is the newest state of its buffer and no gradient is recorded."""
        if s.k.shape[1] == 0:
            return self.State(a.k, a.v, a.length, a.length.clone())
        after = s.length + a.length
        grows = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (a.k, s.k))
        if grows or not torch.equal(s.length, s.filled) or int(after.max()) > s.k.shape[1]:
            room = 0 if torch.is_grad_enabled() else int(after.max())
            k, v, after = _join(a=s, b=a, room=room)
            return self.State(k, v, after, after.clone())
        at = s.length[:, None] + torch.arange(a.k.shape[1], device=after.device)
        row = torch.arange(len(after), device=after.device)[:, None].expand_as(at)
        valid = at < after[:, None]
        s.k[row[valid], at[valid]] = a.k[valid].to(s.k.dtype)
        s.v[row[valid], at[valid]] = a.v[valid].to(s.v.dtype)
        s.filled.copy_(after)
        return self.State(s.k, s.v, after, s.filled)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        keys = torch.arange(s.k.shape[2], device=x.q.device)
        outputs = []
        for t in range(length(x)):
            now = min(t, s.k.shape[1] - 1)
            mask = (keys < s.length[:, now, None])[:, None, None]
            outputs.append(_attend(x.q[:, t : t + 1], s.k[:, now], s.v[:, now], mask))
        return torch.cat(outputs, 1)

    def neutral(self, x: Tensors) -> Summary:
        none = torch.zeros(x.k.shape[0], dtype=torch.int64, device=x.k.device)
        return self.Summary(x.k[:, :0], x.v[:, :0], none)

    def initial(self, x: Tensors, rows: int) -> State:
        none = torch.zeros(rows, dtype=torch.int64, device=x.k.device)
        k, v = (leaf.new_empty(rows, 0, *leaf.shape[2:]) for leaf in (x.k, x.v))
        return self.State(k, v, none, none.clone())

    @staticmethod
    def compact(s: Tensors) -> State:
        longest = int(s.length.max()) if len(s.length) else 0
        valid = (torch.arange(longest, device=s.length.device) < s.length[:, None])[..., None, None]
        k, v = (leaf[:, :longest] * valid for leaf in (s.k, s.v))
        return History.State(k, v, s.length, s.length.clone())

    @staticmethod
    def concatenate(states: Sequence[Tensors]) -> State:
        room = max(s.k.shape[1] for s in states)
        k, v = (torch.cat([F.pad(s[i], (0, 0, 0, 0, 0, room - s.k.shape[1])) for s in states]) for i in range(2))
        return History.State(k, v, torch.cat([s.length for s in states]), torch.cat([s.filled for s in states]))

    def summarize(self, x: Tensors) -> Summary:
        return self.Summary(x.k, x.v, torch.full((x.k.shape[0],), length(x), device=x.k.device))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        if s.k.shape[1] == 0:
            return _attend(x.q, x.k, x.v, None)
        k, v, _ = _join(s, self.summarize(x))
        return attend(x.q, k, v, s.length)


def attend(q: Tensor, k: Tensor, v: Tensor, before: Tensor) -> Tensor:
    """Causal attention of T tokens over their keys and the before[b] keys that precede them.

    q (B, T, H, K) are the last T tokens of each row; k, v (B, S, G, ·) hold before[b] + T valid tokens in row b.
    """
    ends = set(before.tolist())
    if len(ends) == 1:  # one length for all rows: nothing behind it needs a mask
        stop = ends.pop() + q.shape[1]
        k, v, before = k[:, :stop], v[:, :stop], before[:1]
        if q.shape[1] == 1:
            return _attend(q, k, v, torch.ones(1, 1, 1, stop, dtype=torch.bool, device=q.device))
    step = max(1, MASK_ELEMENTS // (k.shape[1] * len(before)))
    keys = torch.arange(k.shape[1], device=q.device)
    outputs = []
    for start in range(0, q.shape[1], step):
        now = torch.arange(start, min(start + step, q.shape[1]), device=q.device)
        mask = keys <= before[:, None, None, None] + now[:, None]
        outputs.append(_attend(q[:, start : start + step], k, v, mask))
    return torch.cat(outputs, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (leaf.to(q.dtype).transpose(1, 2) for leaf in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return output.transpose(1, 2)


def _join(a: Tensors, b: Tensors, *, room: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise concatenation of ragged rows, cut to the longest, with at least `room` spare tokens behind it."""
    total = a.length + b.length
    longest = int(total.max()) if len(total) else 0
    at = a.length[:, None] + torch.arange(b.k.shape[1], device=total.device)
    joined = []
    for old, new in ((a.k, b.k), (a.v, b.v)):
        size = max(longest + room, int(at.max()) + 1 if at.numel() else 0)
        kept = old[:, : min(old.shape[1], size)].to(new.dtype)
        spare = new.new_zeros(len(new), size - kept.shape[1], *new.shape[2:])
        index = at[..., None, None].expand(-1, -1, *new.shape[2:])
        joined.append(torch.cat([kept, spare], 1).scatter(1, index, new)[:, : longest + room])
    return joined[0], joined[1], total
