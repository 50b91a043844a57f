"""The Toeplitz family against matrices written out, and what is particular to it: buffers, windows, two sides."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotach.ops.engine import Span, run
from isotach.ops.recurrence import rows
from isotach.ops.toeplitz import Toeplitz
from isotach.rng import generator
from isotach.testing import laws, subjects
from isotach.testing.laws import Law


def normal(*shape: int, name: str = "") -> Tensor:
    return torch.randn(shape, generator=generator(0, name, *map(str, shape)), dtype=torch.float64)


def dense(v: Tensor, kernel: Tensor, past: Tensor) -> Tensor:
    """The last rows of a matrix times (past, v): v (T, C), kernel (L, C) with lag 0 last, past (S, C)."""
    whole = torch.cat([past, v])
    place = torch.arange(len(whole))
    lag = place[:, None] - place
    matrix = torch.zeros(len(whole), len(whole), v.shape[1], dtype=v.dtype)
    inside = (lag >= 0) & (lag < len(kernel))
    matrix[inside] = kernel.flip(0)[lag[inside]]
    return torch.einsum("tsc,sc->tc", matrix, whole)[len(past) :]


def state(past: Tensor) -> Toeplitz.State:
    """The state that holds `past` (N, S, C)."""
    full = torch.full((len(past),), past.shape[1])
    return Toeplitz.State(past[:, :, None], full, full, full.clone())


lengths = st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 130, 200, 300]), min_size=1, max_size=4).filter(any)


@given(
    lengths, st.sampled_from([0, 1, 64, 100]), st.sampled_from([1, 2, 65, 130, 1000]), st.sampled_from([None, 1, 70])
)
def test_a_pack_is_its_documents_times_their_matrices(
    lengths: list[int], past: int, lags: int, window: int | None
) -> None:
    v, kernel, before = normal(1, sum(lengths), 1, 2), normal(lags, 1, 2), normal(len(lengths), past, 2, name="past")
    given_ = [x.requires_grad_() for x in (v, kernel, *([before] if past else []))]
    parts = zip(v[0, :, 0].split(lengths), before, strict=True)
    expected = torch.cat([dense(part, kernel[-(window or lags) :, 0], own) for part, own in parts])
    weights = normal(*expected.shape, name="weights")
    grads = torch.autograd.grad((expected * weights).sum(), given_)

    span = Span.packed(torch.tensor([0, *lengths]).cumsum(0))
    rec, start = Toeplitz(window=window), state(before) if past else None
    output, _ = run(rec, Toeplitz.Inputs(v, kernel), start, span)
    torch.testing.assert_close(output[0, :, 0], expected, rtol=0, atol=1e-11)
    got = torch.autograd.grad((output[0, :, 0] * weights).sum(), given_)
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lags", [1, 23, 200])
@pytest.mark.parametrize("label", ["", "window"])
@pytest.mark.parametrize("law", [law for law in laws.LAWS if law.number not in (7, 10, 11)], ids=lambda law: law.number)
def test_laws_hold_for_kernels_shorter_and_longer_than_the_text(
    law: Law, label: str, lags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(subjects.SIZES, "L", lags)
    verdict = laws.judge(law, subjects.Family(Toeplitz.instances()[label], label))
    assert verdict.holds, f"{verdict.worst}: {verdict.error:.2e} > {verdict.limit:.0e}"


@pytest.mark.parametrize("cut", [1, 64, 500, 511, 512])
def test_later_tokens_change_nothing_not_even_by_rounding(cut: int) -> None:
    v, kernel = normal(1, 700, 1, 3).float(), normal(700, 1, 3, name="kernel").float()
    changed = torch.cat([v[:, :cut], 1e6 * v[:, cut:]], 1)
    outputs = [run(Toeplitz(), Toeplitz.Inputs(x, kernel), None, Span.of(1, 700))[0] for x in (v, changed)]
    assert torch.equal(*(output[:, :cut] for output in outputs))
    assert not torch.equal(*(output[:, cut] for output in outputs))


def test_states_are_values_although_the_buffer_grows_in_place() -> None:
    kernel, rec = normal(400, 1, 2, name="kernel"), Toeplitz()

    def step(t: int, s: Toeplitz.State | None) -> tuple[Tensor, Toeplitz.State]:
        output: tuple[Tensor, Toeplitz.State] = run(
            rec, Toeplitz.Inputs(normal(2, 1, 1, 2, name=str(t)), kernel), s, Span.of(2, 1, start=t)
        )
        return output

    states: list[Toeplitz.State | None] = [None]
    outputs, places = [], set()
    with torch.no_grad():
        for t in range(300):
            output, after = step(t, states[-1])
            outputs.append(output)
            states.append(after)
            places.add(after.past.data_ptr())
        assert len(places) < 12  # doubling, not one allocation a token
        for t in (0, 5, 150, 299):  # older states go on as if nothing had followed
            assert torch.equal(step(t, states[t])[0], outputs[t])


def test_a_window_keeps_that_many_inputs() -> None:
    rec, kernel = Toeplitz(window=7), normal(50, 1, 2, name="kernel")
    with torch.no_grad():
        s = None
        for t in range(40):
            x = Toeplitz.Inputs(normal(1, 1, 1, 2, name=str(t)), kernel)
            _, s = run(rec, x, s, Span.of(1, 1, start=t))
            assert rec.compact(s).past.shape[1] == min(t + 1, 7)
            assert s.past.shape[1] <= 14


def test_rows_of_any_lengths_step_together() -> None:
    kernel, rec = normal(60, 2, 3, name="kernel"), Toeplitz()
    pasts = [normal(1, size, 2, 3, name=f"past {size}") for size in (1, 40, 7)]
    with torch.no_grad():
        alone = [run(rec, Toeplitz.Inputs(past, kernel), None, Span.of(1, past.shape[1]))[1] for past in pasts]
        v = normal(3, 4, 2, 3)
        expected = [run(rec, Toeplitz.Inputs(v[n : n + 1], kernel), s, Span.of(1, 4))[0] for n, s in enumerate(alone)]
        together = rec.concatenate(alone)
        for t in range(4):
            output, together = run(rec, Toeplitz.Inputs(v[:, t : t + 1], kernel), together, Span.of(3, 1))
            torch.testing.assert_close(output[:, 0], torch.cat(expected)[:, t], rtol=0, atol=1e-12)
    assert together.length.tolist() == [5, 44, 11]
    assert rec.compact(rows(together, slice(0, 1))).past.shape[1] == 5


@pytest.mark.parametrize(("time", "lags"), [(1, 0), (6, 5), (6, 2), (9, 30)])
def test_a_set_is_read_both_ways(time: int, lags: int) -> None:
    """lags before and as many ahead."""
    v, kernel = normal(2, time, 1, 3), normal(2 * lags + 1, 1, 3, name="kernel")
    output, _ = run(Toeplitz(two_sided=True), Toeplitz.Inputs(v, kernel), None, Span.of(2, time), causal=False)
    expected = torch.zeros_like(v)
    for t in range(time):
        for s in range(time):
            if abs(t - s) <= lags:
                expected[:, t] += kernel[lags - (t - s)] * v[:, s]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"kernel": normal(5, 3, 2)}, r"kernel must be \(L, H, V\) = \(L, 2, 3\); got \(5, 3, 2\)"),
        ({"v": normal(1, 4, 2)}, r"v must be \(B, T, H, V\)"),
    ],
)
def test_wrong_shapes_are_refused(inputs: Mapping[str, Any], message: str) -> None:
    x = Toeplitz.Inputs(normal(1, 4, 2, 3), normal(5, 2, 3))._replace(**inputs)
    with pytest.raises(ValueError, match=message):
        run(Toeplitz(), x, None, Span.of(1, 4))


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="toeplitz: window must be at least 1; got 0; leave it out"):
        Toeplitz(window=0)
