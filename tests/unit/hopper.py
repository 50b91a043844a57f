"""Compiles every kernel of a family for a Hopper GPU, which need not be there, and prints what became of them.

Run as a program: the tests' own process may have its kernels defined for Triton's interpreter.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
)

from isotach.ops.triton import (  # noqa: E402
    channel,
    decay,
    delta,
    delta_kernels,
    elementwise,
    gated_norm,
    linear,
    pieces,
    step,
    window,
)


class Compiled:
    """Stands for a kernel: launching it compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.found = kernel, dict[int, Any]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.found[id(compiled)] = compiled

        return launch


def call(time: int, width: int) -> None:
    """A pack of documents that are cut, with a decay per token: forward and backward."""
    q, k, v = (torch.empty(1, time, 3, width, dtype=torch.bfloat16) for _ in range(3))
    log_decay, bounds = torch.empty(1, time, 3, 1), torch.tensor([0, time - 9, time])
    state = torch.empty(2, 3, width, width)
    decay._forward(q, k, v, log_decay, state, bounds, None)
    decay._backward(v, state, q, k, v, log_decay, state, bounds, None, True, True)


def main(width: int) -> None:
    pieces.processors = lambda device: 132
    sweep, chain = Compiled(decay._sweep), Compiled(pieces._chain)
    decay._sweep, pieces._chain = sweep, chain
    call(4096, width)
    kernels = len(sweep.found) + len(chain.found)
    for time in (4097, 5003):
        call(time, width)
    report = {
        "kernels": kernels,
        "more_for_other_lengths": len(sweep.found) + len(chain.found) - kernels,
        "shared": max(kernel.metadata.shared for kernel in sweep.found.values()),
        "matrix_products": min(kernel.asm["ptx"].count("wgmma.mma_async") for kernel in sweep.found.values()),
        "transposed": sum(kernel.asm["ttgir"].count("tt.trans") for kernel in sweep.found.values()),
    }
    print(json.dumps(report))


def channels(time: int) -> None:
    """A pack of documents that are cut, with a decay per channel."""
    q, k, v = (torch.empty(1, time, 3, 64, dtype=torch.bfloat16) for _ in range(3))
    log_decay = torch.empty(1, time, 3, 64)
    bounds, state = torch.tensor([0, time - 9, time]), torch.empty(2, 3, 64, 64)
    decay._forward(q, k, v, log_decay, state, bounds, None)
    decay._backward(v, state, q, k, v, log_decay, state, bounds, None, True, True)


def scans(time: int) -> None:
    """Documents that are cut, and two heads that share a decay, as in hgrn."""
    v, log_decay, state = torch.empty(1, time, 2, 64), torch.empty(1, time, 1, 64), torch.empty(1, 2, 64)
    elementwise._forward(v, log_decay, state, None, None)
    elementwise._backward(v, state, v, log_decay, state, None, None, True, True)


def convolutions(time: int) -> None:
    """A pack, and a filter stored as layers have it."""
    x, weight, state = torch.empty(1, time, 64, dtype=torch.bfloat16), torch.empty(64, 4).t(), torch.empty(2, 4, 64)
    bounds = torch.tensor([0, time - 9, time])
    window._forward(x, weight, state, bounds)
    window._backward(x, state, x, weight, state, bounds, True)


def deltas(time: int, rates: int = 1) -> None:
    """A pack of documents that are cut; one key, and `rates` decays per head."""
    q, k, v = (torch.empty(1, time, 3, 64, dtype=torch.bfloat16) for _ in range(3))
    beta, log_decay = torch.empty(1, time, 3, 1), torch.empty(1, time, 3, rates)
    keys, how = (log_decay, beta, None, None, torch.empty(2, 3, 64, 64)), (torch.tensor([0, time - 9, time]), None)
    delta._forward(q, k, v, *keys, *how)
    delta._backward(v, keys[-1], q, k, v, *keys, *how, True, True)


def channel_deltas(time: int) -> None:
    deltas(time, 64)


def steps(rows: int) -> None:
    """A token of decay per channel, of the delta rule with one key and with three, of a scan and of a filter."""
    q, k, v = (torch.empty(rows, 1, 3, 64, dtype=torch.bfloat16) for _ in range(3))
    log_decay, state, beta = torch.empty(rows, 1, 3, 64), torch.empty(rows, 3, 64, 64), torch.empty(rows, 1, 3, 1)
    for keys in ((None, None, None), (beta, None, None), (None, k, k)):
        step.one_token(q, k, v, log_decay, state, torch.empty_like(state), *keys)
    elementwise._one_token(v, log_decay, torch.empty(rows, 3, 64), torch.empty(rows, 3, 64))
    taps, past = torch.empty(64, 4).t(), torch.empty(rows, 4, 64)
    window._one_token(v[:, :, 0], taps, past, torch.empty_like(past))


def gated_norms(time: int) -> None:
    """Heads with a gain, gated by a slice of a projection."""
    x, gate = torch.empty(2, time, 3, 64, dtype=torch.bfloat16), torch.empty(2, time, 4, 64, dtype=torch.bfloat16)
    for before in (False, True):
        rest = (gate[:, :, 1:], torch.empty(64), 1e-6, "silu", before)
        gated_norm.gated_norm(x, *rest)
        gated_norm._backward(x, x, *rest)


def linears(rows: int) -> None:
    """What a block of TransNormerLLM does with a token of so many rows, and of one."""
    for count in (min(rows, 64), 1):
        x, weight = torch.empty(count, 1024), torch.empty(1024, 1024, dtype=torch.bfloat16)
        parts = linear.linear(x, None, [weight] * 4, None, 1e-6, 2, False)
        o, u = parts[:, :1024], parts[:, 1024:2048]
        linear.linear(o, u, [weight], x, 1e-6, 0, False)
        up = torch.empty(2816, 1024, dtype=torch.bfloat16)
        hidden = linear.linear(x, None, [up, up], None, 1e-6, 1, True)
        linear.linear(hidden, None, [up.t().contiguous()], x, -1.0, 0, False)


DELTA = [(delta_kernels, name) for name in ("invert", "solve", "chain", "differentiate")]
WINDOW = ("_forward_tile", "_forward_state", "_backward_tiles", "_backward_state")
# Which kernels, and who calls them.
FAMILIES: dict[str, tuple[list[tuple[Any, str]], Any]] = {
    "channel": ([(channel, "_fading_scores"), (channel, "_fading_rows"), (pieces, "_chain")], channels),
    "delta": (DELTA, deltas),
    "channel delta": (DELTA, channel_deltas),
    "elementwise": ([(elementwise, "_sweep")], scans),
    "gated norm": ([(gated_norm, "_forward_tile"), (gated_norm, "_backward_tiles")], gated_norms),
    "linear": ([(linear, "_linear")], linears),
    "step": ([(module, "_step") for module in (step, elementwise, window)], steps),
    "window": ([(window, name) for name in WINDOW], convolutions),
}


def report(places: list[tuple[Any, str]], call: Any) -> dict[str, int]:
    pieces.processors = gated_norm.processors = lambda device: 132
    kernels = [Compiled(getattr(*place)) for place in places]
    for place, kernel in zip(places, kernels, strict=True):
        setattr(*place, kernel)
    call(4096)
    first = sum(len(kernel.found) for kernel in kernels)
    call(5003)
    found = [compiled for kernel in kernels for compiled in kernel.found.values()]
    return {
        "kernels": first,
        "more_for_other_lengths": len(found) - first,
        "shared": max(compiled.metadata.shared for compiled in found),
        "transposed": sum(compiled.asm["ttgir"].count("tt.trans") for compiled in found),
    }


if __name__ == "__main__":
    if sys.argv[1] in FAMILIES:
        print(json.dumps(report(*FAMILIES[sys.argv[1]])))
    else:
        main(int(sys.argv[1]))
