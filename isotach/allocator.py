"""What glibc is told about memory: to keep large blocks, or to keep few places for small ones.

glibc takes every block of more than 32 MiB from the system page by page, and gives it back when it is freed. Tensors of
one long pass are such blocks, so reading 16,384 tokens at once costs up to 1.5 times as much per token as reading 2,048
(docs/log.md). Blocks that are kept are paid for once.

Every thread may get an arena of its own, which keeps what its thread has freed. A server's threads come late, each with
some megabytes; with few arenas they share.
"""

import ctypes
import os
from collections.abc import Mapping
from typing import Final

# What mallopt calls them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_KEEP: Final = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 1 << 28}

_kept = False


def keep_blocks() -> bool:
    """Keep freed blocks of up to 1 GiB for this process; whether it was done.

    It is not done where the allocator is another one than glibc's, or was chosen by the user (MALLOC_*, GLIBC_TUNABLES,
    LD_PRELOAD). Memory that the process no longer uses, up to 2 GiB, then stays with it until it ends.
    """
    global _kept
    _kept = _kept or _told(_KEEP)
    return _kept


def share_arenas() -> bool:
    """Two arenas for all threads of this process that have none yet; whether it was done, as above."""
    return _told({_ARENA_MAX: 2})


def _told(options: Mapping[int, int]) -> bool:
    if chosen():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not Linux, or musl
        return False
    return all(mallopt(name, value) for name, value in options.items())


def chosen() -> dict[str, str]:
    """What the environment says of the allocator."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))
    }


def allocation() -> str | dict[str, str]:
    """How blocks are allocated here, as a benchmark records it."""
    return chosen() or ("blocks kept" if _kept else "default")
