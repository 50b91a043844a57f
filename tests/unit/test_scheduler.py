"""The scheduler as what it is: functions of numbers, whose promises are checked round by round."""

from hypothesis import given
from hypothesis import strategies as st

from isotach.serve.scheduler import CALL, LEAST, PATIENCE, SOON, Demand, admit, pace, plan

DEMANDS = st.lists(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, PATIENCE + 2)).map(
        lambda numbers: Demand(max(numbers[:2]), min(numbers[:2]), numbers[2])
    ),
    max_size=8,
)
ROOM = st.integers(1, CALL)


@given(demands=DEMANDS, room=ROOM)
def test_a_call_is_within_its_room_and_never_empty(demands: list[Demand], room: int) -> None:
    slices = plan(demands, room=room)
    assert len(dict(slices)) == len(slices)
    assert all(1 <= count <= demands[index].piece for index, count in slices)
    assert sum(count for _, count in slices) <= room
    assert bool(slices) == bool(demands)


@given(demands=DEMANDS, room=ROOM)
def test_nobody_shares_a_call_with_a_longer_one_that_it_does_not_finish(demands: list[Demand], room: int) -> None:
    fresh = [Demand(demand.left, demand.piece) for demand in demands]
    slices = plan(fresh, room=room)
    for index, count in slices[1:]:
        assert count == fresh[index].left
    if slices:
        assert fresh[slices[0][0]].left == min(demand.left for demand in fresh)


@given(
    cost=st.floats(1e-6, 1.0), fixed=st.floats(0, 1.0), noise=st.lists(st.floats(0.8, 1.2), min_size=40, max_size=40)
)
def test_calls_become_as_large_as_a_step_can_wait_for(cost: float, fixed: float, noise: list[float]) -> None:
    """Where an operation takes `cost` steps per token and `fixed` ones besides."""
    tokens = CALL
    for now in noise:
        tokens = pace(tokens, stretch=(fixed + cost * tokens) * now, step=1.0)
        assert LEAST <= tokens <= CALL
    assert tokens == LEAST or (fixed + cost * tokens) * 0.8 <= 1 / 2 or (fixed + cost * tokens / 2) * 0.8 <= 1 / 4
    if fixed + cost * CALL < 0.4:
        assert tokens == CALL


def test_operations_that_nobody_notices_do_not_make_calls_small() -> None:
    assert pace(CALL, stretch=SOON * 0.9, step=SOON / 100) == CALL
    assert pace(CALL // 2, stretch=SOON * 0.4, step=SOON / 100) == CALL
    assert pace(CALL, stretch=SOON * 1.1, step=SOON / 100) == CALL // 2


def rounds(left: list[int], arrivals: list[list[int]]) -> list[dict[int, int]]:
    """What everybody reads in each round, until nobody has anything left; newcomers are numbered on."""
    left, skipped, history = list(left), [0] * len(left), []
    while any(left) or arrivals:
        new = arrivals.pop(0) if arrivals else []
        left, skipped = left + new, skipped + [0] * len(new)
        there = [i for i, tokens in enumerate(left) if tokens]
        slices = plan([Demand(left[i], left[i], skipped[i]) for i in there])
        read = {there[index]: count for index, count in slices}
        for i in there:
            left[i] -= read.get(i, 0)
            skipped[i] = 0 if i in read else skipped[i] + 1
        history.append(read)
    return history


@given(
    left=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    arrivals=st.lists(st.lists(st.integers(1, 200), max_size=3), max_size=30),
)
def test_everybody_is_read_to_the_end_and_nothing_twice(left: list[int], arrivals: list[list[int]]) -> None:
    history = rounds(left, list(arrivals))
    wanted = [*left, *(tokens for new in arrivals for tokens in new)]
    assert [sum(read.get(i, 0) for read in history) for i in range(len(wanted))] == wanted


def test_ever_new_short_ones_do_not_starve_a_long_one() -> None:
    history = rounds([50_000], [[60]] * 400)
    gaps = [read.get(0, 0) for read in history[:400]]
    assert max(len(run) for run in "".join("." if count else "x" for count in gaps).split(".")) <= PATIENCE
    assert sum(gaps) >= 400 * CALL / 2 / (PATIENCE + 1)


def test_long_ones_take_turns() -> None:
    history = rounds([20_000, 20_001, 20_002], [])
    early = history[:12]
    assert all(sum(read.get(i, 0) for read in early) >= CALL // 2 for i in range(3))


@given(needs=st.lists(st.integers(1, 100), max_size=10), free=st.integers(0, 300), rows=st.integers(0, 12))
def test_who_waits_is_let_in_in_order_while_there_is_room(needs: list[int], free: int, rows: int) -> None:
    count = admit(needs, free=free, rows=rows)
    assert sum(needs[:count]) <= free
    assert count <= rows
    assert count in (len(needs), rows) or sum(needs[: count + 1]) > free
