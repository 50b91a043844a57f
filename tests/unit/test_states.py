"""Stored states: whole or not there, for their owner alone, and never taken for what they are not."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from isotach.errors import UserError
from isotach.infer.sample import Sampling
from isotach.infer.snapshot import KnownOrigin, Snapshot
from isotach.models.state import _digest
from isotach.serve import states
from isotach.serve.states import StateStore
from isotach.serve.ticket import Request
from tests.unit.serving import BYTES, MODELS, ByHand, decoder, tokens

TEXT = list(b"a conversation to be kept")


def snapshot(name: str = "hybrid", ids: list[int] = TEXT, seed: int = 0) -> Snapshot:
    hand = ByHand(decoder(name, seed=seed))
    ticket = hand.submit(Request(ids))
    hand.finish()
    return ticket.snapshot()


def store(folder: Path, name: str = "hybrid") -> StateStore:
    return StateStore(folder, KnownOrigin(decoder(name)), BYTES)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_goes_on_as_if_it_had_never_been_away(name: str, tmp_path: Path) -> None:
    kept = store(tmp_path, name)
    record = kept.create("me", snapshot(name), TEXT, note={"title": "first"})
    assert (record.tokens, record.parent, record.note) == (len(TEXT), None, {"title": "first"})
    again = store(tmp_path, name)
    assert again.get("me", record.id) == record
    assert again.transcript("me", record.id).tolist() == TEXT
    assert again.export("me", record.id).stat().st_size == record.bytes <= snapshot(name).nbytes() + 65536
    hand = ByHand(decoder(name))
    sampling = Sampling(seed=4, max_tokens=8)
    whole, resumed = Request(TEXT, sampling), Request([], sampling, state=again.load("me", record.id))
    tickets = [hand.submit(request) for request in (whole, resumed)]
    hand.finish()
    assert tokens(tickets[0]) == tokens(tickets[1])


def test_forks_share_their_files_and_outlive_their_parent(tmp_path: Path) -> None:
    kept = store(tmp_path)
    first = kept.create("me", snapshot(), TEXT, note={"n": 1})
    fork = kept.fork("me", first.id)
    other = kept.fork("me", fork.id, note={"n": 2})
    assert (fork.parent, other.parent, fork.note, other.note) == (first.id, fork.id, {"n": 1}, {"n": 2})
    assert [record.id for record in kept.list("me")] == [other.id, fork.id, first.id]
    assert kept.export("me", first.id).stat().st_nlink == 3
    kept.delete("me", first.id)
    assert [record.id for record in kept.list("me")] == [other.id, fork.id]
    assert kept.load("me", other.id).chain.digest == snapshot().chain.digest
    assert kept.transcript("me", other.id).tolist() == TEXT


def test_moved_to_another_place_it_is_the_same(tmp_path: Path) -> None:
    here, there = store(tmp_path / "here"), store(tmp_path / "there")
    record = here.create("me", snapshot(), TEXT)
    file = here.export("me", record.id)
    moved = there.import_("you", file, TEXT)
    assert (moved.tokens, moved.chain, moved.owner) == (record.tokens, record.chain, "you")
    assert there.transcript("you", moved.id).tolist() == TEXT
    bare = there.import_("you", file)
    with pytest.raises(UserError, match="imported without them"):
        there.transcript("you", bare.id)
    for wrong in (TEXT[:-1], [*TEXT[:-1], 0], [0, *TEXT[1:]], [-1, *TEXT[1:]], [0.5] * len(TEXT)):
        with pytest.raises(UserError, match="that it has read"):
            there.import_("you", file, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model that made it"):
        store(tmp_path / "other", "delta").import_("you", file)
    assert len(there.list("you")) == 2


@pytest.mark.parametrize("call", ["get", "load", "transcript", "fork", "export", "delete"])
@pytest.mark.parametrize(
    "id", ["another's", "state_" + "0" * 32, "", "../me", "state_x", "state_" + "0" * 31 + "/", "\0"]
)
def test_ids_that_are_not_the_owners_are_unknown(tmp_path: Path, call: str, id: str) -> None:
    kept = store(tmp_path)
    record = kept.create("me", snapshot(), TEXT)
    own = record.id if id == "another's" else id
    with pytest.raises(UserError, match="expected one of yours, found none") as told:
        getattr(kept, call)("you", own)
    with pytest.raises(UserError) as never:
        getattr(store(tmp_path), call)("you", own)
    assert str(told.value) == str(never.value)
    assert kept.list("you") == []
    assert kept.list("me") == [record]


# ---- files that are not what they should be


def edited(path: Path, change: Callable[[dict[str, str], dict[str, torch.Tensor]], None]) -> None:
    """The file after a change to its header and tensors, its content hash made to fit again."""
    with safe_open(path, framework="pt") as file:
        header, leaves = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop("content")
    change(header, leaves)
    header["content"] = _digest(header, leaves)
    save_file(leaves, path, header)


def put(name: str, value: str) -> Callable[[dict[str, str], dict[str, torch.Tensor]], None]:
    return lambda header, leaves: header.__setitem__(name, value)


def said(**changes: object) -> Callable[[dict[str, str], dict[str, torch.Tensor]], None]:
    def change(header: dict[str, str], leaves: dict[str, torch.Tensor]) -> None:
        header["tokens"] = json.dumps(json.loads(header["tokens"]) | changes)

    return change


def leaf(
    field: str, make: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, str], dict[str, torch.Tensor]], None]:
    def change(header: dict[str, str], leaves: dict[str, torch.Tensor]) -> None:
        for name in [name for name in leaves if name.endswith(field)]:
            leaves[name] = make(leaves[name]).contiguous()

    return change


HOSTILE = {
    "no header": lambda header, leaves: header.clear(),
    "other format": put("format", "isotach-state-0"),
    "other weights": put("weights", "0" * 64),
    "positions deep": put("positions", "[" * 100_000),
    "positions negative": put("positions", "[-1]"),
    "positions huge": put("positions", "[" + "9" * 18 + "]"),
    "positions many": put("positions", "[24, 24]"),
    "positions none": put("positions", "[]"),
    "positions text": put("positions", "24"),
    "tokens deep": put("tokens", "[" * 100_000),
    "tokens bare": put("tokens", "abc"),
    "unread huge": said(unread=10**9),
    "unread negative": said(unread=-1),
    "read another": said(read=23),
    "chain short": said(chain="00"),
    "seen short": said(seen="AAAA"),
    "seen malformed": said(seen="A"),
    "another tokenizer": said(tokenizer="0"),
    "more": said(more=1),
    "length beyond": leaf("length", lambda x: x + 1000),
    "length negative": leaf("length", lambda x: x * 0 - 1),
    "length less": leaf("length", lambda x: x - 1),
    "filled beyond": leaf("filled", lambda x: x + 1),
    "length floating": leaf("length", lambda x: x.float()),
    "keys short": leaf("k", lambda x: x[:, :3]),
    "keys of another kind": leaf("k", lambda x: x.float()),
    "keys flat": leaf("k", lambda x: x.flatten()),
    "a tensor less": lambda header, leaves: leaves.pop(min(leaves)),
    "a tensor more": lambda header, leaves: leaves.__setitem__("extra", torch.zeros(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    kept, path = store(tmp_path / "store"), tmp_path / "upload"
    snapshot().save(path)
    edited(path, HOSTILE[name])
    with pytest.raises(UserError) as told:
        kept.import_("me", path)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400
    assert str(path) not in str(told.value)
    assert kept.list("me") == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**27) + b"{",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 73) + b'{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}}'[:73],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
    ],
    ids=["empty", "zeros", "endless header", "long header", "nothing", "deep", "huge shape", "picture"],
)
def test_what_is_no_state_at_all_is_refused(tmp_path: Path, content: bytes) -> None:
    kept, path = store(tmp_path / "store"), tmp_path / "upload"
    path.write_bytes(content)
    with pytest.raises(UserError, match="state to import: expected"):
        kept.import_("me", path)


@pytest.mark.parametrize("file", ["state.safetensors", "transcript.bin", "record.json"])
@pytest.mark.parametrize("damage", ["truncated", "edited", "missing"])
def test_a_damaged_state_is_refused_and_the_others_are_not(tmp_path: Path, file: str, damage: str) -> None:
    kept = store(tmp_path)
    bad, good = kept.create("me", snapshot(), TEXT), kept.create("me", snapshot(), TEXT)
    path = kept.export("me", bad.id).with_name(file)
    content = bytearray(path.read_bytes())
    content[-9] ^= 255
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    again = store(tmp_path)
    read = again.load if file == "state.safetensors" else again.transcript
    with pytest.raises(UserError, match=r"state .*: expected"):
        read("me", bad.id)
    assert again.load("me", good.id).tokens == len(TEXT)
    assert good in again.list("me")


def test_a_transcript_must_be_as_long_as_its_state(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for wrong in (TEXT[:-1], [*TEXT[:-1], 0]):
        with pytest.raises(UserError, match="tokens that it has read"):
            kept.create("me", snapshot(), wrong)
    assert kept.list("me") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


KILLED = """
import sys
from pathlib import Path
from tests.unit.test_states import TEXT, snapshot, store
kept, state = store(Path(sys.argv[1])), snapshot()
print("writing", flush=True)
for n in range(10**6):
    kept.create("me", state, TEXT, note={"n": n})
"""


def test_killed_while_it_writes_every_state_is_whole_or_not_there(tmp_path: Path) -> None:
    kept = store(tmp_path)
    before = kept.create("me", snapshot(), TEXT)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    again = store(tmp_path)
    records = again.list("me")
    assert before in records
    for record in records:
        assert again.load("me", record.id).tokens == len(TEXT)
        assert again.transcript("me", record.id).tolist() == TEXT
    torn = list(tmp_path.glob("*/*/.state_*"))
    for folder in torn:
        os.utime(folder, (0, 0))
    store(tmp_path)
    assert list(tmp_path.glob("*/*/.state_*")) == []


def test_tokens_may_be_any_array(tmp_path: Path) -> None:
    kept = store(tmp_path)
    record = kept.create("me", snapshot(), np.array(TEXT, np.uint32))
    assert kept.transcript("me", record.id).dtype == np.uint32


def test_what_is_deleted_meanwhile_is_left_out_of_a_list_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store(tmp_path)
    gone, damaged, stays = (first.create("me", snapshot(), TEXT) for _ in range(3))
    first.export("me", damaged.id).with_name("record.json").write_text("{")
    kept, read = store(tmp_path), StateStore._read

    def late(self: StateStore, owner: str, id: str) -> object:
        if id == gone.id:
            first.delete("me", id)
        return read(self, owner, id)

    monkeypatch.setattr(StateStore, "_read", late)
    monkeypatch.setattr(first, "_read", lambda owner, id: read(first, owner, id))
    assert kept.list("me") == [stays]
    assert gone.id not in caplog.text
    assert damaged.id in caplog.text


def test_the_newest_state_of_a_session_is_found_by_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store(tmp_path)
    records = [first.create("me", snapshot(), TEXT, session=f"number {n % 3}") for n in range(9)]
    kept, looks, read = store(tmp_path), [], StateStore._read
    monkeypatch.setattr(StateStore, "_read", lambda *arguments: (looks.append(arguments), read(*arguments))[1])
    assert [kept.newest("me", f"number {n}") for n in range(3)] == records[6:]
    assert len(looks) == 3
    assert kept.newest("me", "number 3") is kept.newest("you", "number 0") is None
    kept.delete("me", records[8].id)
    assert kept.newest("me", "number 2") is None


def test_records_are_remembered_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "REMEMBERED", 5000)
    kept = store(tmp_path)
    records = [kept.create("me", snapshot(), TEXT, note={"n": "x" * 1000 * n}) for n in range(6)]
    for _ in range(2):
        assert [kept.get("me", record.id) for record in records] == records
        assert sum(size for _, size in kept._records.values()) == kept._remembered <= 5000
    for record in records:
        kept.delete("me", record.id)
    assert kept._remembered == 0
