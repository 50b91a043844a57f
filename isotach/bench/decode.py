"""Milliseconds per token and bytes of state as the context grows: a model beside a softmax model of the same shape.

Every position is reached by reading that many tokens; then single tokens are timed, all models and positions taking
turns. The twin's cache is filled the same way, and growing it is not charged: that falls into the reading.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.bench.report import Figure, Result, interleave, milliseconds, paired, relative_error, synchronize
from isotach.config import parse
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.state import DecoderState
from isotach.rng import generator

CORRECT = 1e-3  # relative error of logits and gradients above which a model is refused
POSITIONS = (1024, 4096, 16384, 65536)
PRESETS = ("tnl-1m",)
READ = 2048  # tokens read at once on the way to a position
BURST = 4  # tokens timed together: few, so that a position hardly moves while it is measured


def measure(
    *,
    device: torch.device,
    presets: Sequence[str] = PRESETS,
    positions: Sequence[int] = POSITIONS,
    rounds: int = 32,
) -> Result:
    """Untrained presets, each beside its twin; speed does not depend on what the weights are."""
    result = Result({"presets": list(presets), "positions": list(positions), "burst": BURST, "device": str(device)})
    for name in presets:
        decoder = Decoder(parse(ModelConfig, {"preset": name}, who="bench")).to(device)
        found = compare(decoder, name=name, positions=positions, rounds=rounds)
        result.rows += found.rows
        result.figures += found.figures
        result.refused += found.refused
    return result


def compare(decoder: Decoder, *, name: str = "model", positions: Sequence[int] = POSITIONS, rounds: int = 32) -> Result:
    """One row per position for `decoder` and for its untrained softmax twin, and the ratios that the bounds are about.

    positions   ascending numbers of tokens read before the timed ones
    """
    twin = Decoder(softmax_twin(decoder.config)).to(decoder.device)
    decoders = {name: decoder, f"{name} softmax": twin}
    result = Result({"positions": list(positions), "burst": BURST})
    for each in list(decoders):
        if (wrong := model_error(decoders[each])) > CORRECT:
            result.refused.append(f"{each}: relative error {wrong:.1e} against float64, over {CORRECT:.0e}")
            del decoders[each]

    states = {each: read(decoders[each], positions) for each in decoders}
    seconds = _step_seconds(decoders, states, rounds)
    for (each, position), times in seconds.items():
        timing = milliseconds([spent / BURST for spent in times])
        size = states[each][position].nbytes()
        result.rows.append({"model": each, "position": position, **timing, "state_bytes": size})
    result.figures = _figures(name, positions, seconds, {p: s.nbytes() for p, s in states.get(name, {}).items()})
    return result


def softmax_twin(config: ModelConfig) -> ModelConfig:
    """The same shape with softmax attention in every layer."""
    return parse(ModelConfig, config.model_dump(mode="json", exclude_none=True) | {"pattern": ["softmax"]}, who="bench")


@torch.inference_mode()
def read(decoder: Decoder, positions: Sequence[int]) -> dict[int, DecoderState]:
    """The state after each of `positions` random tokens, in one pass and in constant memory besides the states."""
    tokens = _tokens(decoder, max(positions))
    states: dict[int, DecoderState] = {}
    state, start = None, 0
    for position in sorted(positions):
        while start < position:
            stop = min(start + READ, position)
            _, state = decoder.hidden(tokens[:, start:stop], state)
            start = stop
        assert state is not None
        states[position] = state
    return states


def model_error(decoder: Decoder, *, tokens: int = 80) -> float:
    """Largest relative error in float32: of logits in one pass and token by token, and of the loss's gradients.

    Logits are held against the recurrent form in float64, gradients against float64 autograd.
    """
    text = _tokens(decoder, tokens + 1)
    source, target = text[:, :-1], text[0, 1:]
    exact = copy.deepcopy(decoder).double()
    with torch.no_grad():
        expected = _stepwise(exact, source)
        errors = [relative_error(_stepwise(decoder, source), expected)]

    def gradients(model: Decoder) -> tuple[Tensor, Tensor]:
        logits, _ = model(source)
        leaves = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(F.cross_entropy(logits[0], target), leaves)
        return logits.detach(), torch.cat([gradient.flatten() for gradient in found])

    logits, gradient = gradients(decoder)
    _, exact_gradient = gradients(exact)
    return max(*errors, relative_error(logits, expected), relative_error(gradient, exact_gradient))


def _stepwise(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits (1, T, vocab), one token at a time."""
    state, outputs = None, []
    for t in range(tokens.shape[1]):
        logits, state = decoder(tokens[:, t : t + 1], state)
        outputs.append(logits)
    return torch.cat(outputs, 1)


def _step_seconds(
    decoders: Mapping[str, Decoder], states: Mapping[str, Mapping[int, DecoderState]], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds per burst, by model and position. States move on by a burst a round."""
    now = {(name, position): state for name in states for position, state in states[name].items()}
    if not now:
        return {}
    device = next(iter(decoders.values())).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def burst(name: str, position: int) -> None:
        state, following = now[name, position], token
        for _ in range(BURST):
            logits, state = decoders[name](following, state)
            following = logits[:, -1:].argmax(-1)
        now[name, position] = state
        synchronize(device)

    with torch.inference_mode():
        return interleave({key: partial(burst, *key) for key in now}, rounds=rounds, device=device)


def _figures(
    name: str,
    positions: Sequence[int],
    seconds: Mapping[tuple[str, int], list[float]],
    sizes: Mapping[int, int],
) -> list[Figure]:
    if not sizes:
        return []
    first, last = min(positions), max(positions)
    flat = paired(seconds[name, last], seconds[name, first])
    figures = [
        Figure(f"{name}: ms at {last:,} over ms at {first:,}", flat, at_most=1.05),
        Figure(
            f"{name}: state bytes at {last:,} over {first:,}", sizes[last] / sizes[first], at_least=1.0, at_most=1.0
        ),
    ]
    twin = f"{name} softmax"
    if (twin, last) in seconds:
        figures.append(
            Figure(f"{twin}: ms at {last:,} over ms at {first:,}", paired(seconds[twin, last], seconds[twin, first]))
        )
        figures.append(
            Figure(f"{name}: times faster than softmax at {last:,}", paired(seconds[twin, last], seconds[name, last]))
        )
    return figures


def _tokens(decoder: Decoder, count: int) -> Tensor:
    return torch.randint(decoder.config.vocab, (1, count), generator=generator(0, "text")).to(decoder.device)
