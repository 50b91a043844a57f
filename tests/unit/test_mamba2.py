"""Mamba-2 against its equations, and against transformers' with the same weights."""

import inspect
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from isotach.mixers.mamba2 import Mamba2
from tests.unit.forms import built, normal, three_forms

WIDTH, HEADS, STATE, TIME = 16, 4, 8, 37
FALLBACKS = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update")


def layer_of(groups: int, dtype: torch.dtype = torch.float64) -> Mamba2:
    layer = built("mamba2", dtype=dtype, width=WIDTH, heads=HEADS, state_size=STATE, groups=groups)
    assert isinstance(layer, Mamba2)
    with torch.no_grad():
        for parameter, name in ((layer.gain, "gain"), (layer.skip, "skip")):
            parameter.copy_(normal(*parameter.shape, name=name))
    return layer


def published(layer: Mamba2, x: Tensor, groups: int) -> Tensor:
    """Token by token, in the released names."""
    batch, time, _ = x.shape
    inner, size = 2 * WIDTH, layer.conv.weight.shape[1]
    z, xbc, dt = layer.read(x).split((inner, inner + 2 * groups * STATE, HEADS), -1)
    past = F.pad(xbc, (0, 0, size - 1, 0))
    xbc = F.silu(sum(past[:, j : j + time] * layer.conv.weight[:, j] for j in range(size)) + layer.conv.bias)
    u, b, c = xbc.split((inner, groups * STATE, groups * STATE), -1)
    u = u.unflatten(-1, (HEADS, -1))
    b, c = (a.unflatten(-1, (groups, -1)).repeat_interleave(HEADS // groups, 2) for a in (b, c))
    dt = torch.log1p(torch.exp(dt + layer.step_bias))
    h, outputs = torch.zeros(batch, HEADS, inner // HEADS, STATE, dtype=x.dtype), []
    for t in range(time):
        fade = torch.exp(-dt[:, t] * torch.exp(layer.log_rate))
        h = fade[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], u[:, t], b[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, c[:, t]) + layer.skip[:, None] * u[:, t])
    y = torch.stack(outputs, 1).flatten(2) * z * torch.sigmoid(z)
    y = y.unflatten(-1, (groups, -1))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(2)
    return (layer.gain * y) @ layer.out.weight.T


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_the_published_layer(groups: int) -> None:
    layer, x = layer_of(groups), normal(2, TIME, WIDTH)
    expected = published(layer, x, groups)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12, msg=form)


@pytest.fixture
def modeling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' Mamba-2 on its PyTorch paths, whatever kernels are installed."""
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    for name in FALLBACKS:
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    return module


def peer_of(modeling: Any, layer: Mamba2, groups: int) -> Any:
    config = modeling.Mamba2Config(
        hidden_size=WIDTH,
        num_heads=HEADS,
        head_dim=2 * WIDTH // HEADS,
        expand=2,
        state_size=STATE,
        n_groups=groups,
        chunk_size=8,
        num_hidden_layers=1,
    )
    peer = modeling.Mamba2Mixer(config, layer_idx=0)
    ours = layer.state_dict()
    theirs = {
        "in_proj.weight": ours["read.weight"],
        "conv1d.weight": ours["conv.weight"][:, None],
        "conv1d.bias": ours["conv.bias"],
        "A_log": ours["log_rate"],
        "dt_bias": ours["step_bias"],
        "D": ours["skip"],
        "norm.weight": ours["gain"],
        "out_proj.weight": ours["out.weight"],
    }
    peer.load_state_dict(theirs)
    return peer.eval()


@pytest.mark.parametrize("groups", [1, 2])
def test_whole_in_pieces_and_stepped_beside_transformers(modeling: Any, groups: int) -> None:
    layer = layer_of(groups, torch.float32)
    peer = peer_of(modeling, layer, groups)
    x = normal(2, TIME, WIDTH, dtype=torch.float32).requires_grad_()
    expected = peer(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-6, msg=form)
        own = torch.autograd.grad(output.square().sum(), x)[0]
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-5, msg=form)


@torch.no_grad()
def test_their_steps_are_ours(modeling: Any) -> None:
    layer = layer_of(2, torch.float32)
    peer, x = peer_of(modeling, layer, 2), normal(2, TIME, WIDTH, dtype=torch.float32)
    cache = pytest.importorskip("transformers").DynamicCache(config=modeling.Mamba2Config(num_hidden_layers=1))
    steps = [peer(x[:, :9], cache_params=cache)] + [peer(x[:, t : t + 1], cache_params=cache) for t in range(9, TIME)]
    torch.testing.assert_close(three_forms(layer, x)["stepped"], torch.cat(steps, 1), rtol=1e-4, atol=2e-6)


def test_heads_of_the_only_group_share_its_memory() -> None:
    layer, shared = layer_of(1), normal(2, 5, STATE)
    heads = layer._per_head(shared)
    assert heads.shape == (2, 5, HEADS, STATE)
    assert heads.data_ptr() == shared.data_ptr()


def test_it_begins_as_published() -> None:
    layer = built("mamba2", width=800, heads=800, state_size=1)
    assert isinstance(layer, Mamba2)
    with torch.no_grad():
        rate, step = layer.log_rate.exp(), F.softplus(layer.step_bias)
    assert 1 <= float(rate.min()) < 1.2
    assert 15.8 < float(rate.max()) <= 16.001
    assert 1e-3 * 0.999 <= float(step.min()) < 1.1e-3
    assert 0.09 < float(step.max()) < 0.1001
    assert 0.4 < float((step < 1e-2).double().mean()) < 0.6  # log-uniform: half below the geometric mean
    assert bool((layer.skip == 1).all())
    assert bool((layer.gain == 1).all())


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match="groups = 3 does not divide heads = 4; choose a divisor"):
        Mamba2.Config(width=8, heads=4, groups=3)
