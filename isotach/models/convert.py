"""A model whose tnn layers have a constant state, and how far it is from the model it was made of.

etsc       kernels become sums of rotations (mixers/etsc.py), exact for n lags; behind them they repeat themselves
published  the same with one lag more, which makes the values sum to zero
ring       tnn layers keep the last n inputs; behind them the kernel is zero
"""

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotach import config as configuration
from isotach.errors import UserError
from isotach.mixers.etsc import ConvertedTNN
from isotach.mixers.tnn import TNN
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.mixer import Scan
from isotach.ops.engine import Span, run
from isotach.ops.etsc import weights
from isotach.ops.recurrence import family

Form = Literal["etsc", "published", "ring"]

STEPS = 30  # tokens that are timed
HEAD = 256  # positions whose logits are held at a time


class Error(NamedTuple):
    """Of a stretch of a kernel: the largest absolute difference; and the norm of all, over the whole kernel's norm."""

    largest: float
    relative: float


class Cost(NamedTuple):
    """Of one layer and sequence: bytes of state, and seconds in which one more token is mixed, projections left out."""

    state_bytes: int
    seconds: float


def converted(decoder: Decoder, form: Form, *, lags: int) -> Decoder:
    """`decoder` with all tnn layers in this form, exact for so many lags.

    UserError where it has no tnn layer, one that looks ahead, or etsc layers already.
    """
    layers = tnn_layers(decoder)
    table = decoder.config.model_dump(mode="json", exclude_none=True)
    values = decoder.state_dict()
    if form == "ring":
        table["tnn"]["window"] = min(lags, table["tnn"].get("window", lags))
    else:
        options = table.pop("tnn")
        period = lags + 1 if form == "published" else lags
        table["etsc"] = {"expand": options["expand"], "decay": options["decay"], "period": period}
        table["pattern"] = ["etsc" if name == "tnn" else name for name in table["pattern"]]
        for i, layer in layers.items():
            prefix = f"blocks.{i}.mixer."
            for name in layer.state_dict():
                if not name.startswith("gtu."):
                    del values[prefix + name]
            values |= {prefix + name: value for name, value in _rotations(layer, lags, period).items()}
    model = Decoder(configuration.parse(ModelConfig, table, who="convert"))
    model.load_state_dict(values)
    return model.to(decoder.device)


def tnn_layers(decoder: Decoder) -> dict[int, TNN]:
    """The layers that can be converted, by number."""
    found = {i: block.mixer for i, block in enumerate(decoder.blocks) if isinstance(block.mixer, TNN)}
    if not found or "etsc" in decoder.config.pattern:
        pattern = ", ".join(decoder.config.pattern)
        raise UserError(
            f"convert: expected tnn layers and no etsc layers, got pattern {pattern}; start from a trained tnn"
        )
    if not all(layer.causal for layer in found.values()):
        raise UserError("convert: expected tnn.two_sided = false, got true; layers that look ahead have no state")
    return found


@torch.no_grad()
def kernel_errors(layer: TNN, other: TNN | ConvertedTNN, *, lags: int, reach: int) -> tuple[Error, Error]:
    """How far another form's kernel is from the layer's at lags 0..lags-1, as its recurrence answers step by step, and
    at lags..reach-1.
    """
    truth = _in_float64(layer).kernel(reach).flip(0).flatten(1)
    truth[layer.recurrence.window or reach :] = 0
    norm = float(truth.norm())
    near, far = _impulse_response(other, lags) - truth[:lags], -truth[lags:]
    if isinstance(other, ConvertedTNN):
        far = far + other.recurrence.kernel(_inputs(other, 1), reach).flatten(1)[lags:]
    return _error(near, norm), _error(far, norm)


@torch.no_grad()
def log_probability_differences(
    model: Decoder, others: Sequence[Decoder], tokens: Int[Tensor, "1 T"]
) -> Float[Tensor, "others T"]:
    """The largest difference of each other model's log-probabilities from the model's after every token, in nats."""
    parts = []
    for hidden in zip(*(each.hidden(tokens)[0].split(HEAD, 1) for each in (model, *others)), strict=True):
        truth, *rest = (each.head(x).log_softmax(-1) for each, x in zip((model, *others), hidden, strict=True))
        parts.append(torch.cat([(each - truth).abs().amax(-1) for each in rest]))
    return torch.cat(parts, 1)


@torch.inference_mode()
def costs(layers: Sequence[TNN | ConvertedTNN], tokens: Sequence[int]) -> list[Cost]:
    """What each layer costs after so many tokens. They are timed in turn, and the median of STEPS rounds counts."""
    states = []
    for layer, count in zip(layers, tokens, strict=True):
        states.append(run(layer.recurrence, _inputs(layer, count), None, Span.of(1, count))[1])
    seconds: list[list[float]] = [[] for _ in layers]
    for i in range(STEPS):
        for n, (layer, count) in enumerate(zip(layers, tokens, strict=True)):
            inputs, span = _inputs(layer, 1, states[n]), Span.of(1, 1, start=count + i)
            begin = time.perf_counter()
            _, states[n] = run(layer.recurrence, inputs, states[n], span)
            seconds[n].append(time.perf_counter() - begin)
    return [Cost(_bytes(state), statistics.median(own)) for state, own in zip(states, seconds, strict=True)]


def _bytes(state: Any) -> int:
    return sum(leaf.nbytes for leaf in family(state).compact(state) if leaf.is_floating_point())


@torch.no_grad()
def _rotations(layer: TNN, lags: int, period: int) -> dict[str, Tensor]:
    """What a converted layer has instead of a network of distances; solved for in float64."""
    exact = _in_float64(layer)
    kernel = exact.rpe(torch.arange(lags, device=exact.gtu.out.weight.device))
    kernel[layer.recurrence.window or lags :] = 0
    if period > lags:
        kernel = torch.cat([kernel, -kernel.sum(0, keepdim=True)])
    real, imag = weights(exact.split(kernel))
    values = {"real": real.flatten(1), "imag": imag.flatten(1), "log_gamma": exact.log_gamma()}
    return {name: value.to(layer.gtu.out.weight.dtype) for name, value in values.items()}


def _in_float64(layer: TNN) -> TNN:
    return copy.deepcopy(layer).double()


def _inputs(layer: TNN | ConvertedTNN, tokens: int, state: Any = None) -> Any:
    """What the layer gives its recurrence for so many random tokens after `state`."""
    weight = layer.gtu.v.weight
    x = torch.randn(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    before = None if state is None else {"main": state}
    return layer.project(x, Scan(before, Span.of(1, tokens, device=weight.device)))[0]


def _impulse_response(layer: TNN | ConvertedTNN, lags: int) -> Float[Tensor, "L C"]:
    """What the layer's recurrence answers to a one and then zeros."""
    state, outputs = None, []
    for lag in range(lags):
        inputs = _inputs(layer, 1, state)
        inputs = inputs._replace(v=torch.full_like(inputs.v, float(lag == 0)))
        output, state = run(layer.recurrence, inputs, state, Span.of(1, 1, start=lag, device=inputs.v.device))
        outputs.append(output[0, 0].flatten())
    return torch.stack(outputs)


def _error(difference: Tensor, norm: float) -> Error:
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return Error(largest, float(difference.norm()) / norm)
