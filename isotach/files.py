"""Files appear whole or not at all.

Paths are handled as strings here: pathlib interns every part of every path it sees, and a server writes files for ever.
Some 90,000 of them make Python's table of such strings grow by 7 MB at once.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from isotach.errors import UserError


@contextmanager
def replacing(path: str | os.PathLike[str], *, remedy: str = "choose another folder") -> Iterator[BinaryIO]:
    """A writable file that takes the name `path` once the block ends and its bytes are on disk.

    Until then it has a hidden temporary name in the same folder; if the block raises, it is removed and `path` is
    as it was. Raises UserError when the folder cannot be written, the disk is full, or `path` is a folder, pipe or
    device; `remedy` is what its sentence advises.
    """
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder" if os.path.isdir(path) else "pipe or device"
        raise UserError(f"{path}: expected a file to write, got a {kind}; choose another name")
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        file = open(temporary, "xb")  # noqa: SIM115  closed below
    except OSError as error:
        raise _refusal(path, error, remedy) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise _refusal(path, error, remedy) from None
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now what `replacing` would raise after hours of work, except for a disk that fills up meanwhile."""
    with suppress(_Checked), replacing(path):
        raise _Checked


class _Checked(Exception):
    """Leaves `replacing` before it touches `path`."""


def _refusal(path: str, error: OSError, remedy: str) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full, nothing was written; free some space or {remedy}")
    file_above = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "a file where its folder should be" if file_above else error.strerror or error
    return UserError(f"{path}: expected a writable place, got {reason}; {remedy}")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """The whole file in one call."""
    with replacing(path) as file:
        file.write(content)
