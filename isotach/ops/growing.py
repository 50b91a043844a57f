"""Memory that is only appended to: what the growing families share.

    S_t = S_{t-1} ⊕ (what token t leaves)        o_t = attention of token t over S_t

A growing family's Summary holds what each token leaves, leaves (B, S, ...) under the names they have in Inputs, and
`length` (B,); its State adds `filled`. The summary of a segment is its tokens; composing is concatenation. The family
says how tokens are read:

    attend(x, kept, first)    outputs of x's T tokens, which `kept`, a Summary or State, holds at first..first+T-1

Values in, values out, like every family, although memory is appended to in place where that cannot be noticed: `filled`
is shared with the states a buffer was handed on to. Only the newest of them may write behind its end; an older one,
continued again, copies first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isotach import shapes
from isotach.ops.attention import common
from isotach.ops.recurrence import Recurrence, Tensors, at_time, length, rows


def lift(self: Recurrence, x: Tensors) -> Any:
    kept = _taken(self, x)
    ones = torch.ones(kept[0].shape[:2], dtype=torch.int64, device=kept[0].device)
    return self.Summary(*(leaf.unsqueeze(2) for leaf in kept), ones)


def summarize(self: Recurrence, x: Tensors) -> Any:
    kept = _taken(self, x)
    return self.Summary(*kept, torch.full(kept[0].shape[:1], length(x), device=kept[0].device))


def compose(self: Recurrence, a: Tensors, b: Tensors) -> Any:
    return self.Summary(*_join(a, b))


def apply(self: Recurrence, a: Tensors, s: Tensors) -> Any:
    """Append segment a to s, in place where s is the newest state of its buffer and no gradient is recorded."""
    if is_empty(s):
        return self.State(*a, a.length.clone())
    new, old = _leaves(a), _leaves(s)
    starts, counts = s.length.tolist(), a.length.tolist()
    longest = max(map(sum, zip(starts, counts, strict=True)), default=0)
    grows = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (*new, *old))
    if grows or starts != s.filled.tolist() or longest > old[0].shape[1]:
        *leaves, after = _join(s, a, room=0 if torch.is_grad_enabled() else longest)
        return self.State(*leaves, after, after.clone())
    if len({*zip(starts, counts, strict=True)}) == 1:
        for buffer, leaf in zip(old, new, strict=True):
            buffer[:, starts[0] : starts[0] + counts[0]] = leaf[:, : counts[0]]
    else:
        step = torch.arange(new[0].shape[1], device=a.length.device)
        row, token = (step < a.length[:, None]).nonzero(as_tuple=True)
        for buffer, leaf in zip(old, new, strict=True):
            buffer[row, s.length[row] + token] = leaf[row, token].to(buffer.dtype)
    after = s.length + a.length
    s.filled.copy_(after)
    return self.State(*old, after, s.filled)


def emit(self: Any, x: Tensors, s: Tensors) -> Tensor:
    outputs = []
    for t in range(length(x)):
        now = at_time(s, min(t, s.length.shape[1] - 1))
        outputs.append(attend(self, shapes.time_slice(x, t, t + 1), now, now.length - 1))
    return torch.cat(outputs, 1)


def read(self: Any, x: Tensors, s: Tensors) -> Tensor:
    own = self.summarize(x)
    if is_empty(s):
        return attend(self, x, own, None)
    return attend(self, x, self.Summary(*_join(s, own)), s.length)


def attend(self: Any, x: Tensors, kept: Tensors, before: Tensor | None) -> Tensor:
    """Outputs of x's tokens, before[b] kept before them in row b, None where none is; unequal rows one by one."""
    if before is None:
        return self.attend(x, kept, 0)
    if (first := common(before)) is not None:
        return self.attend(x, kept, first)
    alone = ((slice(n, n + 1), first) for n, first in enumerate(before.tolist()))
    return torch.cat([self.attend(rows(x, n), rows(kept, n), first) for n, first in alone])


def neutral(self: Recurrence, x: Tensors) -> Any:
    kept = _taken(self, x)
    none = torch.zeros(len(kept[0]), dtype=torch.int64, device=kept[0].device)
    return self.Summary(*(leaf[:, :0] for leaf in kept), none)


def initial(self: Recurrence, x: Tensors, rows: int) -> Any:
    kept = _taken(self, x)
    none = torch.zeros(rows, dtype=torch.int64, device=kept[0].device)
    return self.State(*(leaf.new_empty(rows, 0, *leaf.shape[2:]) for leaf in kept), none, none.clone())


def compact(s: Tensors) -> Any:
    longest = int(s.length.max()) if len(s.length) else 0
    valid = torch.arange(longest, device=s.length.device) < s.length[:, None]
    leaves = (leaf[:, :longest] * _alongside(valid, leaf) for leaf in _leaves(s))
    return type(s)(*leaves, s.length, s.length.clone())


def reserve(s: Tensors, room: int) -> Any:
    if s.length.tolist() == [s[0].shape[1]] and room <= s[0].shape[1]:
        return s  # full: nobody can write into it
    kept, leaves = compact(s), []
    for leaf in _leaves(kept):
        size = max(room, leaf.shape[1])
        if len(leaf) > 1:  # a shorter row's places are masked, not left out, so there must be numbers in them
            leaves.append(_padded(leaf, size))
        else:
            leaves.append(leaf.new_empty(1, size, *leaf.shape[2:]))
            leaves[-1][:, : leaf.shape[1]] = leaf
    return type(s)(*leaves, kept.length, kept.filled)


def concatenate(states: Sequence[Tensors]) -> Any:
    room = max(_leaves(s)[0].shape[1] for s in states)
    padded = [[_padded(leaf, room) for leaf in _leaves(s)] for s in states]
    leaves = (torch.cat(parts) for parts in zip(*padded, strict=True))
    return type(states[0])(*leaves, torch.cat([s.length for s in states]), torch.cat([s.filled for s in states]))


def is_empty(s: Tensors) -> bool:
    """Whether s has no room for a token at all, as the state before the first."""
    return s[0].shape[1] == 0


def _taken(self: Recurrence, x: Tensors) -> list[Tensor]:
    """What the tokens of x leave behind."""
    return [getattr(x, field) for field in self.Summary._fields[:-1]]


def _leaves(kept: Tensors) -> Sequence[Tensor]:
    """The leaves (B, S, ...) of a summary or state."""
    return kept[: kept._fields.index("length")]


def _padded(leaf: Tensor, room: int) -> Tensor:
    return F.pad(leaf, (0, 0) * (leaf.dim() - 2) + (0, room - leaf.shape[1]))


def _alongside(index: Tensor, leaf: Tensor) -> Tensor:
    """index (B, S) as a view that broadcasts with leaf (B, S, ...)."""
    return index.view(*index.shape, *(1,) * (leaf.dim() - 2))


def _join(a: Tensors, b: Tensors, *, room: int = 0) -> list[Tensor]:
    """Row-wise concatenation of ragged rows, with at least `room` spare tokens behind the longest; and its length."""
    total = a.length + b.length
    stop, added = common(a.length), common(b.length)
    if stop is not None and added is not None:
        leaves = []
        for old, new in zip(_leaves(a), _leaves(b), strict=True):
            spare = [new.new_zeros(len(new), room, *new.shape[2:])] if room else []
            leaves.append(torch.cat([old[:, :stop].to(new.dtype), new[:, :added], *spare], 1))
        return [*leaves, total]
    longest = int(total.max()) + room
    at = a.length[:, None] + torch.arange(_leaves(b)[0].shape[1], device=total.device)
    size = max(longest, int(at.max()) + 1)
    leaves = []
    for old, new in zip(_leaves(a), _leaves(b), strict=True):
        kept = _padded(old[:, :size].to(new.dtype), size)
        leaves.append(kept.scatter(1, _alongside(at, new).expand_as(new), new)[:, :longest])
    return [*leaves, total]
