"""The plan of a chunk loop: every token once, in order, never across documents, in few steps."""

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotach.ops.chunks import Plan, plan

CPU = torch.device("cpu")


def tokens(cut: Plan, lane: int) -> list[int]:
    """The tokens a lane visits, in order."""
    visited: list[int] = []
    for block in cut.blocks:
        if not block.lanes.start <= lane < block.lanes.stop:
            continue
        for step in block.steps:
            rows = torch.arange(block.lanes.stop - block.lanes.start)[step.lanes].tolist()
            if lane - block.lanes.start in rows:
                row = rows.index(lane - block.lanes.start)
                out = torch.empty(step.repeats * step.count, 1, step.length, 1, dtype=torch.int64)
                step.load(torch.arange(10_000).view(-1, 1, 1), 0, step.repeats, out)
                visited += out[row :: step.count].flatten().tolist()
    return visited


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=12),
    st.sampled_from([1, 3, 16, 64]),
    st.sampled_from([None, 1, 2]),
    st.integers(1, 5),
)
def test_every_token_once_in_order_within_its_document(
    lengths: list[int], chunk: int, pieces: int | None, lanes_per_block: int
) -> None:
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    piece = None if pieces is None else pieces * chunk
    cut = plan(bounds, chunk, piece=piece, lanes_per_block=lanes_per_block, device=CPU)
    follows = {int(b): int(a) for link in cut.links for a, b in zip(*link, strict=True)}
    for document, (start, stop) in enumerate(itertools.pairwise(bounds)):
        lanes = [lane for lane in range(len(cut.document)) if int(cut.document[lane]) == document]
        if start == stop:
            assert not lanes
            assert document in cut.empty.tolist()
            continue
        order = [lane for lane in lanes if cut.opens[lane]]
        while not cut.closes[order[-1]]:
            order.append(next(lane for lane in lanes if follows.get(lane) == order[-1]))
        assert sorted(order) == sorted(lanes)
        assert [token for lane in order for token in tokens(cut, lane)] == list(range(start, stop))


def test_many_documents_take_few_steps() -> None:
    lengths = torch.randint(1, 300, (500,), generator=torch.Generator().manual_seed(0))
    bounds = (0, *lengths.cumsum(0).tolist())
    cut = plan(bounds, 64, piece=None, lanes_per_block=500, device=CPU)
    assert sum(step.repeats for block in cut.blocks for step in block.steps) <= 300 // 64 + 6


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9))
def test_store_puts_back_what_load_took(heads: int, width: int, documents: int) -> None:
    lengths = [(7 * i) % 23 + 1 for i in range(documents)]
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    flat = torch.rand(bounds[-1], heads, width, dtype=torch.float64)
    copy = torch.full_like(flat, -1)
    for block in plan(bounds, 8, piece=None, lanes_per_block=3, device=CPU).blocks:
        for step in block.steps:
            out = torch.empty(step.repeats * step.count, heads, step.length, width, dtype=torch.float64)
            step.store(copy, 0, step.repeats, step.load(flat, 0, step.repeats, out))
    assert torch.equal(copy, flat)
