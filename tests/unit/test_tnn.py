"""The mixer against its equations, written out here; its kernel, and what is remembered of it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.mixers.tnn import BLOCK, TNN
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.mixer import Place, initialize
from isotach.ops.engine import Span
from isotach.rng import generator
from isotach.testing import laws
from isotach.testing.laws import Law
from isotach.testing.subjects import Layer


def built(**options: Any) -> TNN:
    """A small layer in float64, initialised from its streams."""
    layer = TNN(TNN.Config(**{"width": 8, "heads": 1} | options), Place(0, 1))
    initialize(nn.ModuleDict({"layer": layer}), lambda name: generator(0, name), 0.02)
    return layer.double()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, *map(str, shape)), dtype=torch.float64)


def affine(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return x @ layer.weight.T + layer.bias


def kernel(layer: TNN, distance: int) -> Tensor:
    """γ^|j| RPE(j), one distance at a time; its norm as released, x / (rms + 1e-8), where ours is √(rms² + 1e-16)."""
    z = affine(layer.rpe.distance, torch.tensor([float(distance)], dtype=torch.float64))
    for own in (*layer.rpe.layers, layer.rpe.out):
        z = affine(own, F.relu(z / (z.square().mean().sqrt() + 1e-8)))
    gamma: Any = layer.gamma
    if layer.rate is not None:
        gamma = gamma + (1 - gamma) * torch.sigmoid(layer.rate)
    return z * gamma ** abs(distance)


def written_out(layer: TNN, x: Tensor, *, ahead: bool = False) -> Tensor:
    u, v = F.silu(affine(layer.gtu.u, x)), F.silu(affine(layer.gtu.v, x))
    mixed = []
    for t in range(x.shape[1]):
        mixed.append(sum(kernel(layer, t - s) * v[:, s] for s in range(x.shape[1] if ahead else t + 1)))
    return affine(layer.gtu.out, u * torch.stack(mixed, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 4},
        {"decay": "learned", "gamma": 0.5},
        {"gamma": 1.0, "rpe_layers": 0},
        {"expand": 1, "rpe_width": 5},
    ],
    ids=str,
)
def test_the_layer_is_its_equations(options: dict[str, Any]) -> None:
    layer, x = built(**options), normal(2, 12, 8)
    output, _ = layer(x, None, Span.of(2, 12))
    expected = written_out(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(y.square().sum(), layer.parameters()) for y in (output, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_tokens_may_look_both_ways() -> None:
    layer, x = built(two_sided=True), normal(2, 7, 8)
    torch.testing.assert_close(
        layer(x, None, Span.of(2, 7))[0], written_out(layer, x, ahead=True), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    "law", [law for law in laws.LAWS if law.number in (1, 2, 3, 8, 9, 12)], ids=lambda law: law.number
)
def test_laws_hold_with_a_window_and_learned_decays(law: Law) -> None:
    verdict = laws.judge(law, Layer("tnn", {"window": 9, "decay": "learned"}))
    assert verdict.holds, f"{verdict.worst}: {verdict.error:.2e} > {verdict.limit:.0e}"


def test_weights_begin_as_released() -> None:
    layer = built(width=64, decay="learned")
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for parameter in module.parameters():
                assert 0.8 * bound < float(parameter.detach().abs().max()) <= bound
    assert layer.rate is not None
    assert 0.8 < float(layer.rate.detach().std()) < 1.2


@torch.no_grad()
def test_far_distances_are_alike_but_for_the_decay() -> None:
    """The first norm removes the scale; without biases all distances would be alike."""
    layer = built()
    rpe = layer.rpe(torch.tensor([1, 2, 10_000, 20_000]))
    near, far = ((rpe[i] - rpe[i + 1]).norm() / rpe[i].norm() for i in (0, 2))
    assert float(far) < 1e-3 < 1e-2 < float(near)
    nn.init.zeros_(layer.rpe.distance.bias)
    rpe = layer.rpe(torch.tensor([1, 2]))
    torch.testing.assert_close(rpe[0], rpe[1])


@torch.no_grad()
def test_the_kernel_is_remembered_as_long_as_its_weights_are_the_same() -> None:
    layer = built(decay="learned")
    first = layer.kernel(2 * BLOCK + 3)
    assert torch.equal(layer.kernel(7), first[-7:])
    assert torch.equal(built(decay="learned").kernel(5), first[-5:])  # to the bit, however many were asked for
    with torch.enable_grad():
        torch.testing.assert_close(layer.kernel(300).detach(), first[-300:], rtol=1e-12, atol=1e-14)

    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0, fused=True)  # which does not count as a change
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    second = layer.kernel(9)
    assert not torch.allclose(second, first[-9:])
    torch.testing.assert_close(second[-5], kernel(layer, 4).view(1, -1))
    layer.load_state_dict(built(decay="learned").state_dict())
    assert torch.equal(layer.kernel(9), first[-9:])
    assert layer.float().kernel(9).dtype == torch.float32
    assert layer.rate is not None
    layer.rate.data = layer.rate.data + 1
    assert not torch.allclose(layer.kernel(9).double(), first[-9:], rtol=1e-3)


@torch.no_grad()
def test_distances_are_not_rounded_to_half_precision() -> None:
    layer, x = built().float(), normal(1, 4, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer(x, None, Span.of(1, 4))
        inputs, _ = layer.project(x, _Past(state))
    assert inputs.v.dtype == torch.bfloat16
    assert inputs.kernel.dtype == torch.float32
    assert float((layer.rpe(torch.tensor([300])) - layer.rpe(torch.tensor([301]))).abs().max()) > 0


class _Past:
    """A call's scan after some state."""

    span = Span.of(1, 4, start=4)

    def __init__(self, state: Any) -> None:
        self.before = state.get


def test_float32_steps_follow_the_whole_text() -> None:
    layer, x = built(width=16).float(), normal(1, 600, 16).float()
    with torch.no_grad():
        whole, _ = layer(x, None, Span.of(1, 600))
        state, steps = None, []
        for t in range(600):
            output, state = layer(x[:, t : t + 1], state, Span.of(1, 1, start=t))
            steps.append(output)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_the_published_language_model_has_48_67_million_parameters() -> None:
    config = ModelConfig(
        vocab=50264, width=512, depth=7, heads=1, hidden=512, pattern=("tnn",), activation="silu", scale_embedding=False
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    mixers = sum(p.numel() for block in decoder.blocks for p in block.mixer.parameters())
    assert mixers == 7 * (2_362_880 + 124_928)
    biases = sum(p.numel() for block in decoder.blocks for name, p in block.ffn.named_parameters() if "bias" in name)
    published = decoder.parameter_count() - biases + 7 * 3 * 512  # its GLU has biases
    assert published == 48_665_600
    assert math.isclose(published / 1e6, 48.67, abs_tol=0.005)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": 1.5}, "gamma"), ({"gamma": 0}, "gamma"), ({"expand": 0}, "expand"), ({"window": 0}, "window")],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TNN.Config(width=8, heads=1, **options)
