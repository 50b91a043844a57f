"""HGRN and HGRN2 against loops over tokens in complex float64, and their forget gates against 60 decimal digits."""

from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isotach import config
from isotach.errors import UserError
from isotach.mixers.hgrn import Hgrn
from isotach.mixers.hgrn2 import Hgrn2
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.bounds import Bound, LowerBounds
from isotach.nn.mixer import Mixer, Place
from isotach.ops.engine import Span
from isotach.rng import generator

DEPTH, WIDTH, HEADS = 4, 6, 2
BOUNDS = get_args(Bound)


def normal(*shape: int, name: str = "", std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=generator(0, name, *map(str, shape)), dtype=torch.float64)


def floors(logits: Tensor, bound: str) -> Tensor:
    """γ (L, D) by the formulas as printed."""
    p = logits.softmax(0)
    return p.cumsum(0) - (p[0] if bound == "inclusive-minus-first" else p)


def build(cls: type[Mixer], index: int, *, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Mixer, Tensor]:
    """A layer with every weight random, Γ too."""
    place = Place(index, DEPTH)
    mixer = cls(cls.Config(width=WIDTH, heads=HEADS, **options), place).double()
    place.shared.double()
    (bounds,) = place.shared.values()
    with torch.no_grad():
        for name, parameter in [*mixer.named_parameters(), ("bounds", bounds.logits)]:
            if name != "theta":
                parameter.copy_(normal(*parameter.shape, name=name, std=0.7))
    place.shared.to(dtype)
    return mixer.to(dtype), bounds.logits


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# ---- the layers


def hgrn(m: Any, logits: Tensor, x: Tensor) -> Tensor:
    """The published layer on x (B, T, D) as a loop over complex numbers."""
    c = F.silu(m.content(x))
    if m.theta is None:
        c, turn = c.to(torch.complex128), torch.ones(WIDTH, dtype=torch.complex128)
    else:
        c, turn = torch.complex(c[..., 0::2], c[..., 1::2]), torch.exp(1j * m.theta)
    gamma = floors(logits, m.bound)[m.place.index]
    f = gamma + (1 - gamma) * torch.sigmoid(m.forget(x))
    h, states = torch.zeros_like(c[:, 0]), []
    for t in range(x.shape[1]):
        h = f[:, t] * turn * h + (1 - f[:, t]) * c[:, t]
        states.append(h)
    h = torch.stack(states, 1)
    h = h.real if m.theta is None else torch.cat([h.real, h.imag], -1)
    return m.out(m.norm(h) * m.activation(m.gate(x)))


def hgrn2(m: Any, logits: Tensor, x: Tensor) -> Tensor:
    """The published layer as one sum over all pairs of tokens."""
    v, q, z = m.read(x).split(WIDTH, -1)
    v, q = (F.silu(v), torch.sigmoid(q)) if m.wikitext else (v, F.silu(q))
    gamma = floors(logits, m.bound)[m.place.index]
    f = gamma + (1 - gamma) * torch.sigmoid(z)
    v, q, f = (part.unflatten(-1, (HEADS, -1)) for part in (v, q, f))
    since = f.log().cumsum(1)
    fade = (since[:, :, None] - since[:, None]).exp()
    o = torch.einsum("bthd,bshd,btshd,bshe->btshe", q, 1 - f, fade, v)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
    o = torch.einsum("btshe,ts->bthe", o, causal).flatten(2)
    return m.out(m.norm(o) if m.wikitext else o / (o.square().mean(-1, True) + 1e-6).sqrt())


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize(
    ("cls", "oracle", "options"),
    [
        (Hgrn, hgrn, {"bound": "inclusive-minus-first"}),
        (Hgrn, hgrn, {"bound": "exclusive", "gate": "sigmoid"}),
        (Hgrn, hgrn, {"complex": False}),
        (Hgrn2, hgrn2, {"bound": "exclusive"}),
        (Hgrn2, hgrn2, {"variant": "wikitext"}),
    ],
)
def test_layers_and_all_their_gradients_are_those_published(
    cls: type[Mixer], oracle: Any, options: Any, index: int
) -> None:
    mixer, logits = build(cls, index, **options)
    x, weights = normal(2, 40, WIDTH, name="x").requires_grad_(), normal(2, 40, WIDTH, name="weights")
    leaves = [x, logits, *mixer.parameters()]
    results = []
    for y in (mixer(x, None, Span.of(2, 40))[0], oracle(mixer, logits, x)):
        grads = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append([y, *grads])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert bool((results[0][2] != 0).any()) == (index > 0)  # the first layer has no floor; the others move Γ


def test_the_ladder_of_angles() -> None:
    mixer, _ = build(Hgrn, 0)
    expected = torch.tensor([10000.0 ** (-2 * j / WIDTH) for j in range(WIDTH)])
    torch.testing.assert_close(mixer.theta.detach().float(), expected)


@pytest.mark.parametrize("bias", [-40.0, 40.0])
@pytest.mark.parametrize("cls", [Hgrn, Hgrn2])
def test_saturated_gates_are_finite_and_accurate_in_float32(cls: type[Mixer], bias: float) -> None:
    results = []
    for dtype in (torch.float64, torch.float32):
        mixer, logits = build(cls, 2, dtype=dtype, **({"variant": "wikitext"} if cls is Hgrn2 else {}))
        shift = mixer.forget.bias if cls is Hgrn else mixer.read.bias[2 * WIDTH :]
        with torch.no_grad():
            shift.add_(bias)
        x = normal(2, 60, WIDTH, name="x").to(dtype).requires_grad_()
        inputs, _ = mixer.project(x, _Scan(Span.of(2, 60)))
        y = mixer(x, None, Span.of(2, 60))[0]
        grads = torch.autograd.grad(y.sum(), [x, logits])
        results.append([inputs.v if cls is Hgrn else inputs.k, inputs.log_decay, y, *grads])
    for exact, got in zip(*results, strict=True):
        assert got.isfinite().all()
        assert error(got.double(), exact) < 1e-5


class _Scan:
    """All that `project` asks of a call."""

    def __init__(self, span: Span) -> None:
        self.span = span


# ---- the floors


@pytest.mark.parametrize("bound", BOUNDS)
def test_floors_start_at_zero_rise_and_stay_below_one(bound: Bound) -> None:
    bounds = LowerBounds(12, 50)
    for scale in (0.0, 1.0, 8.0):
        with torch.no_grad():
            bounds.logits.copy_(normal(12, 50, std=scale))
        logs = [bounds.floor(layer, bound) for layer in range(12)]
        gamma, room = (torch.stack(rows).exp() for rows in zip(*logs, strict=True))
        assert (gamma[0] == 0).all()
        assert (gamma.diff(dim=0) >= 0).all()
        assert (room > 0).all()
        torch.testing.assert_close(gamma.double(), floors(bounds.logits.double(), bound), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gamma + room, torch.ones(12, 50))


def test_floors_agree_until_trained() -> None:
    bounds = LowerBounds(5, 3)
    for layer in range(5):
        for bound in BOUNDS:
            torch.testing.assert_close(bounds.floor(layer, bound)[0].exp(), torch.full((3,), layer / 5))
    with torch.no_grad():
        bounds.logits.copy_(normal(5, 3))
        a, b = (bounds.floor(2, bound)[0].exp() for bound in BOUNDS)
    assert float((a - b).abs().max()) > 0.1


def decimal_gate(logits: list[float], z: float) -> tuple[float, float]:
    """ln f and 1 - f of layer 1 to 60 digits; its floor is P_1."""
    with localcontext() as context:
        context.prec = 60
        p = [Decimal(value).exp() for value in logits]
        floor, sigmoid = p[1] / sum(p), 1 / (1 + (-Decimal(z)).exp())
        f = floor + (1 - floor) * sigmoid
        return float(f.ln()), float(1 - f)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float64, 4e-15)])
def test_gates_are_relatively_accurate_wherever_they_saturate(dtype: torch.dtype, limit: float) -> None:
    rows = [
        [-99.0, 0, 0, 0, -9],
        [-99, -20.5, -2, 2, 0],
        [0, 0, 0, -3, -12],
    ]  # floors e^-99, 1e-9, 0.06, 0.87, 1 - 1e-4
    bounds = LowerBounds(3, 5).to(dtype)
    with torch.no_grad():
        bounds.logits.copy_(torch.tensor(rows))
    z = torch.tensor([-40.0, -17, -3, -0.1, 0, 0.1, 3, 17, 40], dtype=dtype).requires_grad_()
    gates = bounds.forget(z[:, None].expand(-1, 5), 1, "inclusive-minus-first")
    exact = [[decimal_gate(list(column), float(value)) for column in zip(*rows, strict=True)] for value in z.detach()]
    for got, expected in zip(gates, torch.tensor(exact, dtype=torch.float64).unbind(-1), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=limit, atol=0)
        (grad,) = torch.autograd.grad(got.sum(), z, retain_graph=True)
        assert grad.isfinite().all()
    assert (gates[0] <= 0).all()
    for without, least in zip(bounds.forget(z, 0, "inclusive-minus-first"), gates, strict=True):
        torch.testing.assert_close(without, least[:, 0], rtol=limit, atol=0)


# ---- in a model


def model(pattern: tuple[str, ...], depth: int) -> Decoder:
    return Decoder(ModelConfig(vocab=11, width=WIDTH, depth=depth, heads=HEADS, hidden=8, pattern=pattern))


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_one_parameter_for_all_layers_with_gradients_from_each(name: str, tmp_path: Path) -> None:
    decoder = model((name,), 3)
    key = f"shared.{name}_bounds.logits"
    assert [k for k in decoder.state_dict() if "bounds" in k] == [key]
    logits = decoder.get_parameter(key)
    assert logits.shape == (3, WIDTH)
    for layer, block in enumerate(decoder.blocks):
        x = normal(1, 9, WIDTH).float()
        y, _ = block(x, None, Span.of(1, 9), {})
        (grad,) = torch.autograd.grad(y.square().sum(), logits, allow_unused=True, materialize_grads=True)
        assert bool(grad.any()) == (layer > 0)

    with torch.no_grad():
        logits.copy_(normal(3, WIDTH))
    decoder.save(tmp_path)
    tokens = torch.arange(8).view(1, 8)
    assert torch.equal(decoder(tokens)[0], Decoder.load(tmp_path)(tokens)[0])


def test_a_pattern_of_both_has_floors_for_both_over_all_layers() -> None:
    decoder = model(("hgrn", "lightning", "hgrn2"), 6)
    shapes = {name: tuple(value.shape) for name, value in decoder.shared.named_parameters()}
    assert shapes == {"hgrn_bounds.logits": (6, WIDTH), "hgrn2_bounds.logits": (6, WIDTH)}
    assert decoder(torch.zeros(1, 4, dtype=torch.int64))[0].isfinite().all()


def test_an_unknown_bound_is_refused_in_one_sentence() -> None:
    data = {"vocab": 11, "width": 6, "depth": 1, "heads": 2, "hidden": 8, "pattern": ["hgrn"], "hgrn": {"bound": "max"}}
    with pytest.raises(UserError, match=r"hgrn.*bound.*inclusive-minus-first") as refusal:
        config.parse(ModelConfig, data, who="recipe")
    assert "\n" not in str(refusal.value)
