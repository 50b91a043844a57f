"""A norm with a gate behind it: against float64, in Triton's interpreter on a CPU, for real where there is a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn import norm as norms
from isotach.nn.norm import SRMSNorm, gated, gated_before
from isotach.rng import generator
from tests.unit.interpreter import hopper, interpreted

pytest.importorskip("triton")

from isotach.ops.decay import Decay
from isotach.ops.triton import gated_norm as kernels

ACTIVATIONS = ("none", "silu", "sigmoid")


def drawn(*shape: int, name: str, dtype: torch.dtype, where: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(0, name), dtype=torch.float64).to(where, dtype).requires_grad_()


def leaves(
    shape: tuple[int, ...], *, whole: bool, dtype: torch.dtype, gain: bool, where: str = "cpu"
) -> tuple[nn.Module, list[Tensor]]:
    """A norm over heads or over all of them, x, the gate, and the gain if there is one."""
    width = shape[2] * shape[3] if whole else shape[3]
    norm: nn.Module = nn.RMSNorm(width, eps=1e-5) if gain else SRMSNorm(width, eps=1e-5)
    inputs = [drawn(*shape, name="x", dtype=dtype, where=where)]
    inputs.append(drawn(*shape[:2], shape[2] * shape[3], name="gate", dtype=dtype, where=where))
    if gain:
        norm.weight = nn.Parameter(1 + 0.1 * drawn(width, name="gain", dtype=torch.float32, where=where).detach())
        inputs.append(norm.weight)
    return norm, inputs


def everything(norm: nn.Module, inputs: list[Tensor], activation: str) -> list[Tensor]:
    y = gated(norm, inputs[0], inputs[1], activation)  # type: ignore[arg-type]
    weight = drawn(*y.shape, name="weight", dtype=y.dtype, where=str(y.device)).detach()
    return [y.detach(), *torch.autograd.grad(y, inputs, weight)]


def exact(inputs: list[Tensor], activation: str, *, whole: bool) -> list[Tensor]:
    """The definition in float64."""
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs]
    x = wide[0].flatten(2) if whole else wide[0]
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if len(wide) == 3:
        y = y * wide[2]
    gate = wide[1]
    opened = {"none": gate, "silu": gate * gate.sigmoid(), "sigmoid": gate.sigmoid()}[activation]
    y = y.flatten(2) * opened
    weight = drawn(*y.shape, name="weight", dtype=inputs[0].dtype, where=str(y.device)).detach().double()
    return [y.detach(), *torch.autograd.grad(y, wide, weight)]


def worst(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Kernels for the CPU as well, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("kernels are defined for the GPU")
    import isotach.ops.triton.decay  # noqa: F401  so that what `interpreted` mends is there

    interpreted(monkeypatch, Decay)
    monkeypatch.setattr(norms, "has_kernels", lambda name, device: True)
    return monkeypatch


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["all heads", "each head"])
def test_plain_is_the_definition(activation: str, gain: bool, whole: bool) -> None:
    norm, inputs = leaves((2, 5, 3, 8), whole=whole, dtype=torch.float32, gain=gain)
    assert max(worst(everything(norm, inputs, activation), exact(inputs, activation, whole=whole))) < 1e-6


def test_without_a_gate_it_is_the_norm() -> None:
    norm, (x, *_) = leaves((2, 5, 3, 8), whole=False, dtype=torch.float32, gain=True)
    assert torch.equal(gated(norm, x, None, "silu"), norm(x).flatten(2))  # type: ignore[arg-type]


# ---- in the interpreter


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "how",
    [
        {"shape": (2, 7, 3, 8), "whole": False, "gain": True},
        {"shape": (2, 7, 3, 40), "whole": True, "gain": False},
        {"shape": (1, 1, 1, 16), "whole": True, "gain": True},
        {"shape": (1, 300, 2, 33), "whole": False, "gain": True},
    ],
    ids=["each head", "all heads", "one token", "many rows"],
)
def test_values_and_gradients(fused: pytest.MonkeyPatch, activation: str, how: dict[str, Any]) -> None:
    norm, inputs = leaves(dtype=torch.float32, **{key: how[key] for key in ("shape", "whole", "gain")})
    want = exact(inputs, activation, whole=how["whole"])
    for programs in (1, 1000):  # however many share the rows
        fused.setattr(kernels, "PROGRAMS", programs)
        assert max(worst(everything(norm, inputs, activation), want)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sixteen_bits_are_rounded_once(fused: pytest.MonkeyPatch, dtype: torch.dtype, activation: str) -> None:
    norm, inputs = leaves((1, 20, 2, 64), whole=False, dtype=dtype, gain=True)
    got = everything(norm, inputs, activation)
    assert [leaf.dtype for leaf in got] == [dtype, dtype, dtype, torch.float32]
    assert max(worst(got, exact(inputs, activation, whole=False))) <= torch.finfo(dtype).eps / 2


def test_views_are_read_where_they_are(fused: pytest.MonkeyPatch) -> None:
    """Slices of a projection, a broadcast gradient, and float32 beside 16 bits."""
    mixed = drawn(2, 9, 48, name="mixed", dtype=torch.float32)
    norm = SRMSNorm(8)
    y = gated(norm, mixed[..., :24].unflatten(-1, (3, 8)), mixed[..., 24:], "silu")
    (got,) = torch.autograd.grad(y.sum(), mixed)
    wide = mixed.detach().double().requires_grad_()
    x = wide[..., :24].unflatten(-1, (3, 8))
    want = F.silu(wide[..., 24:]) * (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(2)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), torch.autograd.grad(want.sum(), wide)[0], rtol=1e-5, atol=1e-5)
    both = gated(norm, mixed.detach()[..., :24].unflatten(-1, (3, 8)).bfloat16(), mixed.detach()[..., 24:], "silu")
    assert both.dtype == torch.float32
    torch.testing.assert_close(both.double(), want.detach(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_before_the_norm(fused: pytest.MonkeyPatch, groups: int, dtype: torch.dtype) -> None:
    """By the kernel where there is one group, which is what the gain then belongs to."""
    o, gate = (drawn(2, 23, 48, name=name, dtype=dtype) for name in ("o", "gate"))
    gain = (1 + 0.1 * drawn(48, name="gain", dtype=torch.float32).detach()).requires_grad_()
    weight = drawn(2, 23, 48, name="weight", dtype=dtype).detach()
    found = []
    for wide in (False, True):
        leaves = [leaf.detach().to(torch.float64 if wide else leaf.dtype).requires_grad_() for leaf in (o, gate, gain)]
        if wide:
            z = (leaves[0] * F.silu(leaves[1])).unflatten(-1, (groups, -1))
            y = leaves[2] * (z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2)
        else:
            y = gated_before(leaves[0], leaves[1], leaves[2], groups=groups, eps=1e-5)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))])
    most = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * (0.5 if groups == 1 else 2)
    assert max(worst(*found)) <= most
    assert found[0][0].dtype == (dtype if groups == 1 else torch.float32)


def test_float64_is_left_to_pytorch(fused: pytest.MonkeyPatch) -> None:
    norm, inputs = leaves((1, 4, 2, 8), whole=False, dtype=torch.float64, gain=False)
    assert max(worst(everything(norm, inputs, "silu"), exact(inputs, "silu", whole=False))) < 1e-14


def test_registered_operators(fused: pytest.MonkeyPatch) -> None:
    """opcheck of both, no graph break, and no second derivative."""
    x, gate = (drawn(1, 3, 2, 8, name=name, dtype=torch.float32) for name in ("x", "gate"))
    for gain in (None, torch.ones(8, requires_grad=True)):
        torch.library.opcheck(kernels.gated_norm, (x, gate, gain, 1e-6, "silu", False))
        plain = [None if leaf is None else leaf.detach() for leaf in (x, gate, gain)]
        torch.library.opcheck(kernels._backward, (plain[0], *plain, 1e-6, "silu", True))

    def loss(x: Tensor, gate: Tensor) -> Tensor:
        return gated(norm, x, gate, "silu").square().sum()

    torch.compiler.reset()
    flat, norm = drawn(1, 3, 16, name="flat", dtype=torch.float32), SRMSNorm(8)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(x, flat), x), torch.autograd.grad(loss(x, flat), x), strict=True):
        torch.testing.assert_close(got, want)
    (first,) = torch.autograd.grad(loss(x, flat), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


# ---- in the compiler


@pytest.mark.slow
def test_kernels_compile_for_hopper_once() -> None:
    """Interpreted kernels never meet the compiler's types; a new length compiles nothing more."""
    report = hopper("gated norm")
    assert report["kernels"] == 4  # the gate behind, and before
    assert report["more_for_other_lengths"] == 0


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "whole", "gain"),
    [((8, 2048, 16, 128), False, True), ((4, 777, 8, 200), True, False), ((3, 1, 4, 64), False, True)],
)
def test_on_a_gpu(shape: tuple[int, ...], whole: bool, gain: bool, activation: str, dtype: torch.dtype) -> None:
    norm, inputs = leaves(shape, whole=whole, dtype=dtype, gain=gain, where="cuda")
    got = everything(norm, inputs, activation)
    for ours in worst(got, exact(inputs, activation, whole=whole)):
        assert ours < 4 * torch.finfo(dtype).eps + 1e-6
    again = everything(norm, inputs, activation)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
