"""Milliseconds per token and bytes of state as the context grows: a model beside a softmax model of the same shape.

Every position is reached by reading that many tokens; then single tokens are timed, all models and positions taking
turns. The twin's cache is filled the same way and is never charged for copying or for spare room: before it is timed
it moves into a buffer that ends where the timed tokens do.

With llama.cpp as the peer, a model in eight bits is timed as well, each in its own process, with as many threads, and
token by token as chats go: the step, and the likeliest token. Its state at a position is one that has read READ tokens
and is told that it read more, for what is in it costs nothing.

On a GPU a model in bfloat16 is timed for one row and for many, as its engine steps them. Its limit is that the weights
are read once and the states read and written once, as fast as a copy moves bytes in the same rounds.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.bench import llama
from isotach.bench.limits import COPY, Limits, clock
from isotach.bench.report import Figure, K, Result, interleave, milliseconds, paired, relative_error, synchronize
from isotach.config import parse
from isotach.infer.graphs import Stepper
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.quantize import bfloat16, int8
from isotach.models.state import DecoderState
from isotach.nn.mixer import MixerState
from isotach.ops.history import History
from isotach.ops.recurrence import Tensors
from isotach.rng import generator

CORRECT = 1e-3  # relative error of logits and gradients above which a model is refused
POSITIONS = (1024, 4096, 16384, 65536)
PRESETS = ("tnl-1m",)
AGAINST = ("llama.cpp",)
EIGHT_BITS = "tnl-135m"  # the model that is timed beside llama.cpp's
TIMES_FASTER = {1024: 0.8, 8192: 3.0, 32768: 8.0}  # at least, at these positions, than with flash attention
PEERS = {"llama.cpp": True, "llama.cpp without flash attention": False}
ROUNDED = 0.1  # distance over length of logits in eight bits from those without rounded activations: untrained layers
# amplify a difference, in float32 by 100 and more, and a wrong product is off by its length
SIXTEEN_BITS = "tnl-385m"  # the model that is timed on a GPU
ROWS = {1: 0.5, 4: None, 16: None, 64: 0.65, 256: None}  # sequences at once, and the share of the limit that is wanted
READ = 2048  # tokens read at once on the way to a position
STEPS = 4  # single tokens timed in a turn, after an untimed one that brings the weights back into the cache


def measure(
    *,
    device: torch.device,
    presets: Sequence[str] = PRESETS,
    positions: Sequence[int] = POSITIONS,
    against: Sequence[str] = AGAINST,
    rounds: int = 32,
) -> Result:
    """Untrained presets, each beside its twin, and one in eight bits; speed does not depend on what the weights are."""
    result = Result(
        {
            "presets": list(presets),
            "positions": list(positions),
            "against": list(against),
            "steps": STEPS,
            "device": str(device),
        }
    )
    parts = []
    for name in presets:
        decoder = Decoder(parse(ModelConfig, {"preset": name}, who="bench")).to(device)
        parts.append(compare(decoder, name=name, positions=positions, rounds=rounds))
    sixteen = f"{SIXTEEN_BITS} bfloat16"
    if device.type == "cuda":
        model = Decoder(parse(ModelConfig, {"preset": SIXTEEN_BITS}, who="bench")).to(device)
        parts.append(in_sixteen_bits(model, name=sixteen, rounds=rounds))
    else:
        parts.append(Result({}, figures=_shares(sixteen, {})))  # not measured, and said so
    if "llama.cpp" in against:
        if device.type == "cpu":
            eight = parse(ModelConfig, {"preset": EIGHT_BITS}, who="bench")
            parts.append(in_eight_bits(eight, rounds=max(1, rounds // 4)))  # llama.cpp takes seconds for a turn
        else:
            result.absent.append("llama.cpp: compared on the CPU alone")
    for found in parts:
        result.rows += found.rows
        result.figures += found.figures
        result.refused += found.refused
        result.absent += found.absent
    return result


def in_eight_bits(config: ModelConfig, *, name: str = EIGHT_BITS, rounds: int = 32) -> Result:
    """A model in float32 and in eight bits beside llama.cpp, where that is installed, at the positions that bounds are
    about. A byte of weights is counted as read once per token, the embedding as the head that it is.
    """
    result = Result({})
    eight, whole, model = f"{name} int8", f"{name} float32", Decoder(config)
    decoders = {whole: model, eight: int8(model)}
    if (wrong := rounding_error(decoders[eight])) > ROUNDED:
        result.refused.append(f"{eight}: distance {wrong:.1e} from float64, over {ROUNDED:.0e}")
        del decoders[eight]

    short = {each: read(decoder, (READ,))[READ] for each, decoder in decoders.items()}
    calls: dict[tuple[str, int], Callable[[], float]] = {}
    for position in TIMES_FASTER:
        for each, decoder in decoders.items():
            state = replace(short[each], positions=torch.full_like(short[each].positions, position))
            calls[each, position] = partial(_turn, decoder, state)
    with ExitStack() as ends:
        if absence := llama.missing():
            result.absent.append(absence)
        else:
            peer = ends.enter_context(llama.Llama(tuple(TIMES_FASTER), steps=STEPS, threads=torch.get_num_threads()))
            if peer.answer != llama.ANSWER:
                result.refused.append(f"llama.cpp: {llama.PROMPT!r} goes on with {peer.answer!r}, not {llama.ANSWER!r}")
            else:
                for each, flash in PEERS.items():
                    calls |= {(each, at): partial(peer.seconds, at, flash=flash) for at in TIMES_FASTER}
        seconds = _in_turns(calls, rounds)

    for (each, position), times in seconds.items():
        row = {"model": each, "position": position, **milliseconds(times)}
        if each in decoders:
            read_bytes = sum(value.nbytes for value in decoders[each].state_dict().values())
            row |= {"state_bytes": short[each].nbytes(), "weight_bytes": read_bytes}
            row["bytes_per_second"] = read_bytes / row["ms"] * 1e3
        result.rows.append(row)
    for each, flash in PEERS.items():
        for position, bound in TIMES_FASTER.items():
            theirs, ours = seconds.get((each, position)), seconds.get((eight, position))
            value = paired(theirs, ours) if theirs and ours else None
            figure = f"{eight}: times faster than {each} at {position:,}"
            result.figures.append(Figure(figure, value, at_least=bound if flash else None))
    return result


def in_sixteen_bits(decoder: Decoder, *, name: str, rounds: int = 32) -> Result:
    """A row per number of sequences: milliseconds of a step of all, and the share of the limit."""
    result, model = Result({}), bfloat16(decoder)
    if (wrong := rounding_error(model)) > ROUNDED:
        result.refused.append(f"{name}: distance {wrong:.1e} from float64, over {ROUNDED:.0e}")
        return result
    device, limits = decoder.device, Limits.of(decoder.device, torch.bfloat16)
    weight_bytes = sum(value.nbytes for value in model.state_dict().values())
    shares: dict[int, float] = {}
    for rows in ROWS:
        walker = _Walker(model, rows)
        calls = {name: walker.step, COPY: limits.calls[COPY]}
        seconds = interleave(calls, rounds=rounds, device=device, clock=clock(device))
        least = weight_bytes + 2 * walker.state_bytes
        shares[rows] = least / limits.work[COPY] * paired(seconds[COPY], seconds[name])
        row = {"model": name, "rows": rows, **milliseconds(seconds[name]), "state_bytes": walker.state_bytes}
        result.rows.append(row | {"weight_bytes": weight_bytes, "of_limit": shares[rows]})
    result.figures = _shares(name, shares)
    return result


def _shares(name: str, shares: Mapping[int, float]) -> list[Figure]:
    return [
        Figure(f"GPU: {name}: share of the limit, {rows} at once", shares.get(rows), at_least=bound)
        for rows, bound in ROWS.items()
        if bound is not None
    ]


class _Walker:
    """So many sequences that go on from step to step, as the engine has them."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self._stepper, self._tokens = Stepper(decoder, values=False), [0] * rows
        self._state = decoder.initial().fork(rows)
        self.state_bytes = self._state.nbytes()
        self.step()  # which records the graphs

    def step(self) -> None:
        _, self._state = self._stepper.step(self._tokens, self._state)


@torch.inference_mode()
def rounding_error(decoder: Decoder, *, tokens: int = 24) -> float:
    """Distance of logits, token by token, from those of the same weights in float64, over the length of the latter."""
    text = _tokens(decoder, tokens)
    expected = copy.deepcopy(decoder).double()(text)[0]
    return float((_stepwise(decoder, text) - expected).norm() / expected.norm())


def compare(decoder: Decoder, *, name: str = "model", positions: Sequence[int] = POSITIONS, rounds: int = 32) -> Result:
    """One row per position for `decoder` and for its untrained softmax twin, and the ratios that the bounds are about.

    positions   ascending numbers of tokens read before the timed ones
    """
    twin = Decoder(softmax_twin(decoder.config)).to(decoder.device)
    decoders = {name: decoder, f"{name} softmax": twin}
    result = Result({"positions": list(positions), "steps": STEPS})
    for each in list(decoders):
        if (wrong := model_error(decoders[each])) > CORRECT:
            result.refused.append(f"{each}: relative error {wrong:.1e} against float64, over {CORRECT:.0e}")
            del decoders[each]

    states = {each: {p: reserved(s) for p, s in read(decoders[each], positions).items()} for each in decoders}
    seconds = _step_seconds(decoders, states, rounds)
    for (each, position), times in seconds.items():
        size = states[each][position].nbytes()
        result.rows.append({"model": each, "position": position, **milliseconds(times), "state_bytes": size})
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


@torch.inference_mode()
def _step_seconds(
    decoders: Mapping[str, Decoder], states: Mapping[str, Mapping[int, DecoderState]], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds per token, by model and position: for every round the median of STEPS single tokens.

    Each turn starts where reading stopped, so a position stays what it is called however many rounds there are.
    """

    def turn(name: str, position: int) -> float:
        return _turn(decoders[name], rewound(states[name][position]))

    keys = [(name, position) for name in states for position in states[name]]
    return _in_turns({key: partial(turn, *key) for key in keys}, rounds)


def _in_turns(calls: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """What every call says it took, in every round."""
    keys = list(calls)
    seconds: dict[K, list[float]] = {key: [] for key in keys}
    for turn in range(rounds):
        # In another order every time, so that none always follows one that has swept the processor's cache.
        for place in torch.randperm(len(keys), generator=generator(turn, "order")).tolist():
            seconds[keys[place]].append(calls[keys[place]]())
    return seconds


@torch.inference_mode()
def _turn(decoder: Decoder, state: DecoderState) -> float:
    """Median seconds of STEPS single tokens, each drawn from the logits before it."""
    following = torch.zeros(1, 1, dtype=torch.int64, device=decoder.device)
    spent = []
    for _ in range(1 + STEPS):
        synchronize(decoder.device)
        began = time.perf_counter()
        logits, state = decoder(following, state)
        following = logits[:, -1:].argmax(-1)
        synchronize(decoder.device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def reserved(state: DecoderState) -> DecoderState:
    """A copy whose growing memories have buffers of their own with room for the tokens of one turn and no more."""

    def reserve(memory: Tensors) -> Tensors:
        if not isinstance(memory, History.State):
            return memory
        kept = History.compact(memory)
        k, v = (F.pad(leaf, (0, 0, 0, 0, 0, 1 + STEPS)) for leaf in (kept.k, kept.v))
        return kept._replace(k=k, v=v)

    return _each_memory(state, reserve)


def rewound(state: DecoderState) -> DecoderState:
    """The same state as if nothing had been written behind it, so that the next token is appended in place."""

    def rewind(memory: Tensors) -> Tensors:
        return memory._replace(filled=memory.length.clone()) if isinstance(memory, History.State) else memory

    return _each_memory(state, rewind)


def _each_memory(state: DecoderState, change: Callable[[Tensors], Tensors]) -> DecoderState:
    blocks: list[MixerState] = [{name: change(memory) for name, memory in block.items()} for block in state.blocks]
    return DecoderState(tuple(blocks), state.positions)


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
