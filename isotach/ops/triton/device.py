"""What kernels must know of the device they run on."""

from typing import Any

import torch
from triton.runtime import driver

NEEDED = (8, 0)  # compute capability: matrix units that take bfloat16


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, 1 elsewhere."""
    return int(_properties(device.index or 0)["multiprocessor_count"]) if device.type == "cuda" else 1


def refusal(device: torch.device, shared: int) -> str | None:
    """Why kernels that take `shared` bytes of fast memory per program cannot run on `device`, if so."""
    return _refusal(device.index or 0, shared) if device.type == "cuda" else None


@torch.compiler.assume_constant_result
def _refusal(index: int, shared: int) -> str | None:
    capability, there = torch.cuda.get_device_capability(index), int(_properties(index)["max_shared_mem"])
    if capability < NEEDED:
        return f"takes GPUs of compute capability {NEEDED[0]}.{NEEDED[1]} or more; got {capability[0]}.{capability[1]}"
    if there < shared:
        return f"takes {shared >> 10} KiB of shared memory for heads of this width; got a GPU with {there >> 10} KiB"
    return None


def _properties(index: int) -> dict[str, Any]:
    properties: dict[str, Any] = driver.active.utils.get_device_properties(index)
    return properties
