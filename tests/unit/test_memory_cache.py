"""Memory caching against explicit sums over segments, and the laws with it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.memory_cache import CacheConfig, MemoryCache
from isotach.nn.mixer import Scan
from isotach.ops.decay import Decay
from isotach.ops.delta import Delta
from isotach.ops.elementwise import Elementwise
from isotach.ops.engine import Span, run
from isotach.rng import generator
from isotach.testing import laws
from isotach.testing.subjects import Layer

B, T, H, K, V, D, L = 2, 23, 2, 4, 3, 6, 5


def drawn(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(0, name), dtype=torch.float64)


def example(*, decay: float = 0.0) -> tuple[Decay.Inputs, Tensor]:
    q, k, v, x = drawn("q", B, T, H, K), drawn("k", B, T, H, K), drawn("v", B, T, H, V), drawn("x", B, T, D)
    return Decay.Inputs(q, k, v, torch.full((B, 1, H, 1), -decay, dtype=torch.float64)), x


def cached(rec: Any, inputs: Any, x: Tensor, **options: Any) -> Tensor:
    cache = MemoryCache(D, CacheConfig(segment=L) if not options else CacheConfig(**{"segment": L, **options})).double()
    if cache.route is not None:
        torch.nn.init.normal_(cache.route.weight, generator=generator(0, "route"))
    output: Tensor = cache(rec, inputs, x, Scan(None, Span.of(*x.shape[:2])))
    return output


def gates(x: Tensor, *, top: int | None = None) -> Tensor:
    """γ (B, T, segments), from the definition: the mean of each earlier segment, and of the running one so far."""
    weight = torch.empty(D, D, dtype=torch.float64).normal_(generator=generator(0, "route"))
    table = torch.zeros(B, T, (T - 1) // L + 1, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            own = t // L
            means = [x[b, i * L : (i + 1) * L].mean(0) for i in range(own)] + [x[b, own * L : t + 1].mean(0)]
            scores = torch.stack([(weight @ x[b, t]) @ c for c in means]) / D**0.5
            if top is not None and own > top:
                scores[:own][scores[:own].argsort(descending=True)[top:]] = -torch.inf
            table[b, t, : own + 1] = scores.softmax(0)
    return table


def weighed(inputs: Decay.Inputs, table: Tensor) -> Tensor:
    """Σ_{j ≤ t} (q_t · k_j) table[t, segment of j] v_j."""
    segment = torch.arange(T) // L
    scores = torch.einsum("bthk,bshk->bhts", inputs.q, inputs.k).tril() * table[:, None, :, segment]
    return torch.einsum("bhts,bshv->bthv", scores, inputs.v)


def test_residual_with_restart_is_plain_linear_attention() -> None:
    inputs, x = example()
    plain, _ = run(Decay(), inputs, None, Span.of(B, T))
    torch.testing.assert_close(cached(Decay(), inputs, x, read="residual"), plain)


def test_residual_with_checkpoints_counts_a_segment_once_for_every_copy() -> None:
    inputs, x = example()
    segment = torch.arange(T) // L
    table = torch.stack([(segment[t] - torch.arange(segment[-1] + 1) + 1).clamp_min(0) for t in range(T)]).double()
    got = cached(Decay(), inputs, x, read="residual", start="checkpoint")
    torch.testing.assert_close(got, weighed(inputs, table.expand(B, -1, -1)))


@pytest.mark.parametrize("read", ["gated", "soup"])
def test_gated_reading_weighs_every_segment(read: str) -> None:
    inputs, x = example()
    torch.testing.assert_close(cached(Decay(), inputs, x, read=read), weighed(inputs, gates(x)))


def test_soup_reads_the_average_memory() -> None:
    inputs, x = example()
    table, t = gates(x), 17
    parts = [slice(i * L, min((i + 1) * L, t + 1)) for i in range(t // L + 1)]
    memories = torch.stack([torch.einsum("bshk,bshv->bhkv", inputs.k[:, p], inputs.v[:, p]) for p in parts], 1)
    average = torch.einsum("bn,bnhkv->bhkv", table[:, t, : t // L + 1], memories)
    expected = torch.einsum("bhk,bhkv->bhv", inputs.q[:, t], average)
    torch.testing.assert_close(cached(Decay(), inputs, x, read="soup")[:, t], expected)


def test_sparse_reading_keeps_the_highest_scores() -> None:
    inputs, x = example()
    got = cached(Decay(), inputs, x, read="sparse", top=2)
    torch.testing.assert_close(got, weighed(inputs, gates(x, top=2)))
    assert not torch.allclose(got, cached(Decay(), inputs, x, read="gated"))


def test_gated_checkpoints_are_running_sums_of_gates() -> None:
    inputs, x = example()
    table = gates(x).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(cached(Decay(), inputs, x, start="checkpoint"), weighed(inputs, table))


def test_segments_of_one_token_are_softmax_attention() -> None:
    x, v = drawn("x", B, T, D), drawn("v", B, T, 1, V)
    zeros = torch.zeros(B, T, 1, V, dtype=torch.float64)
    got = cached(Elementwise(), Elementwise.Inputs(v, zeros), x, segment=1)
    weight = torch.empty(D, D, dtype=torch.float64).normal_(generator=generator(0, "route"))
    q = torch.nn.functional.linear(x, weight)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, x[:, None], v.transpose(1, 2), is_causal=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_a_delta_memory_is_cached_as_its_own_final_state() -> None:
    inputs, x = example()
    k = inputs.k / inputs.k.norm(dim=-1, keepdim=True)
    beta = drawn("beta", B, T, H, 1).sigmoid()
    delta = Delta.Inputs(inputs.q, k, inputs.v, beta, torch.zeros(B, 1, H, 1, dtype=torch.float64))
    got, table = cached(Delta(), delta, x), gates(x)
    expected = torch.zeros_like(got)
    for i in range(T // L + 1):
        part = slice(i * L, min((i + 1) * L, T))
        own = Delta.Inputs(*(leaf[:, part] if leaf.shape[1] == T else leaf for leaf in delta))
        inside, state = run(Delta(), own, None, Span.of(B, part.stop - part.start))
        expected[:, part] += table[:, part, i, None, None] * inside
        later = torch.einsum("bthk,bhkv->bthv", inputs.q[:, part.stop :], state.state)
        expected[:, part.stop :] += table[:, part.stop :, i, None, None] * later
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 8, 9])
@pytest.mark.parametrize("start", ["restart", "checkpoint"])
def test_laws_hold_with_cached_memories(start: str, number: int) -> None:
    (law,) = (law for law in laws.LAWS if law.number == number)
    subject = Layer("lightning", {"cache": {"segment": 5, "start": start}})
    subject.variants = ("middle",)
    verdict = laws.judge(law, subject)
    assert verdict.cases, "the law concerns it"
    assert verdict.holds, f"{verdict.worst}: {verdict.error:.2e}"


def test_a_growing_memory_is_refused() -> None:
    table = {
        "vocab": 11,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "hidden": 16,
        "pattern": ["softmax"],
        "softmax": {"cache": {}},
    }
    with pytest.raises(ValueError, match="softmax: memory caching copies states of constant size"):
        Decoder(ModelConfig.model_validate(table))
