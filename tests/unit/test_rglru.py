"""RG-LRU against transformers' RecurrentGemma with the same weights."""

from typing import Any

import pytest
import torch

from isotach.mixers.rglru import RADII, Rglru
from isotach.rng import generator
from tests.unit.forms import built, normal, three_forms

WIDTH, HEADS, TIME = 16, 4, 29


@pytest.fixture
def published() -> Any:
    return pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")


@torch.no_grad()
def test_it_is_the_released_layer(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = built("rglru", dtype=torch.float64, width=WIDTH, heads=HEADS)
    assert isinstance(layer, Rglru)
    settings = published.RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=WIDTH, num_attention_heads=HEADS, num_key_value_heads=1, conv1d_width=4
    )
    theirs = published.RecurrentGemmaRecurrentBlock(settings, 0).double()
    scan = theirs.rg_lru._rnn_scan  # which accumulates in float32 by default
    monkeypatch.setattr(theirs.rg_lru, "_rnn_scan", lambda **given: scan(**given, acc_dtype=torch.float64))
    for parameter, name in ((layer.forget_bias, "r"), (layer.take_bias, "i")):
        parameter.copy_(normal(*parameter.shape, name=name))
    weights = {
        "linear_x": layer.read,
        "linear_y": layer.gate,
        "linear_out": layer.out,
    }
    for name, own in weights.items():
        getattr(theirs, name).load_state_dict(own.state_dict())
    theirs.conv_1d.load_state_dict({"weight": layer.conv.weight[:, None], "bias": layer.conv.bias})
    theirs.rg_lru.load_state_dict(
        {
            "recurrent_param": layer.rate.flatten(),
            "input_gate_weight": layer.take,
            "input_gate_bias": layer.take_bias,
            "recurrent_gate_weight": layer.forget,
            "recurrent_gate_bias": layer.forget_bias,
        }
    )
    x = normal(2, TIME, WIDTH)
    expected, _ = theirs(x, torch.arange(TIME)[None].expand(2, -1), None, use_cache=False)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12, msg=form)


@torch.no_grad()
def test_it_begins_with_long_memories() -> None:
    layer = built("rglru", dtype=torch.float64, width=4096, heads=4)
    assert isinstance(layer, Rglru)
    layer.initialize(lambda name: generator(0, name), 0.02)
    radii = torch.exp(-torch.nn.functional.softplus(layer.rate))
    assert RADII[0] <= float(radii.min()) < 0.901
    assert 0.998 < float(radii.max()) <= RADII[1]
