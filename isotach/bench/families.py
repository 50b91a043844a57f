"""Every family's operator beside the best that runs on a CPU today, forward and forward + backward.

Rivals get the layout they ask for and contiguous inputs. They are called where they are installed: the fallbacks of
transformers, unwrapped from what would replace them by GPU kernels; a token loop and a grouped convolution need
nothing. Two rows are held against our own decay family, of which they are special or nested forms.
"""

import inspect
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.bench.ops import CORRECT, Contender, Shape, error, slopes
from isotach.bench.report import Figure, Result, interleave, milliseconds, paired, synchronize
from isotach.ops.decay import Decay
from isotach.ops.delta import Delta
from isotach.ops.elementwise import Elementwise
from isotach.ops.engine import Span, run
from isotach.ops.higher_order import SecondOrder, Tokens
from isotach.ops.recurrence import Recurrence
from isotach.ops.toeplitz import Toeplitz
from isotach.rng import generator

WIDTHS = (64, 128)
PASSES = ("forward", "forward + backward")
SMALL = Shape(heads=2, tokens=147, width=32)  # crosses chunk boundaries and ends inside a chunk
PATIENCE = 10.0  # seconds
CHANNELS = 1536  # of the Toeplitz rows: three times 512, as published


class Duel(NamedTuple):
    """Ours and a rival, the rival's name, and the bound per pass on how much faster ours is, or how much slower."""

    ours: Callable[[Shape, torch.device], Contender]
    rival: Callable[[Shape, torch.device], Contender | None]
    against: str
    faster: tuple[float | None, float | None] = (None, None)
    slower: tuple[float | None, float | None] = (None, None)


def measure(*, device: torch.device, widths: tuple[int, ...] = WIDTHS, tokens: int = 4096, rounds: int = 7) -> Result:
    """B1 H8, float32. A rival that is not installed is named in the settings; a wrong result is refused."""
    result = Result({"batch": 1, "heads": 8, "tokens": tokens, "widths": list(widths), "device": str(device)})
    absent = []
    for name, duel in DUELS.items():
        rival = duel.rival(SMALL, device)
        if rival is None:
            absent.append(duel.against)
        built = {name: duel.ours(SMALL, device)} | ({duel.against: rival} if rival is not None else {})
        wrong = {each: value for each, contender in built.items() if (value := error(contender)) > CORRECT}
        result.refused += [f"{each}: relative error {value:.1e}, over {CORRECT:.0e}" for each, value in wrong.items()]
        if wrong or rival is None:
            continue
        for width in widths:
            shape = Shape(tokens=tokens, width=width)
            _fight(result, name, duel, shape, rounds, device)
    result.settings["absent"] = absent
    return result


def _fight(result: Result, name: str, duel: Duel, shape: Shape, rounds: int, device: torch.device) -> None:
    rival = duel.rival(shape, device)
    assert rival is not None
    built = {name: duel.ours(shape, device), duel.against: rival}
    with torch.no_grad():
        weights = {each: torch.randn_like(c.forward(*c.inputs)) for each, c in built.items()}
        seconds = {"forward": _timed(_calls(built), rounds, device)}
    both: dict[str, Callable[[], object]] = {each: partial(c.backward, weights[each]) for each, c in built.items()}
    seconds["forward + backward"] = _timed(both, rounds, device)
    for at, which in enumerate(PASSES):
        for each, times in seconds[which].items():
            result.rows.append({"contender": each, "width": shape.width, "pass": which, **milliseconds(times)})
        ours, theirs = seconds[which][name], seconds[which][duel.against]
        where = f"{name}, D {shape.width}, {which}"
        if duel.slower[at] is not None:
            result.figures.append(
                Figure(f"{where}, over {duel.against}", paired(ours, theirs), at_most=duel.slower[at])
            )
        else:
            ratio = paired(theirs, ours)
            result.figures.append(Figure(f"{where}, times faster than {duel.against}", ratio, at_least=duel.faster[at]))


def _timed(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """As interleave; where one turn takes longer than PATIENCE, that turn is all there is."""
    once: dict[str, list[float]] = {}
    for name, call in calls.items():
        synchronize(device)
        begin = time.perf_counter()
        kept = call()
        synchronize(device)
        once[name] = [time.perf_counter() - begin]
        del kept
    if sum(seconds for (seconds,) in once.values()) > PATIENCE:
        return once
    return interleave(calls, rounds=rounds, device=device)


def _calls(built: Mapping[str, Contender]) -> dict[str, Callable[[], object]]:
    return {name: partial(contender.forward, *contender.inputs) for name, contender in built.items()}


def _ours(rec: Recurrence, inputs: Any, span: Span) -> Contender:
    """An operator with its own definition as the exact result."""

    def attend(*leaves: Tensor, backend: str) -> Tensor:
        return run(rec, type(inputs)(*leaves), None, span, backend=backend)[0]  # type: ignore[arg-type]

    return Contender(partial(attend, backend="torch"), partial(attend, backend="reference"), tuple(inputs))


def _drawn(name: str, *shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator(0, name)).to(device).requires_grad_()


def _qkv(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    size = (shape.batch, shape.tokens, shape.heads, shape.width)
    q, k, v = (_drawn(name, *size, device=device) for name in ("q", "k", "v"))
    return q, F.normalize(k.detach(), dim=-1).requires_grad_(), v


def _gate(shape: Shape, width: int, device: torch.device, *, over: float = 16.0) -> Tensor:
    gate = _drawn("gate", shape.batch, shape.tokens, shape.heads, width, device=device)
    return (F.logsigmoid(gate.detach()) / over).requires_grad_()


def _beta(shape: Shape, device: torch.device) -> Tensor:
    return _drawn("beta", shape.batch, shape.tokens, shape.heads, 1, device=device).detach().sigmoid().requires_grad_()


def _span(shape: Shape, device: torch.device) -> Span:
    return Span.of(shape.batch, shape.tokens, device=device)


def _delta(kind: str) -> Callable[[Shape, torch.device], Contender]:
    def build(shape: Shape, device: torch.device) -> Contender:
        gate = _gate(shape, 1 if kind == "head" else shape.width, device)
        inputs = Delta.Inputs(*_qkv(shape, device), _beta(shape, device), gate)
        return _ours(Delta(), inputs, _span(shape, device))

    return build


def _delta_of_transformers(model: str, function: str) -> Callable[[Shape, torch.device], Contender | None]:
    def build(shape: Shape, device: torch.device) -> Contender | None:
        fallback = _from_transformers(model, function)
        if fallback is None:
            return None
        per_head = model == "qwen3_next"
        gate = _gate(shape, 1 if per_head else shape.width, device)

        def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
            gates = log_decay[..., 0] if per_head else log_decay
            output: Tensor = fallback(
                q, k, v, g=gates, beta=beta[..., 0], initial_state=None, output_final_state=False
            )[0]
            return output

        def exact(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
            scaled = Delta.Inputs(q * shape.width**-0.5, k, v, beta, log_decay)
            return run(Delta(), scaled, None, _span(shape, device), backend="reference")[0]

        return Contender(forward, exact, (*_qkv(shape, device), _beta(shape, device), gate))

    return build


def _ssd(shape: Shape, device: torch.device) -> Contender:
    """Mamba-2's scan: k = B and q = C shared by all heads, v = dt x, log_decay = A dt."""
    b, c, x, dt, a = _ssd_inputs(shape, device)

    def attend(b: Tensor, c: Tensor, x: Tensor, dt: Tensor, *, backend: str) -> Tensor:
        heads = (-1, -1, shape.heads, -1)
        inputs = Decay.Inputs(c.expand(heads), b.expand(heads), x * dt, a.to(dt.dtype)[:, None] * dt)
        return run(Decay(), inputs, None, _span(shape, device), backend=backend)[0]  # type: ignore[arg-type]

    return Contender(partial(attend, backend="torch"), partial(attend, backend="reference"), (b, c, x, dt))


def _ssd_of_transformers(shape: Shape, device: torch.device) -> Contender | None:
    fallback = _from_transformers("mamba2", "mamba2_chunk_scan")
    if fallback is None:
        return None
    b, c, x, dt, a = _ssd_inputs(shape, device)

    def forward(b: Tensor, c: Tensor, x: Tensor, dt: Tensor) -> Tensor:
        output: Tensor = fallback(x, dt[..., 0], a, b, c, chunk_size=256)
        return output[:, : shape.tokens]

    return Contender(forward, _ssd(shape, device).exact, (b, c, x, dt))


def _ssd_inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, width, _ = shape
    b, c = (_drawn(name, batch, tokens, 1, width, device=device) for name in ("B", "C"))
    x = _drawn("x", batch, tokens, heads, width, device=device)
    dt = F.softplus(_drawn("dt", batch, tokens, heads, 1, device=device).detach() - 4).requires_grad_()
    return b, c, x, dt, -torch.arange(1, heads + 1, device=device, dtype=torch.float32)


def _decay(kind: str) -> Callable[[Shape, torch.device], Contender]:
    """Fixed per head; per token and channel, mild as in GLA, or so strong that 16 tokens lose more than e^60."""

    def build(shape: Shape, device: torch.device) -> Contender:
        if kind == "head":
            gate = -slopes(shape.heads, device).view(1, 1, shape.heads, 1)
        else:
            gate = _gate(shape, shape.width, device, over=16.0 if kind == "mild" else 0.1)
        return _ours(Decay(), Decay.Inputs(*_qkv(shape, device), gate), _span(shape, device))

    return build


def _elementwise(shape: Shape, device: torch.device) -> Contender:
    return _ours(Elementwise(), _elementwise_inputs(shape, device), _span(shape, device))


def _token_loop(shape: Shape, device: torch.device) -> Contender:
    def forward(v: Tensor, log_decay: Tensor) -> Tensor:
        fade, inputs = log_decay.exp().unbind(1), v.unbind(1)
        state, states = torch.zeros_like(inputs[0]), []
        for f, x in zip(fade, inputs, strict=True):
            state = torch.addcmul(x, f, state)
            states.append(state)
        return torch.stack(states, 1)

    return Contender(forward, _elementwise(shape, device).exact, tuple(_elementwise_inputs(shape, device)))


def _elementwise_inputs(shape: Shape, device: torch.device) -> Elementwise.Inputs:
    v = _drawn("v", shape.batch, shape.tokens, shape.heads, shape.width, device=device)
    return Elementwise.Inputs(v, _gate(shape, shape.width, device, over=1.0))


def _second_order(shape: Shape, device: torch.device) -> Contender:
    q, k, v = _qkv(shape, device)
    decay = -slopes(shape.heads, device).view(1, 1, shape.heads, 1)
    return _ours(
        SecondOrder(), Tokens(F.normalize(q.detach(), dim=-1).requires_grad_(), k, v, decay), _span(shape, device)
    )


def _toeplitz(shape: Shape, device: torch.device) -> Contender:
    return _ours(Toeplitz(), _toeplitz_inputs(shape, device), _span(shape, device))


def _convolution(shape: Shape, device: torch.device) -> Contender:
    """The same causal filter as a grouped convolution."""

    def forward(v: Tensor, kernel: Tensor) -> Tensor:
        taps = kernel.flatten(1).t().unsqueeze(1)
        padded = F.pad(v.flatten(2).transpose(1, 2), (len(kernel) - 1, 0))
        return F.conv1d(padded, taps, groups=len(taps)).transpose(1, 2).view(v.shape)

    return Contender(forward, _toeplitz(shape, device).exact, tuple(_toeplitz_inputs(shape, device)))


def _toeplitz_inputs(shape: Shape, device: torch.device) -> Toeplitz.Inputs:
    channels = CHANNELS if shape.tokens > SMALL.tokens else 2 * shape.width
    v = _drawn("v", shape.batch, shape.tokens, 1, channels, device=device)
    lags = torch.arange(shape.tokens, device=device).flip(0)[:, None, None]
    kernel = _drawn("kernel", shape.tokens, 1, channels, device=device).detach() * 0.99**lags
    return Toeplitz.Inputs(v, kernel.requires_grad_())


def _from_transformers(model: str, function: str) -> Callable[..., Any] | None:
    """The pure PyTorch fallback, or None where transformers is not installed."""
    try:
        module = import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        return None
    fallback: Callable[..., Any] = inspect.unwrap(getattr(module, function))
    return fallback


_GDN = _delta_of_transformers("qwen3_next", "torch_chunk_gated_delta_rule")
_KDA = _delta_of_transformers("kimi_linear", "chunk_kimi_delta_attention")
DUELS = {
    "gated delta": Duel(_delta("head"), _GDN, "transformers' Qwen3-Next", faster=(2.0, 3.0)),
    "KDA": Duel(_delta("channel"), _KDA, "transformers' Kimi Linear", faster=(2.0, 3.0)),
    "mamba2": Duel(_ssd, _ssd_of_transformers, "transformers' Mamba-2", faster=(2.0, None)),
    "GLA, mild": Duel(_decay("mild"), _decay("head"), "fixed decay", slower=(3.0, 3.0)),
    "GLA, strong": Duel(_decay("strong"), _decay("head"), "fixed decay", slower=(8.0, 8.0)),
    "HGRN": Duel(_elementwise, _token_loop, "a token loop", faster=(3.0, 3.0)),
    "HLA, second order": Duel(_second_order, _decay("head"), "fixed decay", slower=(4.0, 4.0)),
    "TNN": Duel(_toeplitz, _convolution, "a grouped convolution", faster=(15.0, None)),
}
