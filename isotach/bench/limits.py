"""What the machine can do, measured in the same rounds as what is held against it, and what a call takes.

copy      a block that fills no cache, counting bytes read and written: nothing moves memory faster
product   a square matrix product in the dtype of the inputs: nothing multiplies faster
"""

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from isotach.bench.report import Clock, wall

COPY, PRODUCT = "copy", "product"
SIZES = {"cpu": (1 << 27, 1024), "cuda": (1 << 30, 8192)}  # bytes of the block, side of the matrices
COVER = 1 << 31  # bytes cleared before a call is timed by the GPU: its caches too, and longer than a launch takes


class Limits(NamedTuple):
    """calls: what to time; work: bytes and FLOPs that each does."""

    calls: dict[str, Callable[[], object]]
    work: dict[str, float]

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Limits":
        size, side = SIZES[device.type]
        source = torch.empty(size, dtype=torch.uint8, device=device).random_()
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls: dict[str, Callable[[], object]] = {
            COPY: partial(torch.empty_like(source).copy_, source),
            PRODUCT: partial(torch.mm, a, b, out=torch.empty_like(a)),
        }
        return cls(calls, {COPY: 2.0 * size, PRODUCT: 2.0 * side**3})


def clock(device: torch.device) -> Clock:
    """The device's own clock where it has one: what the work takes, without the launch; else the wall's."""
    if device.type != "cuda":
        return partial(wall, device=device)
    cover = torch.empty(COVER, dtype=torch.uint8, device=device)

    def timed(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cover.zero_()
        begin.record()
        kept = call()
        end.record()
        torch.cuda.synchronize(device)
        del kept
        return 1e-3 * begin.elapsed_time(end)

    return timed


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that a call holds at most at once, what it returns included and what it is given not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on the terminal
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = call()
    del kept
    assert watched.profiler is not None
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
