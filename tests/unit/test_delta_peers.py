"""The delta family against transformers' Qwen3-Next and Kimi Linear, and flash-linear-attention's own loops."""

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isotach.mixers.gated_delta import GatedDelta
from isotach.mixers.kda import Kda
from isotach.nn.forget import Forget
from isotach.nn.mixer import Mixer
from isotach.ops.delta import Delta, SplitDelta
from isotach.ops.engine import Span, run
from tests.unit.forms import built, flash_linear_attention, normal, three_forms

WIDTH, TIME = 16, 85
GATED = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
KIMI = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")


def plain(monkeypatch: pytest.MonkeyPatch, model: str, functions: tuple[str, ...]) -> Any:
    """A transformers model on its PyTorch paths, whatever kernels are installed."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    for name in (*functions, *CONVOLUTIONS):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    return module


@pytest.fixture
def qwen(monkeypatch: pytest.MonkeyPatch) -> Any:
    return plain(monkeypatch, "qwen3_next", GATED)


@pytest.fixture
def kimi(monkeypatch: pytest.MonkeyPatch) -> Any:
    return plain(monkeypatch, "kimi_linear", KIMI)


def inputs(channels: int) -> tuple[Delta.Inputs, Tensor]:
    """Float32, with unit keys, and a state."""
    q, k, v = (normal(2, TIME, 3, size, name=name) for name, size in (("q", 8), ("k", 8), ("v", 6)))
    beta, log_decay = normal(2, TIME, 3, 1, name="b").sigmoid(), -normal(2, TIME, 3, channels, name="g").abs()
    leaves = (q, nn.functional.normalize(k, dim=-1), v, beta, log_decay)
    return Delta.Inputs(*(leaf.float() for leaf in leaves)), normal(2, 3, 8, 6, name="s").float()


def agrees(x: Delta.Inputs, before: Tensor, expected: Tensor, after: Tensor) -> None:
    """`expected` for queries that the peer scales by 1/√K."""
    x = x._replace(q=x.q * x.q.shape[-1] ** -0.5)
    for backend in ("reference", "torch"):
        output, state = run(Delta(), x, SplitDelta.State(before), Span.of(2, TIME), backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=5e-6)
        torch.testing.assert_close(state.state, after, rtol=1e-4, atol=5e-6)


# ---- the operator


def test_operator_of_qwen(qwen: Any) -> None:
    x, before = inputs(1)
    for name in GATED:
        g, beta = x.log_decay.squeeze(-1), x.beta.squeeze(-1)
        their = getattr(qwen, name)(x.q, x.k, x.v, g, beta, initial_state=before.clone(), output_final_state=True)
        agrees(x, before, *their)


def test_operator_of_kimi(kimi: Any) -> None:
    x, before = inputs(8)
    for name in KIMI:
        arguments = {"g": x.log_decay, "beta": x.beta.squeeze(-1), "initial_state": before.clone()}
        agrees(x, before, *getattr(kimi, name)(x.q, x.k, x.v, output_final_state=True, **arguments))


def flash(operator: str) -> ModuleType:
    pytest.importorskip("einops")
    return flash_linear_attention(operator)


def test_operators_of_flash_linear_attention() -> None:
    x, before = inputs(1)
    beta, g = x.beta.squeeze(-1), x.log_decay.squeeze(-1)
    given: dict[str, Any] = {"initial_state": before, "output_final_state": True}
    agrees(x, before, *flash("gated_delta_rule").naive_recurrent_gated_delta_rule(x.q, x.k, x.v, beta, g, **given))
    headed = (leaf.transpose(1, 2) for leaf in (x.q, x.k, x.v))
    output, after = flash("delta_rule").delta_rule_recurrence(*headed, beta.transpose(1, 2), **given)
    agrees(x._replace(log_decay=torch.zeros(2, 1, 3, 1)), before, output.transpose(1, 2), after)
    x, before = inputs(8)
    agrees(x, before, *flash("kda").naive_recurrent_kda(x.q, x.k, x.v, x.log_decay, beta, **given))


# ---- the layers: same weights, same outputs and gradients


def by_key_head(count: int, *parts: Tensor) -> Tensor:
    """Rows of several projections in Qwen3-Next's order: all of a key head's together."""
    return torch.cat([part.unflatten(0, (count, -1)) for part in parts], 1).flatten(0, 1)


def qwen_of(qwen: Any, layer: GatedDelta) -> Any:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=layer.key_heads,
        linear_num_value_heads=layer.heads,
        linear_key_head_dim=layer.keys // layer.key_heads,
        linear_value_head_dim=layer.values // layer.heads,
        rms_norm_eps=1e-5,
    )
    peer, ours = qwen.Qwen3NextGatedDeltaNet(config, 0), layer.state_dict()
    read = ours["read.weight"].split((layer.keys, layer.keys, layer.values))
    peer.load_state_dict(
        {
            "in_proj_qkvz.weight": by_key_head(layer.key_heads, *read, ours["gate.weight"]),
            "in_proj_ba.weight": by_key_head(layer.key_heads, ours["beta.weight"], ours["decay.weight"]),
            "conv1d.weight": ours["conv.weight"][:, None],
            "dt_bias": ours["forget.step_bias"],
            "A_log": ours["forget.log_rate"],
            "norm.weight": ours["norm.weight"],
            "out_proj.weight": ours["out.weight"],
        }
    )
    return peer.to(layer.out.weight.dtype).eval(), config


def kimi_of(kimi: Any, layer: Kda) -> Any:
    config = kimi.KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=layer.heads,
        linear_head_dim=layer.keys // layer.heads,
        rms_norm_eps=1e-5,
    )
    peer, ours = kimi.KimiLinearDeltaAttention(config, 0), layer.state_dict()
    q, k, v = ours["read.weight"].split((layer.keys, layer.keys, layer.values))
    peer.load_state_dict(
        {
            "q_proj.weight": q,
            "k_proj.weight": k,
            "v_proj.weight": v,
            "conv1d.weight": ours["conv.weight"][:, None],
            "forget_gate.f_a_proj.weight": ours["decay.0.weight"],
            "forget_gate.f_b_proj.weight": ours["decay.1.weight"],
            "forget_gate.dt_bias": ours["forget.step_bias"],
            "forget_gate.A_log": ours["forget.log_rate"].view(1, 1, -1, 1),
            "b_proj.weight": ours["beta.weight"],
            "g_a_proj.weight": ours["gate.0.weight"],
            "g_b_proj.weight": ours["gate.1.weight"],  # without the bias, which begins at zero
            "o_norm.weight": ours["norm.weight"],
            "o_proj.weight": ours["out.weight"],
        }
    )
    return peer.to(layer.out.weight.dtype).eval(), config


def beside(layer: Mixer, peer: Any, x: Tensor) -> None:
    """Whole, in pieces and stepped, with gradients. Peers compute the rule in float32 whatever they are given."""
    expected = peer(x.requires_grad_())
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=3e-6, msg=form)
        own = torch.autograd.grad(output.square().sum(), x)[0]
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=3e-5, msg=form)


@torch.no_grad()
def steps_agree(layer: Mixer, peer: Any, config: Any, x: Tensor) -> None:
    """The peer's cache: a first piece, then token by token."""
    cache = pytest.importorskip("transformers").DynamicCache(config=config)
    steps = [peer(x[:, :9], cache_params=cache)] + [peer(x[:, t : t + 1], cache_params=cache) for t in range(9, TIME)]
    torch.testing.assert_close(three_forms(layer, x)["stepped"], torch.cat(steps, 1), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value_heads", [2, 4])
def test_layer_of_qwen(qwen: Any, value_heads: int, dtype: torch.dtype) -> None:
    layer = built("gated_delta", dtype=dtype, width=WIDTH, heads=2, value_heads=value_heads)
    assert isinstance(layer, GatedDelta)
    peer, config = qwen_of(qwen, layer)
    x = normal(2, TIME, WIDTH, dtype=dtype)
    beside(layer, peer, x)
    steps_agree(layer, peer, config, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_of_kimi(kimi: Any, dtype: torch.dtype) -> None:
    layer = built("kda", dtype=dtype, width=WIDTH, heads=2)
    assert isinstance(layer, Kda)
    peer, config = kimi_of(kimi, layer)
    x = normal(2, TIME, WIDTH, dtype=dtype)
    beside(layer, peer, x)
    steps_agree(layer, peer, config, x)


def test_gate_of_kimi(kimi: Any) -> None:
    config = kimi.KimiLinearConfig(hidden_size=WIDTH, linear_num_heads=2, linear_head_dim=8)
    peer, gate = kimi.KimiLinearForgetGate(config), Forget(2, 8, rates=(1.0, 16.0))
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(normal(*parameter.shape, name=name))
        gate.log_rate.copy_(peer.A_log.flatten())
        gate.step_bias.copy_(peer.dt_bias)
        x = normal(2, 9, WIDTH).float()
        torch.testing.assert_close(gate(peer.f_b_proj(peer.f_a_proj(x))), peer(x))
