"""Packing: what a batch holds, told by a plain loop over documents; order as a function of the step alone."""

import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isotach.data.cache import Tokens
from isotach.data.pack import Batch, Packer, prefetch
from isotach.errors import UserError

EOS = 5000


def corpus(lengths: list[int]) -> Tokens:
    """Documents of these many tokens, every token different, so that a pair of tokens names its place."""
    ids, start = [], 0
    for length in lengths:
        ids += [*range(start, start + length), EOS]
        start += length
    assert start <= EOS
    return Tokens(
        ids=np.array(ids, dtype=np.uint16),
        bounds=np.cumsum([0, *(length + 1 for length in lengths)]).astype(np.int64),
        bytes=3 * start,
        byte_lengths=np.where(np.arange(EOS + 1) == EOS, 0, 3).astype(np.int32),
        fingerprint="",
    )


def pairs_of(tokens: Tokens) -> set[tuple[int, int]]:
    """All pairs (token, next token of its document), by the definition."""
    found = set()
    for begin, end in pairwise(tokens.bounds.tolist()):
        document = tokens.ids[begin:end].tolist()
        found |= set(pairwise(document))
    return found


def pairs_in(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True))


def equal(a: Batch, b: Batch) -> bool:
    same = [
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "positions", "cu_seqlens")
    ]
    return all(same) and a.bytes == b.bytes


def check_form(batch: Batch, tokens: Tokens, seq_len: int) -> None:
    """No segment crosses a document or a row, and every field agrees with the segments."""
    count = batch.tokens.shape[1]
    bounds = batch.cu_seqlens.tolist()
    for field in (batch.tokens, batch.targets, batch.positions):
        assert field.shape == (1, count)
        assert field.dtype == torch.int64
    assert (bounds[0], bounds[-1]) == (0, count)
    assert batch.cu_seqlens.dtype == torch.int64
    assert set(range(0, count, seq_len)) <= set(bounds)
    valid = pairs_of(tokens)
    for begin, end in pairwise(bounds):
        assert begin < end
        assert batch.positions[0, begin:end].tolist() == list(range(end - begin))
        inputs, targets = batch.tokens[0, begin:end].tolist(), batch.targets[0, begin:end].tolist()
        assert inputs[1:] == targets[:-1]
        assert set(zip(inputs, targets, strict=True)) <= valid
    assert EOS not in batch.tokens
    assert batch.bytes == 3 * int((batch.targets != EOS).sum())


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
SIZES: dict[str, Any] = {
    "lengths": LENGTHS,
    "seq_len": st.integers(1, 12),
    "rows": st.integers(1, 4),
    "seed": st.integers(0, 99),
}


@settings(max_examples=60)
@given(**SIZES)
def test_an_epoch_has_nearly_every_pair_once(lengths: list[int], seq_len: int, rows: int, seed: int) -> None:
    tokens = corpus(lengths)
    total = sum(lengths)
    if total < seq_len:
        return
    packer = Packer(tokens, seq_len=seq_len, batch_tokens=seq_len, seed=seed)
    assert packer.steps == total // seq_len
    for epoch in range(2):
        seen = Counter[tuple[int, int]]()
        for step in range(epoch * packer.steps, (epoch + 1) * packer.steps):
            batch = packer.batch(step)
            check_form(batch, tokens, seq_len)
            seen.update(pairs_in(batch))
        assert max(seen.values()) == 1
        assert len(seen) == total - total % seq_len
    whole = Packer(tokens, seq_len=seq_len, batch_tokens=rows * seq_len, seed=seed)
    parts = [packer.batch(rows * 3 + row) for row in range(rows)]
    assert torch.equal(whole.batch(3).tokens, torch.cat([part.tokens for part in parts], 1))


@settings(max_examples=60)
@given(**SIZES)
def test_validation_reads_every_pair_once_in_order(lengths: list[int], seq_len: int, rows: int, seed: int) -> None:
    tokens = corpus(lengths)
    packer = Packer(tokens, seq_len=seq_len, batch_tokens=rows * seq_len, seed=seed, shuffle=False)
    batches = [packer.batch(step) for step in range(packer.steps)]
    for batch in batches:
        check_form(batch, tokens, seq_len)
    read = [pair for batch in batches for pair in pairs_in(batch)]
    assert [token for token, _ in read] == list(range(sum(lengths)))
    assert set(read) == pairs_of(tokens)
    assert sum(batch.bytes for batch in batches) == 3 * (sum(lengths) - len(lengths))
    for step in (-1, packer.steps):
        with pytest.raises(IndexError):
            packer.batch(step)


@settings(max_examples=40)
@given(**SIZES, data=st.data())
def test_a_batch_depends_on_seed_and_step_alone(
    lengths: list[int], seq_len: int, rows: int, seed: int, data: st.DataObject
) -> None:
    tokens = corpus([*lengths, seq_len])

    def packer() -> Packer:
        return Packer(tokens, seq_len=seq_len, batch_tokens=rows * seq_len, seed=seed)

    steps = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=5))
    used = packer()
    for step in steps:
        assert equal(used.batch(step), packer().batch(step))
    assert len(used._epochs) <= 3, "old epochs are forgotten"


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("ranks", "micros"), [(1, 1), (1, 6), (2, 3), (3, 2), (6, 1), (12, 1), (1, 12), (3, 4)])
def test_ranks_and_micro_batches_divide_the_rows_of_a_step(ranks: int, micros: int, shuffle: bool) -> None:
    tokens = corpus([7, 1, 90, 33, 2, 250])
    packer = Packer(tokens, seq_len=8, batch_tokens=96, seed=1, shuffle=shuffle)
    for step in range(packer.steps):
        whole = packer.batch(step)
        parts = [
            packer.batch(step, rank=rank, ranks=ranks, micro=micro, micros=micros)
            for rank in range(ranks)
            for micro in range(micros)
        ]
        for field in ("tokens", "targets", "positions"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts], 1), getattr(whole, field))
        assert sum(part.bytes for part in parts) == whole.bytes
        lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
        assert torch.equal(lengths, whole.cu_seqlens.diff())
        if shuffle:
            assert {part.tokens.shape[1] for part in parts} == {96 // (ranks * micros)}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("lengths", [[1] * 500, [1, 40] * 250, [3] * 500], ids=["one-token", "mixed", "three-token"])
def test_five_hundred_documents_in_a_row(lengths: list[int], shuffle: bool) -> None:
    lengths = [min(length, 8) for length in lengths]
    tokens = corpus(lengths)
    packer = Packer(tokens, seq_len=sum(lengths), batch_tokens=sum(lengths), seed=0, shuffle=shuffle)
    batch = packer.batch(0)
    assert set(pairs_in(batch)) == pairs_of(tokens)
    assert batch.tokens.shape[1] == sum(lengths)
    # A row may begin inside a document, which then is met at both its ends.
    assert len(batch.cu_seqlens) - 1 in (500, 501)


def test_epochs_and_seeds_differ() -> None:
    tokens = corpus([30] * 40)
    packer = Packer(tokens, seq_len=10, batch_tokens=1200, seed=0)
    orders = [packer.batch(step).tokens.tolist() for step in range(3)]
    orders.append(Packer(tokens, seq_len=10, batch_tokens=1200, seed=1).batch(0).tokens.tolist())
    assert len({str(order) for order in orders}) == 4
    # One long document: its order cannot change, but where the rows begin does.
    single = Packer(corpus([100]), seq_len=10, batch_tokens=100, seed=0)
    starts = {int(single.batch(step).tokens[0, 0]) % 10 for step in range(20)}
    assert len(starts) > 3


def test_the_order_is_frozen() -> None:
    """Resuming an older run must find the same batches."""
    packer = Packer(corpus([5, 1, 9, 20]), seq_len=5, batch_tokens=10, seed=7)
    assert packer.batch(1000).tokens.tolist() == [[26, 27, 28, 29, 30, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_workers_change_nothing(workers: int) -> None:
    packer = Packer(corpus([7, 1, 90, 33, 2, 250]), seq_len=8, batch_tokens=32, seed=3)
    batches = list(prefetch(packer, range(5, 45), workers, rank=1, ranks=2, micros=2))
    expected = [packer.batch(s, rank=1, ranks=2, micro=m, micros=2) for s in range(5, 45) for m in range(2)]
    assert len(batches) == 80
    assert all(map(equal, batches, expected))


def test_prefetch_stays_a_little_ahead_and_stops_when_closed() -> None:
    packer = Packer(corpus([100]), seq_len=8, batch_tokens=8, seed=3)
    drawn: list[int] = []

    def steps() -> Iterator[int]:
        for step in range(10**9):
            drawn.append(step)
            yield step

    batches = prefetch(packer, steps(), 2)
    next(batches)
    assert len(drawn) <= 6
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isotach-data")]


def test_an_error_in_a_worker_reaches_the_caller() -> None:
    packer = Packer(corpus([100]), seq_len=8, batch_tokens=8, seed=3, shuffle=False)
    with pytest.raises(IndexError):
        list(prefetch(packer, [0, 99], 2))


def test_the_span_is_what_the_engine_reads() -> None:
    batch = Packer(corpus([7, 30]), seq_len=8, batch_tokens=16, seed=0).batch(0)
    pytest.importorskip("isotach.ops.engine")
    assert batch.span.positions is batch.positions
    assert batch.span.cu_seqlens is batch.cu_seqlens


@pytest.mark.parametrize(
    ("lengths", "sizes", "says"),
    [
        ([3, 4], {"seq_len": 8, "batch_tokens": 8}, "at least one sequence of 8 tokens, got 7"),
        ([30], {"seq_len": 8, "batch_tokens": 12}, "multiple of seq_len = 8"),
        ([30], {"seq_len": 8, "batch_tokens": 4}, "multiple of seq_len = 8"),
        ([30], {"seq_len": 0, "batch_tokens": 4}, "multiple of seq_len"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(lengths: list[int], sizes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Packer(corpus(lengths), seed=0, **sizes)


def test_parts_that_do_not_divide_are_refused() -> None:
    packer = Packer(corpus([300]), seq_len=8, batch_tokens=32, seed=0)
    with pytest.raises(UserError, match="4 sequences"):
        packer.batch(0, rank=0, ranks=3)
    with pytest.raises(ValueError, match="rank < 2"):
        packer.batch(0, rank=2, ranks=2)


def test_a_short_split_is_one_short_row_for_validation() -> None:
    tokens = corpus([3, 4])
    packer = Packer(tokens, seq_len=100, batch_tokens=200, seed=0, shuffle=False)
    assert packer.steps == 1
    assert packer.batch(0).tokens.tolist() == [list(range(7))]
