"""The elementwise family's GPU kernels: in Triton's interpreter on a CPU, for real where there is a GPU."""

from typing import Any

import pytest
import torch

from isotach.ops import backends
from isotach.ops.elementwise import Elementwise
from isotach.ops.engine import Span, run
from isotach.rng import generator

pytest.importorskip("triton")

from isotach.ops.triton import elementwise as kernels
from isotach.ops.triton import pieces
from tests.unit.interpreter import Case, compiled_and_plain, drawn, hopper, interpreted, replayed, span

REC = Elementwise()
BOUNDS = [0, 1, 2, 18, 18, 60, 60]  # documents of one token, of none, inside a tile and across tiles


def case(
    *,
    batch: int = 1,
    time: int = 70,
    heads: int = 2,
    width: int = 20,
    shared: bool = False,
    hard: bool = False,
    bounds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    where: str = "cpu",
) -> Case:
    stream = generator(0, "elementwise kernels", str(hard))
    draw, rows = (REC.hard if hard else REC.ranges)["log_decay"], batch if bounds is None else len(bounds) - 1
    log_decay = draw((batch, time, 1 if shared else heads, width), stream).float().double().to(where)
    v, weight = (drawn(stream, batch, time, heads, width, dtype=dtype, where=where) for _ in range(2))
    state, state_weight = (drawn(stream, rows, heads, width, where=where) for _ in range(2))
    x = Elementwise.Inputs(v, log_decay)
    return Case(REC, x, Elementwise.State(state), (weight, state_weight), span(batch, time, bounds, where))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return interpreted(monkeypatch, Elementwise)


def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are cut into pieces of 32 tokens."""
    monkeypatch.setattr(pieces, "SHORTEST", 32)
    monkeypatch.setattr(pieces, "processors", lambda device: 1000)


# ---- in the interpreter


@pytest.mark.parametrize(
    ("how", "chunk_size"),
    [
        ({"batch": 2, "time": 37}, 16),
        ({"heads": 1, "width": 100}, None),
        ({"heads": 3, "shared": True}, None),
        ({"hard": True}, 16),
        ({"heads": 2, "shared": True, "hard": True}, 16),
        ({"bounds": BOUNDS, "time": 60}, 16),
        ({"bounds": BOUNDS, "time": 60, "heads": 3, "shared": True}, 16),
    ],
    ids=["rows", "wide", "shared", "hard", "hard shared", "packed", "packed shared"],
)
def test_values_and_gradients(on_cpu: pytest.MonkeyPatch, how: dict[str, Any], chunk_size: int | None) -> None:
    ratios = case(**how).excess(chunk_size=chunk_size)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["rows", "packed"])
def test_cut_documents(on_cpu: pytest.MonkeyPatch, bounds: list[int] | None, shared: bool) -> None:
    cut_short(on_cpu)
    given = case(batch=1 if bounds else 2, time=60 if bounds else 70, shared=shared, bounds=bounds)
    assert kernels._Call(given.inputs(torch.float32), given.span.cu_seqlens, 16).pieces.between > 0
    ratios = given.excess(chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


def test_more_pieces_than_a_tile_has_rows(on_cpu: pytest.MonkeyPatch) -> None:
    cut_short(on_cpu)
    ratios = case(time=600, heads=1, width=3).excess(chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(on_cpu: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    ratios = case(dtype=dtype, width=40).excess(dtype, 16)
    assert max(ratios.values()) <= 2, ratios


def test_views_are_read_where_they_are(on_cpu: pytest.MonkeyPatch) -> None:
    """Transposed heads as hgrn has them, decays that heads share by expansion, a broadcast gradient."""
    stream = generator(0, "elementwise views")
    mixed = torch.randn(2, 21, 24, 2, generator=stream).requires_grad_()
    rates = (-torch.rand(2, 21, 1, 24, generator=stream)).requires_grad_()
    for expanded in (False, True):
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            log_decay = rates.to(dtype).expand(-1, -1, 2 if expanded else 1, -1)
            x = Elementwise.Inputs(mixed.to(dtype).transpose(-1, -2), log_decay)
            output, state = run(REC, x, None, Span.of(2, 21), backend=backend, chunk_size=16)  # type: ignore[arg-type]
            results.append([output, state.state, *torch.autograd.grad(output.sum(), (mixed, rates))])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_registered_operators(on_cpu: pytest.MonkeyPatch) -> None:
    """opcheck of both, no graph break, and no second derivative."""
    given = case(time=18, width=8)
    x, state = given.inputs(torch.float32), given.state.state.float()
    torch.library.opcheck(kernels._forward, (*x, state.requires_grad_(), None, 16))
    plain, state = x.log_decay.detach(), state.detach()
    for grad_state, wanted in ((None, False), (state, True)):
        grad = torch.ones(1, 18, 2, 8)
        torch.library.opcheck(kernels._backward, (grad, grad_state, grad, plain, state, None, 16, wanted, wanted))
    for a, b in compiled_and_plain(given, torch.float32, 16):
        torch.testing.assert_close(a, b)
    output, _ = run(REC, x, None, given.span, backend="triton", chunk_size=16)
    (first,) = torch.autograd.grad(output.square().sum(), x.v, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("x", "chunk_size", "message"),
    [
        (Elementwise.Inputs(torch.zeros(1, 2, 1, 4).double(), torch.zeros(1, 2, 1, 4)), None, "got v in torch.float64"),
        (Elementwise.Inputs(torch.zeros(1, 2, 65, 4), torch.zeros(1, 2, 1, 4)), None, "64 heads that share .*; got 65"),
        (Elementwise.Inputs(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)), 48, "got chunk_size = 48"),
    ],
)
def test_what_kernels_do_not_take(
    on_cpu: pytest.MonkeyPatch, x: Elementwise.Inputs, chunk_size: int | None, message: str
) -> None:
    """By name it is refused with the reason; left to choose, `run` takes the plain backend."""
    with pytest.raises(ValueError, match=message):
        backends.find(REC, "triton", x, chunk_size)
    assert backends.find(REC, "auto", x, chunk_size) is backends.find(REC, "torch", x, chunk_size)


# ---- in the compiler


@pytest.mark.slow
def test_kernels_compile_for_hopper_once() -> None:
    """Interpreted kernels never meet the compiler's types; a new length compiles nothing more."""
    report = hopper("elementwise")
    assert report["kernels"] == 4
    assert report["more_for_other_lengths"] == 0
    assert report["shared"] <= kernels.SHARED


# ---- on a GPU


GPU = [
    {"batch": 2, "time": 3000, "heads": 2, "width": 512, "shared": True},
    {"batch": 8, "time": 777, "heads": 16, "width": 128},
    {"batch": 1, "time": 20000, "heads": 1, "width": 100},
    {"time": 9000, "heads": 2, "width": 96, "bounds": [0, 1, 2, 90, 90, 2600, 9000]},
    {"batch": 2, "time": 500, "heads": 3, "width": 33, "shared": True, "hard": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", GPU, ids=str)
def test_law_7_on_a_gpu(how: dict[str, Any], dtype: torch.dtype) -> None:
    ratios = case(**how, dtype=dtype, where="cuda").excess(dtype)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.gpu
@pytest.mark.parametrize("how", [GPU[2], GPU[3]], ids=["rows", "packed"])
def test_results_repeat_to_the_bit_and_graphs_replay(how: dict[str, Any]) -> None:
    given = case(**how, where="cuda")
    first, second = (given.everything("triton", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in replayed(given, torch.float32))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")  # not two of these at a time
def test_tensors_of_more_than_two_billion_numbers() -> None:
    """The last document of a pack that ends beyond 2³¹, alone and in its place."""
    width, tail = 2048, 300
    time = 2**31 // width + tail
    v = torch.randn(1, time, 1, width, dtype=torch.bfloat16, device="cuda")
    log_decay = -torch.rand(1, time, 1, width, device="cuda").bfloat16()
    packed = Span.packed(torch.tensor([0, time - tail, time], device="cuda"))
    output, state = run(REC, Elementwise.Inputs(v, log_decay), None, packed, backend="triton")
    alone = Elementwise.Inputs(v[:, -tail:], log_decay[:, -tail:])
    expected, after = run(REC, alone, None, Span.of(1, tail, device="cuda"), backend="triton")
    assert torch.equal(output[:, -tail:], expected)
    assert torch.equal(state.state[1:], after.state)
