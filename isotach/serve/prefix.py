"""States of beginnings: what was read once for an owner is not read again.

    key = (owner, tokens read, digest of their chain)        all of one model, whose fingerprint tells its precision too

A state stands for exactly one sequence of tokens, so there are no blocks that could be taken for another's, and a
prompt goes on from the longest of its beginnings that is there. Where none is long enough the cache can say why not,
and from where on a state would have helped.

In memory those unused for longest make room, and go to disk where there is a folder; there again the oldest are
deleted. The folder holds nothing but files that are verified when they are read: its owner may be killed at any time,
and anything in it be copied or deleted. What is remembered beside the states is of bounded size: about 20 MB.
"""

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.files import check_writable
from isotach.infer.chain import Digests, TokenChain
from isotach.infer.snapshot import Past, Snapshot
from isotach.models.state import Origin

Miss = Literal["cold", "evicted", "no checkpoint"]

STRIDE = 32  # every so many tokens it is noted that they were read: where prompts part is known so exactly
MARKS = 1 << 20  # notes: of about 32 million tokens, in 8 MB
GONE = 1 << 12  # dropped states of which it is remembered that they were there
FILES = 1 << 14  # states on disk: 300 bytes of memory for each
WRITING = 8  # one in so many bytes of memory is for states on their way to disk; others are dropped, not waited for

_log = logging.getLogger("isotach.serve")


class Key(NamedTuple):
    owner: str
    position: int
    digest: bytes


class _Entry(NamedTuple):
    """passing: who reads on from here keeps the state themselves."""

    past: Past
    size: int
    passing: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What a prompt can go on from.

    - past: the furthest along, its unread token None; None where there is none.
    - miss: why it is not further along; None where nothing else of this prompt was ever read.
    - branch: up to where the prompt was read before, to STRIDE tokens, if that is further: keep its state this time.
    """

    past: Past | None
    miss: Miss | None
    branch: int | None


class PrefixCache:
    """Safe for threads; one of its own writes files.

    - folder: where states go that have no room in memory, up to `disk` bytes of files; None drops them.

    Raises UserError where the folder cannot be written.
    """

    def __init__(self, origin: Origin, tokenizer: Tokenizer, *, folder: Path | None, disk: int) -> None:
        self.evictions = 0  # states that are in neither place any more
        self._origin, self._tokenizer, self._folder, self._disk_limit = origin, tokenizer, folder, disk
        self._limit = 0
        self._memory: OrderedDict[Key, _Entry] = OrderedDict()
        self._files: OrderedDict[str, int] = OrderedDict()  # bytes of each, of other models too, the oldest first
        self._gone: OrderedDict[Key, None] = OrderedDict()
        self._positions: defaultdict[str, Counter[int]] = defaultdict(Counter)  # of keys in any of these
        self._marks = np.full(MARKS, 0, np.int64)  # hashes, each in the place that its lowest bits say
        self._bytes = self._disk_bytes = self._writing_bytes = 0
        self._writing: dict[Key, _Entry] = {}
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        if folder is not None:
            self._open(folder)

    # ---- what the engine asks

    @property
    def nbytes(self) -> int:
        """Bytes of states in memory."""
        return self._bytes + self._writing_bytes

    @property
    def disk_bytes(self) -> int:
        return self._disk_bytes

    @property
    def limit(self) -> int:
        """Bytes that states in memory may take; lowering it drops some at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._fit()

    def fetch(self, owner: str, path: Digests, *, last: int) -> None:
        """Load from disk what `find` would give, so that it need not. For who has time: it may take a second."""
        for key in self._keys(folder_of(owner), path, last):
            if self._take(key) is not None:
                return

    def find(self, owner: str, path: Digests, *, last: int) -> Found:
        """What the tokens of `path` can go on from, after at most `last` of them."""
        owner, past, evicted = folder_of(owner), None, False
        for key in self._keys(owner, path, last):
            past = self._take(key)
            if past is not None:
                break
            evicted = evicted or key in self._gone
        reached = path.start if past is None else past.chain.length
        known = next((p for p in _strides(reached, last) if self._noted(owner, path.at(p))), None)
        if evicted:
            return Found(past, "evicted", known)
        if known is not None:
            return Found(past, "no checkpoint", known)
        return Found(past, "cold" if past is None else None, None)

    def put(self, owner: str, past: Past, *, passing: bool = False, instead_of: TokenChain | None = None) -> None:
        """Keep the state after the tokens of past.chain; the unread token is no part of it.

        - passing: its request keeps it too, and may read on; instead_of: a passing state, now passed.
        """
        owner, state = folder_of(owner), past.state
        key = Key(owner, past.chain.length, past.chain.digest)
        with self._lock:
            if instead_of is not None:
                self._drop_passed(Key(owner, instead_of.length, instead_of.digest))
            if key in self._memory:
                self._memory.move_to_end(key)
                return
        if state is None or not past.chain.length:
            return
        if self._writer is not None or state.nbytes() <= self._limit:  # else it would be copied for nothing
            self._insert(key, Past(state.compact(), past.chain, None), passing=passing)

    def mark(self, owner: str, path: Digests, *, start: int, stop: int) -> None:
        """Note that the tokens of `path` from `start` to `stop` were read."""
        owner = folder_of(owner)
        for position in _strides(start, stop):
            self._note(owner, path.at(position))

    def note(self, owner: str, chain: TokenChain) -> None:
        """Note that the last token of a chain was read; called for every one, it notes some."""
        if chain.length % STRIDE == 0:
            self._note(folder_of(owner), chain.digest)

    def _note(self, owner: str, digest: bytes) -> None:
        mark = hash((owner, digest))
        self._marks[mark % MARKS] = mark

    def _noted(self, owner: str, digest: bytes) -> bool:
        """Wrong once in 2^44 for what never was, and where another note has the same place."""
        mark = hash((owner, digest))
        return bool(self._marks[mark % MARKS] == mark)

    def close(self) -> None:
        """Put all states on disk, the oldest left out where they would not fit, and wait until they are there."""
        if self._writer is None:
            return
        chosen, room = [], self._disk_limit
        for key, entry in reversed(self._memory.items()):
            room -= entry.size
            if room >= 0 and self._name(key) not in self._files and key not in self._writing:
                chosen.append((key, entry))
        for key, entry in reversed(chosen[:FILES]):
            self._write(key, entry)
        self._queue.put(None)
        self._writer.join()
        self._writer = None

    # ---- in memory

    def _keys(self, owner: str, path: Digests, last: int) -> list[Key]:
        """Of all states that may be there, or have been; the furthest along first."""
        with self._lock:
            positions = [p for p in self._positions.get(owner, ()) if path.start < p <= last]
        return [Key(owner, position, path.at(position)) for position in sorted(positions, reverse=True)]

    def _insert(self, key: Key, past: Past, *, passing: bool = False) -> None:
        assert past.state is not None
        entry = _Entry(past, past.state.nbytes() + past.chain.seen.nbytes, passing)
        with self._lock:
            if key in self._memory:  # two have loaded it at the same time
                return
            self._forget(key)
            if entry.size > self._room:
                self._spill(key, entry)
                return
            self._memory[key] = entry
            self._positions[key.owner][key.position] += 1
            self._bytes += entry.size
            self._fit()

    def _drop_passed(self, key: Key) -> None:
        if key in self._memory and self._memory[key].passing:
            self._bytes -= self._memory.pop(key).size
            self._uncount(key)

    @property
    def _room(self) -> int:
        """Bytes for states that are not on their way to disk."""
        return self._limit if self._writer is None else self._limit - self._limit // WRITING

    def _fit(self) -> None:
        """Drop those unused for longest, until the others have room."""
        while self._bytes > self._room:
            key, entry = self._memory.popitem(last=False)
            self._uncount(key)
            self._bytes -= entry.size
            self._spill(key, entry)

    def _spill(self, key: Key, entry: _Entry) -> None:
        """To disk, if there is one and it keeps up."""
        if self._name(key) in self._files or key in self._writing:
            return
        if self._writer is None or (self._writing and self._writing_bytes + entry.size > self._limit // WRITING):
            self._lose(key)
        else:
            self._write(key, entry)

    def _take(self, key: Key) -> Past | None:
        with self._lock:
            name, entry = self._name(key), self._memory.get(key)
            if entry is not None:
                self._memory[key] = entry._replace(passing=False)  # somebody else goes on from it
                self._memory.move_to_end(key)
                return entry.past
            if key in self._writing:
                return self._writing[key].past
            if name not in self._files:
                return None
        file = self._path(name)
        try:
            past = Snapshot.load(file, self._origin, self._tokenizer).past
            if (past.chain.length, past.chain.digest) != key[1:]:
                raise UserError(f"state {file}: expected the tokens of its name, got others; delete it")
        except UserError as error:
            with self._lock:
                if name in self._files:  # otherwise it was deleted to make room
                    _log.warning("dropped from the cache: %s", error)
                    self._delete(name)
                    self._lose(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(file)  # the order of use outlives the process
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
        self._insert(key, past)
        return past

    def _lose(self, key: Key) -> None:
        self.evictions += 1
        if key not in self._gone:
            self._gone[key] = None
            self._positions[key.owner][key.position] += 1
        while len(self._gone) > GONE:
            self._forget(next(iter(self._gone)))

    def _forget(self, key: Key) -> None:
        """That it was there."""
        if key in self._gone:
            del self._gone[key]
            self._uncount(key)

    def _uncount(self, key: Key) -> None:
        counts = self._positions[key.owner]
        counts[key.position] -= 1
        if not counts[key.position]:
            del counts[key.position]

    # ---- on disk

    def _open(self, folder: Path) -> None:
        check_writable(folder / "probe")
        found = []
        for file in folder.glob("*/*/*"):
            with contextlib.suppress(OSError):
                status = file.stat()
                if file.suffix == ".safetensors":
                    found.append((status.st_mtime, file, status.st_size))
                elif file.suffix == ".tmp" and time.time() - status.st_mtime > 3600:
                    file.unlink()  # of a process that was killed while it wrote
        for _, file, size in sorted(found):
            name = f"{file.parent.parent.name}/{file.parent.name}/{file.stem}"
            self._files[name] = size
            self._disk_bytes += size
            if (key := self._key(name)) is not None:
                self._positions[key.owner][key.position] += 1
        self._shrink()
        self._writer = threading.Thread(target=self._write_all, name="isotach-cache", daemon=True)
        self._writer.start()

    def _name(self, key: Key) -> str:
        """Of a file, without the folder of all and what every name ends in: there are many in memory."""
        return f"{self._origin.fingerprint()[:16]}/{key.owner}/{key.position}-{key.digest.hex()}"

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}.safetensors"

    def _key(self, name: str) -> Key | None:
        """The key of a file, None where it is not of this model."""
        _, owner, rest = name.split("/")
        position, _, digest = rest.partition("-")
        try:
            key = Key(owner, int(position), bytes.fromhex(digest))
        except ValueError:
            return None
        return key if self._name(key) == name else None

    def _write(self, key: Key, entry: _Entry) -> None:
        with self._lock:
            self._writing[key] = entry
            self._writing_bytes += entry.size
            self._positions[key.owner][key.position] += 1
            self._queue.put(key)

    def _write_all(self) -> None:
        """The writer's thread."""
        while (key := self._queue.get()) is not None:
            entry, name, size = self._writing[key], self._name(key), 0
            try:
                file = self._path(name)
                Snapshot.of(entry.past, weights=self._origin.fingerprint(), tokenizer=self._tokenizer).save(file)
                size = os.path.getsize(file)
            except (UserError, OSError) as error:
                _log.warning("a state was not kept: %s", error)
            with self._lock:
                del self._writing[key]
                self._writing_bytes -= entry.size
                if size:
                    self._files[name] = size  # its position stays counted
                    self._disk_bytes += size
                    self._shrink()
                else:
                    self._uncount(key)
                    self._lose(key)

    def _shrink(self) -> None:
        while self._disk_bytes > self._disk_limit or len(self._files) > FILES:
            name = next(iter(self._files))
            self._delete(name)
            key = self._key(name)
            if key is not None and key not in self._memory:
                self._lose(key)

    def _delete(self, name: str) -> None:
        self._disk_bytes -= self._files.pop(name)
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))
        if (key := self._key(name)) is not None:
            self._uncount(key)


def _strides(start: int, stop: int) -> range:
    """The positions after `start`, to `stop`, that are noted; the last first."""
    return range(stop // STRIDE * STRIDE, start, -STRIDE)


def folder_of(owner: str) -> str:
    """The name of an owner's folder, which does not tell who it is."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
