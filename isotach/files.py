"""Files appear whole or not at all."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from isotach.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A writable file that takes the name `path` once the block ends and its bytes are on disk.

    Until then it has a hidden temporary name in the same folder; if the block raises, it is removed and `path` is
    as it was. Raises UserError when the folder cannot be written or the disk is full.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
    except OSError as error:
        raise _refusal(path, error) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refusal(path, error) from None
        raise


def _refusal(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full, nothing was written; free some space or choose another folder")
    return UserError(f"{path}: expected a writable place, got {error.strerror or error}; choose another folder")


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file in one call."""
    with replacing(path) as file:
        file.write(content)
