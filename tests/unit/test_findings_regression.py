"""The closed form of the in-context regression against every outcome of variables with the same moments."""

import itertools
import math
from typing import Any

import pytest
import torch

from benchmarks.findings.regression import Drift, attend

TWO = ((-1.0, 1 / 2), (1.0, 1 / 2))  # value and chance: a normal variable's moments up to the third
THREE = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))  # up to the fifth


def outcomes(points: tuple[tuple[float, float], ...], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (outcomes, count) of independent variables, and the chance of each outcome."""
    drawn = torch.tensor(list(itertools.product(points, repeat=count)), dtype=torch.float64)
    return drawn[..., 0], drawn[..., 1].prod(-1)


def enumerated(drift: Drift, gate: float, scale: float) -> float:
    """E (y - ŷ)². It is of degree 2 in every entry of w_0, e_i and the query, and of degree 4 in the other inputs."""
    d, n = drift.width, drift.pairs
    steps, weights_chance = outcomes(TWO, d * (n + 2))
    x, x_chance = outcomes(THREE, d * n)
    query, query_chance = outcomes(TWO, d)
    steps, x = steps.unflatten(1, (n + 2, d)), x.unflatten(1, (n, d))
    w = [steps[:, 0]]
    for i in range(1, n + 2):
        w.append(drift.gamma * w[-1] + math.sqrt(drift.noise) * steps[:, i])
    estimate = sum(
        scale * gate ** (n + 1 - i) * (w[i][:, None] * x[:, i - 1]).sum(-1, keepdim=True) * x[:, i - 1]
        for i in range(1, n + 1)
    )
    missed: Any = ((w[n + 1][:, None] - estimate).unsqueeze(2) * query).sum(-1) ** 2
    return float(torch.einsum("abc,a,b,c->", missed, weights_chance, x_chance, query_chance))


@pytest.mark.parametrize(("width", "pairs"), [(1, 4), (2, 2)])
@pytest.mark.parametrize(("gamma", "noise"), [(0.8, 0.3), (1.0, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize(("gate", "scale"), [(1.0, 0.2), (0.6, 0.7)])
def test_error(width: int, pairs: int, gamma: float, noise: float, gate: float, scale: float) -> None:
    drift = Drift(gamma, noise, pairs=pairs, width=width)
    assert drift.error(gate, scale) == pytest.approx(enumerated(drift, gate, scale), rel=1e-12)


def test_best_scale() -> None:
    drift = Drift(0.9, 0.2, pairs=5, width=3)
    first, second = drift.moments(0.7)
    least = drift.error(0.7)
    assert least == pytest.approx(drift.error(0.7, first / second), rel=1e-14)
    assert least < min(drift.error(0.7, factor * first / second) for factor in (0.99, 1.01))


def test_attend_is_the_weighted_sum() -> None:
    stream = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 6, *rest, generator=stream, dtype=torch.float64) for rest in ((2,), ()))
    gates = torch.tensor([0.5, 1.0], dtype=torch.float64)
    read, memory = attend(x, y, gates.log())
    for h, gate in enumerate(gates):
        weight = gate ** torch.arange(5, 0, -1)
        estimate = torch.einsum("i,bid,bi->bd", weight, x[:, :5], y[:, :5])
        torch.testing.assert_close(read[:, h], (x[:, 5] * estimate).sum(-1))
        torch.testing.assert_close(gate * memory[:, h, :2, 2], estimate)
