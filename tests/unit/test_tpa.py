"""Tensor product attention: its equations, plain attention as special cases, what it keeps and how it begins."""

from typing import Any

import pytest
import torch
from torch import Tensor

from isotach.config import parse
from isotach.errors import UserError
from isotach.mixers.tpa import TPA
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.mixer import Place, Scan, initialize
from isotach.ops import factored
from isotach.ops.engine import Span, run
from isotach.ops.factored import Factored
from isotach.ops.history import History
from isotach.rng import generator

H, K, V = 4, 6, 10


def normal(*shape: int, name: str = "") -> Tensor:
    return torch.randn(*shape, generator=generator(0, name, *map(str, shape)), dtype=torch.float64)


def factors(time: int, *, ranks: tuple[int, int, int] = (3, 2, 1)) -> Factored.Inputs:
    p, r, u = ranks
    shapes = ((p, H), (p, K), (r, H), (r, K), (u, H), (u, V))
    return Factored.Inputs(*(normal(2, time, *shape, name=str(i)) for i, shape in enumerate(shapes)))


def oracle(x: Factored.Inputs) -> Tensor:
    """The paper's equations, term by term."""
    q, k, v = (
        sum(a[:, :, r, :, None] * b[:, :, r, None, :] for r in range(a.shape[2])) / a.shape[2]
        for a, b in ((x.a_q, x.b_q), (x.a_k, x.b_k), (x.a_v, x.b_v))
    )
    scores = torch.einsum("bthk,bshk->bhts", q, k) / K**0.5
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def stepped(x: Any) -> Tensor:
    state, outputs = None, []
    for t in range(x[0].shape[1]):
        output, state = run(Factored(), type(x)(*(leaf[:, t : t + 1] for leaf in x)), state, Span.of(2, 1, start=t))
        outputs.append(output)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("ranks", [(3, 2, 1), (1, 1, 1), (1, 3, 2), (6, 1, 3)])
def test_whole_and_stepped_follow_the_equations(ranks: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way single tokens are read: through factors where that takes fewer multiplications."""
    x, taken, through = factors(12, ranks=ranks), [], factored.read_factors

    def noted(*parts: Tensor) -> Tensor:
        taken.append(1)
        return through(*parts)

    monkeypatch.setattr(factored, "read_factors", noted)
    expected = oracle(x)
    torch.testing.assert_close(run(Factored(), x, None, Span.of(2, 12))[0], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stepped(x), expected, rtol=1e-10, atol=1e-12)
    p, r, _ = ranks
    assert bool(taken) == (p * r * (H + K) < H * ((r + 1) * K + V))


def test_reading_through_factors_never_forms_whole_keys() -> None:
    p, r, u, heads, width, kept = 2, 2, 2, 32, 64, 500
    shapes = ((1, p, heads), (1, p, width), (kept, r, heads), (kept, r, width), (kept, u, heads), (kept, u, width))
    a_q, b_q, a_k, b_k, a_v, b_v = (normal(1, *shape, name=str(i)) for i, shape in enumerate(shapes))
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = op(*args, **(kwargs or {}))
            sizes.append(result.numel())
            return result

    with Sizes():
        output = factored.read_factors(a_q, b_q, a_k, b_k, a_v, b_v)
    q, k, v = factored.whole(a_q, b_q), factored.whole(a_k, b_k), factored.whole(a_v, b_v)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / width**0.5
    torch.testing.assert_close(output, torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v), rtol=1e-10, atol=1e-12)
    assert max(sizes) <= kept * r * max(heads, width) < kept * heads * width / 10


@pytest.mark.parametrize("groups", [1, 2, H], ids=["MQA", "GQA", "MHA"])
def test_fixed_head_factors_are_plain_attention(groups: int) -> None:
    """MHA: rank H, a_i = H e_i. MQA: rank 1, a = ones. GQA: rank G, a_j = G where group j's heads are."""
    time = 9
    members = groups * torch.eye(groups, dtype=torch.float64).repeat_interleave(H // groups, 1)
    own = H * torch.eye(H, dtype=torch.float64)
    q, k, v = normal(2, time, H, K), normal(2, time, groups, K, name="k"), normal(2, time, groups, V, name="v")
    a_q, a_kv = (leaf.expand(2, time, -1, -1) for leaf in (own, members))
    x = Factored.Inputs(a_q, q, a_kv, k, a_kv, v)
    expected = run(History(), History.Inputs(q, k, v), None, Span.of(2, time))[0]
    torch.testing.assert_close(run(Factored(), x, None, Span.of(2, time))[0], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stepped(x), expected, rtol=1e-12, atol=1e-13)


def layer(**options: Any) -> TPA:
    made = TPA(TPA.Config.model_validate({"width": 16, "heads": 2} | options), Place(0, 1))
    initialize(torch.nn.ModuleDict({"layer": made}), lambda name: generator(0, name), 0.3)
    return made


def test_an_ordinary_query_projection_is_the_kv_only_variant() -> None:
    mixer = layer(query_rank=None).double()
    x = normal(2, 7, 16)
    inputs, _ = mixer.project(x, Scan(None, Span.of(2, 7)))
    q = factored.whole(inputs.a_q, inputs.b_q)
    torch.testing.assert_close(q.square().sum(), (x @ mixer.b_q.weight.T).square().sum())  # turned, nothing else
    torch.testing.assert_close(q[:, 0].flatten(-2), x[:, 0] @ mixer.b_q.weight.T)


def test_scores_depend_on_distances_alone() -> None:
    mixer, x = layer().double(), normal(1, 20, 16)
    mixer.out.weight.data.copy_(normal(16, 16))
    near, _ = mixer(x, None, Span.of(1, 20))
    far, _ = mixer(x, None, Span.of(1, 20, start=100_000))
    torch.testing.assert_close(far, near, rtol=1e-7, atol=1e-9)


def test_only_factors_are_kept() -> None:
    table = {"vocab": 31, "width": 64, "depth": 1, "heads": 4, "hidden": 16, "pattern": ["tpa"]}
    options = {"own_heads": 7, "head_width": 8, "key_rank": 3, "value_rank": 2}
    decoder = Decoder(parse(ModelConfig, table | {"tpa": options}, who="test"))
    sizes = [decoder(torch.zeros(1, n, dtype=torch.int64))[1].nbytes() for n in (10, 11)]
    assert sizes[1] - sizes[0] == (3 + 2) * (7 + 8) * 4
    assert decoder.state_bytes(1000) - decoder.state_bytes(999) == (3 + 2) * (7 + 8) * 4


@pytest.mark.parametrize(
    ("query_rank", "parameters"),
    [(6, 64 * (6 + 2 + 2) * (7 + 8) + 64 * 7 * 8), (None, 64 * (2 + 2) * (7 + 8) + 2 * 64 * 7 * 8)],
)
def test_parameters_are_as_published(query_rank: int | None, parameters: int) -> None:
    mixer = layer(width=64, heads=4, own_heads=7, head_width=8, query_rank=query_rank)
    assert sum(p.numel() for p in mixer.parameters()) == parameters


@pytest.mark.parametrize(("init", "a", "b"), [("paper", 0.0678, 0.0653), ("released", 0.0306, 0.0095)])
def test_factors_begin_within_the_published_bounds(init: str, a: float, b: float) -> None:
    """d = 1024, h = 47, R = 6, K = 64; the code's view of the maps as 3-D tensors makes the second line."""
    mixer = layer(width=1024, heads=16, own_heads=47, head_width=64, init=init)
    assert mixer.a_q is not None
    assert float(mixer.a_q.weight.detach().abs().max()) == pytest.approx(a, rel=0.005)
    assert float(mixer.b_q.weight.detach().abs().max()) == pytest.approx(b, rel=0.01)
    assert not mixer.out.weight.any()


def test_rounded_factors_decode_as_they_were_read() -> None:
    """bfloat16: factors' errors multiply, and both ways must make them alike."""
    x = Factored.Inputs(*(leaf.bfloat16() for leaf in factors(12)))
    whole, steps = run(Factored(), x, None, Span.of(2, 12))[0], stepped(x)
    assert whole.dtype == steps.dtype == torch.bfloat16
    assert (steps - whole).float().norm() < 1e-2 * whole.float().norm()


def test_odd_heads_are_told() -> None:
    with pytest.raises(UserError, match="heads of 9 are odd, and RoPE turns pairs; make head_width even"):
        parse(TPA.Config, {"width": 16, "heads": 2, "head_width": 9}, who="tpa")
