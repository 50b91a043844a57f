"""run: what it refuses, and how it says so; what its backends share."""

import math

import pytest
import torch

from isotach import mixers, shapes
from isotach.errors import UserError
from isotach.nn import memory_cache, mixer
from isotach.ops.decay import Decay
from isotach.ops.delta import Delta
from isotach.ops.engine import Span, run
from isotach.ops.history import Blocks, History, Sliding
from isotach.ops.recurrence import Recurrence
from isotach.ops.toeplitz import Toeplitz
from isotach.rng import generator
from isotach.testing import subjects

REC = Decay()


def example(batch: int = 2, time: int = 9, variant: str = "token") -> Decay.Inputs:
    sizes = {"B": batch, "T": time, "H": 3, "K": 4, "V": 5}
    return shapes.example(
        REC.Inputs, sizes, generator(0, "test"), draws=REC.ranges, shared=REC.variants[variant], dtype=torch.float64
    )


def test_head_major_values_are_recognised() -> None:
    x = example()
    with pytest.raises(ValueError, match=r"v must be \(B, T, H, V\).*got \(2, 3, 9, 5\).*v.transpose\(1, 2\)"):
        run(REC, x._replace(v=x.v.transpose(1, 2)), None, Span.of(2, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"span": Span.of(2, 8)}, "span.positions must be"),
        ({"state": REC.initial(example(), 3)}, "one row per sequence or document = 2; got 3"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"span": Span(Span.of(2, 9).positions, torch.tensor([0, 9]))}, "packing takes B = 1"),
        (
            {"backend": "triton"},
            r"(no triton backend is registered|triton backend runs on cuda).*; use backend='torch'",
        ),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    call = {"span": Span.of(2, 9), "state": None, "backend": "torch", "chunk_size": None} | change
    with pytest.raises(ValueError, match=message):
        run(REC, example(), call.pop("state"), call.pop("span"), **call)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [[0, 5], [1, 9], [0, 6, 4, 9], [0.0, 9.0]])
def test_bad_bounds_are_refused(bounds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must (be int64|end at T = 9; got 5)"):
        run(REC, example(batch=1), None, Span(Span.of(1, 9).positions, torch.tensor(bounds)))
    if bounds != [0, 5]:
        with pytest.raises(ValueError, match=r"Span\.packed: cu_seqlens must be int64, start at 0 and never fall"):
            Span.packed(torch.tensor(bounds))


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu() -> None:
    """Not for a pack's bounds either, forward and backward, once kernels are compiled."""
    x = example(batch=1)
    inputs = type(x)(*(leaf.float().cuda().requires_grad_() for leaf in x))
    span = Span.packed(torch.tensor([0, 4, 4, 9], device="cuda"))

    def both() -> None:
        output, _ = run(REC, inputs, None, span)
        torch.autograd.grad(output.sum(), inputs)

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = example()
    q = x.q.requires_grad_()
    output, _ = run(REC, x, None, Span.of(2, 9), backend="torch")
    (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda q: run(REC, x._replace(q=q), None, Span.of(2, 9), backend="reference")[0], (q,), fast_mode=True
    )


@pytest.mark.parametrize("bounds", [range(301), [0, 1, 2, 200, 201, 201, 300]], ids=["one-token", "mixed"])
@pytest.mark.parametrize("variant", list(REC.variants))
def test_packs_of_documents_equal_the_definition(bounds: range | list[int], variant: str) -> None:
    x = example(batch=1, time=300, variant=variant)
    x = type(x)(*(leaf.requires_grad_() for leaf in x))
    span = Span.packed(torch.tensor(list(bounds)))
    results = []
    for backend in ("reference", "torch"):
        output, state = run(REC, x, None, span, backend=backend)
        loss = output.square().sum() + state.state.square().sum()
        results.append([output, state.state, *torch.autograd.grad(loss, x)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_five_hundred_documents_in_a_row() -> None:
    lengths = torch.randint(1, 40, (500,), generator=generator(0, "lengths"))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    x = example(batch=1, time=int(bounds[-1]))
    output, state = run(REC, x, None, Span.packed(bounds), backend="torch")
    for n in (0, 1, 250, 499):
        start, stop = int(bounds[n]), int(bounds[n + 1])
        alone, last = run(REC, shapes.time_slice(x, start, stop), None, Span.of(1, stop - start), backend="reference")
        torch.testing.assert_close(output[:, start:stop], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.state[n : n + 1], last.state, rtol=1e-10, atol=1e-10)


def test_not_causal_reads_the_last_state_whatever_the_order() -> None:
    x = example(variant="head")._replace(log_decay=torch.zeros(2, 1, 3, 1, dtype=torch.float64))
    order = torch.randperm(9, generator=generator(0, "order"))
    moved = x._replace(q=x.q[:, order], k=x.k[:, order], v=x.v[:, order])
    output, _ = run(REC, x, None, Span.of(2, 9), causal=False)
    again, _ = run(REC, moved, None, Span.of(2, 9), causal=False)
    torch.testing.assert_close(again, output[:, order])
    torch.testing.assert_close(output, torch.einsum("bthk,bshk,bshv->bthv", x.q, x.k, x.v))


def test_strong_decay_neither_overflows_nor_loses_the_gradient() -> None:
    """64 tokens of e^-20 in float32: a factored e^L would be e^1280."""
    x = example(time=200, variant="channel")
    x = type(x)(*(leaf.float() for leaf in x))
    x = x._replace(log_decay=torch.full_like(x.log_decay, -20.0).requires_grad_())
    output, _ = run(REC, x, None, Span.of(2, 200), backend="torch")
    (got,) = torch.autograd.grad(output.sum(), x.log_decay)
    exact = type(x)(*(leaf.detach().double() for leaf in x))
    exact = exact._replace(log_decay=exact.log_decay.requires_grad_())
    (expected,) = torch.autograd.grad(
        run(REC, exact, None, Span.of(2, 200), backend="reference")[0].sum(), exact.log_decay
    )
    assert math.exp(-21) < float(expected.abs().max()) < math.exp(-15)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def history(time: int) -> History.Inputs:
    return shapes.example(History.Inputs, {"B": 1, "T": time, "H": 2, "G": 1, "K": 4, "V": 4}, generator(0, str(time)))


@torch.no_grad()
def test_an_old_state_survives_what_was_appended_after_it() -> None:
    rec = History()
    _, start = run(rec, history(5), None, Span.of(1, 5))
    _, grown = run(rec, history(1), start, Span.of(1, 1, start=5))
    before = rec.compact(grown)
    left, _ = run(rec, history(1), grown, Span.of(1, 1, start=6))
    other = type(history(1))(*(leaf * 2 for leaf in history(1)))
    right, _ = run(rec, other, grown, Span.of(1, 1, start=6))
    again, _ = run(rec, history(1), grown, Span.of(1, 1, start=6))
    assert torch.equal(left, again)
    assert not torch.equal(left, right)
    for a, b in zip(before, rec.compact(grown), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_appending_to_the_newest_state_copies_nothing() -> None:
    rec = History()
    _, state = run(rec, history(5), None, Span.of(1, 5))
    _, state = run(rec, history(1), state, Span.of(1, 1, start=5))
    where = state.k.data_ptr()
    for t in range(6, 10):
        _, state = run(rec, history(1), state, Span.of(1, 1, start=t))
        assert state.k.data_ptr() == where


@pytest.mark.parametrize("name", [subject.name for subject in subjects.families()])
def test_autocast_does_not_reach_into_a_recurrence(name: str) -> None:
    """Projections may be computed in bfloat16; what a memory sums up may not."""
    subject = subjects.Family.named(name)
    variant = subject.variants[0]
    x, span = subject.example(variant, subjects.SIZES, torch.float32), Span.of(subjects.SIZES["B"], subjects.SIZES["T"])
    expected, _ = subject.run(variant, x, None, span)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = subject.run(variant, x, None, span)
    assert torch.equal(got, expected)


LIMITED = [
    (family.name, field, side)
    for family in subjects.families()
    for field, within in shapes.limits(family.rec.Inputs).items()
    for side in ("low", "high")
    if math.isfinite(getattr(within, side))
]


def test_every_decay_and_beta_says_what_it_takes() -> None:
    families = {family.name: family.rec.Inputs._fields for family in subjects.families()}
    named = {(name, field) for name, fields in families.items() for field in fields if field in ("log_decay", "beta")}
    assert named
    assert named <= {(name, field) for name, field, _ in LIMITED}


@pytest.mark.parametrize(("name", "field", "side"), LIMITED)
def test_one_value_out_of_range_is_refused(name: str, field: str, side: str) -> None:
    """Family, field, what is expected, what came and what to do; the bound itself is in range."""
    subject = subjects.Family.named(name)
    within, sign = shapes.limits(subject.rec.Inputs)[field], 1 if side == "high" else -1
    x, span = subject.example(subject.variants[-1], subjects.SIZES, torch.float32), Span.of(2, subjects.SIZES["T"])
    leaf = getattr(x, field)
    leaf.view(-1)[-1] = getattr(within, side)
    subject.run("", x, None, span)
    leaf.view(-1)[-1] += sign * 0.25
    words = f"{subject.rec.name}: {field} must be {within}; got {leaf.view(-1)[-1]:g}; {within.remedy}"
    with pytest.raises(UserError) as refused:
        subject.run("", x, None, span)
    assert str(refused.value) == words


def test_what_is_not_a_number_shows_in_the_result() -> None:
    """It lies on no side of any bound."""
    x = example()
    x.log_decay[0, 0] = torch.nan
    assert run(REC, x, None, Span.of(2, 9))[0][0].isnan().all()
    beta = Delta.Inputs(x.q, x.k, x.v, torch.full_like(x.v[..., :1], torch.nan), torch.zeros_like(x.log_decay))
    assert run(Delta(), beta, None, Span.of(2, 9))[0].isnan().all()


@pytest.mark.parametrize("name", mixers.names())
def test_no_mixer_leaves_the_range_of_its_recurrence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why mixers go past the door: even large inputs do not get a projection out of range."""
    for module in (mixer, memory_cache):
        monkeypatch.setattr(module, "advance", run)
    layer = subjects.Layer(name)
    for variant in layer.variants:
        x = layer.example(variant, subjects.SIZES, torch.float32)
        for scale in (1.0, 100.0):
            layer.run(variant, subjects.Hidden(scale * x.x), None, Span.of(2, subjects.SIZES["T"]))


@pytest.mark.parametrize("rec", [Blocks(4), Sliding(4), Delta(), History(lambda distance: -distance[None]), Toeplitz()])
def test_what_looks_back_only_reads_no_set(rec: Recurrence) -> None:
    """Blocks would read every token from the last block alone."""
    sizes = {"B": 2, "T": 9, "H": 2, "G": 2, "K": 4, "V": 4, "L": 9}
    x = shapes.example(rec.Inputs, sizes, generator(0, "set"), draws=rec.ranges)
    with pytest.raises(ValueError, match=rf"^{rec.name}: causal must be True, .*; got causal=False; leave it out, or"):
        run(rec, x, None, Span.of(2, 9), causal=False)


def test_a_layer_told_to_look_ahead_refuses_where_its_memory_cannot() -> None:
    """TransNormer's DiagAttention, whose state holds nothing but the last block."""
    layer = subjects.Layer("transnormer")
    module = layer.module("first", torch.float32)
    module.causal = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^blocks: causal must be True"):
        layer.run("first", layer.example("first", subjects.SIZES, torch.float32), None, Span.of(2, 37))
