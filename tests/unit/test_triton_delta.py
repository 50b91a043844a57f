"""The delta family's GPU kernels: in Triton's interpreter on a CPU, for real where there is a GPU.

The oracle is the family's definition in float64. What is allowed is law 7's: twice the error of the plain PyTorch
backend on the same inputs.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from isotach import shapes
from isotach.ops import backends
from isotach.ops.delta import Delta, SplitDelta
from isotach.ops.engine import Span, run
from isotach.ops.recurrence import Recurrence
from isotach.rng import generator

pytest.importorskip("triton")

from isotach.ops.triton import delta as kernels
from isotach.ops.triton import pieces
from tests.unit.interpreter import WIDE, Case, compiled_and_plain, drawn, hopper, interpreted, replayed, span

PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x3")
BOUNDS = [0, 1, 2, 18, 18, 53, 53]  # documents of one token, of none, inside a chunk and across chunks


def case(
    rec: Recurrence,
    variant: str,
    *,
    batch: int = 1,
    time: int = 40,
    heads: int = 1,
    width: int = 20,
    values: int = 24,
    hard: bool = False,
    bounds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    where: str = "cpu",
) -> Case:
    stream, draws = generator(0, "delta kernels", str(hard)), {**rec.ranges, **(rec.hard if hard else {})}
    shared = rec.variants[variant].get("log_decay", frozenset())
    leaves = []
    for field in rec.Inputs._fields:
        shape = (batch, time, heads, {"v": values, "beta": 1}.get(field, width))
        if field == "log_decay":
            shape = (batch, 1 if "T" in shared else time, heads, 1 if "K" in shared else width)
        leaf = draws.get(field, shapes.normal)(shape, stream)
        leaves.append(leaf.to(torch.float32 if field in WIDE else dtype).double().to(where))
    rows = batch if bounds is None else len(bounds) - 1
    sizes = (batch, time, heads, values), (rows, heads, width, values)
    state, weights = drawn(stream, *sizes[1], where=where), tuple(drawn(stream, *size, where=where) for size in sizes)
    return Case(rec, rec.Inputs(*leaves), rec.State(state), weights, span(batch, time, bounds, where))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Kernels run in the interpreter, which multiplies as precisely as they ask.

    Of a float32 factor TF32 keeps 11 bits, and bf16x3 two bfloat16, whose rests are not multiplied with each other.
    """
    for family in (Delta, SplitDelta):
        interpreted(monkeypatch, family)
    from triton import language
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def rounded(value: Any) -> Any:
        if value.dtype.scalar != language.float32:
            return value
        bits = (np.ascontiguousarray(value.data).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), language.float32)

    def halves(value: Any) -> list[Any]:
        whole = torch.from_numpy(np.ascontiguousarray(value.data))
        near = whole.bfloat16().float()
        rest = (whole - near).bfloat16().float()
        return [interpreter.TensorHandle(half.numpy(), language.float32) for half in (near, rest)]

    def multiply(self: Any, a: Any, b: Any, into: Any, precision: Any, *rest: Any) -> Any:
        if precision == ir.INPUT_PRECISION.BF16x3:
            (a, a_rest), (b, b_rest) = halves(a), halves(b)
            for x, y in ((a_rest, b), (a, b_rest)):
                into = dot(self, x, y, into, precision, *rest)
        elif precision == ir.INPUT_PRECISION.TF32:
            a, b = rounded(a), rounded(b)
        return dot(self, a, b, into, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)
    known = replace(interpreter.interpreter_builder.options, allowed_dot_input_precisions=PRECISIONS)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", known)
    return monkeypatch


def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are cut into pieces of 32 tokens, and every 16th is an anchor."""
    monkeypatch.setattr(pieces, "SHORTEST", 32)
    monkeypatch.setattr(pieces, "processors", lambda device: 1000)
    for name in ("HEADS", "CHANNELS"):
        table = {key: config._replace(anchor=16) for key, config in getattr(kernels, name).items()}
        monkeypatch.setattr(kernels, name, table)


# ---- in the interpreter


def label(value: object) -> str | None:
    """The same in every process, as tests that run side by side need."""
    return value.name if isinstance(value, Recurrence) else getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("rec", "variant", "how"),
    [
        (Delta(), "token", {"heads": 2, "time": 21}),
        (Delta(), "head", {"hard": True, "batch": 2, "heads": 2, "time": 16}),
        (Delta(), "channel", {"hard": True}),
        (Delta(), "fixed channel", {"time": 21, "width": 16, "values": 40}),
        (SplitDelta(), "token", {"hard": True}),
        (SplitDelta(), "channel", {"width": 40, "time": 35}),
        (SplitDelta(), "channel", {"bounds": BOUNDS, "time": 53, "hard": True}),
    ],
    ids=label,
)
def test_values_and_gradients(on_cpu: pytest.MonkeyPatch, rec: Recurrence, variant: str, how: dict[str, Any]) -> None:
    ratios = case(rec, variant, **how).excess(chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize(
    ("rec", "variant", "bounds"),
    [(Delta(), "token", BOUNDS), (Delta(), "channel", None), (SplitDelta(), "head", None)],
    ids=["token, packed", "channel", "split"],
)
def test_cut_documents(on_cpu: pytest.MonkeyPatch, rec: Recurrence, variant: str, bounds: list[int] | None) -> None:
    """The states between pieces are chained, and S · G meets at anchors."""
    cut_short(on_cpu)
    given = case(rec, variant, time=53, width=16, values=16, bounds=bounds)
    ratios = given.excess(chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rec", "variant"), [(Delta(), "token"), (SplitDelta(), "channel")], ids=label)
def test_sixteen_bits(on_cpu: pytest.MonkeyPatch, rec: Recurrence, variant: str, dtype: torch.dtype) -> None:
    ratios = case(rec, variant, dtype=dtype, time=21).excess(dtype, chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


def test_keys_wider_than_queries_are_not_rounded(on_cpu: pytest.MonkeyPatch) -> None:
    """Erase is b ∘ k in float32 beside bfloat16, as RWKV-7 has it."""
    on_cpu.setattr("tests.unit.interpreter.WIDE", (*WIDE, "erase"))
    ratios = case(SplitDelta(), "token", dtype=torch.bfloat16, time=21).excess(torch.bfloat16, chunk_size=16)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("chunk", [32, 64])
def test_inverses_of_repeated_keys(on_cpu: pytest.MonkeyPatch, chunk: int) -> None:
    """(1 + A)⁻¹ by blocks is as exact as solving in float32, where A is as large as it gets and 36 rows of it count."""
    x = case(Delta(), "head", time=36, hard=True).x
    q, k, v, beta, log_decay = (leaf.float() for leaf in x)
    call = kernels._Call(q, k, v, log_decay * 0, beta, None, None, None, chunk)
    written = x.beta[0, :, 0] * x.k[0, :, 0]
    lower = torch.eye(36, dtype=torch.float64) + (x.k[0, :, 0] @ written.mT).tril(-1)
    exact, expected = lower.inverse(), torch.zeros(36, chunk, dtype=torch.float64)
    for t in range(0, 36, chunk):
        size = min(chunk, 36 - t)
        expected[t : t + size, :size] = lower[t : t + size, t : t + size].inverse()
    assert exact.norm() > 10
    torch.testing.assert_close(call.matrices[0, :, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_views_are_read_where_they_are(on_cpu: pytest.MonkeyPatch) -> None:
    """Keys shared by heads, slices of one projection, a broadcast gradient, values of another dtype, no final state."""
    stream = generator(0, "views")
    mixed = torch.randn(2, 21, 2, 80, generator=stream).requires_grad_()
    shared = torch.nn.functional.normalize(torch.randn(2, 21, 1, 16, generator=stream), dim=-1).requires_grad_()
    beta = torch.rand(2, 21, 2, generator=stream).requires_grad_()
    rates = (-torch.rand(2, 1, 1, 1, generator=stream)).requires_grad_()
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        q, v, _ = mixed.to(dtype).split((16, 24, 40), -1)
        k, decay = shared.to(dtype).expand(-1, -1, 2, -1), rates.to(dtype).expand(-1, 21, 2, -1)
        x = Delta.Inputs(q, k, v.double(), beta.to(dtype).unsqueeze(-1), decay)
        output, state = run(Delta(), x, None, Span.of(2, 21), backend=backend, chunk_size=16)  # type: ignore[arg-type]
        grads = torch.autograd.grad(output.sum(), (mixed, shared, beta, rates))
        results.append([output, state.state, *grads])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_registered_operators(on_cpu: pytest.MonkeyPatch) -> None:
    """opcheck of both, no graph break, and no second derivative."""
    given = case(Delta(), "token", time=5, width=16, values=16)
    x, state = given.inputs(torch.float32), given.state.state.float().requires_grad_()
    keys = (x.q, x.k, x.v, x.log_decay, x.beta, None, None, state)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._forward, (*keys, None, 16), test_utils=checks)
    plain = [None if leaf is None else leaf.detach() for leaf in keys]
    for grad_state, wanted in ((None, False), (plain[-1], True)):
        how = torch.ones(1, 5, 1, 16), grad_state, *plain, None, 16, wanted, wanted
        torch.library.opcheck(kernels._backward, how, test_utils=checks)
    for got, expected in compiled_and_plain(given, torch.float32, 16):
        torch.testing.assert_close(got, expected)

    output, _ = run(Delta(), x, None, given.span, backend="triton", chunk_size=16)
    (first,) = torch.autograd.grad(output.square().sum(), x.q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "width", "chunk_size", "message"),
    [
        (torch.float64, 20, None, "takes heads of at most 256 channels in .*; got 24 in torch.float64"),
        (torch.float32, 300, None, "at most 256 channels .* got 300"),
        (torch.float32, 20, 48, r"takes chunks of \(16, 32, 64\) tokens; got chunk_size = 48"),
    ],
)
def test_what_kernels_do_not_take(
    on_cpu: pytest.MonkeyPatch, dtype: torch.dtype, width: int, chunk_size: int | None, message: str
) -> None:
    """By name it is refused with the reason; left to choose, `run` takes the plain backend."""
    for rec in (Delta(), SplitDelta()):
        x = rec.Inputs(*(leaf.to(dtype) for leaf in case(rec, "token", time=3, width=width).x))
        with pytest.raises(ValueError, match=message):
            backends.find(rec, "triton", x, chunk_size)
        assert backends.find(rec, "auto", x, chunk_size) is backends.find(rec, "torch", x, chunk_size)


@pytest.mark.parametrize("rec", [Delta(), SplitDelta()], ids=["delta", "split"])
def test_kernels_serve_every_kind_of_decay(on_cpu: pytest.MonkeyPatch, rec: Recurrence) -> None:
    for variant in rec.variants:
        x = rec.Inputs(*(leaf.float() for leaf in case(rec, variant, time=3).x))
        assert backends.find(rec, "auto", x, None) is kernels.delta


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_drifts_without_decay(on_cpu: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What is written and erased again adds up over 1,500 tokens; its rounding must not."""
    given = case(Delta(), "head", time=1500, width=32, values=32, dtype=dtype)
    given = given._replace(x=given.x._replace(log_decay=given.x.log_decay * 0))
    ratios = given.excess(dtype)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["token", "channel"])
@pytest.mark.parametrize("rec", [Delta(), SplitDelta()], ids=["delta", "split"])
def test_as_configured(on_cpu: pytest.MonkeyPatch, rec: Recurrence, variant: str, dtype: torch.dtype) -> None:
    """The chunks and blocks of the table, several of each."""
    ratios = case(rec, variant, time=200, width=64, values=96, dtype=dtype).excess(dtype)
    assert max(ratios.values()) <= 2, ratios


# ---- in the compiler


@pytest.mark.slow
@pytest.mark.parametrize(("family", "table"), [("delta", kernels.HEADS), ("channel delta", kernels.CHANNELS)])
def test_kernels_compile_for_hopper_once(family: str, table: dict[Any, kernels.Config]) -> None:
    """Interpreted kernels never meet the compiler's types; a new length compiles nothing more."""
    report = hopper(family)
    assert report["kernels"] > 0
    assert report["more_for_other_lengths"] == 0
    assert report["shared"] <= table[torch.bfloat16, 64].shared
    assert report["transposed"] == 0


# ---- on a GPU


GPU: list[tuple[Recurrence, str, dict[str, Any]]] = [
    (Delta(), "token", {"batch": 2, "time": 777, "heads": 2, "width": 64, "values": 64}),
    (Delta(), "head", {"batch": 2, "time": 300, "heads": 16, "width": 128, "values": 128}),
    (Delta(), "channel", {"time": 300, "heads": 2, "width": 128, "values": 128}),
    (Delta(), "token", {"time": 200, "width": 96, "values": 192, "hard": True}),
    (Delta(), "channel", {"time": 200, "width": 256, "values": 256, "hard": True}),
    (Delta(), "token", {"time": 4000, "width": 32, "values": 40}),
    (
        SplitDelta(),
        "channel",
        {"time": 3000, "heads": 2, "width": 64, "values": 64, "bounds": [0, 1, 2, 90, 90, 2600, 3000]},
    ),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rec", "variant", "how"), GPU, ids=label)
def test_law_7_on_a_gpu(rec: Recurrence, variant: str, how: dict[str, Any], dtype: torch.dtype) -> None:
    ratios = case(rec, variant, **how, dtype=dtype, where="cuda").excess(dtype)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_gradients_where_hopper_was_miscompiled(width: int) -> None:
    """Chunks of 64 tokens, the width of a matrix instruction, is where transposed products went wrong: by half."""
    given = case(Delta(), "token", batch=2, time=256, width=width, values=width, dtype=torch.bfloat16, where="cuda")
    got = given.everything("triton", torch.bfloat16, 64)
    for name, want in given.everything("reference", torch.float64).items():
        assert float((got[name].double() - want).norm() / want.norm()) < 0.02, name


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 700, 700, 4000]], ids=["rows", "packed"])
@pytest.mark.parametrize("variant", ["token", "channel"])
def test_results_repeat_to_the_bit(variant: str, bounds: list[int] | None) -> None:
    given = case(Delta(), variant, time=4000, width=64, values=64, bounds=bounds, dtype=torch.bfloat16, where="cuda")
    first, second = (given.everything("triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 700, 700, 4000]], ids=["rows", "packed"])
def test_a_captured_graph_replays(bounds: list[int] | None) -> None:
    """Nothing in forward and backward waits for the device."""
    given = case(Delta(), "token", time=4000, width=64, values=64, bounds=bounds, dtype=torch.bfloat16, where="cuda")
    assert all(torch.equal(captured, plain) for captured, plain in replayed(given, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")  # not two of these at a time
def test_tensors_of_more_than_two_billion_numbers() -> None:
    """The last document of a pack that ends beyond 2³¹, alone and in its place."""
    heads, width, tail = 32, 128, 300
    time = 2**31 // (heads * width) + tail
    q, k, v = (torch.randn(1, time, heads, width, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, log_decay = torch.rand(1, time, heads, 1, device="cuda"), -torch.rand(1, time, heads, 1, device="cuda")
    pack = Span.packed(torch.tensor([0, time - tail, time], device="cuda"))
    x = Delta.Inputs(q, k, v, beta, log_decay)
    output, state = run(Delta(), x, None, pack, backend="triton")
    alone = Delta.Inputs(*(leaf[:, -tail:] for leaf in x))
    expected, after = run(Delta(), alone, None, Span.of(1, tail, device="cuda"), backend="triton")
    assert torch.equal(output[:, -tail:], expected)
    assert torch.equal(state.state[1:], after.state)
