"""Retention against the paper's parallel form with complex rotations, and flash-linear-attention's."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from isotach.mixers.retnet import Retnet
from isotach.nn.positions import angles, rope
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from tests.unit.forms import built, flash_linear_attention, normal, three_forms


def retained(layer: Retnet, x: Tensor) -> Tensor:
    """(Q Kᵀ ∘ D) V per head, Q and K rotated as complex numbers: (B, T, H, V)."""
    time, heads = x.shape[1], layer.heads
    q, k, v = (f(x).unflatten(-1, (heads, -1)) for f in (layer.q, layer.k, layer.v))
    half = q.shape[-1] // 2
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(1j * torch.arange(time, dtype=torch.float64)[:, None] * theta)[:, None]
    q, k = (torch.complex(*a.chunk(2, -1)) * turn for a in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    gap = torch.arange(time)[:, None] - torch.arange(time)
    fade = torch.where(gap >= 0, gamma[:, None, None] ** gap.clamp(min=0), 0.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k.conj()).real / (2 * half) ** 0.5
    return torch.einsum("bhts,bshv->bthv", scores * fade, v)


@pytest.mark.parametrize("norm", ["rms", "group"])
def test_it_is_the_published_layer(norm: str) -> None:
    layer, x = built("retnet", width=16, heads=4, norm=norm), normal(2, 70, 16)
    assert isinstance(layer, Retnet)
    with torch.no_grad():
        for name, parameter in layer.norm.named_parameters():
            parameter.copy_(normal(*parameter.shape, name=name))
    o = retained(layer, x)
    if isinstance(layer.norm, nn.GroupNorm):
        o = (o - o.mean(-1, keepdim=True)) * torch.rsqrt(o.var(-1, correction=0, keepdim=True) + 1e-5)
        y = o.flatten(2) * layer.norm.weight + layer.norm.bias
    else:
        y = (o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.norm.weight).flatten(2)
    g = layer.gate(x)
    expected = (y * g * torch.sigmoid(g)) @ layer.out.weight.T
    for form, output in three_forms(layer, x).items():  # the model's angles and rates are float32
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-5, msg=form)
        torch.testing.assert_close(output, three_forms(layer, x)["whole"], rtol=0, atol=1e-12, msg=form)


def test_the_operator_is_flash_linear_attentions() -> None:
    naive = flash_linear_attention("retention")
    layer = built("retnet", width=32, heads=4, dtype=torch.float32)
    x, span = normal(2, 150, 32, dtype=torch.float32), Span.of(2, 150)
    q, k, v = (f(x).unflatten(-1, (4, -1)) for f in (layer.q, layer.k, layer.v))
    angle = angles(span.positions, layer.theta)[:, :, None]
    q, k = rope(q, angle), rope(k, angle)
    expected = naive.naive_retention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)
    log_decay = layer.log_decay.view(1, 1, 4, 1).expand(2, -1, -1, -1)
    output, _ = run(Decay(), Decay.Inputs(q * 8**-0.5, k, v, log_decay), None, span)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_keys_that_rope_cannot_pair_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"expand_k times width = 6 is not a multiple of twice heads"):
        Retnet.Config(width=6, heads=2)
    with pytest.raises(ValidationError, match=r"expand_v times width = 6 is not a multiple of heads = 4"):
        Retnet.Config(width=8, heads=4, expand_v=0.75)
