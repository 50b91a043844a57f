"""What the laws' random examples do not reach: decay that is strong at every token, and its gradient."""

import torch
from torch import Tensor

from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from isotach.rng import generator

B, T, H, K, V = 1, 150, 2, 8, 6


def decay_gradient(dtype: torch.dtype, backend: str) -> Tensor:
    """Of a loss on outputs and on the final state, all rates -20 per token."""
    stream = generator(0, "strong")
    q, k = (torch.randn(B, T, H, K, generator=stream, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, T, H, V, generator=stream, dtype=torch.float64)
    weights = torch.randn(B, H, K, V, generator=stream, dtype=torch.float64)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (q, k, v, torch.full((B, T, H, 1), -20.0))]
    output, state = run(Decay(), Decay.Inputs(*leaves), None, Span.of(B, T), backend=backend)  # type: ignore[arg-type]
    loss = output.sum() + (state.state * weights.to(dtype)).sum()
    return torch.autograd.grad(loss, leaves)[3].double()


def test_the_gradient_of_strong_decay_does_not_cancel() -> None:
    """It is a sum of e^-20s beside products of order one, which must not pass through the same sum."""
    exact, got = decay_gradient(torch.float64, "reference"), decay_gradient(torch.float32, "torch")
    assert float((got - exact).norm() / exact.norm()) < 1e-5
