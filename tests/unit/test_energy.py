"""Energy gating against its definition with explicit weights, and what each kind of statistics may see."""

import pytest
import torch
from torch import Tensor

from isotach.mixers.lightning import Lightning
from isotach.mixers.softmax import Softmax
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.energy import EnergyConfig, EnergyGate
from isotach.nn.mixer import Place, Scan, initialize
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from isotach.ops.history import History
from isotach.rng import generator
from isotach.testing import laws
from isotach.testing.subjects import Layer

B, T, H, K, V, D = 2, 13, 2, 4, 3, 8


def drawn(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(0, name), dtype=torch.float64)


def gate(statistics: str) -> EnergyGate:
    module = EnergyGate(D, H, EnergyConfig(statistics=statistics)).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(drawn(name, *parameter.shape) if name != "energy.weight" else 0.0)
        module.energy.weight.copy_(drawn("w", H, D))
        module.energy.bias.copy_(drawn("b", H))
    return module


def salience(module: EnergyGate, x: Tensor, statistics: str) -> Tensor:
    """g (B, T, H) by the definition, token by token."""
    energy = x @ module.energy.weight.T + module.energy.bias
    z = torch.zeros_like(energy)
    for t in range(T):
        seen = energy[:, : t + 1] if statistics == "prefix" else energy
        spread = ((seen - seen.mean(1, keepdim=True)) ** 2).mean(1) + 1e-6
        z[:, t] = (energy[:, t] - seen.mean(1)) / spread.sqrt()
    return torch.sigmoid(module.sharpness * (z - module.threshold))


@pytest.mark.parametrize("statistics", ["prefix", "published"])
def test_softmax_weights_are_gated_and_renormalised(statistics: str) -> None:
    q, k, v, x = drawn("q", B, T, H, K), drawn("k", B, T, H, K), drawn("v", B, T, H, V), drawn("x", B, T, D)
    module = gate(statistics)
    gated = module(History(), History.Inputs(q, k, v), x, Scan(None, Span.of(B, T)))
    got, _ = run(History(), gated, None, Span.of(B, T))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = (torch.einsum("bthk,bshk->bhts", q, k) / K**0.5).masked_fill(future, -torch.inf).softmax(-1)
    weights = weights * salience(module, x, statistics).transpose(1, 2)[:, :, None]
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(got, torch.einsum("bhts,bshv->bthv", weights, v))


def test_linear_attention_writes_gated_keys() -> None:
    k, x = drawn("k", B, T, H, K), drawn("x", B, T, D)
    module = gate("prefix")
    inputs = Decay.Inputs(k, k, k, torch.zeros(B, 1, H, 1, dtype=torch.float64))
    gated = module(Decay(), inputs, x, Scan(None, Span.of(B, T)))
    torch.testing.assert_close(gated.k, k * salience(module, x, "prefix").unsqueeze(-1))
    assert gated.q is k


@pytest.mark.parametrize(("statistics", "leaks"), [("prefix", False), ("published", True)])
def test_only_the_published_statistics_look_ahead(statistics: str, leaks: bool) -> None:
    config = Softmax.Config(width=16, heads=2, energy={"statistics": statistics})
    layer = Softmax.build(config, Place(0, 1)).double()
    initialize(layer, lambda name: generator(0, name), 0.3)
    x = drawn("x", 1, T, 16).requires_grad_()
    y, _ = layer(x, None, Span.of(1, T))
    (grad,) = torch.autograd.grad(y[0, 3].sum(), x)
    assert bool((grad[0, 4:] != 0).any()) == leaks


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 8, 9])
@pytest.mark.parametrize("name", ["softmax", "lightning"])
def test_laws_hold_with_prefix_statistics(name: str, number: int) -> None:
    (law,) = (law for law in laws.LAWS if law.number == number)
    subject = Layer(name, {"energy": {}})
    subject.variants = ("middle",)
    verdict = laws.judge(law, subject)
    assert verdict.cases, "the law concerns it"
    assert verdict.holds, f"{verdict.worst}: {verdict.error:.2e}"


def test_it_adds_the_published_number_of_parameters() -> None:
    """Six layers of eight heads at width 256: 12,480 with the four numbers per head of the release, ours has three
    (the weight of a single scale is constant)."""

    def count(**options: object) -> int:
        table = {"vocab": 65, "width": 256, "depth": 6, "heads": 8, "hidden": 256, "pattern": ["softmax"]}
        return Decoder(ModelConfig.model_validate({**table, "softmax": options})).parameter_count()

    assert count(energy={}) - count() == 12_480 - 6 * 8


def test_a_mixer_without_keys_is_refused() -> None:
    table = {
        "vocab": 11,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "hidden": 16,
        "pattern": ["hgrn"],
        "hgrn": {"energy": {}},
    }
    with pytest.raises(ValueError, match="hgrn: energy gating weighs keys"):
        Decoder(ModelConfig.model_validate(table))


def test_lightning_takes_it_too() -> None:
    layer = Lightning.build(Lightning.Config(width=16, heads=2, energy={}), Place(0, 1))
    assert layer.energy is not None
