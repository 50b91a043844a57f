"""TransNormer against its equations, the bound that its norm puts on gradients, and the published sizes."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from isotach import mixers
from isotach.config import parse
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.mixer import Place, Scan, initialize
from isotach.nn.norm import SRMSNorm
from isotach.ops.engine import Span
from isotach.rng import generator

TRANSNORMER: Any = mixers.find("transnormer")
WIDTH, HEADS, HEAD, TIME = 16, 2, 8, 29
EPS = 1e-6


def layer(**options: Any) -> Any:
    """A layer in float64 with random biases too."""
    module = TRANSNORMER(TRANSNORMER.Config(width=WIDTH, heads=HEADS, **options), Place(0, 2))
    initialize(nn.ModuleDict({"mixer": module}), partial(generator, 0), 0.02)
    for name in ("q", "k", "v", "out"):
        nn.init.normal_(getattr(module, name).bias, std=0.3, generator=generator(0, name))
    return module.double()


def tokens(time: int = TIME) -> Tensor:
    return torch.randn(2, time, WIDTH, dtype=torch.float64, generator=generator(0, "x"))


def encoded(module: Any, y: Tensor) -> Tensor:
    """LRPE as matrices: Householder's reflection, then every pair (2j, 2j + 1) turned by t θ_j."""
    mirror, theta = nn.functional.normalize(module.encode.mirror, dim=0), module.encode.theta.detach()
    reflection = torch.eye(HEAD, dtype=torch.float64) - 2 * torch.outer(mirror, mirror)
    turned = []
    for t in range(y.shape[1]):
        turns = [torch.tensor([[c, -s], [s, c]]) for c, s in zip((t * theta).cos(), (t * theta).sin(), strict=True)]
        rotation = torch.block_diag(*turns)
        turned.append(y[:, t] @ (rotation @ reflection).T)
    return torch.stack(turned, 1)


def explicit(module: Any, x: Tensor, kind: str, block: int | None) -> Tensor:
    """Every weight of every token for every token; `block` None is NormAttention."""
    q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (module.q, module.k, module.v))
    if block is None:
        shift = 1.0 if kind == "t2" else 0.0
        q, k = (torch.where(y > 0, y, y.exp() - 1) + shift for y in (q, k))
    scores = torch.einsum("bthk,bshk->bhts", encoded(module, q), encoded(module, k))
    t = torch.arange(x.shape[1])
    past = t[:, None] >= t
    if block is None:
        weights = scores * past
    else:
        own = past & (t[:, None] // block == t // block)
        scores = scores / HEAD**0.5
        weights = scores.masked_fill(~own, -torch.inf).softmax(-1) if kind == "t2" else scores.relu() * own
    o = torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2)
    if block is None or kind == "t1":
        o = o / (o.square().mean(-1, keepdim=True) + EPS).sqrt()
    return module.out(o)


@pytest.mark.parametrize("kind", ["t1", "t2"])
@pytest.mark.parametrize("block", [None, 1, 8, 64])
def test_layer_is_its_explicit_form(kind: str, block: int | None) -> None:
    diag = "none" if block is None else "all"
    module, x = layer(type=kind, diag=diag, block=block or 64), tokens()
    got = module(x, None, Span.of(2, TIME))[0]
    # theta and the mirror are float32, as a model keeps them
    torch.testing.assert_close(got, explicit(module, x, kind, block), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("diag", ["none", "all"])
def test_a_complex_core_weighs_products_by_cosines(diag: str) -> None:
    """Its scores are Σ_j q_j k_j cos((t - s) θ_j), and 1/√K is that of K channels, not of the 2K it makes."""
    module, x = layer(diag=diag, core="complex", basis="identity"), tokens()
    inputs, _ = module.project(x, Scan(None, Span.of(2, TIME)))
    scores = torch.einsum("bthk,bshk->bhts", inputs.q, inputs.k)
    q, k = (f(x).unflatten(-1, (HEADS, -1)) for f in (module.q, module.k))
    if diag == "none":
        q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
    t = torch.arange(TIME, dtype=torch.float64)
    cosines = torch.cos((t[:, None] - t)[..., None] * module.encode.theta)
    expected = torch.einsum("bthk,bshk,tsk->bhts", q, k, cosines)
    if diag == "all":
        expected, scores = expected / HEAD**0.5, scores / (2 * HEAD) ** 0.5  # the family divides by its own width
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"type": "t1"}, {}, {"core": "mixed"}, {"core": "permutation"}, {"core": "complex", "basis": "dft"}]
)
@pytest.mark.parametrize("diag", ["none", "all"])
def test_only_distances_matter(options: dict[str, str], diag: str) -> None:
    """Positions shift; blocks are counted from the first token read, wherever it stands."""
    module, x = layer(diag=diag, block=8, **options), tokens()
    here, there = (module(x, None, Span.of(2, TIME, start=start))[0] for start in (0, 1000))
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)


@given(exponent=st.floats(-9, 3), tokens=st.integers(1, 12), width=st.integers(1, 8), seed=st.integers(0, 1 << 20))
def test_the_norm_bounds_gradients_of_scores(exponent: float, tokens: int, width: int, seed: int) -> None:
    """|dL/ds_ij| ≤ c1 c2 / √eps with c1 the largest |dL/do_i| and c2 the largest |v_j|, whatever the scores."""
    norm = SRMSNorm(width, eps=EPS)
    scores, values, slopes = (
        torch.randn(tokens, n, dtype=torch.float64, generator=generator(seed, name))
        for name, n in (("scores", tokens), ("values", width), ("slopes", width))
    )
    scores = (scores.tril() * 10**exponent).requires_grad_()
    gradient = torch.autograd.grad((norm(scores @ values) * slopes).sum(), scores)[0]
    bound = slopes.norm(dim=1).max() * values.norm(dim=1).max() / EPS**0.5
    assert float(gradient.abs().max()) <= float(bound) * (1 + 1e-9)


def test_the_bound_is_reached_and_a_sum_of_weights_has_none() -> None:
    """One token reads two values that cancel, with equal scores s: 1/√eps for every s, against 1 / 2s."""
    norm, values = SRMSNorm(1, eps=EPS), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    for size in (1e-3, 1e-6, 1e-9):
        scores = torch.full((1, 2), size, dtype=torch.float64).requires_grad_()
        normed = torch.autograd.grad(norm(scores @ values).sum(), scores)[0]
        summed = torch.autograd.grad((scores / scores.sum() @ values).sum(), scores)[0]
        torch.testing.assert_close(normed, values.T / EPS**0.5)
        torch.testing.assert_close(summed, values.T / (2 * size))


def test_the_first_half_of_the_layers_is_diag() -> None:
    kinds = [layer_of(index, 6).diag for index in range(6)]
    assert kinds == [True] * 3 + [False] * 3
    assert layer_of(0, 6).norm is None  # T2 has none after softmax
    assert layer_of(0, 6, type="t1").norm is not None
    assert layer_of(5, 6).norm is not None


def layer_of(index: int, depth: int, **options: Any) -> Any:
    return TRANSNORMER(TRANSNORMER.Config(width=WIDTH, heads=HEADS, **options), Place(index, depth))


@pytest.mark.parametrize(("diag", "gain"), [("all", 1.0), ("none", 0.5**0.5)])
def test_weights_begin_as_released(diag: str, gain: float) -> None:
    module = TRANSNORMER(TRANSNORMER.Config(width=64, heads=2, diag=diag), Place(0, 1))
    initialize(nn.ModuleDict({"mixer": module}), partial(generator, 0), 0.02)
    xavier = (6 / (64 + 64)) ** 0.5
    for name, own in (("q", gain), ("k", gain), ("v", gain), ("out", 1.0)):
        projection = getattr(module, name)
        assert 0.99 * own * xavier < float(projection.weight.detach().abs().max()) <= own * xavier * (1 + 1e-6)
        assert not projection.bias.any()
    torch.testing.assert_close(module.encode.theta.detach(), 10000 ** (-2 * torch.arange(16) / 32))


MODEL = {"width": 512, "depth": 6, "heads": 8, "hidden": 1365, "pattern": ["transnormer"]}


@pytest.mark.parametrize(("vocab", "printed"), [(50264, 44.65e6), (267744, 156.0e6)])
def test_published_sizes(vocab: int, printed: float) -> None:
    """Of WikiText-103 in pieces and in words. The decoder's GLU has no biases: 2 · 1365 + 512 a layer are missing."""
    with torch.device("meta"):
        count = Decoder(parse(ModelConfig, MODEL | {"vocab": vocab}, who="test")).parameter_count()
    attention = 4 * (512 * 512 + 512) + 512 // 8 // 2
    assert count == vocab * 512 + 6 * (attention + 3 * 512 * 1365)
    assert abs((count + 6 * (2 * 1365 + 512)) / printed - 1) < 3e-4


def test_the_mirror_is_drawn_from_the_seed_and_saved() -> None:
    table = {"vocab": 9, "width": 16, "depth": 2, "heads": 2, "hidden": 8, "pattern": ["transnormer"]}
    model, same, other = (Decoder(parse(ModelConfig, table, who="test"), seed=seed) for seed in (0, 0, 1))
    assert model.fingerprint() == same.fingerprint()
    mirrors = [m.state_dict()[f"blocks.{i}.mixer.encode.mirror"] for m in (model, other) for i in range(2)]
    assert len({tuple(mirror.tolist()) for mirror in mirrors}) == 4


def test_state_does_not_grow() -> None:
    """Bytes per layer as published, in float32: 4 D K of NormAttention, 8 w D and the length of DiagAttention."""
    model = Decoder(parse(ModelConfig, MODEL | {"vocab": 16, "depth": 2}, who="test"))
    assert model.state_bytes(1) == model.state_bytes(100_000) == 4 * 512 * 64 + 8 * 64 * 512 + 8


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"width": 9, "heads": 3}, "width / heads = 3 is odd, and LRPE turns pairs; make it even"),
        ({"width": 8, "heads": 2, "basis": "dft"}, 'core = "rotation" is not; set core = "complex"'),
        ({"width": 8, "heads": 2, "block": 0}, "block: input should be greater than or equal to 1; got 0"),
    ],
)
def test_bad_options_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(TRANSNORMER.Config, table, who="test")
