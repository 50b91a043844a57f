"""Every causal mixer as the text grows: milliseconds per token, read at once and one by one, and bytes of state.

    read   a forward pass over T tokens without gradients
    step   one token after T others

One layer of width 256 with 4 heads and every option at its default; the second of two, because the first may be
special (TransNormer's is no linear attention). One mixer is measured once more with cached memories, which grow. A
layer is timed only after its output, at once and in pieces, was compared with float64.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isotach import mixers
from isotach.allocator import keep_blocks
from isotach.bench.picture import Panel, Series
from isotach.bench.report import Figure, Result, Row, interleave, milliseconds, paired, relative_error
from isotach.nn.mixer import Mixer, MixerState, Place, initialize
from isotach.ops.engine import Span
from isotach.ops.recurrence import family
from isotach.rng import generator

CORRECT = 1e-4  # relative error above which a layer is refused
BOUND = 1.15  # cost per token at the last length over the first, of every mixer whose state stays as it is
CACHED = "lightning"  # the mixer that is also measured with memory caching
LENGTHS = (2048, 4096, 8192, 16384)
SHAPE = {"width": 256, "heads": 4}
STEPS = 16  # single tokens in a turn; turns follow each other, so at most a few hundred come after T


def measure(*, device: torch.device, lengths: tuple[int, ...] = LENGTHS, rounds: int = 9) -> Result:
    """B1, float32; a row per mixer and length, lengths ascending. A wrong result is refused.

    As in training, freed blocks are kept.
    """
    keep_blocks()
    settings = {**SHAPE, "batch": 1, "dtype": "float32", "lengths": list(lengths), "steps": STEPS}
    result = Result(settings | {"device": str(device)})
    for name, options in contenders().items():
        if (wrong := error(name, options, tokens=lengths[0], device=device)) > CORRECT:
            result.refused.append(f"{name}: relative error {wrong:.1e} against float64, over {CORRECT:.0e}")
        else:
            _time(result, name, build(name, options, dtype=torch.float32, device=device), lengths, rounds)
    return result


def contenders() -> dict[str, dict[str, Any]]:
    """Every causal mixer, and the one with cached memories: a name, that of the mixer before a comma, and options."""
    causal: dict[str, dict[str, Any]] = {name: {} for name in mixers.names() if mixers.find(name).causal}
    return causal | {f"{CACHED}, cached": {"cache": {}}}


def build(name: str, options: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device) -> Mixer:
    """The layer with weights drawn from its name, the same in every dtype."""
    place, cls = Place(1, 2), mixers.find(name.partition(",")[0])
    layer = cls.build(cls.Config(**SHAPE, **options), place)
    std = SHAPE["width"] ** -0.5
    initialize(nn.ModuleDict({"layer": layer, "shared": place.shared}), partial(generator, 0, name), std)
    with torch.no_grad():  # a map that begins at zero would hide every fault before it
        for part, module in layer.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(0, std, generator=generator(0, name, part))
    place.shared.to(device, dtype)
    return layer.to(device, dtype)


@torch.inference_mode()
def error(name: str, options: Mapping[str, Any], *, tokens: int, device: torch.device) -> float:
    """Largest relative error in float32, at once and in two pieces and a step, against float64 at once."""
    x = _tokens(tokens, device)
    exact, _ = build(name, options, dtype=torch.float64, device=device)(x.double(), None, _span(tokens, device))
    layer = build(name, options, dtype=torch.float32, device=device)
    whole, _ = layer(x, None, _span(tokens, device))
    pieces, state, start = [], None, 0
    for stop in (tokens // 2 + 5, tokens - 1, tokens):  # inside a chunk
        output, state = layer(x[:, start:stop], state, _span(stop - start, device, start=start))
        pieces.append(output)
        start = stop
    return max(relative_error(whole, exact), relative_error(torch.cat(pieces, 1), exact))


@torch.inference_mode()
def _time(result: Result, name: str, layer: Mixer, lengths: tuple[int, ...], rounds: int) -> None:
    """Add the mixer's rows and figures."""
    first, last = lengths[0], lengths[-1]
    device = next(layer.parameters()).device
    x = _tokens(last, device)
    calls = {length: partial(layer, x[:, :length], None, _span(length, device)) for length in lengths}
    states: dict[int, MixerState] = {length: call()[1] for length, call in calls.items()}
    sizes = {length: nbytes(state) for length, state in states.items()}
    steps = {length: _Steps(layer, states[length], length) for length in (first, last)}
    read = interleave(calls, rounds=rounds, device=device)
    step = interleave(steps, rounds=rounds, device=device)
    for length in lengths:
        timing = milliseconds(read[length])
        row = {"mixer": name, "tokens": length, **timing, "ms_per_token": timing["ms"] / length}
        if length in step:
            row["step_ms"] = milliseconds([seconds / STEPS for seconds in step[length]])["ms"]
        result.rows.append(row | {"state_bytes": sizes[length]})
    bound = BOUND if sizes[first] == sizes[last] else None
    ratio = paired(read[last], read[first]) * first / last
    result.figures += [
        Figure(f"{name}: ms per token read at {last:,} over {first:,}", ratio, at_most=bound),
        Figure(f"{name}: ms of a step after {last:,} over {first:,}", paired(step[last], step[first]), at_most=bound),
    ]


class _Steps:
    """STEPS single tokens a call, each call after the one before: what grows need not be copied for a new beginning."""

    def __init__(self, layer: Mixer, state: MixerState, position: int) -> None:
        self.layer, self.state, self.position = layer, state, position
        self.x = _tokens(1, next(layer.parameters()).device)

    def __call__(self) -> None:
        for _ in range(STEPS):
            _, self.state = self.layer(self.x, self.state, _span(1, self.x.device, start=self.position))
            self.position += 1


def nbytes(state: MixerState) -> int:
    """Bytes of one layer's state, spare room excluded."""
    return sum(leaf.nbytes for memory in state.values() for leaf in family(memory).compact(memory))


def _tokens(count: int, device: torch.device) -> Tensor:
    return torch.randn(1, count, SHAPE["width"], generator=generator(0, "tokens")).to(device)


def _span(count: int, device: torch.device, *, start: int = 0) -> Span:
    return Span.of(1, count, start=start, device=device)


def panels(document: Row) -> Sequence[Panel]:
    """What a token costs as the text grows: every mixer a line, those whose state grows in a colour of their own."""
    lines: dict[str, list[Row]] = {}
    for row in document["rows"]:
        lines.setdefault(row["mixer"], []).append(row)
    series = tuple(
        Series(
            name,
            tuple((row["tokens"], 1e3 * row["ms_per_token"]) for row in rows),
            group="grows" if rows[-1]["state_bytes"] > rows[0]["state_bytes"] else "keeps its size",
        )
        for name, rows in lines.items()
    )
    return [Panel("One layer reads a text", "tokens of text", "microseconds per token", series)] if series else []
