"""GPU kernels of linear attention whose channels fade apart: in Triton's interpreter, for real where there is a GPU."""

from typing import Any

import pytest
import torch

from isotach.ops import backends
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from isotach.rng import generator

pytest.importorskip("triton")

from isotach.ops.triton import channel as kernels
from isotach.ops.triton import decay, pieces
from tests.unit.interpreter import Case, compiled_and_plain, drawn, hopper, interpreted, replayed, span

REC = Decay()
BOUNDS = [0, 1, 2, 18, 18, 60, 60]  # documents of one token, of none, inside a chunk and across chunks


def case(
    *,
    batch: int = 1,
    time: int = 70,
    heads: int = 2,
    width: int = 20,
    values: int = 24,
    per_token: bool = True,
    hard: bool = False,
    fading: float = 1.0,
    bounds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    where: str = "cpu",
) -> Case:
    """`fading` scales log_decay, whose mean is -1/2."""
    stream = generator(0, "channel kernels", str(hard))
    draw, rows = (REC.hard if hard else REC.ranges)["log_decay"], batch if bounds is None else len(bounds) - 1
    log_decay = (fading * draw((batch, time if per_token else 1, heads, width), stream)).float().double().to(where)
    q, k, v, weight = (
        drawn(stream, batch, time, heads, size, dtype=dtype, where=where) for size in (width, width, values, values)
    )
    state, state_weight = (drawn(stream, rows, heads, width, values, where=where) for _ in range(2))
    x = Decay.Inputs(q, k, v, log_decay)
    return Case(REC, x, Decay.State(state), (weight, state_weight), span(batch, time, bounds, where))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return interpreted(monkeypatch, Decay)


def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are cut into pieces of 32 tokens, and every 32nd is an anchor."""
    monkeypatch.setattr(pieces, "SHORTEST", 32)
    monkeypatch.setattr(pieces, "processors", lambda device: 1000)
    configs = {key: config._replace(anchor=32) for key, config in kernels.CONFIGS.items()}
    monkeypatch.setattr(kernels, "CONFIGS", configs)


# ---- in the interpreter


@pytest.mark.parametrize(
    ("how", "chunk_size"),
    [
        ({"batch": 2, "time": 37}, None),
        ({"per_token": False, "batch": 2, "time": 37, "heads": 1, "width": 40}, None),
        ({"hard": True, "heads": 1}, None),
        ({"hard": True, "per_token": False, "heads": 1}, 64),
        ({"fading": 6.0, "heads": 1}, 32),
        ({"fading": 0.01, "heads": 1, "time": 150}, None),
        ({"bounds": BOUNDS, "time": 60, "heads": 1}, None),
    ],
    ids=["token", "constant", "hard token", "hard constant", "strong and weak chunks", "long memory", "packed"],
)
def test_values_and_gradients(on_cpu: pytest.MonkeyPatch, how: dict[str, Any], chunk_size: int | None) -> None:
    ratios = case(**how).excess(chunk_size=chunk_size)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize(
    "how", [{"batch": 2}, {"bounds": BOUNDS, "time": 60}, {"hard": True, "per_token": False}], ids=str
)
def test_cut_documents(on_cpu: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    cut_short(on_cpu)
    given = case(heads=1, **how)
    assert kernels._Call(given.inputs(torch.float32), given.span.cu_seqlens, None).pieces.between > 0
    ratios = given.excess()
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("hard", [False, True], ids=["usual", "hard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(on_cpu: pytest.MonkeyPatch, dtype: torch.dtype, hard: bool) -> None:
    ratios = case(dtype=dtype, heads=1, hard=hard).excess(dtype)
    assert max(ratios.values()) <= 2, ratios


def test_the_gradient_of_a_rate_does_not_drift(on_cpu: pytest.MonkeyPatch) -> None:
    """Found from the end of 300 tokens, the errors of all tokens between would count."""
    given = case(time=300, heads=1, width=16, values=16, fading=0.05, dtype=torch.bfloat16)
    assert given.excess(torch.bfloat16)["dlog_decay"] <= 2


def test_every_pair_is_weighed_by_the_same_numbers_both_ways(on_cpu: pytest.MonkeyPatch) -> None:
    """q · dq less k · dk sums to what crosses a token. Formed from other factors each, it was 2.3 times as wrong."""
    ratios = case(heads=2).excess(chunk_size=32)
    assert ratios["dlog_decay"] <= 1.5


def test_views_are_read_where_they_are(on_cpu: pytest.MonkeyPatch) -> None:
    """Keys shared by heads, slices of one projection, decays that are a transposed view, a broadcast gradient."""
    stream = generator(0, "channel views")
    mixed = torch.randn(2, 21, 2, 56, generator=stream).requires_grad_()
    shared = torch.randn(2, 21, 1, 16, generator=stream).requires_grad_()
    rates = (-torch.rand(2, 21, 16, 2, generator=stream)).requires_grad_()
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        q, v, _ = mixed.to(dtype).split((16, 24, 16), -1)
        x = Decay.Inputs(q, shared.to(dtype).expand(-1, -1, 2, -1), v.double(), rates.to(dtype).transpose(-1, -2))
        output, state = run(REC, x, None, Span.of(2, 21), backend=backend)  # type: ignore[arg-type]
        results.append([output, state.state, *torch.autograd.grad(output.sum(), (mixed, shared, rates))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_registered_operators(on_cpu: pytest.MonkeyPatch) -> None:
    """opcheck of both, no graph break, and no second derivative."""
    given = case(time=18, width=16, values=16, heads=1)
    x, state = given.inputs(torch.float32), given.state.state.float()
    torch.library.opcheck(decay._forward, (*x, state.requires_grad_(), None, None))
    plain, state = [leaf.detach() for leaf in x], state.detach()
    for grad_state, wanted in ((None, False), (state, True)):
        grad = torch.ones(1, 18, 1, 16)
        torch.library.opcheck(decay._backward, (grad, grad_state, *plain, state, None, None, wanted, wanted))
    for a, b in compiled_and_plain(given, torch.float32):
        torch.testing.assert_close(a, b)
    output, _ = run(REC, x, None, given.span, backend="triton")
    (first,) = torch.autograd.grad(output.square().sum(), x.q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_what_kernels_do_not_take(on_cpu: pytest.MonkeyPatch) -> None:
    """By name it is refused with the reason; left to choose, `run` takes the plain backend."""
    x = case(time=4).inputs(torch.float32)
    wide = torch.zeros(1, 4, 2, 300)
    for given, chunk_size, message in (
        (x._replace(q=x.q.double()), None, "got 24 in torch.float64"),
        (x._replace(q=wide, k=wide, log_decay=wide), None, "at most 256 channels .* got 300"),
        (x, 128, r"chunks of \(16, 32, 64\) tokens where channels fade apart; got chunk_size = 128"),
    ):
        with pytest.raises(ValueError, match=message):
            backends.find(REC, "triton", given, chunk_size)
        assert backends.find(REC, "auto", given, chunk_size) is backends.find(REC, "torch", given, chunk_size)
    assert backends.find(REC, "auto", x, None) is decay.decay


# ---- in the compiler


@pytest.mark.slow
def test_kernels_compile_for_hopper_once() -> None:
    """Interpreted kernels never meet the compiler's types; a new length compiles nothing more."""
    report = hopper("channel")
    assert report["kernels"] == 8
    assert report["more_for_other_lengths"] == 0
    assert report["shared"] <= kernels.CONFIGS[torch.bfloat16, 64].shared
    assert report["transposed"] == 0


# ---- on a GPU


GPU = [
    {"batch": 2, "time": 777, "width": 64, "values": 64},
    {"batch": 2, "time": 777, "heads": 16, "width": 128, "values": 128, "fading": 0.1},
    {"batch": 1, "time": 500, "width": 96, "values": 192, "hard": True},
    {"batch": 1, "time": 300, "width": 256, "values": 256, "per_token": False},
    {"batch": 1, "time": 5000, "width": 32, "values": 40, "fading": 0.01},
    {"time": 3000, "width": 64, "values": 128, "bounds": [0, 1, 2, 90, 90, 2600, 3000]},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", GPU, ids=str)
def test_law_7_on_a_gpu(how: dict[str, Any], dtype: torch.dtype) -> None:
    ratios = case(**how, dtype=dtype, where="cuda").excess(dtype)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "chunk_size"), [(64, 64), (64, 32), (64, 16), (128, 32), (128, 16)])
def test_gradients_where_hopper_was_miscompiled(width: int, chunk_size: int) -> None:
    """Chunks as wide as a matrix instruction are where transposed products went wrong: by half."""
    given = case(batch=2, time=256, width=width, values=width, dtype=torch.bfloat16, where="cuda")
    exact, got = given.everything("reference", torch.float64), given.everything("triton", torch.bfloat16, chunk_size)
    for name, want in exact.items():
        assert float((got[name].double() - want).norm() / want.norm()) < 0.02, name


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 700, 700, 4000]], ids=["rows", "packed"])
def test_results_repeat_to_the_bit_and_graphs_replay(bounds: list[int] | None) -> None:
    given = case(time=4000, width=64, values=64, bounds=bounds, dtype=torch.bfloat16, where="cuda")
    first, second = (given.everything("triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in replayed(given, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")  # not two of these at a time
def test_tensors_of_more_than_two_billion_numbers() -> None:
    """The last document of a pack that ends beyond 2³¹, alone and in its place."""
    heads, width, tail = 32, 128, 300
    time = 2**31 // (heads * width) + tail
    q, k, v = (torch.randn(1, time, heads, width, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    log_decay = -torch.rand(1, time, heads, width, device="cuda")
    packed = Span.packed(torch.tensor([0, time - tail, time], device="cuda"))
    output, state = run(REC, Decay.Inputs(q, k, v, log_decay), None, packed, backend="triton")
    alone = Decay.Inputs(*(leaf[:, -tail:] for leaf in (q, k, v, log_decay)))
    expected, after = run(REC, alone, None, Span.of(1, tail, device="cuda"), backend="triton")
    assert torch.equal(output[:, -tail:], expected)
    assert torch.equal(state.state[1:], after.state)
