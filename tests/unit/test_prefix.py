"""The prefix cache: the longest beginning is found, for its owner alone, in memory, on disk and after a crash."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isotach.infer.chain import Digests, TokenChain
from isotach.infer.sample import Sampling
from isotach.infer.snapshot import KnownOrigin, Past, Snapshot
from isotach.serve import prefix
from isotach.serve.prefix import STRIDE, PrefixCache, folder_of
from isotach.serve.ticket import Request
from tests.unit.serving import BYTES, ByHand, alone, decoder, tokens

EMPTY = TokenChain.empty(BYTES.vocab_size)
MODEL = decoder("lightning")
ORIGIN = KnownOrigin(MODEL)
SIZE = MODEL.state_bytes(1) + BYTES.vocab_size
GB = 1 << 30


def cache(folder: Path | None = None, *, limit: int = GB, disk: int = GB) -> PrefixCache:
    made = PrefixCache(ORIGIN, BYTES, folder=folder, disk=disk)
    made.limit = limit
    return made


def past(ids: list[int]) -> Past:
    """What a model that has read `ids` would leave, its numbers aside."""
    state = ORIGIN.template()
    return Past(type(state)(state.blocks, torch.tensor([len(ids)])), EMPTY.extended(ids), None)


def found(cache: PrefixCache, ids: list[int], owner: str = "me") -> tuple[int, str | None, int | None]:
    """Position, reason and branch for a prompt."""
    result = cache.find(owner, Digests(ids), last=len(ids) - 1)
    return 0 if result.past is None else result.past.chain.length, result.miss, result.branch


def read(cache: PrefixCache, ids: list[int], owner: str = "me") -> None:
    """What the engine tells of a prompt: marks all along, a state behind the last token but one."""
    cache.mark(owner, Digests(ids), start=0, stop=len(ids) - 1)
    cache.put(owner, past(ids[:-1]))


def written(cache: PrefixCache) -> None:
    """Wait until nothing is on its way to disk: what comes while much is would be dropped."""
    while cache._writing:
        time.sleep(0.002)


IDS = st.lists(st.integers(0, 3), min_size=2, max_size=40)


@given(prompts=st.lists(st.tuples(IDS, st.sampled_from("ab")), min_size=1, max_size=8), asked=IDS)
def test_the_longest_beginning_that_the_owner_has_read_is_found(
    prompts: list[tuple[list[int], str]], asked: list[int]
) -> None:
    kept = cache()
    for ids, owner in prompts:
        read(kept, ids, owner)
    own = [ids[:-1] for ids, owner in prompts if owner == "a"]
    longest = max((len(ids) for ids in own if ids == asked[: len(ids)] and len(ids) < len(asked)), default=0)
    result = kept.find("a", Digests(asked), last=len(asked) - 1)
    assert (0 if result.past is None else result.past.chain.length) == longest
    if result.past is not None:
        assert result.past.chain.digest == EMPTY.extended(asked[:longest]).digest
    assert (
        kept.nbytes
        == len({tuple(ids) for ids in own}) * SIZE + len({tuple(i[:-1]) for i, o in prompts if o == "b"}) * SIZE
    )


def test_reasons_for_a_miss() -> None:
    kept = cache(limit=2 * SIZE)
    book = list(range(200))
    assert found(kept, book) == (0, "cold", None)
    read(kept, [*book, 1])
    assert found(kept, [*book, 2]) == (200, None, None)
    assert found(kept, [*book[:100], 9, 9]) == (0, "no checkpoint", 100 // STRIDE * STRIDE)
    assert found(kept, [*book[:100], 9, 9], owner="other") == (0, "cold", None)
    assert found(kept, [7] * 50) == (0, "cold", None)
    read(kept, [5] * 80)
    read(kept, [6] * 80)  # the book's state was used last by its own find, before these two
    assert kept.evictions == 1
    assert found(kept, [*book, 2]) == (0, "evicted", 200 // STRIDE * STRIDE)
    assert found(kept, [*book, 2], owner="other") == (0, "cold", None)


def test_memory_is_bounded_and_what_was_used_last_stays() -> None:
    kept = cache(limit=3 * SIZE)
    prompts = [[n] * 10 for n in range(6)]
    for ids in prompts:
        read(kept, ids)
        assert kept.nbytes <= 3 * SIZE
        assert found(kept, prompts[0])[0] == 9  # and is used by that
    assert [found(kept, ids)[0] for ids in prompts] == [9, 0, 0, 0, 9, 9]
    kept.limit = SIZE
    assert (kept.nbytes, found(kept, prompts[5])[0]) == (SIZE, 9)
    kept.limit = SIZE - 1
    assert kept.nbytes == 0
    read(kept, [9] * 10)
    assert kept.nbytes == 0


def test_what_has_no_room_goes_to_disk_and_survives_a_restart(tmp_path: Path) -> None:
    kept = cache(tmp_path, limit=3 * SIZE)  # two, and one on its way
    prompts = [[n] * 10 for n in range(5)]
    for ids in prompts:
        read(kept, ids)
        assert kept.nbytes <= 3 * SIZE
        written(kept)
    kept.close()
    assert (kept.nbytes, kept.evictions) == (2 * SIZE, 0)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 5
    assert kept.disk_bytes == sum(file.stat().st_size for file in files)
    again = cache(tmp_path)
    assert [found(again, ids) for ids in prompts] == [(9, None, None)] * 5
    assert found(again, prompts[0], owner="other") == (0, "cold", None)
    again.close()
    assert len(list(tmp_path.rglob("*"))) == 7  # nothing new was written


def test_the_disk_is_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    prompts = [[n] * 10 for n in range(6)]
    one = cache(tmp_path / "one")
    read(one, prompts[0])
    one.close()
    file = one.disk_bytes
    kept = cache(tmp_path / "many", limit=2 * SIZE, disk=3 * file)
    for ids in prompts:
        read(kept, ids)
        written(kept)
    kept.close()
    assert (kept.disk_bytes, kept.evictions) == (3 * file, 3)
    assert [found(kept, ids)[:2] for ids in (prompts[0], prompts[5])] == [(0, "evicted"), (9, None)]
    small = cache(tmp_path / "many", disk=2 * file)
    assert [found(small, ids)[0] for ids in prompts] == [0, 0, 0, 0, 9, 9]
    small.close()


@pytest.mark.parametrize("damage", ["truncated", "edited", "renamed", "another model's"])
def test_a_damaged_file_is_a_miss_and_is_removed(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = cache(tmp_path)
    read(kept, [1] * 10)
    read(kept, [2] * 10)
    kept.close()
    file = next(tmp_path.rglob(f"9-{EMPTY.extended([1] * 9).digest.hex()}*"))
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-7])
    elif damage == "edited":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "renamed":
        other = next(path for path in tmp_path.rglob("9-*") if path != file)
        file.write_bytes(other.read_bytes())
    else:
        foreign = ByHand(decoder("lightning", seed=1))
        ticket = foreign.submit(Request([1] * 10))
        foreign.finish()
        ticket.snapshot().save(file)
    again = cache(tmp_path)
    assert found(again, [1] * 10) == (0, "evicted", None)
    assert not file.exists()
    assert "dropped from the cache" in caplog.text
    assert found(again, [2] * 10) == (9, None, None)
    again.close()


def test_another_models_states_are_left_alone_but_counted(tmp_path: Path) -> None:
    foreign = tmp_path / "0123456789abcdef" / folder_of("me") / "9-00.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"x" * 1000)
    (foreign.parent / ".9-00.safetensors.1-2.tmp").write_bytes(b"torn")
    os.utime(foreign.parent / ".9-00.safetensors.1-2.tmp", (0, 0))
    kept = cache(tmp_path)
    assert kept.disk_bytes == 1000
    assert list(foreign.parent.iterdir()) == [foreign]
    kept.close()


def test_what_is_remembered_of_states_on_disk_is_small_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cache(tmp_path, limit=2 * SIZE)

    def fill(numbers: range) -> None:
        for number in numbers:
            kept.put("me", past([number // 200, number % 200, 3]))
            written(kept)

    fill(range(100))  # what grows by leaps has leapt
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    fill(range(100, 300))
    gc.collect()
    each = (tracemalloc.get_traced_memory()[0] - before) / 200
    tracemalloc.stop()
    assert each < 700
    monkeypatch.setattr(prefix, "FILES", 50)
    fill(range(300, 310))
    assert len(kept._files) == len(list(tmp_path.rglob("*.safetensors"))) == 50
    kept.close()
    again = cache(tmp_path)
    assert len(again._files) == 50
    assert found(again, [1, 105, 3, 4])[0] == 3  # the last one; the first are gone
    assert found(again, [0, 0, 3, 4])[0] == 0
    again.close()


def test_what_was_fetched_need_not_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache(tmp_path)
    read(first, [1] * 10)
    first.close()
    kept = cache(tmp_path)
    loaders = [
        threading.Thread(target=kept.fetch, args=("me", Digests([1] * 10)), kwargs={"last": 9}) for _ in range(4)
    ]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join()
    assert kept.nbytes == SIZE  # once, however many have fetched it
    monkeypatch.setattr(Snapshot, "load", lambda *_: pytest.fail("loaded a second time"))
    assert found(kept, [1] * 10) == (9, None, None)
    kept.fetch("me", Digests([2] * 10), last=9)
    kept.close()


def test_a_state_that_was_passed_makes_room() -> None:
    kept = cache()
    ends = [past([1] * count) for count in (10, 20, 30)]
    kept.put("me", ends[0], passing=True)
    kept.put("me", ends[1], passing=True, instead_of=ends[0].chain)
    assert kept.nbytes == SIZE
    assert found(kept, [1] * 25)[0] == 20  # somebody else goes on from here
    kept.put("me", ends[2], passing=True, instead_of=ends[1].chain)
    assert kept.nbytes == 2 * SIZE
    kept.put("me", past([1] * 40), instead_of=EMPTY)
    assert kept.nbytes == 3 * SIZE


KILLED = """
import sys
from pathlib import Path
from tests.unit.test_prefix import cache, read, SIZE
kept = cache(Path(sys.argv[1]), limit=2 * SIZE)
for n in range(10**6):
    read(kept, [n % 251, n // 251, 3])
    if n == 20:
        print("writing", flush=True)
"""


def test_killed_while_it_writes_it_loses_nothing_that_was_there(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    whole = {path for path in tmp_path.rglob("*.safetensors") if not path.name.startswith(".")}
    assert whole
    again = cache(tmp_path)
    for n in range(20):
        position, miss, _ = found(again, [n % 251, n // 251, 3])
        name = f"2-{EMPTY.extended([n % 251, n // 251]).digest.hex()}.safetensors"
        assert (position == 2) == any(path.name == name for path in whole)
        assert miss in (None, "cold")
    assert again.evictions == 0  # no file under its own name was torn
    again.close()


@settings(max_examples=6)
@given(
    prompts=st.lists(st.text("ab ", min_size=1, max_size=90), min_size=2, max_size=6),
    seed=st.integers(0, 9),
    room=st.sampled_from([0, 2, 100]),
)
@pytest.mark.parametrize("name", ["hybrid", "tnn", "delta"])
def test_states_from_memory_and_disk_give_what_a_fresh_reading_gives(
    name: str, prompts: list[str], seed: int, room: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through two lives of an engine, most prompts beginning as others do, with room in memory for few states."""
    model = decoder(name)
    folder = tmp_path_factory.mktemp("cache")
    origin = KnownOrigin(model)
    skipped = 0
    for _ in range(2):
        kept = PrefixCache(origin, BYTES, folder=folder, disk=GB)
        hand = ByHand(model, cache=kept)
        for prompt in prompts:
            kept.limit = hand.rounds._memory = room * model.state_bytes(40) + hand.rounds._footprint(200)
            ids, sampling = list(prompt.encode()), Sampling(seed=seed, max_tokens=5, logprobs=1)
            ticket = hand.submit(Request(ids, sampling, checkpoints=(len(ids) // 2,)))
            hand.finish(partial(written, kept))
            expected = alone(model, ids, sampling)
            got = list(ticket)
            assert tokens(got) == tokens(expected)
            assert [event.logprob for event in got] == pytest.approx([e.logprob for e in expected], abs=1e-9)
            skipped = ticket.usage.cached_tokens
        kept.close()
    assert skipped >= len(prompts[-1]) // 2  # the second life found the first one's
