"""One token of a block in bfloat16: in Triton's interpreter on a CPU, for real where there is a GPU.

The oracle is the same block in float64, with weights that bfloat16 holds. Twice the error is allowed of the same block
as PyTorch computes it in bfloat16.
"""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isotach.config import parse
from isotach.infer.graphs import Stepper, Work
from isotach.models import quantize, step16
from isotach.models.decoder import Block, Decoder, ModelConfig
from isotach.nn.mixer import MixerState
from isotach.ops.decay import Decay
from isotach.ops.engine import Span
from isotach.rng import generator
from tests.unit.interpreter import hopper, interpreted

pytest.importorskip("triton")

import isotach.ops.triton.decay  # noqa: F401  registers
from isotach.ops.triton import linear as kernels

ROWS = [1, 3, 16, 17, 40, 70]


def model(*, where: str = "cpu", **changes: object) -> Decoder:
    table = {"vocab": 50, "width": 48, "depth": 3, "heads": 3, "hidden": 72, "init_std": 0.2, **changes}
    return quantize.bfloat16(Decoder(parse(ModelConfig, table, who="test"), seed=1)).to(where)


def drawn(*shape: int, name: str, where: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(0, name)).to(where)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    interpreted(monkeypatch, Decay)
    monkeypatch.setattr(step16, "_kernels", lambda device: True)
    return monkeypatch


def off(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((got.double() - want).norm() / want.norm()) for got, want in zip(values, exact, strict=True)]


# ---- linear maps


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("on_cpu")
def test_linear_maps(rows: int) -> None:
    """Every form that a block needs, at sizes that no program divides; x and gates may be slices."""
    wide = drawn(rows, 150, name="x")
    x, gate = wide[:, :70], wide[:, 75:145].bfloat16()
    weights = [drawn(37, 70, name=f"w{i}").bfloat16() for i in range(4)]
    residual = drawn(rows, 37, name="residual")
    u, w, g = x.double(), [weight.double() for weight in weights], gate.double()
    normed = u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    cases = [
        (
            kernels.linear(x, None, weights, None, 1e-6, 2, False),
            torch.cat([*(F.silu(normed @ each.T) for each in w[:2]), *(normed @ each.T for each in w[2:])], -1),
        ),
        (kernels.linear(x, gate, weights[:1], residual, 1e-6, 0, False), residual.double() + (normed * g) @ w[0].T),
        (kernels.linear(x, None, weights[:2], None, 1e-6, 0, True), (normed @ w[0].T) * (normed @ w[1].T)),
        (kernels.linear(x, None, weights[:2], None, 1e-6, 1, True), F.silu(normed @ w[0].T) * (normed @ w[1].T)),
        (kernels.linear(x, None, weights[:1], residual, -1.0, 0, False), residual.double() + u @ w[0].T),
    ]
    for number, (got, want) in enumerate(cases):
        assert got.dtype == (torch.float32 if number in (1, 4) else torch.bfloat16)
        assert off([got], [want])[0] < 0.01, number


def test_registered_operator(on_cpu: pytest.MonkeyPatch) -> None:
    x, weight = drawn(2, 32, name="x"), drawn(16, 32, name="w").bfloat16()
    for given in (
        (x, None, [weight] * 4, None, 1e-6, 2, False),
        (x, x, [weight], x[:, :16].contiguous(), -1.0, 0, False),
    ):
        torch.library.opcheck(kernels.linear, given, test_utils=("test_schema", "test_faketensor"))


# ---- a block


def block_of(decoder: Decoder, number: int = 1) -> Block:
    block = decoder.blocks[number]
    assert isinstance(block, Block)
    return block


def both(block: Block, x: Tensor, state: MixerState, *, fused: bool) -> list[Tensor]:
    span = Span.of(len(x), 1, start=5, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float64):
        assert not fused or step16.serves(block, x, span)
        y, after = step16.step(block, x, state, span) if fused else block(x, state, span, {})
    return [y, after["main"].state]


def check(
    rows: int, where: str, fused_by: pytest.MonkeyPatch | None = None, *, number: int = 1, **changes: object
) -> None:
    block, sizes = block_of(model(where=where, **changes), number), (3, 16 if number else 32, 16)  # the first turns
    x, before = drawn(rows, 1, 48, name="x", where=where), drawn(rows, *sizes, name="s", where=where)
    exact = both(copy.deepcopy(block).double(), x.double(), {"main": Decay.State(before.double())}, fused=False)
    got = both(block, x, {"main": Decay.State(before)}, fused=True)
    if fused_by is not None:
        fused_by.setattr(step16, "_kernels", lambda device: False)
    plain = both(block, x, {"main": Decay.State(before)}, fused=False)
    assert [leaf.dtype for leaf in got] == [torch.float32, torch.float32]
    for ours, theirs in zip(off(got, exact), off(plain, exact), strict=True):
        assert ours <= 2 * max(theirs, 1e-3)


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_block(on_cpu: pytest.MonkeyPatch, rows: int, activation: str, number: int) -> None:
    check(rows, "cpu", on_cpu, number=number, activation=activation)


@pytest.mark.usefixtures("on_cpu")
def test_which_blocks_are_served() -> None:
    decoder, x = model(), drawn(2, 1, 48, name="x")
    span = Span.of(2, 1)
    with torch.no_grad():
        assert all(step16.serves(block_of(decoder, number), x, span) for number in range(3))
        assert not step16.serves(block_of(decoder), x.expand(2, 3, -1), span)
        assert not step16.serves(block_of(decoder), x.double(), span)
        assert not step16.serves(block_of(model(norm="rms")), x, span)
        assert not step16.serves(block_of(model(pattern=["gla"])), x, span)
        assert not step16.serves(block_of(model(ffn_bias=True)), x, span)
        assert not step16.serves(block_of(model(lightning={"gate_activation": "sigmoid"})), x, span)
        whole = Decoder(
            parse(ModelConfig, {"vocab": 50, "width": 48, "depth": 2, "heads": 3, "hidden": 72}, who="test")
        )
        assert not step16.serves(block_of(whole), x, span)
    assert not step16.serves(block_of(decoder), x, span)  # with gradients


def test_nothing_is_served_on_a_cpu() -> None:
    with torch.no_grad():
        assert not step16.serves(block_of(model()), drawn(2, 1, 48, name="x"), Span.of(2, 1))


def test_a_model_steps_as_it_does_without(on_cpu: pytest.MonkeyPatch) -> None:
    """In graphs, between two states, while rows come and go."""

    def capture(work: Work) -> tuple[Tensor, object]:
        result = work()
        return result, lambda: result.copy_(work())

    decoder = model()
    runs = []
    for fused in (True, False):
        on_cpu.setattr(step16, "_kernels", lambda device, fused=fused: fused)
        stepper = Stepper(decoder, values=True, capture=capture)  # type: ignore[arg-type]
        state, found = decoder.initial(), []
        for token, rows in ((3, 1), (4, 1), (5, 3), (6, 3), (7, 2)):
            if rows != state.rows:
                state = state.select(torch.arange(rows) % state.rows)
            logits, state = stepper.step([token] * rows, state)
            found.append(logits.float().clone())
        runs.append(torch.cat(found))
    torch.testing.assert_close(runs[0], runs[1], rtol=0.1, atol=0.1 * float(runs[1].std()))


@pytest.mark.slow
def test_kernels_compile_for_hopper_once() -> None:
    """More rows compile nothing more, but for the four sizes that there are."""
    report = hopper("linear")
    assert report["kernels"] == 8
    assert report["more_for_other_lengths"] == 0
    assert report["shared"] <= kernels.SHARED


@pytest.mark.gpu
def test_a_model_on_a_gpu() -> None:
    """Graphs of whole steps against the same model in float64."""
    decoder = model(where="cuda", width=96, hidden=144, vocab=500)
    stepper, state, exact = Stepper(decoder, values=False), decoder.initial(), copy.deepcopy(decoder).double()
    wide = exact.initial()
    with torch.no_grad():
        for token in (3, 4, 5, 6, 7):
            logits, state = stepper.step([token], state)
            want, wide = exact(torch.tensor([[token]], device="cuda"), wide)
            assert off([logits], [want[:, -1]])[0] < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 33, 64, 200])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_on_a_gpu(rows: int, activation: str) -> None:
    check(rows, "cuda", activation=activation)
