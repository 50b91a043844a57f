"""The elementwise scan against loops over tokens, written here, real and complex."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotach.nn.positions import angles, rope
from isotach.ops.elementwise import Elementwise
from isotach.ops.engine import Span, run
from isotach.rng import generator


def normal(*shape: int, name: str = "") -> Tensor:
    return torch.randn(shape, generator=generator(0, name, *map(str, shape)), dtype=torch.float64)


def decays(*shape: int) -> Tensor:
    """Natural logarithms of decays from none to total: e^-60 is nothing in either precision."""
    choice = torch.randint(5, shape, generator=generator(1, *map(str, shape)))
    return torch.tensor([0.0, -1e-8, -0.3, -5.0, -60.0], dtype=torch.float64)[choice]


def loop(v: Tensor, log_decay: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One document: v (T, H, V), log_decay (T, H or 1, V), h (H, V)."""
    outputs = []
    for value, fade in zip(v, log_decay, strict=True):
        h = fade.exp() * h + value
        outputs.append(h)
    return torch.stack(outputs) if outputs else v, h


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


@given(lengths, st.sampled_from([None, 1, 4, 1000]), st.booleans())
def test_a_pack_is_its_documents_one_by_one(lengths: list[int], chunk: int | None, shared: bool) -> None:
    total, heads = sum(lengths), 2
    v, state = normal(1, total, heads, 3, name="v"), normal(len(lengths), heads, 3, name="state")
    log_decay = decays(1, total, 1 if shared else heads, 3)
    given_ = [x.requires_grad_() for x in (v, log_decay, state)]
    parts = [
        loop(a, b, h) for a, b, h in zip(v[0].split(lengths), log_decay[0].split(lengths), state.unbind(), strict=True)
    ]
    expected = torch.cat([o for o, _ in parts]), torch.stack([h for _, h in parts])
    weights = [normal(*x.shape, name="weights") for x in expected]
    grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(expected, weights, strict=True)), given_)

    span = Span.packed(torch.tensor([0, *lengths]).cumsum(0))
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        own = [x.detach().to(dtype).requires_grad_() for x in given_]
        o, after = run(Elementwise(), Elementwise.Inputs(*own[:2]), Elementwise.State(own[2]), span, chunk_size=chunk)
        assert error(o[0], expected[0]) < limit
        assert error(after.state, expected[1]) < limit
        loss = sum((x.double() * w).sum() for x, w in zip((o[0], after.state), weights, strict=True))
        for got, want in zip(torch.autograd.grad(loss, own), grads, strict=True):
            assert error(got, want) < limit


def test_nothing_of_one_document_is_in_another() -> None:
    v, log_decay = normal(1, 60, 2, 3), torch.zeros(1, 60, 2, 3, dtype=torch.float64)
    span = Span.packed(torch.tensor([0, 25, 60]))
    outputs = []
    for factor in (1.0, 1e6):
        changed = torch.cat([v[:, :25] * factor, v[:, 25:]], 1)
        outputs.append(run(Elementwise(), Elementwise.Inputs(changed, log_decay), None, span)[0][:, 25:])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("time", [37, 64])
def test_inputs_are_left_alone(time: int) -> None:
    """Also where chunks come out even and v is read where it lies."""
    leaves = [normal(2, time, 2, 3, name="v"), decays(2, time, 2, 3), normal(2, 2, 3, name="state")]
    kept = [leaf.clone() for leaf in leaves]
    given_ = [leaf.requires_grad_() for leaf in leaves]
    state = Elementwise.State(given_[2])
    output, after = run(Elementwise(), Elementwise.Inputs(*given_[:2]), state, Span.of(2, time))
    torch.autograd.grad(output.sum() + after.state.sum(), given_)
    assert all(torch.equal(leaf, before) for leaf, before in zip(leaves, kept, strict=True))


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_a_turning_memory_is_a_real_one_in_a_turning_frame(start: int) -> None:
    time, width = 50, 6
    c, f = normal(1, time, width, 2), torch.sigmoid(normal(1, time, width, name="f"))
    theta = torch.linspace(0, 3.1, width, dtype=torch.float64)
    h, turning = torch.zeros(width, dtype=torch.complex128), f * torch.exp(1j * theta)
    expected = []
    for t in range(time):
        h = turning[0, t] * h + torch.view_as_complex(c)[0, t]
        expected.append(h)

    span = Span.of(1, time, start=start)
    angle = angles(span.positions, theta)
    v = rope(c.transpose(2, 3).flatten(2), -angle).unflatten(-1, (2, width))
    o, _ = run(Elementwise(), Elementwise.Inputs(v, f.log().unsqueeze(2)), None, span)
    got = rope(o.flatten(2), angle).unflatten(-1, (2, width))[0]
    # A float64 angle of a million turns is itself good to 1e-10.
    assert error(got, torch.stack([torch.stack([h.real, h.imag]) for h in expected])) < (1e-13 if start == 0 else 1e-9)


def test_bfloat16_is_accumulated_in_float32() -> None:
    v, log_decay = torch.ones(1, 3000, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 3000, 1, 1)
    o, after = run(Elementwise(), Elementwise.Inputs(v, log_decay), None, Span.of(1, 3000))
    assert o.dtype == torch.bfloat16
    assert float(after.state) == 3000  # a bfloat16 sum of ones stops at 256


def test_heads_before_time_are_refused() -> None:
    x = Elementwise.Inputs(torch.zeros(2, 4, 9, 5), torch.zeros(2, 9, 4, 5))
    with pytest.raises(ValueError, match=r"elementwise: log_decay must be .*time-major: log_decay\.transpose\(1, 2\)"):
        run(Elementwise(), x, None, Span.of(2, 4))


def test_second_derivatives_are_refused_in_one_sentence() -> None:
    x = Elementwise.Inputs(normal(1, 5, 1, 2).requires_grad_(), decays(1, 5, 1, 2).requires_grad_())
    o, _ = run(Elementwise(), x, None, Span.of(1, 5))
    (grad,) = torch.autograd.grad(o.square().sum(), x.v, create_graph=True)
    with pytest.raises(RuntimeError, match=r"elementwise: .* no second derivative; .* backend='reference'"):
        grad.sum().backward()


def test_agrees_with_flash_linear_attention() -> None:
    v, log_decay, state = normal(2, 100, 1, 7).float(), decays(2, 100, 1, 7).float(), normal(2, 1, 7).float()
    expected, last = naive().naive_recurrent_hgrn(v[:, :, 0], log_decay[:, :, 0], state[:, 0], output_final_state=True)
    o, after = run(Elementwise(), Elementwise.Inputs(v, log_decay), Elementwise.State(state), Span.of(2, 100))
    assert error(o[:, :, 0], expected.double()) < 1e-6
    assert error(after.state[:, 0], last.double()) < 1e-6


def naive() -> Any:
    """flash-linear-attention's reference, read as a file: importing the package takes a GPU's compiler."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed")
    path = Path(package.submodule_search_locations[0]) / "ops" / "hgrn" / "naive.py"
    spec = importlib.util.spec_from_file_location("naive_hgrn", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
