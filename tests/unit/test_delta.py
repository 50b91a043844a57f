"""The delta rule: what the laws' random examples do not reach, and the mixers against their published equations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from isotach import shapes
from isotach.mixers.delta import DeltaNet
from isotach.mixers.gated_delta import GatedDelta
from isotach.mixers.kda import Kda
from isotach.nn.mixer import Scan
from isotach.ops.delta import Delta, SplitDelta
from isotach.ops.engine import Span, run
from isotach.ops.recurrence import Recurrence
from isotach.ops.torch import loop
from isotach.rng import generator
from tests.unit.forms import built, normal, three_forms

SIZES = {"B": 2, "T": 150, "H": 2, "K": 8, "V": 5}


def example(rec: Recurrence, variant: str = "token", *, log_decay: shapes.Draw | None = None, **sizes: int) -> Any:
    draws = {**rec.ranges, **({} if log_decay is None else {"log_decay": log_decay})}
    shared = rec.variants[variant]
    return shapes.example(rec.Inputs, SIZES | sizes, generator(0, rec.name), draws=draws, shared=shared)


def results(rec: Recurrence, x: Any, span: Span, backend: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs, final state and the gradients of a loss on both."""
    state = normal(span.rows, *x.k.shape[2:], x.v.shape[-1], name="state").to(dtype).requires_grad_()
    x = type(x)(*(leaf.to(dtype).requires_grad_() for leaf in x))
    output, after = run(rec, x, SplitDelta.State(state), span, backend=backend)  # type: ignore[arg-type]
    loss = (output.double() * normal(*output.shape, name="o")).sum() + after.state.double().square().sum()
    return [output.detach(), after.state.detach(), *torch.autograd.grad(loss, (*x, state))]


def furthest(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


# ---- the rule itself


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_key_gives_back_what_was_last_written_under_it(backend: str) -> None:
    x = example(Delta(), "head", log_decay=shapes.one_of(0.0))
    x = x._replace(q=x.k, beta=torch.ones_like(x.beta))
    output, _ = run(Delta(), x, None, Span.of(2, 150), backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(output, x.v)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_two_reflections_are_none(backend: str) -> None:
    """β = 2 mirrors the memory in the plane across k; with nothing written, doing so twice changes nothing."""
    x = example(Delta(), "head", log_decay=shapes.one_of(0.0))
    mirror = x.k.unflatten(1, (-1, 2))[:, :, :1].expand(-1, -1, 2, -1, -1).flatten(1, 2)
    x = x._replace(k=mirror, v=0 * x.v, beta=torch.full_like(x.beta, 2.0))
    before = normal(2, 2, 8, 5)
    _, after = run(Delta(), x, SplitDelta.State(before), Span.of(2, 150), backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(after.state, before)


@pytest.mark.parametrize("variant", list(Delta.variants))
def test_equal_keys_are_the_plain_rule(variant: str) -> None:
    x = example(Delta(), variant)
    split = SplitDelta.Inputs(x.q, x.k, x.beta * x.k, x.beta * x.k, x.v, x.log_decay)
    for backend in ("reference", "torch"):
        output, state = run(Delta(), x, None, Span.of(2, 150), backend=backend)  # type: ignore[arg-type]
        other, after = run(SplitDelta(), split, None, Span.of(2, 150), backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(other, output, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after.state, state.state, rtol=1e-10, atol=1e-10)


# ---- the chunk loop


@pytest.mark.parametrize("rec", [Delta(), SplitDelta()], ids=lambda rec: rec.name)
@pytest.mark.parametrize("variant", list(Delta.variants))
@pytest.mark.parametrize(
    "log_decay",
    [
        shapes.one_of(0.0),
        shapes.uniform(-1.0, 0.0),  # a chunk of 64 loses less than e^60
        shapes.uniform(-2.5, 0.0),
        shapes.uniform(-6.0, 0.0),
        shapes.one_of(0.0, -1e-8, -5.0, -20.0, -200.0),
    ],
    ids=["none", "weak", "medium", "strong", "mixed"],
)
def test_every_strength_of_decay(rec: Recurrence, variant: str, log_decay: shapes.Draw) -> None:
    x, span = example(rec, variant, log_decay=log_decay), Span.of(2, 150)
    expected = results(rec, x, span, "reference")
    assert furthest(results(rec, x, span, "torch"), expected) < 1e-11
    assert furthest(results(rec, x, span, "torch", torch.float32), expected) < 3e-5


def test_the_gradient_of_strong_decay_does_not_cancel() -> None:
    """It is a sum of e^-20s beside products of order one, which must not pass through the same sum."""
    for variant in ("token", "channel"):
        x, span = example(Delta(), variant, log_decay=shapes.one_of(-20.0)), Span.of(2, 150)
        expected = results(Delta(), x, span, "reference")[-2]
        got = results(Delta(), x, span, "torch", torch.float32)[-2]
        assert 0 < float(expected.abs().max()) < 1e-6
        assert furthest([got], [expected]) < 1e-5


@pytest.mark.parametrize("rec", [Delta(), SplitDelta()], ids=lambda rec: rec.name)
@pytest.mark.parametrize("variant", list(Delta.variants))
@pytest.mark.parametrize("bounds", [range(151), [0, 1, 2, 80, 80, 149, 150]], ids=["one-token", "mixed"])
def test_packs_of_documents_equal_the_definition(rec: Recurrence, variant: str, bounds: range | list[int]) -> None:
    x, span = example(rec, variant, B=1), Span.packed(torch.tensor(list(bounds)))
    assert furthest(results(rec, x, span, "torch"), results(rec, x, span, "reference")) < 1e-11


def test_states_that_do_not_fit_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, span = example(Delta(), "channel"), Span.of(2, 150)
    expected = results(Delta(), x, span, "torch")
    monkeypatch.setattr(loop, "STATE_BYTES", 1)
    monkeypatch.setattr(loop, "RUN_BYTES", 1)
    assert furthest(results(Delta(), x, span, "torch"), expected) < 1e-13


@pytest.mark.parametrize("rec", [Delta(), SplitDelta()], ids=lambda rec: rec.name)
def test_second_derivatives_are_refused_not_wrong(rec: Recurrence) -> None:
    x = example(rec, T=5)
    q = x.q.requires_grad_()
    output, _ = run(rec, x, None, Span.of(2, 5), backend="torch")
    (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {"beta": x.beta.squeeze(-1)},
            r"^delta: beta must be \(B, T, H, 1\) = \(2, 9, 2, 1\); got \(2, 9, 2\)",
        ),
        (lambda x: {"beta": x.beta.expand(-1, -1, -1, 8)}, r"^delta: beta must be \(B, T, H, 1\).*got \(2, 9, 2, 8\)"),
        (lambda x: {"v": x.v.transpose(1, 2)}, r"^delta: v must be .*Isotach is time-major: v.transpose\(1, 2\)"),
        (lambda x: {"k": x.k[..., :4]}, r"^delta: k must be \(B, T, H, K\) = \(2, 9, 2, 8\); got \(2, 9, 2, 4\)"),
        (lambda x: {"log_decay": x.log_decay[..., 0]}, r"^delta: log_decay must be \(B, 1 or T, H, 1 or K\)"),
    ],
)
def test_wrong_shapes_are_named(change: Callable[[Any], dict[str, Tensor]], message: str) -> None:
    x = example(Delta(), T=9)
    with pytest.raises(ValueError, match=message):
        run(Delta(), x._replace(**change(x)), None, Span.of(2, 9))


# ---- the mixers


def convolved(layer: Any, x: Tensor) -> Tensor:
    taken, weight = layer.read(x), layer.conv.weight
    past = F.pad(taken, (0, 0, weight.shape[1] - 1, 0))
    y = sum(past[:, j : j + x.shape[1]] * weight[:, j] for j in range(weight.shape[1]))
    return F.silu(y) if layer.conv.activation == "silu" else y


def rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, keep: Tensor) -> Tensor:
    """Token by token; keep (B, T, H, 1 or K)."""
    state, outputs = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = keep[:, t, :, :, None] * state
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1)


def heads(x: Tensor, count: int, repeat: int = 1) -> Tensor:
    return x.unflatten(-1, (count, -1)).repeat_interleave(repeat, 2)


def of_length_one(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def finished(layer: Any, o: Tensor, gate: Tensor | None) -> Tensor:
    y = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
    return (y.flatten(2) if gate is None else y.flatten(2) * gate) @ layer.out.weight.T


def delta_net(layer: DeltaNet, x: Tensor) -> Tensor:
    q, k, v = (heads(part, 2) for part in F.silu(convolved(layer, x)).split((16, 16, 16), -1))
    beta = torch.sigmoid(layer.beta(x))
    return finished(layer, rule(of_length_one(q), of_length_one(k), v, beta, torch.ones_like(beta)[..., None]), None)


def gated_delta(layer: GatedDelta, x: Tensor) -> Tensor:
    q, k, v = convolved(layer, x).split((12, 12, 24), -1)
    q, k = (of_length_one(heads(part, 2, layer.heads // 2)) for part in (q, k))
    keep = torch.exp(-torch.exp(layer.forget.log_rate) * F.softplus(layer.decay(x) + layer.forget.step_bias))
    o = rule(q, k, heads(v, layer.heads), torch.sigmoid(layer.beta(x)), keep[..., None])
    return finished(layer, o, F.silu(layer.gate(x)))  # type: ignore[misc]


def kda(layer: Kda, x: Tensor) -> Tensor:
    q, k, v = convolved(layer, x).split((16, 16, 16), -1)
    q, k = (of_length_one(heads(part, 2, layer.heads // 2)) for part in (q, k))
    z = heads(layer.decay(x) + layer.forget.step_bias, layer.heads)
    rate = torch.exp(layer.forget.log_rate)[:, None]
    keep = torch.exp(
        -rate * F.softplus(z) if layer.forget.bound is None else layer.forget.bound * torch.sigmoid(rate * z)
    )
    o = rule(q, k, heads(v, layer.heads), torch.sigmoid(layer.beta(x)), keep)
    return finished(layer, o, torch.sigmoid(layer.gate(x)))  # type: ignore[misc]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "published", "options"),
    [
        ("delta", delta_net, {}),
        ("gated_delta", gated_delta, {}),
        ("gated_delta", gated_delta, {"value_heads": 4}),
        ("kda", kda, {}),
        ("kda", kda, {"value_heads": 4}),
        ("kda", kda, {"bound": -5.0}),
    ],
)
def test_it_is_the_published_layer(name: str, published: Callable[..., Tensor], options: dict[str, Any]) -> None:
    layer, x = built(name, width=16, heads=2, **options), normal(2, 70, 16)
    for label, parameter in layer.named_parameters():
        if label in ("norm.weight", "gate.1.bias"):
            parameter.copy_(normal(*parameter.shape, name=label))
    expected = published(layer, x)
    for form, output in three_forms(layer, x).items():
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12, msg=form)


@torch.no_grad()
def test_rates_and_steps_begin_as_published() -> None:
    fade, thin = (
        built("gated_delta", width=512, heads=512, expand_k=1.0, expand_v=1.0),
        built("kda", width=512, heads=2),
    )
    assert isinstance(fade, GatedDelta)
    assert isinstance(thin, Kda)
    for gate, low, high in ((fade.forget, 1e-3, 0.2), (thin.forget, 1.0, 16.0)):
        rate, step = gate.log_rate.exp(), F.softplus(gate.step_bias)
        assert low <= float(rate.min()) <= high
        assert float(rate.max()) <= 16.001
        assert 1e-3 * 0.999 <= float(step.min()) < 1.2e-3
        assert 0.08 < float(step.max()) < 0.1001
        assert 0.4 < float((step < 1e-2).double().mean()) < 0.6  # log-uniform: half below the geometric mean
    bounded = built("kda", width=16, heads=2, bound=-5.0)
    assert isinstance(bounded, Kda)
    assert bool((bounded.forget.log_rate == 0).all())
    assert float(bounded.forget(1e4 * normal(1, 9, 16)).min()) >= -5.0


@torch.no_grad()
@pytest.mark.parametrize("name", ["delta", "gated_delta", "kda"])
def test_negative_eigenvalues_double_beta(name: str) -> None:
    x, span = normal(2, 9, 16), Span.of(2, 9)
    plain, doubled = (
        built(name, width=16, heads=2, negative_eigenvalues=negative).project(x, Scan(None, span))[0].beta
        for negative in (False, True)
    )
    assert 0 < float(plain.min()) < float(plain.max()) < 1
    torch.testing.assert_close(doubled, 2 * plain)


@torch.no_grad()
def test_features_and_norms_of_the_ablation() -> None:
    x, span = normal(2, 9, 16), Span.of(2, 9)
    layer = built("delta", width=16, heads=2, features="elu1", norm="sum", gate="sigmoid")
    inputs = layer.project(x, Scan(None, span))[0]
    k = heads(F.elu(convolved(layer, x).split((16, 16, 16), -1)[1]) + 1, 2)
    torch.testing.assert_close(inputs.k, k / (k.sum(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        (DeltaNet, {"expand_k": 0.3}, "expand_k times width = 4.8 is not a multiple of heads = 2; change it"),
        (DeltaNet, {"norm": "sum"}, "norm = 'sum' divides by a sum that may vanish with features = 'silu'; take relu"),
        (GatedDelta, {"value_heads": 3}, "value_heads = 3 is not a multiple of heads = 2; choose one"),
        (
            GatedDelta,
            {"value_heads": 4, "expand_v": 0.125},
            "expand_v times width = 2 is not a multiple of value_heads",
        ),
        (Kda, {"bound": 1.0}, "less than 0"),
        (Kda, {"expand_k": 0.1}, "expand_k times width = 1.6 is not a multiple of heads = 2; change it"),
    ],
)
def test_options_that_cannot_be_are_refused(mixer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        mixer.Config(width=16, heads=2, **options)
