"""The short convolution's GPU kernels: in Triton's interpreter on a CPU, for real where there is a GPU."""

from typing import Any

import pytest
import torch

from isotach.ops import backends
from isotach.ops.engine import Span, run
from isotach.ops.window import Window
from isotach.rng import generator

pytest.importorskip("triton")

from isotach.ops.triton import window as kernels
from tests.unit.interpreter import Case, compiled_and_plain, drawn, hopper, interpreted, replayed, span

BOUNDS = [0, 1, 2, 18, 18, 60, 60]  # documents shorter than the filter, empty, and across tiles


def case(
    *,
    batch: int = 1,
    time: int = 60,
    width: int = 40,
    size: int = 4,
    bounds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    where: str = "cpu",
) -> Case:
    stream, rows = generator(0, "window kernels"), batch if bounds is None else len(bounds) - 1
    x, weight_of_output = (drawn(stream, batch, time, width, dtype=dtype, where=where) for _ in range(2))
    weight = drawn(stream, size, width, dtype=dtype, where=where)
    state, weight_of_state = (drawn(stream, rows, size, width, where=where) for _ in range(2))
    weights = (weight_of_output, weight_of_state)
    return Case(Window(size), Window.Inputs(x, weight), Window.State(state), weights, span(batch, time, bounds, where))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return interpreted(monkeypatch, Window)


# ---- in the interpreter


@pytest.mark.parametrize(
    "how",
    [
        {"batch": 2, "time": 37},
        {"size": 1, "width": 130},
        {"size": 3},
        {"size": 7, "batch": 3, "time": 3},
        {"bounds": BOUNDS},
        {"bounds": BOUNDS, "size": 5},
    ],
    ids=["rows", "scale", "three", "longer than its input", "packed", "packed five"],
)
@pytest.mark.parametrize("programs", [1, 1000])
def test_values_and_gradients(on_cpu: pytest.MonkeyPatch, how: dict[str, Any], programs: int) -> None:
    """However many programs share the tiles."""
    on_cpu.setattr(kernels, "PROGRAMS", programs)
    ratios = case(**how).excess()
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["rows", "packed"])
def test_sixteen_bits(on_cpu: pytest.MonkeyPatch, dtype: torch.dtype, bounds: list[int] | None) -> None:
    ratios = case(dtype=dtype, bounds=bounds).excess(dtype)
    assert max(ratios.values()) <= 2, ratios


def test_views_are_read_where_they_are(on_cpu: pytest.MonkeyPatch) -> None:
    """A filter stored as (D, W), a slice of a projection, a broadcast gradient, and none for the state."""
    stream = generator(0, "window views")
    mixed = torch.randn(2, 21, 60, generator=stream).requires_grad_()
    stored = torch.randn(20, 4, generator=stream).requires_grad_()
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x = Window.Inputs(mixed.to(dtype)[..., 20:40], stored.to(dtype).t())
        output, state = run(Window(), x, None, Span.of(2, 21), backend=backend)  # type: ignore[arg-type]
        results.append([output, state.inputs, *torch.autograd.grad(output.sum(), (mixed, stored))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_registered_operators(on_cpu: pytest.MonkeyPatch) -> None:
    """opcheck of both, no graph break, and no second derivative."""
    given = case(time=18, width=8)
    x, state = given.inputs(torch.float32), given.state.inputs.float()
    torch.library.opcheck(kernels._forward, (*x, state.requires_grad_(), None))
    plain, state = [leaf.detach() for leaf in x], state.detach()
    for grad_state, wanted in ((None, False), (state, True)):
        torch.library.opcheck(kernels._backward, (torch.ones(1, 18, 8), grad_state, *plain, state, None, wanted))
    for a, b in compiled_and_plain(given, torch.float32):
        torch.testing.assert_close(a, b)
    output, _ = run(Window(), x, None, given.span, backend="triton")
    (first,) = torch.autograd.grad(output.square().sum(), x.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_what_kernels_do_not_take(on_cpu: pytest.MonkeyPatch) -> None:
    """By name it is refused with the reason; left to choose, `run` takes the plain backend."""
    for x, message in (
        (Window.Inputs(torch.zeros(1, 2, 4).double(), torch.zeros(4, 4)), "got x in torch.float64"),
        (Window.Inputs(torch.zeros(1, 2, 4), torch.zeros(17, 4)), "at most 16 taps; got 17"),
    ):
        rec = Window(len(x.weight))
        with pytest.raises(ValueError, match=message):
            backends.find(rec, "triton", x, None)
        assert backends.find(rec, "auto", x, None) is backends.find(rec, "torch", x, None)


# ---- in the compiler


@pytest.mark.slow
def test_kernels_compile_for_hopper_once() -> None:
    """Interpreted kernels never meet the compiler's types; a new length compiles nothing more."""
    report = hopper("window")
    assert report["kernels"] == 4
    assert report["more_for_other_lengths"] == 0
    assert report["shared"] <= kernels.SHARED


# ---- on a GPU


GPU = [
    {"batch": 8, "time": 3000, "width": 2048},
    {"batch": 2, "time": 777, "width": 100, "size": 3},
    {"time": 9000, "width": 512, "bounds": [0, 1, 2, 90, 90, 2600, 9000]},
    {"time": 5000, "width": 96, "size": 16},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", GPU, ids=str)
def test_law_7_on_a_gpu(how: dict[str, Any], dtype: torch.dtype) -> None:
    ratios = case(**how, dtype=dtype, where="cuda").excess(dtype)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.gpu
@pytest.mark.parametrize("how", [GPU[0], GPU[2]], ids=["rows", "packed"])
def test_results_repeat_to_the_bit_and_graphs_replay(how: dict[str, Any]) -> None:
    given = case(**how, dtype=torch.bfloat16, where="cuda")
    first, second = (given.everything("triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in replayed(given, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")  # not two of these at a time
def test_tensors_of_more_than_two_billion_numbers() -> None:
    """The last document of a pack that ends beyond 2³¹, alone and in its place."""
    width, tail = 4096, 300
    time = 2**31 // width + tail
    x = torch.randn(1, time, width, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(4, width, device="cuda")
    packed = Span.packed(torch.tensor([0, time - tail, time], device="cuda"))
    output, state = run(Window(), Window.Inputs(x, weight), None, packed, backend="triton")
    alone = Window.Inputs(x[:, -tail:], weight)
    expected, after = run(Window(), alone, None, Span.of(1, tail, device="cuda"), backend="triton")
    assert torch.equal(output[:, -tail:], expected)
    assert torch.equal(state.inputs[1:], after.inputs)
