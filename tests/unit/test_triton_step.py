"""One token on the GPU: in Triton's interpreter on a CPU, for real where there is a GPU; the oracle is float64."""

import pytest
import torch
from torch import Tensor

from isotach import shapes
from isotach.ops import backends
from isotach.ops.decay import Decay
from isotach.ops.delta import Delta, SplitDelta
from isotach.ops.elementwise import Elementwise
from isotach.ops.engine import Span, run
from isotach.ops.higher_order import Asymmetric, SecondOrder, ThirdOrder
from isotach.ops.recurrence import Paired, Recurrence, Tensors
from isotach.ops.window import Window
from isotach.rng import generator

pytest.importorskip("triton")

import isotach.ops.triton.higher_order  # noqa: F401  registers
import isotach.ops.triton.step as kernels
from isotach.ops.triton import delta, elementwise, window  # noqa: F401  register
from tests.unit.interpreter import WIDE, drawn, hopper, interpreted

FAMILIES: tuple[Recurrence, ...] = (
    *(Decay(), Delta(), SplitDelta(), SecondOrder(), Asymmetric(), ThirdOrder()),
    *(Elementwise(), Window(4), Window(3), Window(1)),
)
KINDS = [(rec, variant) for rec in FAMILIES for variant in rec.variants]
NAMES = [f"{rec.name}-{getattr(rec, 'size', '')}{variant}" for rec, variant in KINDS]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for rec in FAMILIES:
        interpreted(monkeypatch, type(rec))


def token(
    rec: Recurrence,
    variant: str,
    *,
    rows: int = 3,
    heads: int = 2,
    width: int = 20,
    values: int = 40,
    where: str = "cpu",
) -> tuple[Tensors, Tensors]:
    """One token of every row and a state, in float64; bfloat16 holds what is not wide."""
    stream, shared = generator(0, "step", rec.name, variant), rec.variants[variant].get("log_decay", frozenset())
    sizes = {"B": rows, "T": 1, "H": heads, "K": width, "V": values, "D": values, "W": getattr(rec, "size", 0), "1": 1}
    leaves = []
    for field, axes in shapes.axes(rec.Inputs).items():
        alone = shared if field == "log_decay" else frozenset[str]()
        shape = tuple(1 if axis.shared and axis.name in alone else sizes[axis.name] for axis in axes)
        leaf = rec.ranges.get(field, shapes.normal)(shape, stream)
        leaves.append(leaf.to(torch.float32 if field in WIDE else torch.bfloat16).double().to(where))
    x = rec.Inputs(*leaves)
    return x, rec.State(*(drawn(stream, *leaf.shape, where=where) for leaf in rec.initial(x, rows)))


def narrowed(values: Tensors, dtype: torch.dtype) -> Tensors:
    fields = zip(values._fields, values, strict=True)
    return type(values)(*(leaf.to(torch.float32 if field in WIDE else dtype) for field, leaf in fields))


def check(rec: Recurrence, variant: str, dtype: torch.dtype, where: str = "cpu", **sizes: int) -> None:
    """At most twice the error of the definition in the same dtypes, for outputs and state."""
    x, state = token(rec, variant, where=where, **sizes)
    exact, exact_after = rec.step(x, state)
    near, before = narrowed(x, dtype), type(state)(*(leaf.float() for leaf in state))
    span = Span.of(len(near[0]), 1, device=where)
    with torch.no_grad():
        assert backends.find_step(rec, "auto", near, before) is not None
        got, after = run(rec, near, before, span)
        plain, plain_after = rec.step(near, before)
    assert got.dtype == plain.dtype == dtype
    for ours, theirs, want in zip((got, *after), (plain, *plain_after), (exact, *exact_after), strict=True):
        assert ours.shape == want.shape
        floor = torch.finfo(dtype if ours is got else torch.float32).eps
        errors = [float((each.double() - want).norm() / want.norm()) for each in (ours, theirs)]
        assert errors[0] <= 2 * max(errors[1], floor)


@pytest.mark.parametrize(("rec", "variant"), KINDS, ids=NAMES)
@pytest.mark.usefixtures("on_cpu")
def test_the_definition(rec: Recurrence, variant: str) -> None:
    check(rec, variant, torch.float32)


@pytest.mark.parametrize(("width", "values"), [(1, 1), (64, 64), (96, 33), (256, 8)])
@pytest.mark.usefixtures("on_cpu")
def test_heads_of_any_size(width: int, values: int) -> None:
    check(Delta(), "channel", torch.bfloat16, width=width, values=values, rows=2, heads=1)


@pytest.mark.usefixtures("on_cpu")
def test_nothing_is_asked_of_how_inputs_lie_in_memory() -> None:
    """Projections give views of one tensor, rates one number for all rows, and a fork a state that rows share."""
    rec = Decay()
    x, state = token(rec, "token", width=16, values=16)
    together = torch.cat([x.q, x.k, x.v], -1)
    q, k, v = together.mT.contiguous().mT.float().split(16, -1)
    near = rec.Inputs(q, k, v, x.log_decay[:1, :, :1].float().expand(3, 1, 2, 1))
    shared = rec.State(state.state[:1].float().mT.contiguous().mT.expand(3, 2, 16, 16))
    with torch.no_grad():
        got, after = run(rec, near, shared, Span.of(3, 1))
        want, expected = rec.step(near, shared)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(after.state, expected.state)
    assert shared.state.shape == (3, 2, 16, 16)  # and is untouched
    torch.testing.assert_close(shared.state, state.state[:1].float().expand(3, -1, -1, -1))


@pytest.mark.parametrize("rec", FAMILIES, ids=lambda rec: f"{rec.name}{getattr(rec, 'size', '')}")
@pytest.mark.usefixtures("on_cpu")
def test_a_pair_of_states_is_all_that_many_steps_need(rec: Recurrence) -> None:
    variant = next(iter(rec.variants))
    x, state = token(rec, variant, rows=2)
    near, before = narrowed(x, torch.float32), type(state)(*(leaf.float() for leaf in state))
    span = Span.of(2, 1)
    with torch.no_grad():
        pair = Paired(type(state)(*map(torch.clone, before)), type(state)(*map(torch.empty_like, before)))
        places = [leaf.data_ptr() for half in pair for leaf in half]
        for step in range(3):
            want, before = run(rec, near, before, span)
            got, pair = run(rec, near, pair, span)
            assert torch.equal(got, want)
            assert all(map(torch.equal, pair.now, before))
            halves = pair if step % 2 else reversed(pair)
            assert [leaf.data_ptr() for half in halves for leaf in half] == places


@pytest.mark.usefixtures("on_cpu")
def test_a_pair_takes_one_token() -> None:
    x, state = token(Delta(), "token")
    longer = type(x)(*(leaf.float().expand(-1, 2, -1, -1) for leaf in x))
    with pytest.raises(ValueError, match="a pair of states takes one token of every row"):
        run(Delta(), longer, Paired(state, state), Span.of(3, 2))


@pytest.mark.usefixtures("on_cpu")
def test_where_gradients_are_wanted_the_definition_steps() -> None:
    rec = Delta()
    x, state = token(rec, "token")
    near, before = narrowed(x, torch.float32), type(state)(state.state.float().requires_grad_())
    output, after = run(rec, near, before, Span.of(3, 1))
    (got,) = torch.autograd.grad(output.sum() + after.state.sum(), before.state)
    exact = type(state)(state.state.clone().requires_grad_())
    output, after = rec.step(x, exact)
    (want,) = torch.autograd.grad(output.sum() + after.state.sum(), exact.state)
    torch.testing.assert_close(got, want.float())


@pytest.mark.usefixtures("on_cpu")
def test_what_the_kernels_cannot_take_is_stepped_by_the_definition() -> None:
    x, state = token(Decay(), "token")
    with torch.no_grad():
        assert backends.find_step(Decay(), "auto", x, state) is None  # float64
        near = narrowed(x, torch.float32)
        assert backends.find_step(Decay(), "reference", near, state) is None


def test_shapes_without_numbers() -> None:
    """What torch.compile and CUDA graphs of a model ask."""
    x, state = token(Delta(), "channel")
    given = (x.q, x.k, x.v, x.log_decay, state.state, state.state, x.beta)
    assert kernels.one_token(*(leaf.to("meta", torch.float32) for leaf in given)).shape == x.v.shape


@pytest.mark.slow
def test_kernels_compile_for_hopper_once() -> None:
    """Interpreted kernels never meet the compiler's types; more rows compile nothing more."""
    report = hopper("step")
    assert report["kernels"] == 5
    assert report["more_for_other_lengths"] == 0
    assert report["transposed"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rec", "variant"), KINDS, ids=NAMES)
def test_on_a_gpu(rec: Recurrence, variant: str, dtype: torch.dtype) -> None:
    check(rec, variant, dtype, "cuda", rows=5, width=128, values=128)


@pytest.mark.gpu
def test_a_step_is_captured_as_a_graph() -> None:
    rec = Delta()
    x, state = token(rec, "channel", where="cuda")
    near, before = narrowed(x, torch.float32), type(state)(state.state.float())

    def step() -> tuple[Tensor, Tensor]:
        output, after = run(rec, near, before, Span.of(3, 1, device="cuda"))
        return output, after.state

    with torch.inference_mode():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        before.state.mul_(0.5)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
