"""Positions against matrix exponentials and written-out biases: what is relative, and what includes what."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.config import parse
from isotach.errors import UserError
from isotach.mixers.softmax import POSITIONS, Softmax
from isotach.nn.mixer import Place, Scan, initialize
from isotach.nn.positions import LRPE, Rope, alibi_slopes, angles, ladder, plane_rotation, rope
from isotach.nn.receptive import ENCODINGS, log_bias
from isotach.ops.engine import Span, run
from isotach.ops.running import Running
from isotach.rng import generator
from isotach.testing import laws
from isotach.testing.subjects import Layer

CORES = ("rotation", "mixed", "permutation", "complex")
UNITARY = [*product(CORES, ("identity", "dct", "householder", "odd_even")), ("complex", "dft")]
WIDTH, HEADS = 32, 4
HEAD = WIDTH // HEADS


def normal(*shape: int, name: str = "") -> Tensor:
    return torch.randn(*shape, generator=generator(0, name, *map(str, shape)), dtype=torch.float64)


def drawn(module: nn.Module) -> Any:
    """With weights in float64."""
    initialize(nn.ModuleDict({"module": module}), lambda name: generator(0, name), 0.3)
    return module.double()


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def at(positions: list[int]) -> Tensor:
    return torch.tensor([positions])


# ---- LRPE


@pytest.mark.parametrize(("core", "basis"), UNITARY)
@torch.no_grad()
def test_lrpe_is_unitary_and_relative(core: Any, basis: Any) -> None:
    encode = drawn(LRPE(8, core=core, basis=basis))
    q, k = normal(1, 1, 3, 8, name="q"), normal(1, 1, 3, 8, name="k")
    assert encode(q, at([9])).norm().item() == pytest.approx(q.norm().item(), rel=1e-12)
    scores = [(encode(q, at([t])) * encode(k, at([s]))).sum(-1) for t, s in ((12, 5), (107, 100), (10_007, 10_000))]
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=1e-9, atol=1e-10)
    other = (encode(q, at([13])) * encode(k, at([5]))).sum(-1)
    assert not torch.allclose(other, scores[0])
    torch.testing.assert_close((encode(q, at([4])) * encode(k, at([4]))).sum(-1), (q * k).sum(-1))


def test_lrpes_rotation_is_rope_with_neighbours_paired() -> None:
    x, positions = normal(1, 6, 2, 8), torch.arange(6)[None]
    neighbours = torch.arange(8).view(4, 2).T.flatten()  # channel 2j to j, channel 2j + 1 to j + 4
    encode = LRPE(8).double()
    expected = rope(x[..., neighbours], angles(positions, encode.theta)[:, :, None])
    torch.testing.assert_close(encode(x, positions)[..., neighbours], expected)


@torch.no_grad()
def test_permutations_are_powers_and_come_round() -> None:
    encode, x = drawn(LRPE(8, core="permutation")), normal(1, 1, 1, 8)
    once = encode(torch.arange(8.0).expand(1, 1, 1, 8), at([1])).long().flatten()
    y, order = x, 0
    for t in range(1, 200):
        y = y[..., once]
        torch.testing.assert_close(encode(x, at([t])), y)
        order = order or (t if torch.equal(y, x) else 0)
    assert order > 1
    torch.testing.assert_close(encode(x, at([5 + 1000 * order])), encode(x, at([5])))


def test_lrpe_is_saved_as_it_was_drawn() -> None:
    for core, basis in (("permutation", "householder"), ("rotation", "householder")):
        first, second = drawn(LRPE(8, core=core, basis=basis)), LRPE(8, core=core, basis=basis).double()
        second.load_state_dict(first.state_dict())
        x = normal(1, 5, 2, 8)
        torch.testing.assert_close(second(x, torch.arange(5)[None]), first(x, torch.arange(5)[None]))


def test_impossible_lrpes_are_refused() -> None:
    with pytest.raises(ValueError, match="basis dft is complex; got core 'rotation'"):
        LRPE(8, basis="dft")
    with pytest.raises(ValueError, match="core rotation turns pairs; got 7 channels"):
        LRPE(7)


# ---- GRAPE, multiplicative


def generated(a: Tensor, b: Tensor, turns: float) -> Tensor:
    return torch.linalg.matrix_exp(turns * (torch.outer(a, b) - torch.outer(b, a)))


@pytest.mark.parametrize("turns", [0.0, 1e-5, 0.3, -2.0, 40.0])
def test_plane_rotation_is_the_matrix_exponential(turns: float) -> None:
    a, b, x = normal(7, name="a"), normal(7, name="b"), normal(3, 7)
    y = plane_rotation(x, a, b, number(turns))
    torch.testing.assert_close(y, x @ generated(a, b, turns).T, rtol=1e-10, atol=1e-11)
    further = plane_rotation(y, a, b, number(0.7))
    torch.testing.assert_close(further, plane_rotation(x, a, b, number(turns + 0.7)), rtol=1e-10, atol=1e-11)


def test_planes_that_vanish_turn_nothing_and_have_gradients() -> None:
    a = normal(5).requires_grad_()
    y = plane_rotation(normal(2, 5), a, 3 * a, number(1.5))
    torch.testing.assert_close(y, normal(2, 5))
    (gradient,) = torch.autograd.grad(y.sum(), a)
    assert bool(gradient.isfinite().all())
    near = a.detach() + 1e-9 * normal(5, name="near")
    expected = normal(2, 5) @ generated(a.detach(), near, 1.5).T
    torch.testing.assert_close(plane_rotation(normal(2, 5), a.detach(), near, number(1.5)), expected)


def test_rope_is_plane_after_plane() -> None:
    x, theta = normal(1, 9, 2, 8), ladder(8)[:4].double()
    positions = torch.arange(9)
    y, axes = x, torch.eye(8, dtype=torch.float64)
    for j in range(4):
        y = plane_rotation(y, axes[j + 4], axes[j], (positions * theta[j])[None, :, None])
    torch.testing.assert_close(y, rope(x, angles(positions[None], theta)[:, :, None]), rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_a_contextual_phase_counts_the_tokens_before() -> None:
    turn, x = drawn(Rope(6, 2, 8, kind="contextual", base=100.0)), normal(1, 30, 6)
    turn.rate.weight.copy_(normal(2, 6))
    ones = torch.ones(1, 30, 2, 8, dtype=torch.float64)
    q, k = turn(ones, ones, x, Scan(None, Span.of(1, 30)))
    omega = F.softplus(x @ turn.rate.weight.T + turn.rate.bias)
    phase = torch.cat([omega.new_zeros(1, 1, 2), omega.cumsum(1)[:, :-1]], 1)
    expected = torch.einsum("bthj->bth", 2 * torch.cos((phase[:, 20:21] - phase)[..., None] * turn.theta))
    torch.testing.assert_close((q[:, 20:21] * k).sum(-1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "step"), [("contextual", 1e-3), ("released", 0.394)])
def test_contextual_phases_begin_at_the_documented_rate(kind: Any, step: float) -> None:
    turn, ones = drawn(Rope(6, 1, 2, kind=kind, base=100.0)), torch.ones(1, 2, 1, 2, dtype=torch.float64)
    _, k = turn(ones, ones, normal(1, 2, 6), Scan(None, Span.of(1, 2)))
    assert math.acos(float((k[0, 0] * k[0, 1]).sum().detach()) / 2) == pytest.approx(step, rel=1e-3)


def test_running_sums_stay_exact() -> None:
    """A million float32 tokens of 0.394, then one of 1e-3, by chunks and by single steps."""
    rec, step = Running(), torch.full((1, 50_000, 1), 0.394)
    state = None
    for _ in range(20):
        _, state = run(rec, Running.Inputs(step), state, Span.of(1, 50_000))
    total = 1_000_000 * float(torch.tensor(0.394))
    for n in range(1, 101):
        output, state = run(rec, Running.Inputs(torch.full((1, 1, 1), 1e-3)), state, Span.of(1, 1))
        high, low = output[0, 0].tolist()
        assert high + low == pytest.approx(total + n * float(torch.tensor(1e-3)), abs=2e-8)


# ---- softmax attention with every kind of position


def layer(positions: str, **options: Any) -> Softmax:
    config = {"width": WIDTH, "heads": HEADS, "positions": positions} | options
    made = drawn(Softmax(Softmax.Config.model_validate(config), Place(0, 1)))
    for module in made.modules():  # maps that begin at zero would hide what comes before them
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3, generator=generator(1, str(tuple(module.weight.shape))))
    return made


def parts(mixer: Softmax, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple((x @ part.weight.T).unflatten(-1, (HEADS, -1)) for part in (mixer.q, mixer.k, mixer.v))


def attention(mixer: Softmax, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    time = q.shape[1]
    scores = torch.einsum("bthk,bshk->bhts", q, k) / HEAD**0.5 + bias
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2) @ mixer.out.weight.T


def lifted(steps: Tensor) -> Tensor:
    """G(n) of the additive lift, steps (..., T): the product of I - step_l E over l ≤ t, as (..., T, 2, 2) matrices."""
    e = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    matrices = [torch.eye(2, dtype=torch.float64).expand(*steps.shape[:-1], 2, 2)]
    for t in range(steps.shape[-1]):
        matrices.append((torch.eye(2, dtype=torch.float64) - steps[..., t, None, None] * e) @ matrices[-1])
    return torch.stack(matrices[1:], -3)


def unipotent(steps: Tensor) -> Tensor:
    """(G(i) q^)ᵀ (G(j)^{-T} k^) - q·k for q^ = [q; 1; 0], k^ = [k; 0; 1]: the bias that the lift adds, (..., T, T)."""
    group = lifted(steps)
    q, k = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.einsum("...ia,...ja->...ij", group @ q, torch.linalg.inv(group).mT @ k)


@torch.no_grad()
def test_alibi_is_the_additive_lift_at_a_constant_step() -> None:
    mixer, x = layer("alibi"), normal(2, 25, WIDTH)
    steps = torch.tensor(alibi_slopes(HEADS), dtype=torch.float64)[:, None].expand(-1, 25)
    bias = unipotent(steps)
    t, s = torch.arange(25)[:, None], torch.arange(25)
    torch.testing.assert_close(bias, (s - t) * steps[:, :1, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixer(x, None, Span.of(2, 25))[0], attention(mixer, *parts(mixer, x), bias))


@torch.no_grad()
def test_fox_is_the_additive_lift_along_the_path() -> None:
    mixer, x = layer("fox"), normal(2, 25, WIDTH)
    assert mixer.forget is not None
    log_forget = F.logsigmoid(x @ mixer.forget.weight.T + mixer.forget.bias).mT
    bias = unipotent(-log_forget)
    torch.testing.assert_close(bias[:, :, 7, 4], log_forget[:, :, 5:8].sum(-1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mixer(x, None, Span.of(2, 25))[0], attention(mixer, *parts(mixer, x), bias))


@pytest.mark.parametrize(("positions", "sides"), [("grape_aq", "q"), ("grape_ak", "k"), ("grape_aqk", "qk")])
@torch.no_grad()
def test_gated_slopes_are_the_published_ones(positions: str, sides: str) -> None:
    mixer, x = layer(positions), normal(2, 25, WIDTH)
    q, k, v = parts(mixer, x)
    t, s = torch.arange(25)[:, None], torch.arange(25)
    slopes, bias = torch.tensor(alibi_slopes(HEADS), dtype=torch.float64), torch.zeros(2, HEADS, 25, 25).double()
    for side, value in (("q", q), ("k", k)):
        if side not in sides:
            assert getattr(mixer, f"{side}_slope") is None
            continue
        u = getattr(mixer, f"{side}_slope").direction
        gate = F.softplus((value * (u / u.norm(dim=-1, keepdim=True))).sum(-1) / HEAD**0.5) * slopes
        bias = bias - (t - s) * (gate.mT[..., None] if side == "q" else gate.mT[:, :, None])
    torch.testing.assert_close(mixer(x, None, Span.of(2, 25))[0], attention(mixer, q, k, v, bias))


@pytest.mark.parametrize("name", ENCODINGS)
@torch.no_grad()
def test_relative_encodings_are_added_to_the_scores(name: str) -> None:
    mixer, x = layer(f"rpe:{name}"), normal(2, 25, WIDTH)
    distance = (torch.arange(25)[:, None] - torch.arange(25)).clamp_min(0)
    bias = log_bias(ENCODINGS[name], alibi_slopes(HEADS))(distance.flatten()).unflatten(-1, (25, 25))
    torch.testing.assert_close(mixer(x, None, Span.of(2, 25))[0], attention(mixer, *parts(mixer, x), bias))


@torch.no_grad()
def test_learned_frequencies_begin_as_rope() -> None:
    x = normal(2, 25, WIDTH)
    outputs = [layer(kind)(x, None, Span.of(2, 25))[0] for kind in ("rope", "grape_m")]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)  # θ is kept as a float32 logarithm
    learned = layer("grape_m")
    assert learned.rope is not None
    assert learned.rope.log_theta is not None
    learned.rope.log_theta.add_(normal(HEADS, HEAD // 2))
    moved = learned(x, None, Span.of(2, 25, start=50_000))[0]
    torch.testing.assert_close(moved, learned(x, None, Span.of(2, 25))[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("positions", ["rope", "none"])
@torch.no_grad()
def test_without_an_order_every_token_reads_all(positions: str) -> None:
    mixer, x = layer(positions, causal=False), normal(2, 12, WIDTH)
    q, k, v = parts(mixer, x)
    if positions == "rope":
        angle = angles(torch.arange(12)[None], ladder(HEAD)[: HEAD // 2].double())[:, :, None]
        q, k = rope(q, angle), rope(k, angle)
    weights = (torch.einsum("bthk,bshk->bhts", q, k) / HEAD**0.5).softmax(-1)
    expected = torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x, None, Span.of(2, 12))[0], expected)
    packed = mixer(x[:1], None, Span.packed(torch.tensor([0, 5, 12])))[0]
    torch.testing.assert_close(packed[:, :5], mixer(x[:1, :5], None, Span.of(1, 5))[0])


@torch.no_grad()
def test_gains_of_the_qk_norm_leave_positions_relative() -> None:
    mixer, x = layer("rope", qk_norm=True), normal(1, 12, WIDTH)
    for norm in (mixer.q_norm, mixer.k_norm):
        norm.weight.copy_(normal(HEAD))
    near, far = (mixer(x, None, Span.of(1, 12, start=start))[0] for start in (0, 100_000))
    torch.testing.assert_close(far, near, rtol=1e-7, atol=1e-9)
    q, k, v = parts(mixer, x)
    q, k = (F.rms_norm(leaf, (HEAD,), normal(HEAD), 1e-5) for leaf in (q, k))
    angle = angles(torch.arange(12)[None], ladder(HEAD)[: HEAD // 2].double())[:, :, None]
    expected = attention(mixer, rope(q, angle), rope(k, angle), v, torch.zeros(12, 12).double())
    torch.testing.assert_close(near, expected)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 8, 9, 12])
@pytest.mark.parametrize("positions", [name for name in POSITIONS if name[:4] != "rpe:"] + ["rpe:inverse_log"])
def test_laws_hold_for_every_kind_of_position(positions: str, number: int) -> None:
    (law,) = (law for law in laws.LAWS if law.number == number)
    verdict = laws.judge(law, Layer("softmax", {"positions": positions, "kv_heads": 1, "qk_norm": True}))
    assert verdict.holds, f"{verdict.worst}: {verdict.error:.2e} > {verdict.limit:.0e}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"positions": "alibbi"}, "'alibbi' is not known; did you mean alibi"),
        ({"positions": "rpe:gausian"}, "did you mean rpe:gaussian"),
        (
            {"positions": "fox", "causal": False},
            "'fox' looks back only, and causal is false; choose rope, grape_m, none",
        ),
        ({"heads": 32}, "width / heads = 1 is odd, and RoPE turns pairs; make it even"),
    ],
)
def test_bad_positions_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(Softmax.Config, {"width": WIDTH, "heads": HEADS} | options, who="softmax")


def test_heads_of_one_channel_need_no_rotation() -> None:
    assert parse(Softmax.Config, {"width": 32, "heads": 32, "positions": "alibi"}, who="softmax").positions == "alibi"


def test_slopes_of_other_numbers_of_heads_come_from_the_next_power() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-h for h in range(1, 9)] + [2.0 ** -(h + 0.5) for h in range(4)]
