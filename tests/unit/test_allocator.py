"""Blocks that are kept: what a second pass costs, and who decides."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = 64 << 20
PROBE = f"""
import resource, sys
from isotach import allocator
if sys.argv[1:]:
    assert allocator.keep_blocks() == (sys.argv[1] == "kept"), allocator.allocation()
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):  # aligned blocks wander before they come to lie in each other's places
    before = faults()
    torch.zeros({BLOCK // 4})
print(faults() - before, allocator.allocation())
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
PAGES = BLOCK // os.sysconf("SC_PAGE_SIZE") // 512  # were the system's pages huge


def probe(*arguments: str, **environment: str) -> tuple[int, str]:
    """Page faults of the last of many equal blocks, and what a benchmark would say of the allocator."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=inherited | environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    faults, _, name = run.stdout.strip().partition(" ")
    return int(faults), name


@glibc
def test_a_kept_block_is_paid_for_once() -> None:
    faults, name = probe()
    assert faults >= PAGES
    assert name == "default"
    faults, name = probe("kept")
    assert faults < PAGES
    assert name == "blocks kept"


@glibc
def test_the_users_choice_stands() -> None:
    _, name = probe("left", MALLOC_TOP_PAD_="131072")
    assert name == "{'MALLOC_TOP_PAD_': '131072'}"


ARENAS = """
import ctypes, sys, threading
from isotach import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
if sys.argv[1:]:
    assert allocator.share_arenas()
found, gate = set(), threading.Barrier(12)
def take():
    gate.wait()
    address = libc.malloc(64 << 10)
    found.add(address >> 26)  # arenas are 64 MiB apart at least
    gate.wait()
threads = [threading.Thread(target=take) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(found))
"""


@glibc
def test_threads_share_arenas() -> None:
    def places(*arguments: str) -> int:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        environment = plain | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", ARENAS, *arguments]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(run.stdout)

    assert places("shared") <= 2 < places()
