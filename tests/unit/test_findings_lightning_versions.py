"""LA-1, written for its comparison with LA-2, against the recurrence token by token."""

import pytest
import torch

from benchmarks.findings.lightning_versions import computing, lightning_1
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run


@pytest.mark.parametrize("time", [1, 8, 29])
def test_outputs_and_gradients(time: int) -> None:
    stream = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, time, 3, 4, generator=stream, dtype=torch.float64) for _ in range(4))
    log_decay = torch.tensor([0.0, -0.1, -5.0], dtype=torch.float64).view(1, 1, 3, 1).expand(2, -1, -1, -1)
    leaves = [leaf.requires_grad_() for leaf in (q, k, v)]
    x = Decay.Inputs(q, k, v, log_decay)
    expected, _ = run(Decay(), x, None, Span.of(2, time), backend="reference")
    found, _ = lightning_1(Decay(), x, Decay().initial(x, 2), None, 8)
    torch.testing.assert_close(found, expected)
    both = [torch.autograd.grad((outputs * weight).sum(), leaves) for outputs in (found, expected)]
    torch.testing.assert_close(both[0], both[1])


def test_takes_the_place_of_the_operator_and_gives_it_back() -> None:
    x = Decay.Inputs(*(torch.ones(1, 3, 1, 2) for _ in range(3)), torch.zeros(1, 1, 1, 1))

    def twice(rec: Decay, x: Decay.Inputs, s: Decay.State, *_: object) -> tuple[torch.Tensor, Decay.State]:
        return 2 * lightning_1(rec, x, s, None, None)[0], s

    before, _ = run(Decay(), x, None, Span.of(1, 3))
    with computing(twice):
        within, _ = run(Decay(), x, None, Span.of(1, 3))
    after, _ = run(Decay(), x, None, Span.of(1, 3))
    torch.testing.assert_close(within, 2 * before)
    assert torch.equal(before, after)
