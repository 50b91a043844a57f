"""The decay family's GPU kernels: in Triton's interpreter on a CPU, for real where there is a GPU.

The oracle is the family's definition in float64. What is allowed is law 7's: twice the error of the plain PyTorch
backend on the same inputs. Its results are nearly as exact as their dtype where the inputs have 16 bits, so float32
results are then compared as if they had 16 bits too.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isotach.bench import limits, ops
from isotach.bench.families import Shape
from isotach.ops import backends
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from isotach.rng import generator

pytest.importorskip("triton")

import isotach.ops.triton
from isotach.ops.triton import decay as kernels
from isotach.ops.triton import device, pieces
from tests.unit.interpreter import Case, compiled_and_plain, hopper, interpreted, replayed

REC = Decay()
FOLDER = Path(isotach.ops.triton.__file__).parent
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
    bounds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    where: str = "cpu",
) -> Case:
    stream = generator(0, "kernels", str(hard))
    rows = batch if bounds is None else len(bounds) - 1

    def normal(*shape: int, exact: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=stream, dtype=torch.float64).to(exact).double().to(where)

    shape = (batch, time if per_token else 1, heads, 1)
    draw = (REC.hard if hard else REC.ranges)["log_decay"]
    log_decay = draw(shape, stream).float().double().to(where)
    q, k, v, weight = (normal(batch, time, heads, size) for size in (width, width, values, values))
    state, state_weight = (normal(rows, heads, width, values, exact=torch.float32) for _ in range(2))
    span = Span.of(batch, time, device=where) if bounds is None else Span.packed(torch.tensor(bounds, device=where))
    return Case(REC, Decay.Inputs(q, k, v, log_decay), Decay.State(state), (weight, state_weight), span)


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
    "how",
    [
        {"batch": 2, "time": 37},
        {"per_token": False, "width": 48, "values": 16},
        {"hard": True},
        {"per_token": False, "hard": True, "batch": 2, "time": 37},
        {"bounds": BOUNDS, "time": 60},
    ],
    ids=["token", "constant", "hard token", "hard constant", "packed"],
)
def test_values_and_gradients(on_cpu: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    ratios = case(**how).excess(chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "constant"])
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["rows", "packed"])
def test_cut_documents(on_cpu: pytest.MonkeyPatch, bounds: list[int] | None, per_token: bool) -> None:
    cut_short(on_cpu)
    given = case(batch=1 if bounds else 2, heads=1, time=60 if bounds else 70, bounds=bounds, per_token=per_token)
    assert kernels._Call(given.x._replace(q=given.x.q.float()), given.span.cu_seqlens, 16).pieces.between > 0
    ratios = given.excess(chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(on_cpu: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    ratios = case(dtype=dtype, heads=1).excess(dtype, chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


def test_views_are_read_where_they_are(on_cpu: pytest.MonkeyPatch) -> None:
    """Keys shared by heads, slices of one projection, a broadcast gradient, values of another dtype."""
    stream = generator(0, "views")
    mixed = torch.randn(2, 21, 2, 80, generator=stream).requires_grad_()
    shared = torch.randn(2, 21, 1, 16, generator=stream).requires_grad_()
    rates = (-torch.rand(2, 1, 1, 1, generator=stream)).requires_grad_()
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        q, v, _ = mixed.to(dtype).split((16, 24, 40), -1)
        x = Decay.Inputs(q, shared.to(dtype).expand(-1, -1, 2, -1), v.double(), rates.to(dtype).expand(-1, 21, 2, -1))
        output, state = run(REC, x, None, Span.of(2, 21), backend=backend, chunk_size=16)  # type: ignore[arg-type]
        results.append([output, state.state, *torch.autograd.grad(output.sum(), (mixed, shared, rates))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_registered_operators(on_cpu: pytest.MonkeyPatch) -> None:
    """opcheck of both, no graph break, and no second derivative."""
    given = case(time=18, width=16, values=16)
    x = Decay.Inputs(*(leaf.float().requires_grad_() for leaf in given.x))
    state = given.state.state.float().requires_grad_()
    torch.library.opcheck(kernels._forward, (*x, state, None, 16))
    plain = [leaf.detach() for leaf in (*x, state)]
    grad = torch.ones(1, 18, 2, 16)
    for grad_state, wanted in ((None, False), (state.detach(), True)):
        torch.library.opcheck(kernels._backward, (grad, grad_state, *plain, None, 16, wanted, wanted))

    for a, b in compiled_and_plain(given, torch.float32, 16):
        torch.testing.assert_close(a, b)

    output, _ = run(REC, x, None, given.span, backend="triton", chunk_size=16)
    (first,) = torch.autograd.grad(output.square().sum(), x.q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.float64}, "takes heads of at most 256 channels in .*; got 24 in torch.float64"),
        ({"q": (1, 70, 2, 300), "k": (1, 70, 2, 300)}, "at most 256 channels .* got 300"),
        ({"chunk_size": 48}, r"takes chunks of \(16, 32, 64, 128\) tokens; got chunk_size = 48"),
        ({"device": "cuda"}, "the triton backend runs on cuda, the inputs are on cpu"),
    ],
)
def test_what_kernels_do_not_take(on_cpu: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    """By name it is refused with the reason; left to choose, `run` takes the plain backend."""
    if "device" in change:
        entry = backends._kernels[Decay, "triton"]
        on_cpu.setitem(backends._kernels, (Decay, "triton"), entry._replace(device=change["device"]))
    x = Decay.Inputs(*(leaf.float() for leaf in case().x))
    for field, new in change.items():
        if field in Decay.Inputs._fields:
            leaf = getattr(x, field)
            x = x._replace(**{field: leaf.to(new) if isinstance(new, torch.dtype) else leaf.new_zeros(new)})
    chunk_size = change.get("chunk_size")
    with pytest.raises(ValueError, match=message):
        backends.find(REC, "triton", x, chunk_size)
    assert backends.find(REC, "auto", x, chunk_size) is backends.find(REC, "torch", x, chunk_size)


def test_what_kernels_take_is_given_to_them_alone(on_cpu: pytest.MonkeyPatch) -> None:
    x = Decay.Inputs(*(leaf.float() for leaf in case().x))
    assert backends.find(REC, "auto", x, None) is kernels.decay
    entry = backends._kernels[Decay, "triton"]
    on_cpu.setitem(backends._kernels, (Decay, "triton"), entry._replace(device="cuda"))
    assert backends.find(REC, "auto", x, None) is not kernels.decay


def test_a_pack_is_cut_without_looking_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece has a program, and so many programs were started before anybody knew the bounds."""
    cut_short(monkeypatch)
    for bounds in ([0, 0, 1, 40, 40, 400], [0, 400], list(range(0, 401, 8)), [0, 32, 64, 95, 400]):
        cu_seqlens = torch.tensor(bounds)
        made = pieces.cut(1, 400, cu_seqlens, programs=2, chunk=16, device=cu_seqlens.device)
        wanted = [max(1, -(-length // 32)) for length in cu_seqlens.diff().tolist()]
        assert made.document is not None
        assert made.document.bincount(minlength=len(wanted) + 1).tolist()[:-1] == wanted
        assert made.limit == len(made.document) == len(wanted) + 400 // 32
        assert made.between >= sum(wanted) - len(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_constant_rate_does_not_drift(on_cpu: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Found from far away, the errors of all tokens between would count: it would be off by 4e-5, and by 0.1."""
    given = case(time=700, heads=3, width=16, values=16, per_token=False, dtype=dtype)
    assert given.excess(dtype)["dlog_decay"] <= 2


def test_chunks_longer_than_anchors_are_apart(on_cpu: pytest.MonkeyPatch) -> None:
    ratios = case(time=300, heads=1).excess(chunk_size=128)
    assert max(ratios.values()) <= 2, ratios


def test_the_benchmark_takes_the_kernels(on_cpu: pytest.MonkeyPatch) -> None:
    """All it does on a GPU but the clock, at a size for the interpreter."""
    tiny = Shape(batch=1, heads=1, tokens=16, width=16)
    on_cpu.setattr(ops, "SMALL", tiny)
    on_cpu.setattr(limits, "SIZES", {"cpu": (64, 4)})
    cell = ops.Cell("decay", tiny, torch.bfloat16)
    result = ops.measure(device=torch.device("cpu"), against=(), rounds=1, cells=[cell])
    assert result.refused == []
    assert [(row["pass"], row["at"]["backend"]) for row in result.rows] == [
        ("forward", "triton"),
        ("forward + backward", "triton"),
    ]


# ---- in the compiler


def test_kernels_compile_for_hopper_once() -> None:
    """Interpreted kernels never meet the compiler's types; a new length compiles nothing more."""
    report = hopper("64")
    assert report["kernels"] > 0
    assert report["more_for_other_lengths"] == 0
    assert report["shared"] <= kernels.CONFIGS[torch.bfloat16, 64].shared
    assert report["matrix_products"] > 0
    assert report["transposed"] == 0


def test_no_kernel_transposes() -> None:
    """A product's result that is transposed and multiplied again is wrong on Hopper, Triton 3.4 to 3.7.0."""
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                names = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
                assert not names & {"trans", "T", "permute"}, f"{path.name}: {node.name}"


# ---- on a GPU


GPU = [
    {"batch": 2, "time": 777, "width": 64, "values": 64},
    {"batch": 2, "time": 777, "heads": 16, "width": 128, "values": 128, "per_token": False},
    {"batch": 1, "time": 500, "width": 96, "values": 192, "hard": True},
    {"batch": 1, "time": 300, "width": 256, "values": 256},
    {"batch": 1, "time": 5000, "width": 32, "values": 40},
    {"time": 3000, "width": 64, "values": 128, "bounds": [0, 1, 2, 90, 90, 2600, 3000]},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", GPU, ids=str)
def test_law_7_on_a_gpu(how: dict[str, Any], dtype: torch.dtype) -> None:
    ratios = case(**how, dtype=dtype, where="cuda").excess(dtype)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_gradients_where_hopper_was_miscompiled(width: int) -> None:
    """Chunks of 64 tokens, the width of a matrix instruction, is where transposed products went wrong: by half."""
    given = case(batch=2, time=256, width=width, values=width, dtype=torch.bfloat16, where="cuda")
    exact = given.everything("reference", torch.float64)
    for name, got in given.everything("triton", torch.bfloat16, 64).items():
        assert float((got.double() - exact[name]).norm() / exact[name].norm()) < 0.02, name


@pytest.mark.gpu
def test_a_gpu_is_served_by_kernels() -> None:
    given = case(dtype=torch.bfloat16, where="cuda")
    x = Decay.Inputs(*(leaf.bfloat16() for leaf in given.x))
    assert backends.find(REC, "auto", x, None) is kernels.decay
    assert device.processors(x.q.device) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 700, 700, 4000]], ids=["rows", "packed"])
def test_results_repeat_to_the_bit(bounds: list[int] | None) -> None:
    given = case(time=4000, width=64, values=64, bounds=bounds, dtype=torch.bfloat16, where="cuda")
    first, second = (given.everything("triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 700, 700, 4000]], ids=["rows", "packed"])
def test_a_captured_graph_replays(bounds: list[int] | None) -> None:
    """Forward and backward, new inputs in the same memory; nothing in them waits for the device."""
    given = case(time=4000, width=64, values=64, bounds=bounds, dtype=torch.bfloat16, where="cuda")
    assert all(torch.equal(captured, alone) for captured, alone in replayed(given, torch.bfloat16))


@pytest.mark.gpu
def test_nothing_waits_for_the_device_in_a_compiled_step() -> None:
    """Without a graph break under torch.compile, with the kernels as they are."""
    given = case(time=500, width=64, values=64, dtype=torch.bfloat16, where="cuda")
    x = Decay.Inputs(*(leaf.to(t) for leaf, t in zip(given.x, [torch.bfloat16] * 3 + [torch.float32], strict=True)))

    def forward(*leaves: Tensor) -> Tensor:
        return run(REC, Decay.Inputs(*leaves), None, given.span)[0]

    torch.compiler.reset()
    assert torch.equal(torch.compile(forward, fullgraph=True)(*x), forward(*x))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")  # not two of these at a time
def test_tensors_of_more_than_two_billion_numbers() -> None:
    """The last document of a pack that ends beyond 2³¹, alone and in its place."""
    heads, width, tail = 32, 128, 300
    time = 2**31 // (heads * width) + tail
    q, k, v = (torch.randn(1, time, heads, width, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    log_decay = -torch.rand(1, time, heads, 1, device="cuda")
    span = Span.packed(torch.tensor([0, time - tail, time], device="cuda"))
    output, state = run(REC, Decay.Inputs(q, k, v, log_decay), None, span, backend="triton")
    alone = Decay.Inputs(*(leaf[:, -tail:] for leaf in (q, k, v, log_decay)))
    expected, after = run(REC, alone, None, Span.of(1, tail, device="cuda"), backend="triton")
    assert torch.equal(output[:, -tail:], expected)
    assert torch.equal(state.state[1:], after.state)
