"""The tests' own safety net: memory that nobody wrote is not a number."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fresh_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.ones(3, dtype=dtype)
    fresh = [
        torch.empty(3, dtype=dtype),
        torch.empty_like(like),
        like.new_empty(3),
        torch.empty_strided((3,), (1,), dtype=dtype),
        torch.ones(1, dtype=dtype).resize_(4)[1:],
        torch.nn.Linear(1, 3, device="meta", dtype=dtype).to_empty(device="cpu").bias,
    ]
    assert all(tensor.isnan().all() for tensor in fresh)


def test_fresh_integers_are_no_index() -> None:
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
