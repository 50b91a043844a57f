"""Named states of owners, on disk: a conversation that can be put away, forked, moved and gone on with.

    FOLDER/model/owner/state_0123.../    state.safetensors   the snapshot, which verifies itself
                                         transcript.bin      its tokens, four bytes each, where they are known
                                         record.json         everything else
    FOLDER/model/owner/session-89ab...   the id of the newest state of a session, under a digest of its name

Such a folder is written under a hidden name, and gets its own when all of it is on disk: a state is whole or not there,
whenever the process is killed. Nothing in it is ever changed, so forks may share files.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.files import check_writable, write_atomically
from isotach.infer.chain import Digests
from isotach.infer.snapshot import Snapshot
from isotach.models.state import Origin
from isotach.serve.prefix import folder_of

STATE, TRANSCRIPT, RECORD = "state.safetensors", "transcript.bin", "record.json"
REMEMBERED = 2 << 20  # bytes of records that are remembered, as they are on disk

_log = logging.getLogger("isotach.serve")


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a state without loading it.

    - id: "state_" and 32 hex digits, drawn at random: it cannot be guessed.
    - tokens: how many it stands for, the unread one included; chain: hex digest of those read.
    - bytes: of the state's file.
    - transcript: sha256 of the tokens' file, hex; None where they are not known.
    - created: seconds since 1970.
    - parent: the id that it was forked from.
    - note: whatever the owner wants kept beside it (JSON).
    """

    id: str
    owner: str
    tokens: int
    chain: str
    bytes: int
    transcript: str | None
    created: float
    parent: str | None
    note: Mapping[str, Any]


class StateStore:
    """A folder of states. Safe for threads.

    UserError for an id that the owner does not have: another owner's is as unknown as one that never was.
    """

    def __init__(self, folder: Path, origin: Origin, tokenizer: Tokenizer) -> None:
        self._folder = folder / origin.fingerprint()[:16]
        self._origin, self._tokenizer = origin, tokenizer
        self._records: OrderedDict[str, tuple[Record, int]] = OrderedDict()
        self._remembered = 0
        self._lock = threading.Lock()
        check_writable(self._folder / "probe")
        for left in self._folder.glob("*/.state_*"):  # of a process that was killed
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)

    def create(
        self,
        owner: str,
        snapshot: Snapshot,
        tokens: Sequence[int] | NDArray[np.integer[Any]] | None,
        *,
        note: Mapping[str, Any] | None = None,
        session: str | None = None,
    ) -> Record:
        """Keep a snapshot and the transcript of its tokens (the unread one last; None where it is not known).

        It is then the newest of a session that is named.
        """
        ids = None if tokens is None else np.asarray(tokens, "<u4")
        if ids is not None and (len(ids) != snapshot.tokens or snapshot.unread not in (None, *ids[-1:].tolist())):
            raise UserError(f"state: expected the {snapshot.tokens} tokens that it has read, got {len(ids)} others")

        def fill(folder: Path) -> dict[str, Any]:
            snapshot.save(folder / STATE)
            if ids is not None:
                write_atomically(folder / TRANSCRIPT, ids.tobytes())
            return {
                "tokens": snapshot.tokens,
                "chain": snapshot.chain.digest.hex(),
                "bytes": (folder / STATE).stat().st_size,
                "transcript": None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest(),
                "parent": None,
            }

        record = self._add(owner, fill, note)
        if session is not None:
            write_atomically(self._of(owner) / _session(session), record.id.encode())
        return record

    def newest(self, owner: str, session: str) -> Record | None:
        """The newest state of a session, None where there is none any more."""
        try:
            id = (self._of(owner) / _session(session)).read_text(encoding="ascii")
        except FileNotFoundError:
            return None
        try:
            return self._read(owner, id)
        except UserError:  # it was deleted
            return None

    def list(self, owner: str) -> list[Record]:
        """The owner's states, the newest first."""
        records = []
        for folder in self._of(owner).glob("state_*"):
            try:
                records.append(self._read(owner, folder.name))
            except UserError as error:
                if folder.exists():  # otherwise it was deleted meanwhile
                    _log.warning("left out of a list: %s", error)
        return sorted(records, key=lambda record: (record.created, record.id), reverse=True)

    def get(self, owner: str, id: str) -> Record:
        return self._read(owner, id)

    def load(self, owner: str, id: str) -> Snapshot:
        """The verified snapshot."""
        record = self._read(owner, id)
        snapshot = Snapshot.load(self._of(owner) / record.id / STATE, self._origin, self._tokenizer)
        if (snapshot.tokens, snapshot.chain.digest.hex()) != (record.tokens, record.chain):
            raise UserError(f"state {id}: expected the tokens of its record, got others; use another copy")
        return snapshot

    def transcript(self, owner: str, id: str) -> NDArray[np.uint32]:
        """The verified tokens. UserError where they are not known."""
        record = self._read(owner, id)
        if record.transcript is None:
            raise UserError(f"state {id}: expected its tokens, found none; it was imported without them")
        try:
            content = (self._of(owner) / record.id / TRANSCRIPT).read_bytes()
        except OSError as error:
            raise UserError(f"state {id}: expected its tokens, got {error.strerror}; use another copy") from None
        if hashlib.sha256(content).hexdigest() != record.transcript:
            raise UserError(f"state {id}: expected the tokens of its record, got others; use another copy")
        return np.frombuffer(content, "<u4").astype(np.uint32, copy=False)

    def fork(self, owner: str, id: str, *, note: Mapping[str, Any] | None = None) -> Record:
        """A second state with the same content, under an id of its own; it takes no room where the disk can link."""
        record = self._read(owner, id)
        source = self._of(owner) / record.id

        def fill(folder: Path) -> dict[str, Any]:
            for name in (STATE, *([] if record.transcript is None else [TRANSCRIPT])):
                _link(source / name, folder / name)
            kept = ("tokens", "chain", "bytes", "transcript")
            return {name: getattr(record, name) for name in kept} | {"parent": record.id}

        return self._add(owner, fill, record.note if note is None else note)

    def export(self, owner: str, id: str) -> Path:
        """The state's file. Open it at once: a delete removes it."""
        return self._of(owner) / self._read(owner, id).id / STATE

    def import_(
        self,
        owner: str,
        path: Path,
        tokens: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        *,
        note: Mapping[str, Any] | None = None,
    ) -> Record:
        """Keep what `export` gave, here or elsewhere.

        UserError for a file that is torn, edited, hostile or of another model, and for tokens that it has not read.
        """
        try:
            snapshot = Snapshot.load(path, self._origin, self._tokenizer)
        except UserError as error:  # where the upload lies is nobody's business
            raise UserError(str(error).replace(str(path), "to import")) from None
        if tokens is not None:
            ids = np.asarray(tokens)
            fits = ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids) == snapshot.tokens
            if not fits or ids.min(initial=0) < 0 or not _has_read(snapshot, ids.tolist()):
                raise UserError("state to import: expected the tokens that it has read, got others; leave them out")
        return self.create(owner, snapshot, tokens, note=note)

    def delete(self, owner: str, id: str) -> None:
        """Files that somebody reads already stay readable to them."""
        folder = self._of(owner) / self._read(owner, id).id
        gone = folder.with_name(f".{id}.gone")
        with self._lock:
            self._forget(id)
            try:
                folder.rename(gone)  # at once, whatever becomes of the rest
            except OSError:
                raise _unknown(id) from None
        shutil.rmtree(gone, ignore_errors=True)

    # ---- the folder

    def _of(self, owner: str) -> Path:
        return self._folder / folder_of(owner)

    def _add(self, owner: str, fill: Any, note: Mapping[str, Any] | None) -> Record:
        """A new state out of what `fill` puts into a folder and says of it."""
        id = f"state_{secrets.token_hex(16)}"
        folder = self._of(owner) / f".{id}.tmp"
        try:
            folder.mkdir(parents=True)
            record = Record(id=id, owner=owner, created=time.time(), note=dict(note or {}), **fill(folder))
            write_atomically(folder / RECORD, json.dumps(asdict(record)).encode())
            folder.rename(folder.with_name(id))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _sync(folder.parent)
        return record

    def _read(self, owner: str, id: str) -> Record:
        if not re.fullmatch(r"state_[0-9a-f]{32}", id):
            raise _unknown(id)
        with self._lock:
            known = self._records.get(id)
        if known is not None:
            if known[0].owner != owner:
                raise _unknown(id)
            return known[0]
        try:
            content = (self._of(owner) / id / RECORD).read_bytes()
        except OSError:
            raise _unknown(id) from None
        try:
            data = json.loads(content)
            record = Record(**{field.name: data[field.name] for field in fields(Record)})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"state {id}: expected a record, got a damaged one; use another copy") from None
        if (record.id, record.owner) != (id, owner):
            raise _unknown(id)
        with self._lock:
            self._forget(id)
            self._records[id] = record, len(content)
            self._remembered += len(content)
            while self._remembered > REMEMBERED:
                self._forget(next(iter(self._records)))
        return record

    def _forget(self, id: str) -> None:
        """The record in memory."""
        if id in self._records:
            self._remembered -= self._records.pop(id)[1]


def _session(name: str) -> str:
    return f"session-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def _has_read(snapshot: Snapshot, ids: Sequence[int]) -> bool:
    """Whether these are the tokens of a snapshot."""
    read = snapshot.chain.length
    return snapshot.unread in (None, *ids[read:]) and (
        not read or Digests(ids[:read]).at(read) == snapshot.chain.digest
    )


def _unknown(id: str) -> UserError:
    shown = id if re.fullmatch(r"[\w.-]{1,64}", id) else "with this id"
    return UserError(f"state {shown}: expected one of yours, found none; list your states")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise UserError(
            f"state {source.parent.name}: expected its {source.name}, found none; use another copy"
        ) from None
    except OSError:  # this disk cannot
        shutil.copyfile(source, target)
        _sync(target)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
