"""What a mixer owes whose tokens have no order, in place of the laws about order.

    order    tokens in reverse, each with its position: the same outputs in reverse, and the same memory
    oracle   the output of every token is what a causal reading gives it where it comes last

The second ties the set to the recurrence: the causal layer it is compared with is the same weights, read as laws 1 and
2 describe.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isotach.ops.engine import Span
from isotach.testing.laws import Case, error
from isotach.testing.subjects import SIZES, Hidden, Layer

TIME = 9


def order(layer: Layer) -> Iterator[Case]:
    """Tokens in reverse, each with its position."""
    for variant in layer.variants:
        x, past, positions = _example(layer, variant)
        output, state = layer.run(variant, Hidden(x), past, Span(positions))
        again, after = layer.run(variant, Hidden(x.flip(1)), past, Span(positions.flip(1)))
        yield f"{variant} outputs", error([again], [output.flip(1)])
        # Memories may hold the tokens in the order they came: what is read from them must agree.
        yield f"{variant} memory", error([_next(layer, variant, after)], [_next(layer, variant, state)])


def oracle(layer: Layer) -> Iterator[Case]:
    """Every token in turn as the last one of a causal reading."""
    for variant in layer.variants:
        x, past, positions = _example(layer, variant)
        output, _ = layer.run(variant, Hidden(x), past, Span(positions))
        causal: Any = copy.copy(layer.module(variant, x.dtype))
        causal.causal = True
        for t in range(TIME):
            last = torch.tensor([*range(t), *range(t + 1, TIME), t])
            read, _ = causal(x[:, last], past, Span(positions[:, last]))
            yield f"{variant} token {t}", error([read[:, -1]], [output[:, t]])


def _example(layer: Layer, variant: str) -> tuple[Tensor, Any, Tensor]:
    """Tokens, a past of three others, and positions."""
    x = layer.example(variant, SIZES | {"T": TIME}, torch.float64).x
    return x, layer.past(variant, SIZES["B"], torch.float64), Span.of(SIZES["B"], TIME, start=3).positions


def _next(layer: Layer, variant: str, state: Any) -> Tensor:
    """What one more token reads."""
    x = layer.example(variant, SIZES | {"T": 1}, torch.float64)
    return layer.run(variant, x, state, Span.of(SIZES["B"], 1, start=3 + TIME))[0]
