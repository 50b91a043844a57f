"""What a pattern costs: a number per layer and mixer, summed over the layers.

Counts are those of the Decoder with the pattern, and exact. A measured time is that of the models with one mixer
throughout: a layer counts as the depth-th part of its mixer's model.
"""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from isotach.config import Config
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.state import DecoderState
from isotach.rng import generator
from isotach.search.recipe import Cost, Pattern, SearchConfig, patterned

READ = 2048  # tokens read at once
TIMES = 20  # of a measurement, after an untimed one; the fastest and slowest tenths do not count, as released
COUNTS = {"flops": Decoder.flops_per_token, "state_bytes": Decoder.state_bytes}


class Costs(Config):
    """costs(pattern) in FLOPs, bytes or milliseconds: `rest`, and what each layer's mixer adds."""

    cost: Cost
    context: int
    rest: float
    layers: tuple[dict[str, float], ...]

    def __call__(self, pattern: Pattern) -> float:
        return self.rest + math.fsum(layer[name] for layer, name in zip(self.layers, pattern, strict=True))

    def cheapest(self) -> Pattern:
        return tuple(min(layer, key=layer.__getitem__) for layer in self.layers)

    def costliest(self) -> Pattern:
        return tuple(max(layer, key=layer.__getitem__) for layer in self.layers)


def costs(model: ModelConfig, search: SearchConfig, device: torch.device) -> Costs:
    """Count, or measure on `device`, what every choice costs in every layer of `model`."""
    if search.cost in COUNTS:
        rest, layers = _counted(model, search)
    else:
        rest, layers = 0.0, _measured(model, search, device)
    return Costs(cost=search.cost, context=search.context, rest=rest, layers=layers)


def _counted(model: ModelConfig, search: SearchConfig) -> tuple[float, tuple[dict[str, float], ...]]:
    """The first choice everywhere, and for every layer and choice what changing that layer alone adds."""
    first, *others = search.choices

    def count(pattern: Pattern) -> float:
        decoder = Decoder(patterned(model, pattern))
        return float(COUNTS[search.cost](decoder, search.context))

    base = [first] * model.depth
    rest = count(tuple(base))
    return rest, tuple(
        {first: 0.0} | {name: count((*base[:i], name, *base[i + 1 :])) - rest for name in others}
        for i in range(model.depth)
    )


@torch.inference_mode()
def _measured(model: ModelConfig, search: SearchConfig, device: torch.device) -> tuple[dict[str, float], ...]:
    """Milliseconds per layer of the uniform models, which take turns so that a slow moment slows all."""
    tokens = torch.randint(model.vocab, (1, search.context), generator=generator(0, "text")).to(device)
    decoders = {name: Decoder(patterned(model, (name,))).to(device) for name in search.choices}
    states = {name: _read(decoder, tokens) for name, decoder in decoders.items()}
    spent: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(1 + TIMES):
        for name, decoder in decoders.items():
            _wait(device)
            began = time.perf_counter()
            if search.cost == "read_ms":
                _read(decoder, tokens)
            else:
                _, states[name] = decoder(tokens[:, :1], states[name])
            _wait(device)
            spent[name].append(time.perf_counter() - began)
    layer = {name: 1e3 * trimmed_mean(times[1:]) / model.depth for name, times in spent.items()}
    return (layer,) * model.depth


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without the largest and the smallest tenth."""
    out = len(values) // 10
    return statistics.fmean(sorted(values)[out : len(values) - out])


def _read(decoder: Decoder, tokens: Tensor) -> DecoderState:
    state = None
    for piece in tokens.split(READ, 1):
        _, state = decoder.hidden(piece, state)
    assert state is not None
    return state


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
