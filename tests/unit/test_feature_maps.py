"""Feature maps against their definitions, channel by channel, and what linear attention asks of them."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from isotach.nn.feature_maps import (
    POSITIVE,
    T2R,
    Features,
    Fixation,
    Hedgehog,
    Positive,
    Signed,
    elu1,
    feature_map,
    undecayed,
)
from isotach.nn.mixer import initialize
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from isotach.rng import generator

HEADS, WIDTH = 2, 4
NAMES = (*get_args(Positive), *get_args(Signed))


def drawn(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(0, name))


def built(name: Features) -> nn.Module:
    """The map as a model begins with it, in float64."""
    module = nn.ModuleDict()
    found = feature_map(name, heads=HEADS, width=WIDTH)
    if isinstance(found, nn.Module):
        module["map"] = found.double()
        initialize(module, partial(generator, 0), 0.02)
    return found


def defined(name: str, x: list[float]) -> list[float]:
    """φ of one head's channels in plain Python; learned maps with W the identity and b = 0, as they begin."""

    def softmax(values: list[float]) -> list[float]:
        total = sum(map(math.exp, values))
        return [math.exp(value) / total for value in values]

    positive, negative = [max(c, 0.0) for c in x], [max(-c, 0.0) for c in x]
    both = positive + negative
    return {
        "identity": x,
        "relu": positive,
        "relu_plus": [c + 1 / math.sqrt(len(x)) for c in positive],
        "elu": [c if c > 0 else math.exp(c) - 1 for c in x],
        "elu1": [c + 1 if c > 0 else math.exp(c) for c in x],
        "silu": [c / (1 + math.exp(-c)) for c in x],
        "softmax": softmax(x),
        "dpfp": [both[i] * both[i - j] for j in (1, 2, 3) for i in range(len(both))],
        "t2r": positive,
        "hedgehog": softmax(x) + softmax([-c for c in x]),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_as_defined(name: Features) -> None:
    x = drawn("x", 2, 3, HEADS, WIDTH)
    got = built(name)(x)
    expected = torch.tensor([defined(name, row) for row in x.flatten(0, 2).tolist()], dtype=torch.float64)
    torch.testing.assert_close(got.flatten(0, 2), expected, rtol=1e-12, atol=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=WIDTH, max_size=WIDTH))
def test_positive_maps_are_positive(channels: list[float]) -> None:
    x = torch.tensor(channels, dtype=torch.float64).expand(1, 1, HEADS, WIDTH)
    for name in POSITIVE:
        features = built(name)(x)  # type: ignore[arg-type]
        assert bool((features >= 0).all()), name
        assert bool(features.isfinite().all()), name


@pytest.mark.parametrize("name", get_args(Signed))
def test_signed_maps_are_not(name: Features) -> None:
    assert bool((built(name)(drawn("x", 1, 9, HEADS, WIDTH)) < 0).any())


def test_elu1_does_not_round_to_zero() -> None:
    x = torch.tensor([-20.0, -80.0])
    assert bool((elu1(x) > 0).all())
    assert bool((torch.nn.functional.elu(x) + 1 == 0).all())


def test_every_name_is_positive_or_signed() -> None:
    assert set(NAMES) == {name for part in get_args(Features) for name in get_args(part) or (part,)}
    assert set(POSITIVE).isdisjoint(get_args(Signed))


@pytest.mark.parametrize("kind", [T2R, Hedgehog])
def test_learned_maps_keep_heads_apart(kind: type[nn.Module]) -> None:
    learned = kind(HEADS, WIDTH).double()
    for parameter in learned.parameters():
        nn.init.normal_(parameter, generator=generator(0, "weights"))
    x = drawn("x", 1, 5, HEADS, WIDTH)
    logits = torch.stack([x[:, :, h] @ learned.weight[h] for h in range(HEADS)], 2)
    if isinstance(learned, T2R):
        expected = torch.relu(logits + learned.bias)
    else:
        expected = torch.cat([logits.softmax(-1), (-logits).softmax(-1)], -1)
    torch.testing.assert_close(learned(x), expected)


def test_fixation_weighs_the_channels_of_q_and_k_alike() -> None:
    fixation = Fixation(WIDTH).double()
    for parameter in fixation.parameters():
        nn.init.normal_(parameter, generator=generator(0, "gate"))
    q, k, v = (drawn(name, 1, 5, HEADS, WIDTH) for name in "qkv")
    weight, bias = fixation.gate.weight, fixation.gate.bias
    gate = torch.sigmoid(q @ weight[:, :4].T + k @ weight[:, 4:8].T + v @ weight[:, 8:].T + bias)
    for got, expected in zip(fixation(q, k, v), (q * gate, k * gate), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_a_column_of_ones_counts_the_weights(causal: bool) -> None:
    q, k, v = (drawn(name, 2, 11, HEADS, WIDTH) for name in "qkv")
    output, _ = run(Decay(), undecayed(q, k, v, count=True), None, Span.of(2, 11), causal=causal)
    weights = torch.einsum("bthk,bshk->bhts", q, k)
    weights = weights.tril() if causal else weights
    torch.testing.assert_close(output[..., -1], weights.sum(-1).transpose(1, 2))
    torch.testing.assert_close(output[..., :-1], torch.einsum("bhts,bshv->bthv", weights, v))
