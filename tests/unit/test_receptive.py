"""Receptive fields against closed forms, brute force and the published figures."""

import math
from pathlib import Path

import pytest
import torch

from isotach.errors import UserError
from isotach.nn.receptive import (
    ENCODINGS,
    draw,
    empirical_receptive_field,
    encoding,
    kerple_log,
    kerple_power,
    log_bias,
    tail_sum,
    theoretical_receptive_field,
)

# Written again from the list, to check logarithms and formulas against each other.
WEIGHTS = {
    "exponential": lambda x: math.exp(-x),
    "inverse_square": lambda x: 1 / (1 + x * x),
    "gaussian": lambda x: math.exp(-(x**2)),
    "exponential_root": lambda x: math.exp(-math.sqrt(x)),
    "inverse": lambda x: 1 / (1 + x),
    "exponential_1.25": lambda x: math.exp(-(x**1.25)),
    "exponential_0.75": lambda x: math.exp(-(x**0.75) / 2),
    "log_inverse_square": lambda x: (1 + math.log(1 + x)) / (1 + x) ** 2,
    "exponential_log_square": lambda x: math.exp(-(math.log(3 + x) ** 2)),
    "exponential_quartic": lambda x: math.exp(-(x**4)),
    "inverse_log": lambda x: 1 / ((3 + x) * math.log(3 + x)),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_are_their_formulas(name: str) -> None:
    distances = torch.arange(40)
    bias = log_bias(encoding(name), [0.5, 0.125])(distances)
    expected = [[WEIGHTS[name](slope * j) for j in range(40)] for slope in (0.5, 0.125)]
    torch.testing.assert_close(bias.exp(), torch.tensor(expected, dtype=torch.float64))
    assert bool((bias <= 0).all())


def test_which_encodings_extrapolate() -> None:
    assert {name for name, each in ENCODINGS.items() if not each.converges} == {"inverse", "inverse_log"}
    assert [kerple_log(p).converges for p in (0.5, 1.0, 1.01)] == [False, False, True]
    assert kerple_power(0.1).converges


@pytest.mark.parametrize("name", [name for name, each in ENCODINGS.items() if each.converges])
@pytest.mark.parametrize("slope", [1 / 16, 1 / 256])
def test_tails_are_the_terms_that_were_left_out(name: str, slope: float) -> None:
    each, start, stop = encoding(name), round(5 / slope), 4_000_000
    terms = each.log_weight(slope * torch.arange(start, stop, dtype=torch.float64)).exp()
    expected = float(terms.sum()) + tail_sum(each, slope=slope, start=stop)
    assert tail_sum(each, slope=slope, start=start) == pytest.approx(expected, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("exponential", (6, 24, 767)),
        ("inverse_square", (23, 99, 3250)),  # the last by 1/2 + π/2k coth(π/k)
        ("exponential_log_square", (11, 45, 1423)),
        ("gaussian", (4, 12, 356)),
        ("exponential_root", (43, 178, 5759)),
    ],
)
def test_theoretical_fields(name: str, tokens: tuple[int, ...]) -> None:
    found = [theoretical_receptive_field(encoding(name), slope=k, eps=0.05) for k in (1 / 2, 1 / 8, 1 / 256)]
    assert found == list(tokens)


@pytest.mark.parametrize("eps", [0.5, 0.05, 1e-3, 1e-9])
def test_decay_attentions_field_has_a_closed_form(eps: float) -> None:
    for slope in (1.0, 1 / 8, 1 / 1000):
        found = theoretical_receptive_field(encoding("exponential"), slope=slope, eps=eps)
        assert found == math.ceil(math.log(1 / eps) / slope)


def test_fields_beyond_what_is_summed_are_estimated() -> None:
    """1 / (1 + x²) leaves about 1 / (k² N) behind N, of a sum of π/2k + 1/2."""
    slope, eps = 1 / 256, 1e-6
    expected = 1 / slope**2 / (eps * (math.pi / 2 / slope / math.tanh(math.pi / slope) + 0.5))
    assert theoretical_receptive_field(encoding("inverse_square"), slope=slope, eps=eps) == pytest.approx(expected)


def test_diverging_encodings_reach_without_end() -> None:
    assert theoretical_receptive_field(encoding("inverse"), slope=0.5, eps=0.05) == math.inf


@pytest.mark.parametrize("name", ["exponential", "inverse_square", "exponential_log_square"])
def test_what_lies_beyond_the_field_changes_little(name: str) -> None:
    """|output - output of the last J tokens| ≤ 2 V e^2M tail / head for scores within M and values within V."""
    slope, time, draw = 0.125, 4000, torch.Generator().manual_seed(0)
    bias = log_bias(encoding(name), [slope])(torch.arange(time).flip(0))[0]
    scores = torch.rand(time, generator=draw, dtype=torch.float64) * 2 - 1
    values = torch.rand(time, generator=draw, dtype=torch.float64) * 2 - 1
    window = int(theoretical_receptive_field(encoding(name), slope=slope, eps=0.01))
    full = ((scores + bias).softmax(0) * values).sum()
    cut = ((scores + bias)[-window:].softmax(0) * values[-window:]).sum()
    assert abs(float(full - cut)) <= 2 * math.exp(2) * 0.01 / 0.99


def test_the_empirical_field_is_the_first_window_that_suffices() -> None:
    asked = []

    def perplexity(window: int) -> float:
        asked.append(window)
        return 10 + 40 / window

    # 10.3125 / (10 + 40 / J) > 0.95 from J = 47.06 on.
    assert empirical_receptive_field(perplexity, [8, 16, 32, 64, 128], eps=0.05) == 64
    assert asked == [128, 8, 16, 32, 64]
    assert empirical_receptive_field(lambda window: 1 / window, [1, 2, 4], eps=0.05) == 4


def test_bad_questions_are_told() -> None:
    with pytest.raises(UserError, match="encoding 'gausian' is not known; did you mean gaussian"):
        encoding("gausian")
    with pytest.raises(UserError, match=r"expected slope > 0 and 0 < eps < 1, got 0 and 0\.1"):
        theoretical_receptive_field(encoding("gaussian"), slope=0, eps=0.1)
    with pytest.raises(UserError, match=r"expected ascending windows, got \[4, 2\]"):
        empirical_receptive_field(float, [4, 2], eps=0.1)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_written(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"fields.{suffix}"
    for measured in (None, {"exponential": 700.0, "inverse": 9000.0}):
        draw([encoding("exponential"), encoding("inverse")], out, slopes=[0.5, 1 / 256], measured=measured)
        assert out.stat().st_size > 10_000
    if suffix == "svg":
        assert "diverges" in out.read_text()


def test_an_unknown_picture_format_is_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"expected a picture format, got '\.doc'"):
        draw([encoding("exponential")], tmp_path / "fields.doc", slopes=[0.5])
