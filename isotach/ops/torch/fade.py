"""How decay enters the products of a chunk: what rows and columns are multiplied by, and when.

With L the running sum of log_decay in a chunk of m tokens, whatever reads (a row) at token i meets what was written
(a column) at token j ≤ i weakened by e^{L_i - L_j}, and the state before the chunk by e^{L_i}; the state after it gets
columns weakened by e^{L_m - L_j}.

    weak    The chunk decays by less than e^60. Rows are loaded times e^{L_i}, columns times e^{-L_j}: among them and
            the state nothing decays. The state is multiplied by e^{L_m} after it is written.
    strong  Products inside the chunk are weighed (scores.py). Before they meet the state, rows are multiplied by
            e^{L_i} and columns by e^{L_m - L_j}; the state is, by e^{L_m}, between being read and being written.

Rows x, columns y and the state S meet in P = (x yᵀ) ∘ D, x S and S ← S + yᵀ z only, so a family that multiplies where
Fade says needs to know neither.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from isotach.ops.chunks import Block
from isotach.ops.torch.loop import Loop, Run
from isotach.ops.torch.scores import SAFE, ChannelScores, HeadScores, MaskedScores, weight

Factor = Tensor | None  # (·, H, m, #K), or nothing to multiply by


class Fade(NamedTuple):
    """What to multiply by, in a run's chunks.

    inside  (rows, columns) when they are loaded
    across  (rows, columns) once more before they meet the state
    state   between being read and being written, and after that: (·, H, #K, 1)
    """

    inside: tuple[Factor, Factor]
    across: tuple[Factor, Factor]
    state: tuple[Factor, Factor]
    scores: MaskedScores | HeadScores | ChannelScores

    def state_by_chunk(self, run: Run) -> list[tuple[Factor, ...]]:
        """`state` for each of the run's repeats."""
        return list(zip(*(_by_repeat(factor, run) for factor in self.state), strict=True))

    @property
    def strong(self) -> bool:
        """Whether factors may be so small that products with them are denormal."""
        return not isinstance(self.scores, MaskedScores)


def _by_repeat(factor: Factor, run: Run) -> tuple[Factor, ...]:
    return (factor,) * run.repeats if factor is None or len(factor) == 1 else run.split(factor)


class Fades:
    """The decay of one call, chunk by chunk, and its gradient."""

    def __init__(self, log_decay: Tensor, loop: Loop, *, packed: bool) -> None:
        self.log_decay, self.loop, self.packed = log_decay, loop, packed
        self._constant: dict[int, Fade] = {}

    def of(self, run: Run, block: Block) -> Fade:
        """The decay of the run's chunks; computed once per length where it is the same for all tokens and sequences."""
        step = run.step
        if self.log_decay.shape[1] != 1:
            flat = self.log_decay.flatten(0, 1)
            shape = (run.repeats * step.count, flat.shape[1], step.length, flat.shape[2])
            out = torch.empty(shape, dtype=torch.float64, device=flat.device)
            earlier = torch.ones(step.length, step.length, dtype=out.dtype, device=out.device).tril()
            return self._fade(earlier @ step.load(flat, run.i, run.repeats, out))  # cumsum takes twice as long
        one = self.log_decay.shape[0] == 1 or self.log_decay.stride(0) == 0
        if one and step.length in self._constant:
            return self._constant[step.length]
        rate = self.log_decay[:1, 0] if one else self.log_decay[self._sequences(run, block), 0]
        count = torch.arange(1, step.length + 1, dtype=torch.float64, device=rate.device)
        fade = self._fade(rate.double().unsqueeze(2) * count[:, None])
        if one:
            self._constant[step.length] = fade
        return fade

    def _fade(self, running: Tensor) -> Fade:
        """`running`: L (·, H, m, #K) in float64, because differences of float32 sums are as coarse as the sums."""
        dtype, length, last = self.loop.scratch.dtype, running.shape[2], running[..., -1:, :]
        lowest = float(last.min())
        if lowest == 0.0:
            return Fade((None, None), (None, None), (None, None), MaskedScores(length))
        if lowest > -SAFE:
            rows, total = running.to(dtype).exp(), last.mT.to(dtype).exp()
            return Fade((rows, rows.reciprocal()), (None, None), (None, total), MaskedScores(length))
        across, total = (weight(running, dtype), weight(last - running, dtype)), weight(last.mT, dtype)
        kind = HeadScores if running.shape[-1] == 1 else ChannelScores
        return Fade((None, None), across, (total, None), kind(running, self.loop.scratch))

    # ---- the gradient of log_decay

    @property
    def shared(self) -> bool:
        """Whether a head's channels share one decay."""
        return self.log_decay.shape[-1] == 1

    def collector(self) -> Tensor:
        """Room for it: every token's is written once, a shared one is summed in float64."""
        if self.log_decay.shape[1] != 1:
            return torch.empty_like(self.log_decay, memory_format=torch.contiguous_format)
        return torch.zeros(self.log_decay.shape, dtype=torch.float64, device=self.log_decay.device)

    def store(self, collector: Tensor, run: Run, block: Block, dlog: Tensor) -> None:
        """`dlog` (N, H, m, #K)."""
        if self.log_decay.shape[1] != 1:
            run.step.store(collector.flatten(0, 1), run.i, run.repeats, dlog)
        else:
            collector.flatten(1).index_add_(0, self._sequences(run, block), dlog.sum(2).flatten(1).double())

    def _sequences(self, run: Run, block: Block) -> Tensor:
        """The row of the batch that each chunk of the run belongs to."""
        document = run.step.pick(self.loop.plan.document[block.lanes])
        return (torch.zeros_like(document) if self.packed else document).repeat(run.repeats)
