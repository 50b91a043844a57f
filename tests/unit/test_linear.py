"""Linear attention against its explicit T × T form, for every feature map and normaliser."""

from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from isotach import mixers
from isotach.config import parse
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.feature_maps import POSITIVE, Signed
from isotach.nn.mixer import Mixer, Place, initialize
from isotach.ops.engine import Span
from isotach.rng import generator

LINEAR: Any = mixers.find("linear")
WIDTH, HEADS, TIME = 16, 2, 21


def layer(**options: Any) -> Any:
    """A layer in float64 with all its parameters random."""
    module = LINEAR(LINEAR.Config(width=WIDTH, heads=HEADS, **options), Place(0, 2)).double()
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator(0, name))
    return module


def tokens(time: int = TIME) -> Tensor:
    return torch.randn(2, time, WIDTH, dtype=torch.float64, generator=generator(0, "x"))


def explicit(module: Any, x: Tensor) -> Tensor:
    """Every weight of every token for every token; the feature maps themselves are tested elsewhere."""
    q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (module.q, module.k, module.v))
    q, k = module.map_q(q), module.map_k(k)
    if module.fixation is not None:
        q, k = module.fixation(q, k, v)
    weights = torch.einsum("bthk,bshk->bhts", q, k)
    if module.causal:
        weights = weights.tril()
    if module.sums:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    if module.norm is not None:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight
    return o.flatten(-2) @ module.out.weight.T


CHOICES = [("sum", features) for features in POSITIVE]
CHOICES += [(normaliser, features) for normaliser in ("norm", "none") for features in (*POSITIVE, *get_args(Signed))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("normaliser", "features"), CHOICES)
def test_layer_is_its_explicit_form(normaliser: str, features: str, causal: bool) -> None:
    module = layer(features=features, normaliser=normaliser, causal=causal)
    x = tokens()
    torch.testing.assert_close(module(x, None, Span.of(2, TIME))[0], explicit(module, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_feature_fixation_is_the_linear_video_transformers_attention(causal: bool) -> None:
    module = layer(features="relu_plus", fixation=True, causal=causal)
    x = tokens()
    torch.testing.assert_close(module(x, None, Span.of(2, TIME))[0], explicit(module, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("features", POSITIVE)
def test_the_sum_makes_a_weighted_mean(features: str) -> None:
    """Every output lies between the values read, or between them and 0 where the 1e-6 off zero tells."""
    module, x = layer(features=features), tokens()
    module.out.weight.data = torch.eye(WIDTH, dtype=torch.float64)
    values, y = module.v(x), module(x, None, Span.of(2, TIME))[0]
    assert bool((y <= values.cummax(1).values.clamp_min(0) + 1e-12).all())
    assert bool((y >= values.cummin(1).values.clamp_max(0) - 1e-12).all())


@pytest.mark.parametrize("features", get_args(Signed))
def test_signed_features_are_not_divided_by_their_sum(features: str) -> None:
    table = {"vocab": 9, "width": 16, "depth": 1, "heads": 2, "hidden": 8, "pattern": ["linear"]}
    with pytest.raises(UserError, match=f'linear: features = "{features}" has both signs.* normaliser = "norm"'):
        parse(ModelConfig, table | {"linear": {"features": features}}, who="recipe.toml")
    parse(ModelConfig, table | {"linear": {"features": features, "normaliser": "norm"}}, who="recipe.toml")


@pytest.mark.parametrize("features", ["hedgehog", "t2r"])
def test_a_model_with_learned_maps_is_drawn_from_its_seed(features: str) -> None:
    table = {"vocab": 9, "width": 16, "depth": 2, "heads": 2, "hidden": 8, "pattern": ["linear"]}
    config = parse(ModelConfig, table | {"linear": {"features": features}}, who="test")
    first, second = Decoder(config, seed=3), Decoder(config, seed=3)
    assert first.fingerprint() == second.fingerprint()
    assert all(bool(parameter.isfinite().all()) for parameter in first.parameters())
    weight = first.get_parameter("blocks.0.mixer.map_q.weight")
    assert torch.equal(weight, torch.eye(8).expand(2, 8, 8))


def test_the_normed_output_does_not_grow_and_the_plain_one_does() -> None:
    """Without sum or norm, outputs grow with the tokens read."""
    grown = {}
    for normaliser in ("sum", "norm", "none"):
        module: Mixer = layer(normaliser=normaliser)
        y = module(tokens(400), None, Span.of(2, 400))[0].detach().abs()
        grown[normaliser] = float(y[:, -20:].mean() / y[:, :20].mean())
    assert grown["sum"] < 2 > grown["norm"]
    assert grown["none"] > 8


def test_biases_are_absent_and_the_gate_of_fixation_begins_at_one_half() -> None:
    module = LINEAR(LINEAR.Config(width=WIDTH, heads=HEADS, features="relu_plus", fixation=True), Place(0, 1))
    initialize(torch.nn.ModuleDict({"mixer": module}), partial(generator, 0), 0.02)
    assert {name for name, _ in module.named_parameters() if name.endswith("bias")} == {"fixation.gate.bias"}
    assert not module.fixation.gate.bias.any()
