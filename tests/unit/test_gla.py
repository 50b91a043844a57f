"""GLA against its equations, written once more token by token, and against flash-linear-attention's own loop."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from isotach.mixers.gla import Gla
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from tests.unit.forms import built, flash_linear_attention, normal, three_forms


def published(layer: Gla, x: Tensor) -> Tensor:
    batch, time, _ = x.shape
    heads = layer.heads
    q, k, v, g = (f(x).view(batch, time, heads, -1) for f in (layer.q, layer.k, layer.v, layer.gate))
    a = torch.sigmoid(layer.decay_up(layer.decay_down(x))).pow(1 / 16).view(batch, time, heads, -1)
    state, outputs = torch.zeros(batch, heads, k.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(time):
        state = a[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], state) / k.shape[-1] ** 0.5
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
        outputs.append((o * g[:, t] * torch.sigmoid(g[:, t])).flatten(1))
    return torch.stack(outputs, 1) @ layer.out.weight.T


def test_it_is_the_published_layer() -> None:
    layer, x = built("gla", width=16, heads=2), normal(2, 70, 16)
    assert isinstance(layer, Gla)
    with torch.no_grad():
        layer.norm.weight.copy_(normal(8, name="gain"))
        layer.decay_up.bias.copy_(normal(8, name="bias"))
    expected = published(layer, x)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12, msg=form)


def test_the_operator_is_flash_linear_attentions() -> None:
    naive = flash_linear_attention("gla")
    q, k, v, gate, before = (
        normal(*shape, name=name, dtype=torch.float32)
        for name, shape in {
            "q": (2, 150, 3, 8),
            "k": (2, 150, 3, 8),
            "v": (2, 150, 3, 6),
            "gate": (2, 150, 3, 8),
            "s": (2, 3, 8, 6),
        }.items()
    )
    log_decay = F.logsigmoid(gate) / 16
    expected, after = naive.naive_recurrent_gla(q, k, v, log_decay, initial_state=before, output_final_state=True)
    inputs = Decay.Inputs(q * 8**-0.5, k, v, log_decay)
    output, state = run(Decay(), inputs, Decay.State(before), Span.of(2, 150))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.state, after, rtol=1e-5, atol=1e-5)


def test_a_fresh_layer_remembers_for_sixteen_tokens() -> None:
    layer = built("gla", width=16, heads=2)
    inputs, _ = layer.project(0 * normal(1, 5, 16), None)  # type: ignore[arg-type]
    torch.testing.assert_close(inputs.log_decay.exp().pow(16), torch.full((1, 5, 2, 4), 0.5, dtype=torch.float64))


def test_keys_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"expand_k times width = 5 is not a multiple of heads = 2"):
        Gla.Config(width=10, heads=2)
    assert Gla.Config(width=100, heads=10, expand_k=0.7, expand_v=0.3).expand_k == 0.7
