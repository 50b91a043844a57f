"""The filters against a brute-force oracle, the draws against the distribution they claim, the seeds, the ranges."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from isotach.config import parse
from isotach.errors import UserError
from isotach.infer.sample import Sampling, draw, filtered, invert, uniform

VOCAB = 6
EDGE = 1e-9  # examples with a threshold this close to a sum are decided by rounding


def oracle(logits: list[float], sampling: Sampling, seen: list[bool]) -> list[float]:
    """The distribution that the documentation describes, one token at a time in Python floats."""
    penalty = sampling.repetition_penalty
    logits = [(x / penalty if x > 0 else x * penalty) if was else x for x, was in zip(logits, seen, strict=True)]
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return [float(token == ranked[0]) for token in range(len(logits))]
    weight = [math.exp((x - max(logits)) / sampling.temperature) for x in logits]
    kept = ranked[: sampling.top_k] if sampling.top_k else ranked
    if sampling.top_p < 1:
        mass = math.fsum(weight[token] for token in kept)
        sums = [math.fsum(weight[token] for token in kept[:n]) / mass for n in range(len(kept) + 1)]
        assume(all(abs(before - sampling.top_p) > EDGE for before in sums))
        kept = [token for token, before in zip(kept, sums[:-1], strict=True) if before < sampling.top_p]
    assume(all(abs(weight[token] - sampling.min_p) > EDGE or weight[token] == 1 for token in kept))
    kept = [token for token in kept if weight[token] >= sampling.min_p]
    mass = math.fsum(weight[token] for token in kept)
    return [weight[token] / mass if token in kept else 0.0 for token in range(len(logits))]


# Few values, so that equal logits are common.
LOGITS = st.lists(st.sampled_from([-8.0, -1.5, -0.25, 0.0, 0.5, 1.0, 3.0]), min_size=VOCAB, max_size=VOCAB)
SEEN = st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.001, 0.999)),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
)


@given(rows=st.lists(st.tuples(LOGITS, SAMPLINGS, SEEN), min_size=1, max_size=4))
def test_filters_equal_the_oracle_for_every_row_of_a_batch(
    rows: list[tuple[list[float], Sampling, list[bool]]],
) -> None:
    logits, samplings, seen = (list(column) for column in zip(*rows, strict=True))
    got = filtered(torch.tensor(logits), samplings, torch.tensor(seen)).softmax(-1)
    expected = [oracle(*row) for row in rows]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


def test_filters_act_in_the_documented_order() -> None:
    probabilities = torch.tensor([[0.30, 0.25, 0.24, 0.11, 0.10]], dtype=torch.float64)
    unseen = torch.zeros(1, 5, dtype=torch.bool)

    def kept(**settings: float) -> int:
        return int(torch.isfinite(filtered(probabilities.log(), [Sampling(**settings)], unseen)).sum())

    assert kept(top_k=3, top_p=0.35) == 1  # of the three that are left the first has 0.38; of all five it has 0.30
    assert kept(top_p=0.5) == 2
    assert kept(temperature=4.0, top_p=0.5) == 3  # the temperature came first and flattened them
    assert kept(min_p=0.36, top_p=0.85) == 4  # min-p first would leave four, of which 0.85 needs only three


@pytest.mark.parametrize("sampling", [Sampling(top_k=700), Sampling(top_p=0.35)], ids=["top_k", "top_p"])
def test_among_equals_the_smaller_ids_stay(sampling: Sampling) -> None:
    equal, unseen = torch.zeros(1, 2000), torch.zeros(1, 2000, dtype=torch.bool)
    kept = torch.isfinite(filtered(equal, [sampling], unseen))[0].nonzero().flatten()
    assert kept.tolist() == list(range(len(kept)))
    assert abs(len(kept) - 700) <= 1  # 700 equal parts of 1/2000 may sum to a hair less than 0.35


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.4, top_p=0.8),
        Sampling(min_p=0.2, repetition_penalty=1.5),
    ],
    ids=lambda sampling: sampling.model_dump_json(exclude_defaults=True),
)
def test_draws_follow_the_filtered_distribution(sampling: Sampling) -> None:
    draws, vocab = 20_000, 12
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 1.5, (1, vocab)))
    seen = torch.arange(vocab)[None] % 3 == 0
    expected = filtered(logits, [sampling], seen).softmax(-1)[0]
    numbers = torch.tensor([uniform(7, position) for position in range(draws)], dtype=torch.float64)
    rows = filtered(logits, [sampling], seen).expand(draws, vocab)
    counts = torch.bincount(invert(rows, numbers), minlength=vocab)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = ((counts - draws * expected)[possible] ** 2 / (draws * expected)[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4  # about one chance in 1e5 for an exact sampler


def test_inversion_is_exact_at_the_boundaries_and_never_draws_the_forbidden() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, math.log(3.0), -torch.inf]], dtype=torch.float64)
    cumulative = 0.25
    cases = {0.0: 1, math.nextafter(cumulative, 0): 1, cumulative + 1e-15: 3, 1 - 2.0**-53: 3}
    for number, token in cases.items():
        assert invert(logits, torch.tensor([number], dtype=torch.float64)).item() == token


def test_numbers_are_uniform_and_a_function_of_seed_and_position() -> None:
    numbers = np.array([uniform(3, position) for position in range(10_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    deciles = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert ((deciles - 1000) ** 2 / 1000).sum() < 30  # 9 degrees of freedom
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.04
    assert uniform(3, 5) == numbers[5]
    assert uniform(4, 5) != numbers[5]


@given(st.lists(st.tuples(LOGITS, SAMPLINGS, SEEN, st.integers(0, 2**63 - 1)), min_size=2, max_size=5))
def test_a_row_is_drawn_as_if_it_were_alone(rows: list[tuple[list[float], Sampling, list[bool], int]]) -> None:
    logits = torch.tensor([row[0] for row in rows])
    samplings = [sampling.model_copy(update={"seed": seed, "logprobs": 2}) for _, sampling, _, seed in rows]
    seen = torch.tensor([row[2] for row in rows])
    positions = list(range(10, 10 + len(rows)))
    together = draw(logits, samplings, positions=positions, seen=seen)
    for r, drawn in enumerate(together):
        (alone,) = draw(logits[r : r + 1], [samplings[r]], positions=[positions[r]], seen=seen[r : r + 1])
        assert alone.token == drawn.token
        assert alone.logprob == pytest.approx(drawn.logprob, abs=1e-12)


def test_logprobs_are_the_models_own_before_every_filter() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.1, 9.0]])  # the last id has no token: the vocabulary is padded
    seen = torch.ones(1, 4, dtype=torch.bool)
    sampling = Sampling(temperature=0.0, top_k=1, repetition_penalty=3.0, seed=0, logprobs=3)
    (drawn,) = draw(logits, [sampling], positions=[0], seen=seen)
    expected = logits[0].double().log_softmax(-1)
    assert drawn.token == 2
    assert drawn.logprob == pytest.approx(expected[2].item(), abs=1e-12)
    assert [token for token, _ in drawn.top] == [2, 0, 3]
    assert all(first[1] >= second[1] for first, second in pairwise(drawn.top))
    assert drawn.top[0][1] == drawn.logprob


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0]]).expand(200, 3)
    samplings = [Sampling(seed=seed) for seed in range(200)]
    drawn = draw(logits, samplings, positions=[0] * 200, seen=torch.zeros(200, 2, dtype=torch.bool))
    assert {one.token for one in drawn} == {0, 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5, "top_p": 0.5}, {"repetition_penalty": 2.0}],
    ids=str,
)
def test_logits_that_are_not_finite_are_refused(bad: float, settings: dict[str, float]) -> None:
    """Whatever filters see them first, and however large the vocabulary is."""
    for vocab in (2, 500):
        logits = torch.zeros(2, vocab)
        logits[1] = bad
        if bad == math.inf:
            logits[1, 1:] = 0.0
        seen = torch.ones(2, vocab, dtype=torch.bool)
        with pytest.raises(UserError, match="finite logits"):
            draw(logits, [Sampling(seed=0, **settings)] * 2, positions=[0, 0], seen=seen)


def test_fresh_seeds_are_reported_and_differ() -> None:
    assert Sampling(seed=5).seeded().seed == 5
    assert Sampling().seeded().seed != Sampling().seeded().seed


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": [""]},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"temprature": 1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=name):
        parse(Sampling, settings, who="generate")


@pytest.mark.gpu
def test_on_a_gpu_the_same_tokens_are_drawn() -> None:
    samplings = [
        Sampling(seed=1),
        Sampling(seed=2, temperature=0),
        Sampling(seed=3, top_k=40, top_p=0.9),
        Sampling(seed=4, min_p=0.01, repetition_penalty=1.2, logprobs=3),
    ]
    logits = 4 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(50_000)[None].expand(4, -1) % 3 == 0
    bias = [None, None, torch.where(torch.arange(50_000) < 100, -torch.inf, 0.0), None]
    for position in range(20):
        how = {"positions": [position] * 4, "seen": seen, "bias": bias}
        expected, got = draw(logits, samplings, **how), draw(logits.cuda(), samplings, **how)
        assert [one.token for one in got] == [one.token for one in expected]
        assert [token for token, _ in got[3].top] == [token for token, _ in expected[3].top]
