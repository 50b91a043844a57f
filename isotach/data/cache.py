"""Token files: every id of a text, memory-mapped, under a header that lets a damaged file be refused.

    [ magic, 16 bytes | JSON header, padded with spaces to 1024 bytes ][ ids | padding to 8 | bounds, int64 ]

The header's `digest` is the sha256 of ids, bounds and the other header fields, checked at every opening.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.files import replacing

MAGIC = b"isotach-tokens-1"
HEADER_BYTES = 1024


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text as token ids, documents end to end.

    - `ids`: (tokens,) uint16 or uint32; every document is closed by the end-of-document token.
    - `bounds`: (documents + 1,) int64; document i is ids[bounds[i]:bounds[i + 1]].
    - `bytes`: UTF-8 bytes of the text.
    - `byte_lengths`: (vocab_size,) bytes that each token stands for.
    - `fingerprint`: sha256 of all of this.
    - `skipped`: files of the standard library that were left out because they are not UTF-8.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    bounds: NDArray[np.int64]
    bytes: int
    byte_lengths: NDArray[np.int32]
    fingerprint: str
    skipped: int = 0


@dataclass(frozen=True)
class Run:
    """Tokens of a document, or of a part of it; `last` closes the document."""

    ids: NDArray[np.int32]
    bytes: int
    last: bool


def write(path: Path, runs: Iterable[Run], tokenizer: Tokenizer, key: str) -> None:
    """Write the token file `path`, reading `runs` one at a time; an end-of-document follows every document."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    eos = np.array([tokenizer.eos], dtype=dtype).tobytes()
    bounds = array("q", [0])
    tokens, text_bytes, digest = 0, 0, hashlib.sha256()
    with replacing(path, remedy="set data.cache to another folder") as file:
        file.write(bytes(HEADER_BYTES))
        for run in runs:
            data = run.ids.astype(dtype).tobytes() + (eos if run.last else b"")
            file.write(data)
            digest.update(data)
            tokens += len(data) // dtype.itemsize
            text_bytes += run.bytes
            if run.last:
                bounds.append(tokens)
        if sys.byteorder == "big":
            bounds.byteswap()
        tail = bytes(-tokens * dtype.itemsize % 8) + bounds.tobytes()
        file.write(tail)
        digest.update(tail)
        header = {
            "key": key,
            "itemsize": dtype.itemsize,
            "tokens": tokens,
            "documents": len(bounds) - 1,
            "bytes": text_bytes,
        }
        file.seek(0)
        file.write(_seal(header, digest).ljust(HEADER_BYTES))


def read(path: Path, tokenizer: Tokenizer, key: str) -> Tokens:
    """Map the token file `path`. Raises UserError with the reason if it is not whole, unchanged and of this key."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            header = _parse(path, head)
            size, data_bytes = os.fstat(file.fileno()).st_size, header["tokens"] * header["itemsize"]
            data_bytes += -data_bytes % 8
            expected = HEADER_BYTES + data_bytes + 8 * (header["documents"] + 1)
            if size != expected:
                raise _refused(path, f"it should have {expected} bytes and has {size}")
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: expected a readable token cache, got {error.strerror}; mend or delete it") from None
    fields = {name: value for name, value in header.items() if name != "digest"}
    if _seal(fields, digest) != head.rstrip(b" "):
        raise _refused(path, "its content was changed after it was written")
    if header["key"] != key:
        raise _refused(path, "it was made for another text or tokenizer")
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER_BYTES)
    return Tokens(
        ids=mapped[: header["tokens"] * header["itemsize"]].view(f"<u{header['itemsize']}"),
        bounds=mapped[data_bytes:].view("<i8"),
        bytes=header["bytes"],
        byte_lengths=tokenizer.byte_lengths,
        fingerprint=header["digest"],
    )


def _seal(fields: dict[str, Any], content: Any) -> bytes:
    """The header: the fields, and a digest of content and fields together."""
    text = json.dumps(fields, sort_keys=True)
    digest = content.copy()
    digest.update(text.encode())
    return MAGIC + json.dumps({**fields, "digest": digest.hexdigest()}, sort_keys=True).encode()


def _parse(path: Path, head: bytes) -> dict[str, Any]:
    if not head.startswith(MAGIC):
        raise _refused(path, "it is not a token cache of this version")
    if len(head) < HEADER_BYTES:
        raise _refused(path, f"it should have at least {HEADER_BYTES} bytes and has {len(head)}")
    try:
        header: dict[str, Any] = json.loads(head[len(MAGIC) :])
        if header["itemsize"] not in (2, 4) or min(header["tokens"], header["documents"]) < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise _refused(path, "its header was changed after it was written") from None
    return header


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: this token cache is refused: {reason}; delete it and it will be made again")
