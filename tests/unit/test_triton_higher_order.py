"""Higher orders on the GPU: the decay family's kernels, nested; in Triton's interpreter on a CPU."""

import pytest
import torch
from torch import Tensor

from isotach.ops.engine import run
from isotach.ops.higher_order import Asymmetric, SecondOrder, ThirdOrder, Tokens
from isotach.ops.recurrence import Recurrence
from isotach.rng import generator

pytest.importorskip("triton")

import isotach.ops.triton.higher_order  # noqa: F401  registers
from tests.unit.interpreter import drawn, interpreted, span

FEW = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


def everything(rec: Recurrence, backend: str, dtype: torch.dtype, bounds: list[int] | None) -> list[Tensor]:
    """Outputs, final states and all gradients, from a past."""
    stream, narrow, wide = generator(0, "higher"), torch.bfloat16, torch.promote_types(dtype, torch.float32)
    q, k = (drawn(stream, 1, 21, 2, 16, dtype=narrow).to(dtype) / 4 for _ in range(2))
    v = drawn(stream, 1, 21, 2, 20, dtype=narrow).to(dtype)
    log_decay = -torch.rand(1, 21, 2, 1, generator=stream).to(wide)
    x = Tokens(*(leaf.requires_grad_() for leaf in (q, k, v, log_decay)))
    rows = 1 if bounds is None else len(bounds) - 1
    state = rec.initial(x, rows)
    state = type(state)(*(drawn(stream, *leaf.shape).to(wide).requires_grad_() for leaf in state))
    output, after = run(rec, x, state, span(1, 21, bounds), backend=backend, chunk_size=16)  # type: ignore[arg-type]
    weights = [drawn(stream, *leaf.shape).to(leaf.dtype) for leaf in (output, *after)]
    grads = torch.autograd.grad((output, *after), (*x, *state), weights)
    return [value.detach() for value in (output, *after, *grads)]


@pytest.mark.parametrize(
    ("family", "dtype", "bounds"),
    [
        (SecondOrder, torch.float32, [0, 1, 1, 21]),
        (Asymmetric, torch.float32, None),
        (ThirdOrder, torch.bfloat16, None),
    ],
)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, family: type[Recurrence], dtype: torch.dtype, bounds: list[int] | None
) -> None:
    """With at most twice the plain backend's error, or two ulps; of few numbers it is a lottery."""
    interpreted(monkeypatch, family)
    exact = everything(family(), "reference", torch.float64, bounds)
    got, plain = everything(family(), "triton", dtype, bounds), everything(family(), "torch", dtype, bounds)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        errors = [float((each.double() - want).norm() / want.norm()) for each in (ours, theirs)]
        assert errors[0] <= (2 * max(errors[1], torch.finfo(dtype).eps) if want.numel() > 100 else FEW[dtype])
