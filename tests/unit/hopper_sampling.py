"""Compiles the kernels of sampling for a Hopper GPU, which need not be there, and prints what became of them.

Run as a program: the tests' own process may have its kernels defined for Triton's interpreter.
"""

import json
import sys

import torch
from hopper import Compiled  # beside this file; to import it is to be without a GPU

from isotach.ops.sampling import Key, Tilt
from isotach.ops.triton import sampling


def call(rows: int, vocab: int, *, start: int = 0, samples: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
    hidden, weight = torch.empty(rows, 1024, dtype=dtype), torch.empty(vocab, 1024, dtype=dtype)
    sampling.sample(hidden, weight, Key.of(0, 0, rows), Tilt(torch.ones(rows)), samples=samples, start=start)


def report(rows: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """What the kernels for so many rows are, and how many more there are for other numbers of everything."""
    tiles, whole = Compiled(sampling._tiles), Compiled(sampling._whole)
    sampling._tiles, sampling._whole = tiles, whole
    call(rows, 4096, dtype=dtype)
    kernels = len(tiles.found) + len(whole.found)
    call(rows - 1, 4095, start=1, samples=3, dtype=dtype)
    (kernel,) = list(tiles.found.values())[:1]
    found = {
        "kernels": kernels,
        "more": len(tiles.found) + len(whole.found) - kernels,
        "shared": kernel.metadata.shared,
        "matrix_products": kernel.asm["ptx"].count("wgmma.mma_async") + kernel.asm["ptx"].count("mma.sync"),
        "transposed": kernel.asm["ttgir"].count("tt.trans"),
    }
    sampling._tiles, sampling._whole = tiles.kernel, whole.kernel
    return found


if __name__ == "__main__":
    print(json.dumps({rows: report(int(rows)) for rows in sys.argv[1:]}))
