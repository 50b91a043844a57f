"""A token for every row of a batch: the fused draw beside a matrix product, a softmax and torch.multinomial.

What must move is the output projection, once; logits, probabilities and what multinomial keeps come on top of it. The
product alone is timed too: nobody who multiplies first is faster.

    of_copy   the bytes of weights and states over those that a copy moves in the same time
    MiB       all that is held at once besides weights and states
    times     how many times as long as Isotach takes

Nobody is timed whose draws are wrong: at the size that is timed, each of ours must have the largest score of all
tokens, logits and noise taken together in float64, up to rounding; and at a small one, draws must follow the softmax.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.bench.limits import COPY, Limits, clock, peak
from isotach.bench.picture import Panel, Series
from isotach.bench.report import Clock, Figure, Result, Row, interleave, milliseconds, paired
from isotach.ops.sampling import Key, Tilt, gumbel, sample
from isotach.rng import generator

OURS, RIVAL, PRODUCT = "isotach", "softmax + multinomial", "product alone"
BARS = {1: 1.35, 16: 1.44, 64: 1.67, 256: 1.0}  # times, by batch: FlashSampling's on an H200, and not slower at 256
CORRECT = 1e-3  # by how much a score or a log-probability may miss the exact one, in nats
DRAWS = 1 << 14
CHECKED = 4  # rows whose scores are all computed again
PIECE = 8192  # tokens of them at a time


class Shape(NamedTuple):
    """B, D, V and the dtype of weights and states."""

    batch: int
    width: int
    vocab: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"B {self.batch}, D {self.width:,}, V {self.vocab:,}, {str(self.dtype).removeprefix('torch.')}"


GRIDS = {
    "cpu": tuple(Shape(batch, 1024, 32_768, torch.float32) for batch in (1, 16, 64)),
    "cuda": tuple(Shape(batch, 4096, 151_936, torch.bfloat16) for batch in BARS),
}
Contender = Callable[[Tensor, Tensor], Tensor]  # states (B, D) and weights (V, D) to tokens (B,), or to logits


def fused(hidden: Tensor, weight: Tensor) -> Tensor:
    return sample(hidden, weight, *_how(hidden)).token[:, 0]


def unfused(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.multinomial(F.linear(hidden, weight).float().softmax(-1), 1)[:, 0]


CONTENDERS: dict[str, Contender] = {OURS: fused, RIVAL: unfused, PRODUCT: F.linear}


def measure(*, device: torch.device, rounds: int = 50, shapes: tuple[Shape, ...] | None = None) -> Result:
    """The device's grid, or the shapes given."""
    shapes = GRIDS[device.type] if shapes is None else shapes
    result = Result({"device": device.type, "rounds": rounds})
    limits, timer = Limits.of(device, torch.float32), clock(device)
    for shape in shapes:
        _measure(result, shape, device, rounds, limits, timer)
    result.figures = figures(result.rows if device.type == "cuda" else [])
    return result


def _measure(result: Result, shape: Shape, device: torch.device, rounds: int, limits: Limits, timer: Clock) -> None:
    hidden, weight = _drawn(shape, device)
    calls: dict[str, Callable[[], object]] = {}
    for name, contender in CONTENDERS.items():
        wrong = fault(contender, hidden, weight) if name == OURS else None
        wrong = wrong or (unlikely(contender, device, shape.dtype) if name != PRODUCT else None)
        if wrong:
            result.refused.append(f"{name}: {shape}: {wrong}")
        else:
            calls[name] = partial(contender, hidden, weight)
    calls[COPY] = limits.calls[COPY]
    with torch.no_grad():
        seconds = interleave(calls, rounds=rounds, device=device, clock=timer)
        held = {name: peak(call, device) for name, call in calls.items() if name != COPY}
    moved = hidden.nbytes + weight.nbytes
    rate = limits.work[COPY] / statistics.median(seconds[COPY])
    result.settings[f"GB/s of a copy, {shape}"] = 1e-9 * rate
    for name in held:
        row: Row = {"shape": str(shape), "contender": name, **milliseconds(seconds[name])}
        row["GB/s"] = 1e-9 * moved / statistics.median(seconds[name])
        row["of_copy"] = moved / limits.work[COPY] * paired(seconds[COPY], seconds[name])
        row["MiB"] = held[name] / 2**20
        if name != OURS and OURS in seconds:
            row["times"] = paired(seconds[name], seconds[OURS])
        row["at"] = {"batch": shape.batch, "width": shape.width, "vocab": shape.vocab}
        result.rows.append(row)


def figures(rows: list[Row]) -> list[Figure]:
    """What a GPU's rows are held against; without a value where there are none."""
    times = {row["at"]["batch"]: row.get("times") for row in rows if row["contender"] == RIVAL}
    return [
        Figure(f"GPU: batch {batch}, {RIVAL}'s time over ours", times.get(batch), at_least=bar)
        for batch, bar in BARS.items()
    ]


def fault(contender: Contender, hidden: Tensor, weight: Tensor) -> str | None:
    """What is wrong with tokens that are to be those of `sample`, compared with all scores of a few rows in float64."""
    tokens, rows = contender(hidden, weight), min(CHECKED, len(hidden))
    key, _ = _how(hidden)
    key = Key(*(leaf[:rows] for leaf in key))
    scores = torch.empty(rows, len(weight), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(weight), PIECE):
        part = weight[start : start + PIECE]
        ids = torch.arange(start, start + len(part), device=hidden.device)[None]
        scores[:, start : start + len(part)] = hidden[:rows].double() @ part.double().mT + gumbel(key, ids, 1)[:, 0]
    missed = (scores.amax(-1) - scores.gather(-1, tokens[:rows, None])[:, 0]).max().item()
    return None if missed <= CORRECT else f"a token {missed:.1e} below the largest score, over {CORRECT:.0e}"


def unlikely(contender: Contender, device: torch.device, dtype: torch.dtype) -> str | None:
    """Whether draws from 64 tokens differ from the softmax as no exact sampler's do, but one in a million."""
    hidden, weight = _drawn(Shape(1, 16, 64, dtype), device)
    expected = DRAWS * (hidden.double() @ weight.double().mT)[0].softmax(-1)
    counts = contender(hidden.expand(DRAWS, -1).contiguous(), weight).bincount(minlength=64)
    found, freedom = ((counts - expected) ** 2 / expected).sum().item(), 63
    most = freedom + 5 * math.sqrt(2 * freedom) + 10
    return None if found <= most else f"chi-square {found:.0f} on {freedom} degrees of freedom, over {most:.0f}"


def _how(hidden: Tensor) -> tuple[Key, Tilt]:
    return Key.of(1, 2, len(hidden), device=hidden.device), Tilt(hidden.new_ones(len(hidden), dtype=torch.float32))


def _drawn(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits are then standard normal."""
    stream = generator(0, "sample", device=device)
    hidden = torch.randn(shape.batch, shape.width, generator=stream, device=device)
    weight = torch.randn(shape.vocab, shape.width, generator=stream, device=device) / shape.width**0.5
    return hidden.to(shape.dtype), weight.to(shape.dtype)


def panels(document: Row) -> list[Panel]:
    """Time against batch."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in document["rows"]:
        lines.setdefault(row["contender"], []).append((row["at"]["batch"], row["ms"]))
    series = tuple(Series(name, tuple(points), faint=name == PRODUCT) for name, points in lines.items())
    return [Panel("A token for every row", "rows", "milliseconds", series)] if series else []
