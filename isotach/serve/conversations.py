"""What stored states are to their users: conversations, with messages, titles and names.

A state knows tokens; which of them are whose message is written beside it, in the note that the store keeps for it.
"""

import io
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from isotach.config import Config
from isotach.errors import UserError
from isotach.infer.snapshot import Snapshot
from isotach.serve.limits import log
from isotach.serve.objects import State, StateDetail, StateList, StoredMessage
from isotach.serve.schemas import ApiError, Ids
from isotach.serve.states import Record, StateStore

BLOCK = 512  # of a tar file
PIECE = 1 << 20  # bytes of a file in memory at once
TRANSCRIPT = 256 << 20  # bytes of a transcript at most: twenty million tokens
STATE_FILE, TRANSCRIPT_FILE = "state.safetensors", "transcript.json"


class Said(Config):
    """One message of a conversation, and how many tokens there are up to its end (None: nobody can go back there)."""

    role: str
    content: str
    end: int | None = Field(None, ge=1)


class Note(Config):
    """messages: None for a state of plain text. before: tokens that were read before the first of them, None where that
    is not known. session: by which name it is continued. parent: what it came from."""

    messages: tuple[Said, ...] | None = None
    before: Annotated[int, Field(ge=0)] | None = None
    title: str | None = None
    session: str | None = None
    parent: str | None = None


class Transcript(Config):
    """What travels with an exported state."""

    tokens: Ids | None
    note: Note


@dataclass(frozen=True, slots=True)
class Basis:
    """What a request continues; without a snapshot nothing.

    - before: how many tokens come before the first message, the request's own if there is no other.
    """

    snapshot: Snapshot | None = None
    tokens: NDArray[np.uint32] | None = field(default_factory=lambda: np.empty(0, np.uint32))  # None: not known
    messages: tuple[Said, ...] | None = ()
    before: int | None = 0
    parent: str | None = None
    session: str | None = None

    def __len__(self) -> int:
        return 0 if self.snapshot is None else self.snapshot.tokens

    @property
    def roles(self) -> list[str]:
        """Whose messages were read, for the template. Plain text is what a system message would be."""
        if self.snapshot is None:
            return []
        return [message.role for message in self.messages or ()] or ["system"]


class Conversations:
    """The stored states of all owners. Methods read files; call them from a thread."""

    def __init__(self, store: StateStore, *, model: str) -> None:
        self.store = store
        self._model = model
        self._busy: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def hold(self, owner: str, session: str) -> None:
        """From here to `release` the session belongs to one request; ApiError 409 where it belongs to another."""
        with self._lock:
            if (owner, session) in self._busy:
                message = "session_id: expected a session that is not answering now; wait for its answer"
                raise ApiError(409, message, param="session_id", code="session_busy")
            self._busy.add((owner, session))

    def release(self, owner: str, session: str) -> None:
        with self._lock:
            self._busy.discard((owner, session))

    def basis(self, owner: str, *, state: str | None, session: str | None) -> Basis:
        """What to continue: a state, the newest one of a session, or nothing."""
        if state is not None:
            record = self.record(owner, state, param="state")
        else:
            newest = None if session is None else self.store.newest(owner, session)
            if newest is None:
                return Basis(session=session)
            record = newest
        try:
            snapshot = self.store.load(owner, record.id)
        except UserError as error:
            param = "session_id" if state is None else "state"
            raise ApiError.of(error, param=param, code="state_unusable") from None
        note = _note(record)
        before = note.before if note.messages else record.tokens
        return Basis(snapshot, self._tokens(record), note.messages, before, record.id, session)

    def keep(
        self,
        owner: str,
        basis: Basis,
        snapshot: Snapshot,
        tokens: Sequence[int],
        *,
        messages: Sequence[Said] | None,
        title: str | None = None,
    ) -> State:
        """Store what came of `basis` after `tokens` more; a session's state takes the place of the one before."""
        total = snapshot.tokens
        whole = None if basis.tokens is None else np.concatenate([basis.tokens, np.asarray(tokens, np.uint32)])[:total]
        said = None if messages is None else (*(basis.messages or ()), *messages)
        before = None if said is None else basis.before
        note = Note(messages=said, before=before, title=title, session=basis.session, parent=basis.parent)
        try:
            record = self.store.create(owner, snapshot, whole, note=note.model_dump(mode="json"), session=basis.session)
        except (UserError, OSError) as error:
            log.error("a state could not be stored", exc_info=error)
            message = "state: the server could not store it; ask whoever runs it to look into its log"
            raise ApiError(507, message, code="not_stored") from None
        if basis.session is not None and basis.parent is not None:
            self.store.delete(owner, basis.parent)
        return self.show(record)

    def rewound(self, owner: str, id: str, count: int) -> tuple[Basis, NDArray[np.uint32], tuple[Said, ...] | None]:
        """The tokens of a conversation's first messages, and these; with 0 what was read before them. What they go on
        from is nothing. ApiError 400 where nobody can go back there."""
        note = _note(self.record(owner, id))
        said = note.messages or ()
        if count > len(said):
            message = f"messages: expected at most the {len(said)} messages of this state, got {count}"
            raise ApiError(400, message, param="messages", code="invalid_value")
        end = said[count - 1].end if count else note.before
        if not end:
            where = "this message's end is not known" if count else "nothing is known to be before the first message"
            raise ApiError(400, f"messages: {where}; fork it elsewhere", param="messages", code="invalid_value")
        nothing = Basis(before=note.before, parent=id)
        return nothing, self.store.transcript(owner, id)[:end], said[:count] if count else None

    def record(self, owner: str, id: str, *, param: str = "id") -> Record:
        """ApiError 404 for an id that the owner does not have."""
        try:
            return self.store.get(owner, id)
        except UserError as error:
            raise ApiError.of(error, 404, param=param, code="state_not_found") from None

    def page(self, owner: str, *, limit: int, after: str | None, session: str | None) -> StateList:
        """The owner's states, the newest first; those behind `after`, that of a session."""
        if session is None:
            records = self.store.list(owner)
        else:
            newest = self.store.newest(owner, session)
            records = [] if newest is None else [newest]
        if after is not None:
            places = [place for place, record in enumerate(records) if record.id == after]
            if not places:
                raise ApiError(400, "after: expected the id of one of these states; leave it out", param="after")
            records = records[places[0] + 1 :]
        shown = [self.show(record) for record in records[:limit]]
        return {"object": "list", "data": shown, "has_more": len(records) > limit}

    def show(self, record: Record) -> State:
        note = _note(record)
        return {
            "id": record.id,
            "object": "state",
            "created": int(record.created),
            "model": self._model,
            "tokens": record.tokens,
            "bytes": record.bytes,
            "parent": record.parent or note.parent,
            "session": note.session,
            "title": note.title or _title(note.messages),
            "message_count": None if note.messages is None else len(note.messages),
        }

    def detail(self, record: Record) -> StateDetail:
        note = _note(record)
        messages: list[StoredMessage] | None = None
        if note.messages is not None:
            messages = [{"role": each.role, "content": each.content, "end": each.end} for each in note.messages]
        return {**self.show(record), "messages": messages, "before": note.before}

    def fork(self, owner: str, id: str, *, title: str | None) -> State:
        note = _note(self.record(owner, id)).model_copy(update={"session": None, **({"title": title} if title else {})})
        return self.show(self.store.fork(owner, id, note=note.model_dump(mode="json")))

    # ---- on the way

    def export(self, owner: str, id: str, *, transcript: bool) -> tuple[BinaryIO, int, bytes]:
        """An open file, its size, and what is to come before it (see `bundle`)."""
        record = self.record(owner, id)
        file = self.store.export(owner, id).open("rb")
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not transcript:
            return file, size, b""
        tokens = self._tokens(record)
        note = _note(record).model_copy(update={"session": None, "parent": None})
        whole = Transcript(tokens=None if tokens is None else tokens.tolist(), note=note)
        return file, size, whole.model_dump_json().encode()

    def import_(self, owner: str, path: Path, *, title: str | None) -> State:
        """Store what `export` gave: a state's file, or one with its transcript."""
        tokens, note = None, Note()
        with path.open("rb") as file:
            bundled = file.read(BLOCK)[257:262] == b"ustar"
        if bundled:
            transcript = _unbundle(path)
            tokens, note = transcript.tokens, transcript.note
        if title is not None:
            note = note.model_copy(update={"title": title})
        return self.show(self.store.import_(owner, path, tokens, note=note.model_dump(mode="json")))

    def _tokens(self, record: Record) -> NDArray[np.uint32] | None:
        try:
            return self.store.transcript(record.owner, record.id)
        except UserError:  # it was imported without one
            return None


def bundle(file: BinaryIO, size: int, transcript: bytes) -> Iterator[bytes]:
    """A tar file of a state and its transcript; just the state where there is no transcript. Closes `file`."""
    with file:
        if not transcript:
            yield from iter(lambda: file.read(PIECE), b"")
            return
        yield _head(TRANSCRIPT_FILE, len(transcript))
        yield transcript + b"\0" * (-len(transcript) % BLOCK)
        yield _head(STATE_FILE, size)
        yield from iter(lambda: file.read(PIECE), b"")
        yield b"\0" * (-size % BLOCK + 2 * BLOCK)


def bundle_size(size: int, transcript: bytes) -> int:
    """Bytes of what `bundle` yields."""
    if not transcript:
        return size
    return sum(BLOCK + length + -length % BLOCK for length in (len(transcript), size)) + 2 * BLOCK


def _head(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _unbundle(path: Path) -> Transcript:
    """The transcript in a bundle; the file is left with the state alone."""
    fault = UserError("state: expected a file that this server exported, got another tar file; use another copy")
    transcript, found = None, False
    part = path.with_suffix(".part")
    with path.open("rb") as file:
        while (block := file.read(BLOCK)).strip(b"\0"):
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            except (tarfile.HeaderError, ValueError):
                raise fault from None
            if info.size < 0 or not info.isreg() or info.name not in (STATE_FILE, TRANSCRIPT_FILE):
                raise fault
            if info.name == TRANSCRIPT_FILE:
                if info.size > TRANSCRIPT:
                    raise fault
                transcript = file.read(info.size)
            else:
                found = True
                with part.open("wb") as out:
                    left = info.size
                    while left and (piece := file.read(min(left, PIECE))):
                        out.write(piece)
                        left -= len(piece)
            file.seek(-info.size % BLOCK, io.SEEK_CUR)
    if transcript is None or not found:
        raise fault
    part.replace(path)
    try:
        return Transcript.model_validate_json(transcript)
    except ValidationError:
        raise fault from None


def _note(record: Record) -> Note:
    return Note.model_validate(record.note)


def _title(messages: Sequence[Said] | None) -> str | None:
    """The beginning of the first thing that was said."""
    first = next((message.content for message in messages or () if message.role == "user"), None)
    if first is None:
        return None
    line = " ".join(first[:400].split())
    return line if len(line) <= 80 else f"{line[:79]}…"


def said(messages: Sequence[dict[str, Any]], ends: Sequence[int | None], *, before: int) -> list[Said]:
    """Messages as they are remembered: `before` tokens were read before the first of them."""
    return [
        Said(role=message["role"], content=message["content"], end=None if end is None else before + end or None)
        for message, end in zip(messages, ends, strict=True)
    ]
