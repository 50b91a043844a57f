"""Schedules: the shapes that their definitions promise, at every step of many runs."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotach.train.schedule import cosine, warmup_stable_decay

runs = st.integers(1, 300).flatmap(
    lambda steps: st.tuples(
        st.just(steps), st.integers(0, steps), st.integers(0, steps), st.floats(0, 1, allow_nan=False)
    )
)


@given(runs)
def test_warmup_stable_decay_rises_holds_and_falls(run: tuple[int, int, int, float]) -> None:
    steps, warmup, decay, floor = run
    curve = [warmup_stable_decay(s, steps=steps, warmup=warmup, decay=decay, floor=floor) for s in range(steps + 1)]
    start = max(warmup, steps - decay)
    assert curve[:warmup] == [(s + 1) / warmup for s in range(warmup)]
    assert all(value == 1 for value in curve[warmup:start])
    assert all(later <= earlier for earlier, later in itertools.pairwise(curve[start:]))
    assert all(floor <= value <= 1 for value in curve[warmup:])
    if decay:
        assert curve[steps] == pytest.approx(floor)


@given(runs)
def test_cosine_rises_and_falls(run: tuple[int, int, int, float]) -> None:
    steps, warmup, _, floor = run
    curve = [cosine(s, steps=steps, warmup=warmup, floor=floor) for s in range(steps + 1)]
    assert curve[:warmup] == [(s + 1) / warmup for s in range(warmup)]
    falling = curve[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(falling))
    assert all(floor - 1e-12 <= value <= 1 for value in falling)
    if warmup < steps:
        assert falling[0] == pytest.approx(1)
        assert falling[-1] == pytest.approx(floor)


def test_known_points() -> None:
    assert cosine(60, steps=110, warmup=10, floor=0.1) == pytest.approx(0.55)
    assert cosine(35, steps=110, warmup=10, floor=0.0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert warmup_stable_decay(85, steps=100, warmup=5, decay=20, floor=0.0) == pytest.approx(0.5)
    assert warmup_stable_decay(99, steps=100, warmup=5, decay=20, floor=0.0) > 0


def test_a_longer_run_changes_nothing_before_its_decay() -> None:
    short = [warmup_stable_decay(s, steps=100, warmup=10, decay=20, floor=0.0) for s in range(80)]
    assert short == [warmup_stable_decay(s, steps=500, warmup=10, decay=20, floor=0.0) for s in range(80)]
