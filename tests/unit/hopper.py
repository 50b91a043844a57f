"""Compiles every kernel of the decay family for a Hopper GPU, which need not be there, and prints what became of them.

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

from isotach.ops.triton import decay, pieces  # noqa: E402


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
    sweep, chain = Compiled(decay._sweep), Compiled(decay._chain)
    decay._sweep, decay._chain = sweep, chain
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


if __name__ == "__main__":
    main(int(sys.argv[1]))
