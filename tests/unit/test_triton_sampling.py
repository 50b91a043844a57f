"""Fused sampling beside the torch form: in Triton's interpreter on a CPU, for real where there is a GPU.

States and weights are small integers where tokens must be equal: both forms then have the same logits.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isotach.ops import sampling
from isotach.ops.decay import Decay
from isotach.ops.sampling import Drawn, Filters, Key, Tilt, gumbel, merge, sample, sample_filtered, stacked
from isotach.rng import generator

pytest.importorskip("triton")

import triton
import triton.language as tl

import isotach.ops.triton.decay  # noqa: F401  registers what `interpreted` lets in
from isotach.ops.triton import sampling as kernels
from tests.unit.interpreter import interpreted
from tests.unit.test_sampling import chi_square, exact

GPU = torch.device("cuda")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Kernels run in the interpreter, in small tiles."""
    small = {key: config._replace(rows=16, tokens=64, step=32) for key, config in kernels.CONFIGS.items()}
    monkeypatch.setattr(kernels, "CONFIGS", small)
    return interpreted(monkeypatch, Decay)


def beside(fused: Drawn, plain: Drawn) -> None:
    """Equal tokens; the rest to rounding."""
    assert torch.equal(fused.token, plain.token)
    for got, want in zip(fused, plain, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def inputs(rows: int, vocab: int, *, width: int = 32, dtype: torch.dtype = torch.float32, where: str = "cpu") -> Any:
    hidden, weight = exact(rows, width, name="h"), exact(vocab, width, name="w", scale=0.25)
    return hidden.to(where, dtype), weight.to(where, dtype), Key.of(2**62 + 5, 2**31 + 9, rows, device=where)


@triton.jit
def _noise(words, noise, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, SIZE)
    tl.store(noise + place, kernels._gumbel(tl.load(words + place).to(tl.uint32)))


# ---- in the interpreter


def test_noise_is_that_of_the_definition(on_cpu: pytest.MonkeyPatch) -> None:
    """To the last bits, at both ends too."""
    ends = torch.tensor([0, 1, 2, 300, 2**24 - 1, 2**24 + 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    words = torch.cat([ends, torch.randint(2**32, (1014,), generator=generator(0, "words"))])
    noise = torch.empty(1024)
    _noise[(1,)](words, noise, SIZE=1024)
    torch.testing.assert_close(noise, sampling._gumbel(words), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_those_of_the_definition(on_cpu: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Two blocks of rows, a last tile that ends early, two samples, rows at their own temperatures."""
    hidden, weight, key = inputs(18, 150, dtype=dtype)
    tilted = Tilt(torch.tensor([1.0, 0.0, 0.3, 1e-9, 4.0, 0.7]).repeat(3))
    plain = sample(hidden, weight, key, tilted, samples=2, backend="torch")
    beside(sample(hidden, weight, key, tilted, samples=2, backend="triton"), plain)
    assert plain.token.unique().numel() > 20


@pytest.mark.parametrize("shared", [False, True])
def test_biases_and_penalties_come_first(on_cpu: pytest.MonkeyPatch, shared: bool) -> None:
    hidden, weight, key = inputs(3, 70, width=20)  # and channels that do not fill a step
    rows = 1 if shared else 3
    bias, seen = exact(rows, 140, name="bias")[:, ::2], exact(rows, 70, name="seen") > 0.2
    bias[0, :9] = -torch.inf
    tilted = Tilt(torch.tensor([1.0, 0.0, 0.5]), bias, seen, torch.tensor([1.5, 0.7, 1.0]))
    plain = sample(hidden, weight, key, tilted, samples=4, backend="torch")
    beside(sample(hidden, weight, key, tilted, samples=4, backend="triton"), plain)


@pytest.mark.parametrize("start", [0, 3, 2**30 + 1])
def test_a_shard_is_drawn_by_its_own_ids(on_cpu: pytest.MonkeyPatch, start: int) -> None:
    """Shards need not begin at a multiple of four, as quarters of tiles do."""
    hidden, weight, key = inputs(2, 90)
    tilted, cuts = Tilt(torch.tensor([1.0, 0.0])), (0, 7, 33, 90)
    parts = [sample(hidden, weight[a:b], key, tilted, start=start + a, backend="triton") for a, b in pairwise(cuts)]
    beside(merge(stacked(parts)), sample(hidden, weight, key, tilted, start=start, backend="torch"))


def test_the_smallest_id_wins_among_equals(on_cpu: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(300, 1)
    weight[[70, 69, 66, 67, 200]] = 1.0
    tilted = Tilt(torch.zeros(2), torch.tensor([[0.0], [1.0]]) * (torch.arange(300) > 66))
    drawn = sample(torch.ones(2, 1), weight, Key.of(0, 0, 2), tilted, backend="triton")
    assert drawn.token.tolist() == [[66], [67]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_a_finite_largest_logit_has_no_token(on_cpu: pytest.MonkeyPatch, bad: float) -> None:
    hidden, weight, key = inputs(3, 100)
    bias = torch.zeros(3, 100)
    bias[0], bias[2, 4] = -torch.inf, bad
    drawn = sample(hidden, weight, key, Tilt(torch.ones(3), bias), backend="triton")
    assert (drawn.token == -1).tolist() == [[True], [False], [True]]
    assert (drawn.logprob == -torch.inf).tolist() == [[True], [False], [True]]


def test_views_are_read_where_they_are(on_cpu: pytest.MonkeyPatch) -> None:
    hidden, weight, key = inputs(4, 140)
    tilted = Tilt(torch.ones(8)[::2])
    wide = [torch.stack([leaf, leaf + 1], 1).flatten(0, 1)[::2] for leaf in (hidden, weight)]
    turned = weight.mT.contiguous().mT
    plain = sample(hidden, weight, key, tilted, backend="torch")
    for state, matrix in (wide, (hidden.mT.contiguous().mT, turned)):
        beside(sample(state, matrix, key, tilted, backend="triton"), plain)


def test_the_registered_operator(on_cpu: pytest.MonkeyPatch) -> None:
    hidden, weight, key = inputs(2, 20, width=16)
    torch.library.opcheck(kernels._sample, (hidden, weight, *key, torch.ones(2), None, None, None, 2, 0))


def test_what_kernels_do_not_take_is_refused(on_cpu: pytest.MonkeyPatch) -> None:
    hidden, weight, key = inputs(2, 20)
    with pytest.raises(ValueError, match=r"expected weights of .*; got torch.float64; use backend='torch'"):
        sample(hidden, weight.double(), key, Tilt(torch.ones(2)), backend="triton")


def test_constants_are_those_of_the_definition() -> None:
    assert (kernels.COLDEST.value, kernels.LARGEST.value) == (sampling.COLDEST, sampling.LARGEST)


# ---- in the compiler


def test_kernels_compile_for_hopper_once() -> None:
    """No other number of rows, samples or tokens of a vocabulary compiles anything more."""
    script = Path(__file__).with_name("hopper_sampling.py")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script), "16"], check=True, capture_output=True, text=True, env=plain)
    (report,) = json.loads(done.stdout.splitlines()[-1]).values()
    assert report["kernels"] == 2
    assert report["more"] == 0
    assert report["shared"] <= kernels.CONFIGS[2, 16].shared
    assert report["matrix_products"] > 0
    assert report["transposed"] == 0


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 17, 50, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_score_is_taken_on_a_gpu(rows: int, dtype: torch.dtype) -> None:
    """Only where two scores are nearer than rounding may another token be drawn than by the torch form."""
    stream = generator(0, "gpu")
    hidden = torch.randn(rows, 1000, generator=stream).to(GPU, dtype)
    weight = (torch.randn(20_011, 1000, generator=stream) / 10).to(GPU, dtype)
    key = Key.of(3, 4, rows, device="cuda")
    tilted = Tilt(torch.rand(rows, generator=stream).to(GPU), torch.randn(1, 20_011, generator=stream).to(GPU))
    fused, plain = (sample(hidden, weight, key, tilted, samples=3, backend=name) for name in ("triton", "torch"))
    torch.testing.assert_close(fused.score, plain.score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.mass, plain.mass, rtol=1e-4, atol=1e-4)
    same = fused.token == plain.token
    assert same.float().mean() > 0.99
    torch.testing.assert_close(fused.logprob[same], plain.logprob[same], rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_integers_draw_the_same_tokens_on_a_gpu() -> None:
    hidden, weight, key = inputs(100, 5000, dtype=torch.bfloat16, where="cuda")
    tilted = Tilt(torch.ones(100, device=GPU))
    fused, plain = (sample(hidden, weight, key, tilted, samples=20, backend=name) for name in ("triton", "torch"))
    assert (fused.token != plain.token).sum() <= 1  # logarithms differ in their last bit
    filters = Filters(*(torch.full((100,), value, device=GPU) for value in (50, 0.9, 0.0)))
    there = sample_filtered(hidden, weight, key, tilted, filters)
    assert bool((there.token >= 0).all())


@pytest.mark.gpu
def test_draws_follow_the_distribution_on_a_gpu() -> None:
    stream = generator(0, "state")
    hidden, weight = (torch.randn(*size, generator=stream).to(GPU, torch.bfloat16) for size in ((1, 8), (500, 8)))
    rows = 4096
    drawn = sample(
        hidden.expand(rows, -1),
        weight,
        Key.of(1, 2, rows, device="cuda"),
        Tilt(torch.ones(rows, device=GPU)),
        samples=64,
    )
    assert chi_square(drawn.token, (hidden.double() @ weight.double().mT)[0].softmax(0)) < 1


@pytest.mark.gpu
def test_a_draw_is_captured_in_a_graph_and_leaves_no_logits() -> None:
    hidden, weight, key = inputs(64, 32_000, dtype=torch.bfloat16, where="cuda")
    tilted = Tilt(torch.ones(64, device=GPU))
    expected = sample(hidden, weight, key, tilted).token
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sample(hidden, weight, key, tilted)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 64 * 32_000 * 4 / 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(hidden, weight, key, tilted)
    key.position.add_(1)
    graph.replay()
    assert not torch.equal(drawn.token, expected)
    key.position.sub_(1)
    graph.replay()
    assert torch.equal(drawn.token, expected)


@pytest.mark.gpu
def test_the_noise_of_a_gpu() -> None:
    words = torch.randint(2**32, (1024,), generator=generator(0, "words")).to(GPU)
    noise = torch.empty(1024, device=GPU)
    _noise[(1,)](words, noise, SIZE=1024)
    torch.testing.assert_close(noise, sampling._gumbel(words), rtol=2e-6, atol=1e-6)
    key: Key = Key.of(3, 4, 2, device="cuda")
    ids: Tensor = torch.arange(9, device=GPU)[None]
    on_cpu = gumbel(Key(*(leaf.cpu() for leaf in key)), ids.cpu(), 2)
    torch.testing.assert_close(gumbel(key, ids, 2).cpu(), on_cpu, rtol=2e-6, atol=1e-6)
