"""A causal Toeplitz matrix per channel: each input is weighed by how long ago it came.

    S_t = (S_{t-1}, v_t)        o_t = Σ_{s≤t} w_{t-s} ∘ v_s

The state is the inputs themselves. They and the kernel are kept the oldest first and meet at their ends, as in a
convolution layer: kernel[-1] weighs the token itself, kernel[-1-j] what came j tokens before, and before kernel[0] is
nothing. The summary of a segment is its inputs, and composing is concatenation. `window` keeps the newest so many: a
plain ring buffer. The closed form multiplies spectra, of Fourier transforms long enough not to wrap.

States are values, yet grow in place where that cannot be noticed: `filled`, shared by the states that a buffer was
handed on to, says how much of it any of them has written. Only the newest of them may go on behind its end; an older
one, continued again, copies first.

Toeplitz Neural Network (arXiv:2305.04749).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from isotach.ops.recurrence import Recurrence, Tensors, at_time, length, state_dtype

PIECE_ELEMENTS = 1 << 20  # products held at a time while a token reads its state: more would leave the cache


class Toeplitz(Recurrence):
    """`window`: how many inputs are kept, the token's own included; None for all.

    two_sided: tokens of a set, which all read the state after the last, look ahead as well.
    """

    class Inputs(NamedTuple):
        """A two-sided kernel has 2 F + 1 rows: the last F weigh what is ahead, kernel[-1] what is farthest."""

        v: Float[Tensor, "B T H V"]
        kernel: Float[Tensor, "L H V"]

    class Summary(NamedTuple):
        past: Float[Tensor, "B S H V"]

    class State(NamedTuple):
        """Row b holds the length[b] inputs before past[b, stop[b]]; `stop` is the same for all rows.

        Before a row's inputs are zeros, or inputs older than the window; behind `filled` nothing has been written.
        """

        past: Float[Tensor, "B S H V"]
        stop: Int[Tensor, "B"]
        length: Int[Tensor, "B"]
        filled: Int[Tensor, "B"]

    def __init__(self, *, window: int | None = None, two_sided: bool = False) -> None:
        if window is not None and window < 1:
            raise ValueError(f"toeplitz: window must be at least 1; got {window}; leave it out to keep every input")
        self.window, self.both_ways = window, two_sided

    @classmethod
    def instances(cls) -> Mapping[str, Self]:
        return {"": cls(), "window": cls(window=11)}

    def lift(self, x: Tensors) -> Summary:
        return self.Summary(x.v.unsqueeze(2))

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        joined = torch.cat([a.past, b.past], -3)
        return self.Summary(joined[..., -(self.window or joined.shape[-3]) :, :, :])

    def apply(self, a: Tensors, s: Tensors) -> State:
        """Append segment a to s, in place where s is the newest state of its buffer and no gradient is recorded."""
        time = a.past.shape[1]
        after = (s.length + time).clamp_max(self.window) if self.window else s.length + time
        if s.past.shape[1] == 0:
            end = torch.full_like(after, time)
            return self.State(a.past, end, after, end.clone())
        stop = _stop(s)
        recorded = torch.is_grad_enabled() and (a.past.requires_grad or s.past.requires_grad)
        if recorded or stop + time > s.past.shape[1] or not torch.equal(s.stop, s.filled):
            past = self.newest(torch.cat([self.recent(s).to(a.past.dtype), a.past], 1))
            end = torch.full_like(s.stop, past.shape[1])
            room = 0 if torch.is_grad_enabled() else past.shape[1]  # as much again
            return self.State(F.pad(past, (0, 0, 0, 0, 0, room)), end, after, end.clone())
        s.past[:, stop : stop + time] = a.past
        s.filled.add_(time)
        return self.State(s.past, s.stop + time, after, s.filled)

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        if s.stop.shape[1] < length(x):
            return self._set(x, self.recent(at_time(s, 0)))
        kernel = self.taps(x)
        outputs = []
        for t in range(length(x)):
            now = self.recent(at_time(s, t))
            lags = min(now.shape[1], len(kernel))
            now, taps = now[:, now.shape[1] - lags :], kernel[len(kernel) - lags :]
            parts = [(now[:, own].to(taps.dtype) * taps[own]).sum(1) for own in pieces(lags, now[:, 0].numel())]
            outputs.append(torch.stack(parts).sum(0).to(x.v.dtype))
        return torch.stack(outputs, 1)

    def _set(self, x: Tensors, whole: Tensor) -> Tensor:
        """Every token reads the inputs before and, with a two-sided kernel, behind it; they are the last of `whole`."""
        most = len(x.kernel) // 2 if self.both_ways else 0
        ahead = min(most, length(x) - 1)
        kernel = x.kernel[: len(x.kernel) - most + ahead][-(whole.shape[1] + ahead) :]
        return convolve(whole, kernel.to(state_dtype(x.v)), count=length(x), ahead=ahead).to(x.v.dtype)

    def neutral(self, x: Tensors) -> Summary:
        return self.Summary(x.v[:, :0])

    def initial(self, x: Tensors, rows: int) -> State:
        none = torch.zeros(rows, dtype=torch.int64, device=x.v.device)
        return self.State(x.v.new_empty(rows, 0, *x.v.shape[2:]), none, none, none.clone())

    def stored(self, context: int) -> int:
        return min(context, self.window or context)

    def room(self, context: int) -> int:
        return 2 * min(context, self.window) if self.window else context  # see apply

    @staticmethod
    def reserve(s: Tensors, room: int) -> State:
        if s.length.tolist() == s.stop.tolist() == [s.past.shape[1]] and room <= s.past.shape[1]:
            return s  # full: nobody can write into it
        kept = Toeplitz.compact(s)
        rows, longest, *channels = kept.past.shape
        past = kept.past.new_empty(rows, max(room, longest), *channels)
        past[:, :longest] = kept.past
        return Toeplitz.State(past, kept.stop, kept.length, kept.filled)

    @staticmethod
    def compact(s: Tensors) -> State:
        longest, stop = int(s.length.max()) if len(s.length) else 0, _stop(s)
        past = s.past[:, stop - longest : stop]
        valid = torch.arange(longest, 0, -1, device=past.device) <= s.length[:, None]
        now = torch.full_like(s.length, longest)
        return Toeplitz.State(past * valid[..., None, None], now, s.length, now.clone())

    @staticmethod
    def concatenate(states: Sequence[Tensors]) -> State:
        parts = [Toeplitz.compact(s) for s in states]
        longest = max(part.past.shape[1] for part in parts)
        past = torch.cat([F.pad(part.past, (0, 0, 0, 0, longest - part.past.shape[1], 0)) for part in parts])
        count = torch.cat([part.length for part in parts])
        now = torch.full_like(count, longest)
        return Toeplitz.State(past, now, count, now.clone())

    def summarize(self, x: Tensors) -> Summary:
        return self.Summary(self.newest(x.v))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        whole = torch.cat([self.recent(s).to(x.v.dtype), x.v], 1)
        return convolve(whole, self.taps(x)[-whole.shape[1] :], count=length(x)).to(x.v.dtype)

    def taps(self, x: Tensors) -> Float[Tensor, "L H V"]:
        """The kernel within the window, without what is ahead, as it is multiplied."""
        taps: Tensor = x.kernel[: len(x.kernel) - len(x.kernel) // 2] if self.both_ways else x.kernel
        return taps[-(self.window or len(taps)) :].to(state_dtype(x.v))

    def recent(self, s: Tensors) -> Float[Tensor, "B S H V"]:
        """The inputs that a state can still be asked for; zeros before the first of a row."""
        return self.newest(s.past[:, : _stop(s)])

    def newest(self, past: Float[Tensor, "B S H V"]) -> Float[Tensor, "B S H V"]:
        """Those within the window."""
        return past[:, -(self.window or past.shape[1]) :]


def pieces(count: int, each: int) -> Iterator[slice]:
    """Slices of range(count), so that `each` elements times a slice's length fit in cache."""
    size = max(1, PIECE_ELEMENTS // max(1, each))
    return (slice(i, min(i + size, count)) for i in range(0, max(1, count), size))


def convolve(
    inputs: Float[Tensor, "B S H V"], kernel: Float[Tensor, "L H V"], *, count: int, ahead: int = 0
) -> Float[Tensor, "B count H V"]:
    """What the last `count` inputs read, in the kernel's dtype; kernel[-1] weighs what is `ahead` tokens ahead."""
    stop = inputs.shape[1] + ahead
    size = 1 << (inputs.shape[1] + len(kernel) - 2).bit_length()
    spectrum = torch.fft.rfft(inputs.to(kernel.dtype), size, dim=1) * torch.fft.rfft(kernel.flip(0), size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, stop - count : stop]


def _stop(s: Tensors) -> int:
    """Where the next input goes. An empty buffer is not asked, because torch.compile could not."""
    return int(s.stop[0]) if s.past.shape[1] and len(s.stop) else s.past.shape[1]
