"""cosFormer: the factored form is the cosine of distances, outputs stream, and text longer than M is refused."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isotach import mixers
from isotach.errors import UserError
from isotach.nn.mixer import Place, initialize
from isotach.ops.engine import Span
from isotach.rng import generator

COSFORMER: Any = mixers.find("cosformer")
WIDTH, HEADS, TIME = 16, 2, 23


def layer(**options: Any) -> Any:
    module = COSFORMER(COSFORMER.Config(width=WIDTH, heads=HEADS, **options), Place(0, 2)).double()
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator(0, name))
    return module


def tokens(time: int = TIME) -> Tensor:
    return torch.randn(2, time, WIDTH, dtype=torch.float64, generator=generator(0, "x"))


def explicit(module: Any, x: Tensor, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs and weights (B, H, T, T) from cosines of distances."""
    q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (module.q, module.k, module.v))
    t = torch.arange(start, start + x.shape[1], dtype=torch.float64)
    near = torch.cos(math.pi * (t[:, None] - t) / (2 * length))
    weights = torch.einsum("bthk,bshk->bhts", module.map(q), module.map(k)) * near
    if module.causal:
        weights = weights.tril()
    o = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True).clamp_min(1e-6), v)
    return module.out(o.flatten(-2)), weights


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("features", ["relu", "elu1"])
@pytest.mark.parametrize("length", [TIME, 40, 65536])
def test_layer_is_its_explicit_form(length: int, features: str, causal: bool) -> None:
    module, x = layer(length=length, features=features, causal=causal), tokens()
    expected, weights = explicit(module, x, length)
    torch.testing.assert_close(module(x, None, Span.of(2, TIME))[0], expected, rtol=1e-9, atol=1e-10)
    assert bool((weights >= 0).all())


def test_only_distances_matter() -> None:
    module, x = layer(length=64), tokens()
    here, there = (module(x, None, Span.of(2, TIME, start=start))[0] for start in (0, 64 - TIME))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


def test_outputs_do_not_depend_on_what_follows() -> None:
    """With M fixed; with M the length at hand, as in the released code, they do."""
    x = tokens()
    fixed = layer(length=TIME)
    whole = fixed(x, None, Span.of(2, TIME))[0]
    torch.testing.assert_close(fixed(x[:, :11], None, Span.of(2, 11))[0], whole[:, :11], rtol=1e-9, atol=1e-10)
    moving = layer(length=11)(x[:, :11], None, Span.of(2, 11))[0]
    assert float((moving - whole[:, :11]).detach().abs().max()) > 0.01


def test_text_longer_than_m_is_refused() -> None:
    module, x = layer(length=TIME), tokens()
    state = module(x, None, Span.of(2, TIME))[1]
    with pytest.raises(UserError, match=r"positions below length = 23, got 23; read less, or train with a larger"):
        module(x[:, :1], state, Span.of(2, 1, start=TIME))
    packed = Span.packed(torch.tensor([0, TIME, 2 * TIME]))
    module(x.reshape(1, 2 * TIME, WIDTH), None, packed)  # each document is short enough


def test_tokens_without_any_weight_give_zero() -> None:
    """relu(q) = 0 leaves nothing to divide; the output is the bias, and gradients are finite."""
    module = layer()
    nn.init.zeros_(module.q.weight)
    nn.init.constant_(module.q.bias, -1.0)
    x = tokens().requires_grad_()
    y = module(x, None, Span.of(2, TIME))[0]
    assert torch.equal(y, module.out.bias.expand_as(y))
    gradient = torch.autograd.grad(y.sum(), x)[0]
    assert bool(gradient.isfinite().all())


def test_weights_begin_as_released() -> None:
    module = COSFORMER(COSFORMER.Config(width=64, heads=2), Place(0, 1))
    initialize(nn.ModuleDict({"mixer": module}), partial(generator, 0), 0.02)
    for parameter in module.parameters():
        assert 0.9 / 8 < float(parameter.detach().abs().max()) <= 1 / 8
