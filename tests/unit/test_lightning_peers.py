"""Lightning with MiniMax-01's options against transformers' MiniMax: same weights, same outputs."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from isotach.mixers.lightning import Lightning, minimax_rates
from isotach.nn.mixer import Place
from tests.unit.forms import built, normal, three_forms

WIDTH, HEADS, TIME = 24, 4, 37
OPTIONS = {
    "lrpe": "none",
    "decay": "minimax",
    "values": "silu",
    "gate_activation": "sigmoid",
    "norm_gain": True,
}


def pair(index: int, depth: int, dtype: torch.dtype) -> tuple[Lightning, Any, Any]:
    """Our layer, theirs with its weights, and an empty cache of theirs."""
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_hidden_layers=depth,
        layer_types=["linear_attention"] * depth,
        block_size=8,
    )
    layer = built("lightning", place=Place(index, depth), dtype=dtype, width=WIDTH, heads=HEADS, **OPTIONS)
    assert isinstance(layer, Lightning)
    assert layer.gate is not None
    peer = modeling.MiniMaxLightningAttention(config, layer_idx=index).to(dtype)
    with torch.no_grad():
        layer.norm.weight.copy_(normal(WIDTH, name="gain"))
        qkv = torch.stack([f.weight.unflatten(0, (HEADS, -1)) for f in (layer.q, layer.k, layer.v)], 1)
        peer.qkv_proj.weight.copy_(qkv.flatten(0, 2))
        peer.out_proj.weight.copy_(layer.out.weight)
        peer.output_gate.weight.copy_(layer.gate.weight)
        peer.norm.weight.copy_(layer.norm.weight)
    return layer, peer, modeling.MiniMaxCache()


def ask(peer: Any, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
    output: torch.Tensor = peer(x, position_embeddings=None, attention_mask=None, past_key_values=cache)[0]
    return output


@torch.no_grad()
@pytest.mark.parametrize(("index", "depth"), [(0, 3), (1, 3), (2, 3), (0, 1)])
def test_whole_in_pieces_and_stepped_in_float32(index: int, depth: int) -> None:
    layer, peer, _ = pair(index, depth, torch.float32)
    x = normal(2, TIME, WIDTH, dtype=torch.float32)
    expected = ask(peer, x)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, msg=form)


def test_values_and_gradients_in_float64() -> None:
    """Their rates and norm are float32 even then; with both in float64 nothing but rounding is left."""
    layer, peer, cache = pair(1, 3, torch.float64)
    peer.norm = nn.RMSNorm(WIDTH, eps=1e-6).double()
    peer.norm.weight = layer.norm.weight
    peer.slope_rate = -layer.log_decay.double().view(-1, 1, 1)
    peer.query_decay, peer.key_decay, peer.diagonal_decay = peer.decay_factors(peer.slope_rate)
    x = normal(2, TIME, WIDTH).requires_grad_()
    expected = ask(peer, x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-11, msg=form)
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x)[0], gradient, rtol=0, atol=1e-9)
    with torch.no_grad():
        prompt = ask(peer, x[:, :9], cache)
        steps = [ask(peer, x[:, t : t + 1], cache) for t in range(9, TIME)]
    torch.testing.assert_close(torch.cat([prompt, *steps], 1), expected, rtol=0, atol=1e-11)


def test_rates_are_theirs() -> None:
    for index, depth in ((0, 80), (40, 80), (79, 80), (0, 1)):
        _, peer, _ = pair(index, depth, torch.float32)
        torch.testing.assert_close(
            minimax_rates(HEADS, Place(index, depth)), peer.slope_rate.flatten(), rtol=1e-6, atol=0
        )


def test_published_layers_keep_their_weights() -> None:
    layer = built("lightning", width=WIDTH, heads=HEADS)
    assert set(layer.state_dict()) == {"theta", "q.weight", "k.weight", "v.weight", "out.weight", "gate.weight"}


def test_an_activation_without_a_gate_is_refused() -> None:
    with pytest.raises(ValidationError, match="gate_activation = 'sigmoid' without a gate; set gate = true"):
        Lightning.Config(width=8, heads=2, gate=False, gate_activation="sigmoid")
