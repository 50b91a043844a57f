"""Memories of keys and values against explicit T × T masks and biases in float64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from isotach import shapes
from isotach.ops import attention, history
from isotach.ops.attention import sdpa
from isotach.ops.engine import Span, run
from isotach.ops.history import Blocks, Forgetting, History, Sliding, Sloped
from isotach.ops.recurrence import Recurrence
from isotach.rng import generator

HEADS = 4


def example(rec: Recurrence, time: int, *, batch: int = 2, groups: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    sizes = {"B": batch, "T": time, "H": HEADS, "G": groups, "K": 8, "V": 8}
    return shapes.example(rec.Inputs, sizes, generator(0, rec.name, str(time)), draws=rec.ranges, dtype=dtype)


def oracle(x: Any, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √K + bias) v with everything written out; bias (..., T, T), -inf where nothing is read."""
    k, v = (leaf.repeat_interleave(x.q.shape[2] // leaf.shape[2], 2) for leaf in (x.k, x.v))
    scores = torch.einsum("bthk,bshk->bhts", x.q, k) / x.q.shape[-1] ** 0.5 + bias
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def where(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


def places(time: int) -> tuple[Tensor, Tensor]:
    """t down, s across."""
    at = torch.arange(time)
    return at[:, None], at


def causal(time: int) -> Tensor:
    t, s = places(time)
    return where(s <= t)


def bias_of(rec: Recurrence, x: Any) -> Tensor:
    """What the family's docstring says, as a T × T matrix per row and head."""
    time = x.q.shape[1]
    t, s = places(time)
    if isinstance(rec, Sliding):
        return where((s <= t) & ((s > t - rec.window) | (s < rec.sinks)))
    if isinstance(rec, Blocks):
        return where((s <= t) & (t // rec.size == s // rec.size))
    if isinstance(rec, Forgetting):
        bias = torch.zeros(len(x.q), x.q.shape[2], time, time, dtype=torch.float64)
        for i in range(time):
            for j in range(i):
                bias[:, :, i, j] = x.log_decay[:, j + 1 : i + 1].sum(1)
        return bias + causal(time)
    if isinstance(rec, Sloped):
        slope = x.q_slope.mT[..., None] + x.k_slope.mT[:, :, None]
        return -(t - s) * slope + causal(time)
    assert isinstance(rec, History)
    if rec.bias is None:
        return causal(time)
    return rec.bias((t - s).clamp_min(0).flatten()).double().unflatten(-1, (time, time)) + causal(time)


def slopes(distance: Tensor) -> Tensor:
    return -torch.tensor([0.5, 0.1, 0.02, 0.0], dtype=torch.float64)[:, None] * distance


FAMILIES = {
    "plain": History(),
    "distance": History(slopes),
    "forgetting": Forgetting(),
    "sloped": Sloped(),
    "window": Sliding(7),
    "window and sinks": Sliding(7, 3),
    "more sinks than window": Sliding(2, 5),
    "blocks": Blocks(6),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_every_form_is_attention_under_the_mask_and_bias(name: str, groups: int) -> None:
    rec, time = FAMILIES[name], 45
    x = example(rec, time, groups=groups)
    expected = oracle(x, bias_of(rec, x))
    for chunk in (None, 1, 4, 16):
        output, _ = run(rec, x, None, Span.of(2, time), chunk_size=chunk)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    state, outputs = None, []
    for start, stop in ((0, 1), (1, 2), (2, 20), (20, 21), (21, 44), (44, 45)):
        output, state = run(rec, shapes.time_slice(x, start, stop), state, Span.of(2, stop - start, start=start))
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_different_ages_go_on_together(name: str) -> None:
    rec, ages, time = FAMILIES[name], (1, 12, 5), 9
    parts = [example(rec, age + time, batch=1) for age in ages]
    pasts = [
        run(rec, shapes.time_slice(x, 0, age), None, Span.of(1, age))[1] for x, age in zip(parts, ages, strict=True)
    ]
    rests = [shapes.time_slice(x, age, age + time) for x, age in zip(parts, ages, strict=True)]
    both = type(parts[0])(*(torch.cat(leaves) for leaves in zip(*rests, strict=True)))
    for step in (time, 1):
        state = rec.concatenate(pasts)
        outputs = []
        for start in range(0, time, step):
            now = shapes.time_slice(both, start, start + step)
            output, state = run(rec, now, state, Span.of(3, step, start=torch.tensor(ages) + start))
            outputs.append(output)
        for row, (x, age) in enumerate(zip(parts, ages, strict=True)):
            expected = oracle(x, bias_of(rec, x))[0, age:]
            torch.testing.assert_close(torch.cat(outputs, 1)[row], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tile", [attention.TILE, 40])
def test_gradients_are_those_of_the_written_out_form(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in many small tiles, which are computed again in the backward."""
    monkeypatch.setattr(attention, "TILE", tile)
    monkeypatch.setattr(attention, "ROWS", min(tile, attention.ROWS) // 20 or 1)
    rec, time = FAMILIES[name], 23
    x = type(example(rec, 1))(*(leaf.requires_grad_() for leaf in example(rec, time)))
    weights = torch.linspace(-1, 2, 2 * time * HEADS * 8, dtype=torch.float64).cos().view(2, time, HEADS, 8)
    output, _ = run(rec, x, None, Span.of(2, time))
    expected = oracle(x, bias_of(rec, x))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    grads, wanted = (torch.autograd.grad((o * weights).sum(), [*x]) for o in (output, expected))
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_relu_blocks_are_not_normalised() -> None:
    rec, time = Blocks(6, "relu"), 20
    x = example(rec, time)
    k, v = (leaf.repeat_interleave(2, 2) for leaf in (x.k, x.v))
    weights = (torch.einsum("bthk,bshk->bhts", x.q, k) / 8**0.5).relu()
    t, s = places(time)
    weights = weights * ((s <= t) & (t // 6 == s // 6))
    output, _ = run(rec, x, None, Span.of(2, time))
    torch.testing.assert_close(output, torch.einsum("bhts,bshv->bthv", weights, v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rec", [Sliding(16, 4), Blocks(16)], ids=["sliding", "blocks"])
def test_a_windows_cost_is_linear_and_its_state_constant(rec: Recurrence, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = 0

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
        nonlocal scores
        scores += q.shape[0] * q.shape[1] * k.shape[1]
        return sdpa(q, k, v, mask, **how)

    monkeypatch.setattr(history, "sdpa", counted)
    costs, sizes = [], []
    for time in (1024, 2048):
        scores = 0
        _, state = run(rec, example(rec, time, batch=1, dtype=torch.float32), None, Span.of(1, time))
        costs.append(scores)
        sizes.append(sum(leaf.nbytes for leaf in state))
    assert costs[1] <= 2.05 * costs[0] <= 2.05 * 1024 * 300
    assert sizes[0] == sizes[1] == 2 * (20 if isinstance(rec, Sliding) else 16) * 2 * 8 * 4 + 8


def test_decoding_rows_of_one_length_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
        masks.append(mask)
        return sdpa(q, k, v, mask, **how)

    for rec in (History(), Sliding(7, 3), Blocks(6)):
        _, state = run(rec, example(rec, 12), None, Span.of(2, 12))
        with monkeypatch.context() as patch:
            patch.setattr(history, "sdpa", noted)
            patch.setattr(attention, "sdpa", noted)
            run(rec, example(rec, 1), state, Span.of(2, 1, start=12))
    assert masks == [None] * 3


def test_a_long_memory_forgets_as_precisely_as_a_short_one() -> None:
    """After 100,000 tokens that were forgotten at once a float32 sum has no room for rates of 1e-3."""
    rec, time = Forgetting(), 101_000
    now = example(rec, 1, batch=1)
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.rand(1, time, 2, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    log_decay = -torch.rand(1, time, HEADS, generator=draw, dtype=torch.float64).float().double()
    log_decay[:, 100_000:] *= 1e-3
    outputs = []
    for dtype in (torch.float64, torch.float32):
        length = torch.tensor([time])
        state = Forgetting.State(k.to(dtype), v.to(dtype), log_decay.to(dtype), length, length.clone())
        x = Forgetting.Inputs(*(leaf.to(dtype) for leaf in now))
        outputs.append(run(rec, x, state, Span.of(1, 1, start=time))[0].double())
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert error < 2e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pack_of_many_lengths_is_its_documents(name: str) -> None:
    rec, bounds = FAMILIES[name], [0, 9, 9, 10, 19, 33, 45]
    x = example(rec, 45, batch=1)
    output, state = run(rec, x, None, Span.packed(torch.tensor(bounds)))
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            continue
        own = shapes.time_slice(x, start, stop)
        torch.testing.assert_close(output[:, start:stop], oracle(own, bias_of(rec, own)), rtol=1e-10, atol=1e-12)
        assert int(state.length[n]) == stop - start


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Sliding(0), "window must be at least 1 and sinks at least 0; got 0 and 0"),
        (lambda: Sliding(4, -1), "got 4 and -1"),
        (lambda: Blocks(0), "size must be at least 1 and weights softmax or relu; got 0"),
        (lambda: Blocks(4, "tanh"), "got 4 and 'tanh'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_memories_are_refused(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()
