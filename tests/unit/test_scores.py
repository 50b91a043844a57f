"""Products weighed by decay, and their gradients, against the sum over channels written out."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from isotach.ops.torch.scores import ChannelScores, HeadScores, MaskedScores
from isotach.ops.torch.scratch import Buffer, Scratch
from tests.unit.forms import normal

N, H, K = 2, 3, 5
SETS = list(itertools.product((1, 2), (1, 2)))


def running(m: int, channels: int, scale: float) -> Tensor:
    return -(normal(N, H, m, channels, name="decay").abs() * scale).cumsum(2)


def weights(total: Tensor) -> Tensor:
    """e^{L_i - L_j} for i ≥ j, else 0: (N, H, m, m, channels)."""
    future = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool).triu(1)
    gaps = total.unsqueeze(3) - total.unsqueeze(2)
    return gaps.masked_fill(future[..., None], -torch.inf).exp()


def agree(scores: MaskedScores | HeadScores | ChannelScores, weighed: Tensor, s: int, t: int) -> None:
    """Forward and backward of s sets of rows against t sets of columns, all weighed by `weighed` (N, H, m, m, ·)."""
    m, scratch = weighed.shape[2], Scratch(torch.float64, torch.device("cpu"))
    x, y = (normal(N, H, sets, m, K, name=name).requires_grad_() for name, sets in (("x", s), ("y", t)))

    def buffer(name: str, value: Tensor) -> Buffer:
        n, heads, rows, width = value.shape
        taken = scratch.take(name, n, heads, rows, width)
        taken.wide.copy_(value.detach())
        return taken

    rows, columns = buffer("x", x.flatten(2, 3)), buffer("y", y.flatten(2, 3))
    products = buffer("p", torch.full((N, H, s * m, t * m), torch.nan))
    scores.forward(rows, columns, products)
    for strict in (False, True):
        kept = weighed.masked_fill(torch.eye(m, dtype=torch.bool)[..., None] & strict, 0).expand(-1, -1, -1, -1, K)
        expected = torch.einsum("nhsik,nhtjk,nhijk->nhsitj", x, y, kept).flatten(4, 5).flatten(2, 3)
        if not strict:
            torch.testing.assert_close(products.wide, expected.detach(), rtol=1e-11, atol=1e-11)
        grad = buffer("grad", normal(*expected.shape, name="grad"))
        dx, dy = torch.autograd.grad((expected * grad.wide).sum(), (x, y))
        drows, dcolumns = buffer("dx", torch.nan * dx.flatten(2, 3)), buffer("dy", torch.nan * dy.flatten(2, 3))
        scores.backward(grad, rows, columns, drows, dcolumns, strict=strict)
        torch.testing.assert_close(drows.wide, dx.flatten(2, 3), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(dcolumns.wide, dy.flatten(2, 3), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("s", "t"), SETS)
@pytest.mark.parametrize("m", [1, 3, 16, 37])
def test_without_decay(m: int, s: int, t: int) -> None:
    agree(MaskedScores(m), weights(torch.zeros(N, H, m, 1, dtype=torch.float64)), s, t)


@pytest.mark.parametrize(("s", "t"), SETS)
@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_one_decay_per_head(scale: float, s: int, t: int) -> None:
    total = running(37, 1, scale)
    agree(HeadScores(total, Scratch(torch.float64, torch.device("cpu"))), weights(total), s, t)


@pytest.mark.parametrize(("s", "t"), SETS)
@pytest.mark.parametrize("m", [1, 3, 16, 37, 64])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0, 200.0])
def test_one_decay_per_channel(scale: float, m: int, s: int, t: int) -> None:
    total = running(m, K, scale)
    agree(ChannelScores(total, Scratch(torch.float64, torch.device("cpu"))), weights(total), s, t)


def test_blocks_are_as_long_as_their_decay_allows() -> None:
    scratch = Scratch(torch.float32, torch.device("cpu"))
    rates = {1.0: 64, 4.0: 16, 20.0: 4, 100.0: 1}
    for rate, size in rates.items():
        total = -rate * torch.arange(1, 65, dtype=torch.float64)[:, None].expand(1, 1, 64, K)
        assert ChannelScores(total, scratch).parts[0].block == size


def test_weights_below_resolution_are_zero() -> None:
    """Products with them would underflow, which takes a hundred times as long."""
    total = -torch.arange(64, dtype=torch.float64).mul(3)[None, None, :, None]
    kept = HeadScores(total, Scratch(torch.float32, torch.device("cpu"))).weights
    assert float(kept[kept > 0].min()) > 2e-16
    assert float(kept[0, 0, 40, 30]) == pytest.approx(math.exp(-30), rel=1e-5, abs=0)
    assert float(kept[0, 0, 40, 27]) == 0
