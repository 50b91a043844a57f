"""The mixer hla in all its options: one layer in every form, weights that are a mean, magnitudes that stay sane."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from isotach.config import parse
from isotach.errors import UserError
from isotach.mixers.hla import EPS, HLA
from isotach.nn.mixer import Place, Scan
from isotach.ops.engine import Span, run
from isotach.rng import generator

ORDERS = ("second", "asymmetric", "third")
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

every_order = pytest.mark.parametrize("order", ORDERS)


def layer(
    *, width: int = 16, heads: int = 2, std: float = 0.3, dtype: torch.dtype = torch.float64, **options: Any
) -> HLA:
    mixer = HLA(HLA.Config(width=width, heads=heads, **options), Place(0, 1)).to(dtype)
    mixer.initialize(partial(generator, 0), std)
    return mixer


def hidden(time: int, *, batch: int = 2, width: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, time, width, generator=generator(0, "hidden"), dtype=dtype)


@every_order
@pytest.mark.parametrize("decay", ["retnet", "none"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
@torch.no_grad()
def test_whole_stepped_and_packed_agree(order: str, decay: str, gate: bool, normalise: bool) -> None:
    mixer, x = layer(order=order, decay=decay, gate=gate, normalise=normalise), hidden(21)
    expected, end = mixer(x, None, Span.of(2, 21))
    state, steps = None, []
    for t in range(21):
        y, state = mixer(x[:, t : t + 1], state, Span.of(2, 1, start=t))
        steps.append(y)
    close(torch.cat(steps, 1), expected)
    packed, ends = mixer(x.flatten(0, 1)[None], None, Span.packed(torch.tensor([0, 21, 42])))
    close(packed[0], expected.flatten(0, 1))
    assert state is not None
    for leaves in zip(end["main"], state["main"], ends["main"], strict=True):
        close(leaves[1], leaves[0])
        close(leaves[2], leaves[0])


@every_order
@torch.no_grad()
def test_normalised_outputs_are_means_of_past_values(order: str) -> None:
    mixer = layer(order=order, normalise=True)
    x, span = hidden(40), Span.of(2, 40)
    inputs, _ = mixer.project(x, Scan(None, span))
    o, _ = run(mixer.recurrence, inputs, None, span)
    values, mean = inputs.v[..., :-1], o[..., :-1] / o[..., -1:]
    assert bool((o[..., -1] > 100 * EPS).all())
    assert bool((mean <= values.cummax(1).values + 1e-12).all())
    assert bool((mean >= values.cummin(1).values - 1e-12).all())


def test_rates_are_those_of_retnet_or_none() -> None:
    rates = layer(heads=4).log_decay
    assert rates.tolist() == pytest.approx([math.log1p(-(2.0 ** (-5 - h))) for h in range(4)])
    assert not layer(decay="none").log_decay.any()


@every_order
@pytest.mark.parametrize("decay", ["retnet", "none"])
@torch.no_grad()
def test_long_texts_neither_overflow_nor_fade_away(order: str, decay: str) -> None:
    mixer = layer(width=64, std=0.02, order=order, decay=decay, dtype=torch.float32)
    x = hidden(4096, batch=1, width=64, dtype=torch.float32)
    y, _ = mixer(x, None, Span.of(1, 4096))
    exact, _ = mixer.double()(x.double(), None, Span.of(1, 4096))
    assert float((y - exact).norm() / exact.norm()) < 1e-4
    sizes = y.square().mean(-1)[0]
    assert 0.2 < float(sizes[-100:].mean() / sizes[100:200].mean()) < 5


@every_order
@pytest.mark.parametrize("normalise", [True, False])
def test_every_parameter_learns(order: str, normalise: bool) -> None:
    mixer = layer(order=order, normalise=normalise)
    y, _ = mixer(hidden(21), None, Span.of(2, 21))
    y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(UserError, match="order"):
        parse(HLA.Config, {"width": 16, "heads": 2, "order": "fourth"}, who="model.hla")
