"""Draws against the distribution they claim, noise against a definition in Python numbers, and one way against another.

Where logits are to be the same whatever the tiles, states and weights are small integers: their products are exact.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isotach.bench import limits
from isotach.bench import sample as bench
from isotach.errors import UserError
from isotach.infer.sample import Sampling, filtered
from isotach.ops import sampling
from isotach.ops.sampling import (
    Drawn,
    Filters,
    Key,
    Tilt,
    choose,
    gumbel,
    merge,
    philox,
    sample,
    sample_filtered,
    sample_logits,
    stacked,
)
from isotach.rng import generator

VOCAB = 36
DRAWS = 10_000


def exact(*shape: int, name: str, scale: float = 0.125) -> Tensor:
    """Multiples of `scale` whose products float32 adds up without rounding."""
    return torch.randint(-8, 9, shape, generator=generator(0, name)).float() * scale


def tilt(rows: int, temperature: float = 1.0, **columns: Tensor) -> Tilt:
    return Tilt(torch.full((rows,), temperature), **columns)


def chi_square(tokens: Tensor, probability: Tensor) -> float:
    """Of counts against a distribution, as a multiple of the largest that one exact sampler in 1e5 shows."""
    counts = tokens.flatten().bincount(minlength=len(probability)).double()
    assert len(counts) == len(probability)
    assert counts[probability == 0].sum() == 0
    possible = probability > 0
    expected = probability[possible] * tokens.numel()
    freedom = int(possible.sum()) - 1
    found = ((counts[possible] - expected) ** 2 / expected).sum().item()
    return found / (freedom + 4 * math.sqrt(2 * freedom) + 4)


# ---- noise


def test_philox_is_the_published_one() -> None:
    """The known answers that come with Random123."""
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in known:
        got = philox(tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key))
        assert tuple(int(word) for word in got) == words


def words(seed: int, *counter: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    a, b, c, d = counter
    keys = [seed % 2**32, seed >> 32]
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = y >> 32 ^ b ^ keys[0], y % 2**32, x >> 32 ^ d ^ keys[1], x % 2**32
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return [a, b, c, d]


WORD = st.integers(0, 2**32 - 1)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63 - 1), position=WORD, row=WORD, token=st.integers(0, 2**32 - 8), size=st.integers(1, 7))
def test_noise_is_a_function_of_what_it_is_for(seed: int, position: int, row: int, token: int, size: int) -> None:
    key = Key(*(torch.tensor([7, leaf]) for leaf in (seed, position, row)))
    ids = torch.arange(token, token + size)
    noise = sampling._gumbel_range(key, token, token + size, 3)
    assert torch.equal(noise, gumbel(key, ids[None], 3))
    assert torch.equal(noise[1:], gumbel(Key(*(leaf[1:] for leaf in key)), ids[None], 3))
    for s in range(3):
        for place, each in enumerate(ids.tolist()):
            u = min((words(seed, position, row, s, each // 4)[each % 4] + 0.5) / 2**32, 1 - 2**-24)
            assert noise[1, s, place].item() == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-5)


def test_noise_has_a_fine_upper_tail_and_no_infinity() -> None:
    """u rounds to 1 where the word is largest, and -log1p(-1) is infinite; small u are what large noise comes from."""
    ends = sampling._gumbel(torch.tensor([0, 1, 2, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]))
    assert ends[0].item() == pytest.approx(33 * math.log(2), rel=1e-6)
    assert ends[-1].item() == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert bool((ends.diff() <= 0).all())
    assert len(set(sampling._gumbel(torch.arange(20_000)).tolist())) > 19_500  # of float32 near 22 there are not more


@pytest.mark.parametrize("field", ["seed", "position", "row", "sample"])
def test_noise_is_independent_along_everything_that_keys_it(field: str) -> None:
    """Sample s of seed n is not sample 0 of seed n + s; what differs in one word is not correlated."""
    count = torch.arange(2000)
    if field == "sample":
        noise = gumbel(Key.of(3, 5, 1), torch.arange(8)[None], 2000)[0]
    else:
        key = Key.of(3, 5, 2000)._replace(row=torch.full_like(count, 7))
        noise = gumbel(key._replace(**{field: count}), torch.arange(8)[None], 1)[:, 0]
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.04)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.06)
    beside = torch.cat([noise, noise.roll(1, 0)], -1).double()
    off = beside.T.corrcoef() - torch.eye(16)
    assert off.abs().max() < 0.1  # 4.5 standard deviations


# ---- draws


def given_logits(vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """A state, weights, and their logits."""
    hidden, weight = exact(1, 6, name="state"), exact(vocab, 6, name=f"weight{vocab}", scale=0.25)
    return hidden, weight, (hidden @ weight.mT)[0]


def many(count: int, *, seed: int = 5, over: str = "position") -> Key:
    key = Key.of(seed, 0, count)
    return (
        key if over == "row" else Key.of(seed, 9, count)._replace(**{over: key.row, "row": torch.zeros_like(key.row)})
    )


@pytest.mark.parametrize("over", ["position", "row", "seed", "sample"])
def test_draws_follow_the_distribution(monkeypatch: pytest.MonkeyPatch, over: str) -> None:
    monkeypatch.setitem(sampling.TILE, "cpu", 10 * DRAWS)  # tiles of ten tokens
    hidden, weight, logits = given_logits()
    rows = 1 if over == "sample" else DRAWS
    key = Key.of(5, 0, 1) if over == "sample" else many(DRAWS, over=over)
    bias = exact(1, VOCAB, name="bias")
    bias[0, 3] = -torch.inf
    drawn = sample(hidden.expand(rows, -1), weight, key, tilt(rows, 0.7, bias=bias), samples=DRAWS // rows)
    expected = ((logits + bias[0]).double() / 0.7).softmax(0)
    assert chi_square(drawn.token, expected) < 1
    torch.testing.assert_close(drawn.logprob.double(), expected.log()[drawn.token], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.mass.double(), ((logits + bias[0]).double() / 0.7).logsumexp(0).expand(rows))


def shards(rows: int, cuts: tuple[int, ...], *, wrong: bool = False, **how: Any) -> Drawn:
    """Draws from stretches of the vocabulary; `wrong` gives each shard the noise of the first, as if ids were local."""
    hidden, weight, _ = given_logits()
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, VOCAB), strict=True):
        key = how.get("keys", {}).get(start, many(rows))
        part = sample(hidden.expand(rows, -1), weight[start:stop], key, tilt(rows), start=0 if wrong else start)
        parts.append(part._replace(token=part.token + start) if wrong else part)
    return stacked(parts)


def test_shards_merge_into_the_draw_from_all() -> None:
    hidden, weight, logits = given_logits()
    whole = sample(hidden.expand(DRAWS, -1), weight, many(DRAWS), tilt(DRAWS))
    merged = merge(shards(DRAWS, (1, 14, 15)))
    assert torch.equal(merged.token, whole.token)
    assert torch.equal(merged.score, whole.score)
    torch.testing.assert_close(merged.logprob, whole.logprob)
    torch.testing.assert_close(merged.mass, whole.mass)
    assert chi_square(merged.token, logits.double().softmax(0)) < 1


def test_shards_that_share_noise_are_found_out() -> None:
    """What happens when noise is keyed by a rank's own ids, with one seed on all ranks: the test above can fail."""
    _, _, logits = given_logits()
    assert chi_square(merge(shards(DRAWS, (9, 18, 27), wrong=True)).token, logits.double().softmax(0)) > 20


@pytest.mark.parametrize("cuts", [(12, 24), (1, 30, 31)])
def test_a_shard_is_chosen_by_its_mass_whatever_noise_it_used(cuts: tuple[int, ...]) -> None:
    _, _, logits = given_logits()
    keys = {start: many(DRAWS, seed=100 + start) for start in (0, *cuts)}
    chosen = choose(shards(DRAWS, cuts, keys=keys), many(DRAWS), tilt(DRAWS))
    expected = logits.double().softmax(0)
    assert chi_square(chosen.token, expected) < 1
    torch.testing.assert_close(chosen.logprob.double(), expected.log()[chosen.token], rtol=1e-5, atol=1e-5)
    groups = torch.bucketize(chosen.token, torch.tensor(cuts), right=True)
    assert chi_square(groups, torch.stack([part.sum() for part in expected.tensor_split(cuts)])) < 1
    largest = torch.stack([part.sum() for part in expected.tensor_split(cuts)]).argmax()
    assert not bool((groups == largest).all())


def test_parts_may_be_merged_in_any_grouping() -> None:
    parts = shards(50, (5, 6, 20))
    left, right = (merge(Drawn(*(leaf[span] for leaf in parts))) for span in (slice(0, 2), slice(2, 4)))
    for got, want in zip(merge(stacked([left, right])), merge(parts), strict=True):
        torch.testing.assert_close(got, want)


@settings(max_examples=25)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 1e-9, 0.3, 1.0, 4.0]), st.sampled_from([0.5, 1.0, 1.3])), min_size=1, max_size=4
    ),
    samples=st.integers(1, 3),
    tile=st.integers(1, 120),
    start=st.integers(0, 9),
    shared=st.booleans(),
)
def test_tiles_change_nothing(
    rows: list[tuple[float, float]], samples: int, tile: int, start: int, shared: bool
) -> None:
    """Fused, in tiles of any size, equals the draw from logits made at once, to the bit; and rows drawn alone."""
    count, vocab = len(rows), 41
    hidden, weight = exact(count, 5, name="h"), exact(vocab, 5, name="w")
    temperature, penalty = (torch.tensor(column) for column in zip(*rows, strict=True))
    bias = exact(1 if shared else count, vocab, name="b")
    seen = exact(1 if shared else count, vocab, name="seen") > 0.5
    tilted, key = Tilt(temperature, bias, seen, penalty), Key.of(11, 4, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sampling.TILE, "cpu", tile)
        fused = sample(hidden, weight, key, tilted, samples=samples, start=start)
        last = slice(count - 1, count)
        own = Tilt(temperature[last], bias[-1:], seen[-1:], penalty[last])
        alone = sample(hidden[last], weight, Key(*(leaf[last] for leaf in key)), own, samples=samples, start=start)
    logits = hidden @ weight.mT + bias
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None]), logits)
    whole = sample_logits(logits, key, tilted, samples=samples, start=start)
    assert torch.equal(fused.token, whole.token)
    assert torch.equal(fused.score, whole.score)
    torch.testing.assert_close(fused.logprob, whole.logprob, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused.token[last], alone.token)
    greedy = temperature < 1e-6
    assert torch.equal(fused.token[greedy] - start, logits[greedy].argmax(-1, keepdim=True).expand(-1, samples))
    softness = torch.where(greedy, 1.0, temperature)[:, None]
    expected = (logits / softness).double().log_softmax(-1).gather(-1, fused.token - start)
    torch.testing.assert_close(fused.logprob.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(), (2, 5)])
def test_the_smallest_id_wins_among_equals(monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, ...]) -> None:
    """Within tiles, across tiles, across shards, and among the candidates of a filter."""
    monkeypatch.setitem(sampling.TILE, "cpu", 6)
    logits = torch.tensor([0.0, 1.0, 0.0, 2.0, -1.0, 2.0, 2.0, 1.0])
    hidden, key = torch.ones(1, 1), Key.of(0, 0, 1)
    parts = [
        sample(hidden, part[:, None], key, tilt(1, 0.0), start=start)
        for start, part in zip((0, *cuts), logits.tensor_split(cuts), strict=True)
    ]
    for drawn in (merge(stacked(parts)), choose(stacked(parts), key, tilt(1, 0.0))):
        assert drawn.token.tolist() == [[3]]
        assert drawn.logprob.item() == pytest.approx(logits.log_softmax(0)[3].item(), rel=1e-6)
    filters = Filters(torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert sample_filtered(hidden, logits[:, None], key, tilt(1, 0.0), filters).token.tolist() == [[3]]
    drawn = sample_filtered(hidden.expand(200, 1), logits[:, None], many(200), tilt(200), expanded(filters, 200))
    assert set(drawn.token.flatten().tolist()) == {3, 5}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_finite_largest_logit_has_no_token(bad: float) -> None:
    hidden, weight = torch.ones(3, 2), exact(9, 2, name="w")
    bias = torch.zeros(3, 9)
    bias[0], bias[2, 4] = -torch.inf, bad
    filters = Filters(torch.tensor([0, 0, 3]), torch.ones(3), torch.zeros(3))
    for drawn in (
        sample(hidden, weight, Key.of(0, 0, 3), tilt(3, bias=bias), samples=2),
        sample_filtered(hidden, weight, Key.of(0, 0, 3), tilt(3, bias=bias), filters, samples=2),
    ):
        assert (drawn.token == -1).tolist() == [[True] * 2, [False] * 2, [True] * 2]
        assert (drawn.logprob == -torch.inf).tolist() == [[True] * 2, [False] * 2, [True] * 2]


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operator returned."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        own = [leaf for leaf in (out if isinstance(out, tuple | list) else [out]) if isinstance(leaf, Tensor)]
        self.most = max([self.most, *(leaf.numel() for leaf in own if leaf._base is None)])
        return out


def test_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those of one row."""
    monkeypatch.setitem(sampling.TILE, "cpu", 600)
    rows, vocab = 6, 5000
    hidden, weight = exact(rows, 3, name="h"), torch.ones(vocab, 3)
    filters = expanded(Filters(torch.tensor([40]), torch.tensor([0.9]), torch.tensor([0.0])), rows)
    with Largest() as watched:
        sample(hidden, weight, Key.of(0, 0, rows), tilt(rows))
        sample_filtered(hidden, weight, Key.of(0, 0, rows), tilt(rows), filters)
    assert watched.most < rows * vocab / 4


# ---- filters


def expanded(filters: Filters, rows: int) -> Filters:
    return Filters(*(leaf.expand(rows) for leaf in filters))


SETTINGS = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.sampled_from([0, 1, 5, 40, 700]),
    st.sampled_from([0.05, 0.31, 0.77, 0.983, 1.0]),
    st.sampled_from([0.0, 0.0123, 0.37, 1.0]),
)


@settings(max_examples=25)
@given(rows=st.lists(SETTINGS, min_size=1, max_size=5), samples=st.integers(1, 2))
def test_filters_equal_masks_under_the_same_noise(rows: list[tuple[float, int, float, float]], samples: int) -> None:
    """The oracle has all logits, filters them in float64 and adds the same noise; rows have settings of their own."""
    count, vocab = len(rows), 600  # more than the first look at the likeliest holds
    stream = generator(0, "filters")
    hidden, weight = torch.randn(count, 4, generator=stream), torch.randn(vocab, 4, generator=stream)
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    filters, tilted, key = Filters(top_k, top_p, min_p), Tilt(temperature), Key.of(2, 3, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sampling.TILE, "cpu", 250 * count)
        drawn = sample_filtered(hidden, weight, key, tilted, filters, samples=samples)
    logits = hidden @ weight.mT
    samplings = [Sampling(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in rows]
    left = filtered(logits, samplings, torch.zeros(count, vocab, dtype=torch.bool)).isfinite()
    expected = sample_logits(logits.masked_fill(~left, -torch.inf), key, tilted, samples=samples).token
    assert torch.equal(drawn.token, expected)
    whole = logits.double() / torch.where(temperature == 0, 1.0, temperature)[:, None]
    torch.testing.assert_close(
        drawn.logprob.double(), whole.log_softmax(-1).gather(-1, drawn.token), rtol=1e-4, atol=1e-5
    )


def test_top_p_behind_top_k_is_of_what_is_left() -> None:
    weight = torch.tensor([0.30, 0.25, 0.24, 0.11, 0.10]).log()[:, None]

    def left(top_k: int, top_p: float, min_p: float = 0.0) -> set[int]:
        filters = Filters(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
        drawn = sample_filtered(torch.ones(1, 1), weight, Key.of(1, 0, 1), tilt(1), filters, samples=400)
        return set(drawn.token.flatten().tolist())

    assert left(3, 0.35) == {0}
    assert left(0, 0.35) == {0, 1}
    assert left(0, 1.0, 0.5) == {0, 1, 2}
    assert left(0, 1e-9) == {0}


def test_a_nucleus_of_any_size_is_found() -> None:
    """More equal tokens than the first look holds are left, smaller ids first."""
    filters = Filters(torch.tensor([0]), torch.tensor([0.6999]), torch.tensor([0.0]))
    drawn = sample_filtered(torch.zeros(1, 1), torch.ones(400, 1), Key.of(1, 0, 1), tilt(1), filters, samples=2000)
    assert chi_square(drawn.token, torch.where(torch.arange(400) < 280, 1 / 280, 0.0)) < 1


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5, 4)}, r"weight must be \(V, D\) = \(V, 3\); got \(5, 4\)"),
        ({"temperature": torch.ones(3)}, r"temperature must be \(B\) = \(2\)"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be at least 0; got -1"),
        ({"bias": torch.zeros(2, 4)}, r"bias must be \(1 or B, V\)"),
        ({"seen": torch.zeros(1, 5, dtype=torch.bool)}, "expected seen and penalty, or neither"),
        ({"seed": torch.tensor([-1, 0])}, "seed must be between 0"),
        ({"row": torch.zeros(2, dtype=torch.int32)}, "expected a key of int64; got torch.int32 for row"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    hidden, weight = torch.ones(2, 3), change.get("weight", torch.ones(5, 3))
    key = Key.of(0, 0, 2)._replace(**{name: leaf for name, leaf in change.items() if name in Key._fields})
    tilted = tilt(2)._replace(**{name: leaf for name, leaf in change.items() if name in Tilt._fields})
    with pytest.raises(ValueError, match=message):
        sample(hidden, weight, key, tilted)


@pytest.mark.parametrize("wrong", [Filters(torch.ones(2).long(), torch.tensor([0.5, 1.5]), torch.zeros(2))])
def test_filters_out_of_range_are_refused(wrong: Filters) -> None:
    with pytest.raises(UserError, match=r"top_p must be between 0 and 1; got 1\.5"):
        sample_filtered(torch.ones(2, 3), torch.ones(5, 3), Key.of(0, 0, 2), tilt(2), wrong)


# ---- the benchmark


def test_who_draws_wrongly_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.SIZES, "cpu", (1 << 12, 8))
    shapes = tuple(bench.Shape(batch, 32, 700, torch.float32) for batch in (1, 3))

    def temperate(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.multinomial((hidden @ weight.mT / 3).softmax(-1), 1)[:, 0]

    found = bench.measure(device=torch.device("cpu"), rounds=1, shapes=shapes)
    assert found.refused == []
    assert [row["contender"] for row in found.rows] == [*bench.CONTENDERS] * 2
    assert {figure.verdict for figure in found.figures} == {"not measured"}
    (panel,) = bench.panels(found.document())
    assert {len(series.points) for series in panel.series} == {2}
    for name, message in ((bench.OURS, "below the largest score"), (bench.RIVAL, "chi-square")):
        with monkeypatch.context() as patch:
            patch.setitem(bench.CONTENDERS, name, temperate)
            found = bench.measure(device=torch.device("cpu"), rounds=1, shapes=shapes[:1])
        (sentence,) = found.refused
        assert sentence.startswith(f"{name}: ")
        assert message in sentence
        assert name not in {row["contender"] for row in found.rows}
