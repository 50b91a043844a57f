"""A Toeplitz kernel as a sum of decaying rotations, so that the state is constant: exact Toeplitz-to-SSM conversion.

    s_t = p ∘ s_{t-1} + v_t        o_t = Re Σ_k w_k s_t[k]        p_k = e^{log_decay} e^{-iθ_k},  θ_k = 2πk / m

Every channel has the same rotations k = 0..⌊m / 2⌋; those beyond are the conjugates. Their impulse response is
e^{j log_decay} c_j with c_j = Re Σ_k w_k e^{-iθ_k j}, a Fourier series of period m: any m values fit it exactly, and
behind them they come again, fainter by the decay. `weights` solves for w with one transform.

Rotated by a Fourier transform, s is a ring of m inputs whose oldest, faded, is added to the newest: the same numbers,
which a ring keeps and reads with half the work. With r = 1..T the place in a segment of T tokens:

    read       o_r = Σ_{s≤r} e^{(r-s) log_decay} c_{r-s} v_s  +  e^{r log_decay} Re Σ_k w_k s[k] e^{-iθ_k r}
    summarize  (T, Σ_s p^{T-s} v_s), a transform of the inputs folded into m places

Accelerating Toeplitz Neural Network with Constant-time Inference Complexity (arXiv:2311.08756), where the weights stand
before the state instead of behind it.
"""

import math
from collections.abc import Mapping
from typing import Annotated, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotach import shapes
from isotach.ops.recurrence import FADING, Recurrence, Tensors, length, state_dtype
from isotach.ops.toeplitz import convolve, pieces


class ETSC(Recurrence):
    """`period`: m, the lags for which any kernel is exact."""

    class Inputs(NamedTuple):
        """w = real + i imag; log_decay ≤ 0, natural logarithm."""

        v: Float[Tensor, "B T H V"]
        real: Float[Tensor, "K H V"]
        imag: Float[Tensor, "K H V"]
        log_decay: Annotated[Float[Tensor, "#H #V"], FADING]

    class Summary(NamedTuple):
        """s ↦ e^{log_decay} (cos - i sin) ∘ s + (real + i imag)."""

        log_decay: Float[Tensor, "B #H #V"]
        cos: Float[Tensor, "B K"]
        sin: Float[Tensor, "B K"]
        real: Float[Tensor, "B K H V"]
        imag: Float[Tensor, "B K H V"]

    class State(NamedTuple):
        real: Float[Tensor, "B K H V"]
        imag: Float[Tensor, "B K H V"]

    ranges = {"log_decay": shapes.uniform(-1.0, 0.0)}
    hard = {"log_decay": shapes.one_of(0.0, -1e-8, -5.0, -20.0)}
    variants = {"channel": {}, "fixed": {"log_decay": frozenset("HV")}}

    def __init__(self, period: int) -> None:
        if period < 1:
            raise ValueError(f"etsc: period must be at least 1; got {period}; it is the number of exact lags")
        self.period, self.rotations = period, period // 2 + 1

    @classmethod
    def instances(cls) -> Mapping[str, Self]:
        return {"even": cls(6), "odd": cls(7)}

    def lift(self, x: Tensors) -> Summary:
        x = self.wide(x)
        batch, time = x.v.shape[:2]
        cos, sin = self.rotation(torch.ones(batch, time, dtype=torch.int64, device=x.v.device), x.v.dtype)
        update = x.v.unsqueeze(2).expand(-1, -1, self.rotations, -1, -1)
        return self.Summary(
            x.log_decay.expand(batch, time, -1, -1), cos, sin, update, x.v.new_zeros(()).expand(update.shape)
        )

    def compose(self, a: Tensors, b: Tensors) -> Summary:
        real, imag = _turned(b, a.real, a.imag)
        cos, sin = a.cos * b.cos - a.sin * b.sin, a.sin * b.cos + a.cos * b.sin
        return self.Summary(a.log_decay + b.log_decay, cos, sin, real, imag)

    def apply(self, a: Tensors, s: Tensors) -> State:
        return self.State(*_turned(a, s.real, s.imag))

    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        dtype, x = x.v.dtype, self.wide(x)
        parts = [
            (s.real[..., own, :, :] * x.real[own]).addcmul_(s.imag[..., own, :, :], x.imag[own], value=-1).sum(-3)
            for own in pieces(self.rotations, s.real[..., 0, :, :].numel())
        ]
        return torch.stack(parts).sum(0).expand(-1, length(x), -1, -1).to(dtype)

    def neutral(self, x: Tensors) -> Summary:
        zero = x.v.new_zeros((), dtype=state_dtype(x.v))
        batch, modes = x.v.shape[0], self.rotations
        update = zero.expand(batch, modes, *x.v.shape[2:])
        turn = zero.expand(batch, modes)
        return self.Summary(zero.expand(batch, *x.log_decay.shape), turn + 1, turn, update, update)

    def initial(self, x: Tensors, rows: int) -> State:
        zero = x.v.new_zeros((), dtype=state_dtype(x.v)).expand(rows, self.rotations, *x.v.shape[2:])
        return self.State(zero, zero)

    def summarize(self, x: Tensors) -> Summary:
        batch, time = x.v.shape[:2]
        return self.summary(x, torch.full((batch,), time, device=x.v.device), *places(x))

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        wide, time = self.wide(x), length(x)
        within = convolve(wide.v, self.kernel(x, time).flip(0), count=time)
        return (within + self.recalled(x, s, *places(x)).view(within.shape)).to(x.v.dtype)

    def summary(self, x: Tensors, lengths: Int[Tensor, "N"], row: Int[Tensor, "M"], place: Int[Tensor, "M"]) -> Summary:
        """Summaries of documents of these lengths; the i-th token is the place[i]-th, from 1, of document row[i]."""
        x = self.wide(x)
        left = lengths[row] - place
        faded = x.v.flatten(0, 1) * (left[:, None, None] * x.log_decay).exp()
        folded = x.v.new_zeros(len(lengths) * self.period, *x.v.shape[2:])
        folded = folded.index_add(0, row * self.period + left % self.period, faded).unflatten(0, (-1, self.period))
        spectrum = torch.fft.rfft(folded, dim=1)
        cos, sin = self.rotation(lengths, x.v.dtype)
        return self.Summary(lengths[:, None, None] * x.log_decay, cos, sin, spectrum.real, spectrum.imag)

    def recalled(
        self, x: Tensors, s: Tensors, row: Int[Tensor, "M"], place: Int[Tensor, "M"]
    ) -> Float[Tensor, "M H V"]:
        """What the states s before the documents add to the outputs."""
        x = self.wide(x)
        real, imag = s.real * x.real - s.imag * x.imag, s.real * x.imag + s.imag * x.real
        series = self._series(real, imag).flatten(0, 1)[row * self.period + place % self.period]
        return series * (place[:, None, None] * x.log_decay).exp()

    def kernel(self, x: Tensors, lags: int) -> Float[Tensor, "L H V"]:
        """The impulse response, lag by lag."""
        x = self.wide(x)
        lag = torch.arange(lags, device=x.v.device)
        return self._series(x.real, x.imag)[lag % self.period] * (lag[:, None, None] * x.log_decay).exp()

    def rotation(self, steps: Int[Tensor, "..."], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of θ_k · steps, (..., K)."""
        k = torch.arange(self.rotations, device=steps.device)
        angle = (steps.unsqueeze(-1) * k % self.period).double() * (2 * math.pi / self.period)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def wide(self, x: Tensors) -> Inputs:
        """Inputs as they are accumulated; ValueError where the weights are of another period."""
        if len(x.real) != self.rotations:
            raise ValueError(
                f"etsc: period {self.period} has {self.rotations} rotations; got weights for {len(x.real)}; "
                "convert the kernel again"
            )
        dtype = state_dtype(x.v)
        return self.Inputs(*(leaf.to(dtype) for leaf in x))

    def _series(self, real: Float[Tensor, "... K H V"], imag: Float[Tensor, "... K H V"]) -> Tensor:
        """Re Σ_k (real + i imag)_k e^{-iθ_k j} for j = 0..m-1."""
        spectrum = torch.complex(real, -imag) / _multiplicity(self.period, real)[:, None, None]
        return torch.fft.irfft(spectrum, self.period, dim=-3, norm="forward")


def weights(kernel: Float[Tensor, "m H V"]) -> tuple[Float[Tensor, "K H V"], Float[Tensor, "K H V"]]:
    """w, real and imaginary, of the rotations whose sum takes the values of `kernel`, its decay left out."""
    spectrum = torch.fft.rfft(kernel, dim=0, norm="forward") * _multiplicity(len(kernel), kernel)[:, None, None]
    return spectrum.real.contiguous(), -spectrum.imag


def _multiplicity(period: int, like: Tensor) -> Float[Tensor, "K"]:
    """How many of all rotations each stands for: itself and its conjugate, where that is another."""
    k = torch.arange(period // 2 + 1, device=like.device)
    return 2 - (2 * k % period == 0).to(like.dtype)


def _turned(a: Tensors, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Summary a as a map."""
    fade = a.log_decay.exp().unsqueeze(-3)
    cos, sin = (part[..., None, None] * fade for part in (a.cos, a.sin))
    turned_real = torch.addcmul(a.real, real, cos).addcmul_(imag, sin)
    return turned_real, torch.addcmul(a.imag, imag, cos).addcmul_(real, sin, value=-1)


def places(x: Tensors) -> tuple[Tensor, Tensor]:
    """Of every token of unpacked x the row, and the place in it, from 1."""
    batch, time = x.v.shape[:2]
    row = torch.arange(batch, device=x.v.device).repeat_interleave(time)
    return row, torch.arange(1, time + 1, device=x.v.device).repeat(batch)
