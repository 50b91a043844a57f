"""Which function computes a family: the registry, and the choice between registered kernels.

A kernel's whole contract is (rec, x, s, cu_seqlens, chunk_size) -> (outputs (B, T, H, V), state after the last token).
It belongs to a family, never to a mixer.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from isotach.ops.recurrence import Recurrence, Tensors

Backend = Literal["auto", "reference", "torch", "triton"]
Kernel = Callable[[Any, Tensors, Tensors, Tensor | None, int | None], tuple[Tensor, Tensors]]

_kernels: dict[tuple[type[Recurrence], str], tuple[Kernel, str | None]] = {}
_loaded: set[str] = set()
_announced: set[tuple[str, str]] = set()
_log = logging.getLogger("isotach")


def register(family: type[Recurrence], backend: str, *, device: str | None = None) -> Callable[[Kernel], Kernel]:
    """Make the decorated function the `backend` of `family`, on `device` only where it is named."""

    def add(kernel: Kernel) -> Kernel:
        _kernels[family, backend] = (kernel, device)
        return kernel

    return add


def find(rec: Recurrence, backend: str, device: torch.device) -> Kernel | None:
    """The kernel that serves `rec` on `device`, None where the engine's own loop does.

    "auto" takes triton on a GPU where the family has it, otherwise torch. A backend asked for by name that cannot
    serve raises ValueError.
    """
    _load(type(rec).__module__)
    if backend == "auto":
        fits = (type(rec), "triton") in _kernels and device.type == _kernels[type(rec), "triton"][1]
        backend = "triton" if fits else "torch"
        _announce(rec.name, device.type, backend)
    kernel, where = _kernels.get((type(rec), backend), (None, None))
    if kernel is None and backend != "torch":
        raise ValueError(f"{rec.name}: no {backend} backend is registered; use backend='torch'")
    if where is not None and where != device.type:
        raise ValueError(f"{rec.name}: the {backend} backend runs on {where}, the inputs are on {device.type}")
    return kernel


def available(rec: Recurrence, device: torch.device) -> tuple[str, ...]:
    """The backends that can serve `rec` on `device`, the reference first."""
    _load(type(rec).__module__)
    own = [
        name for (family, name), (_, where) in _kernels.items() if family is type(rec) and where in (None, device.type)
    ]
    return ("reference", *sorted({"torch", *own}))


# Constant results, because torch.compile cannot trace an import or a log call; memoised in plain sets, because it does
# not see through functools.cache.
@torch.compiler.assume_constant_result
def _load(module: str) -> bool:
    """Import the kernels of the family defined in isotach.ops.NAME: isotach.ops.torch.NAME and so on."""
    package, _, name = module.rpartition(".")
    if module not in _loaded and package == "isotach.ops":
        _loaded.add(module)
        for backend in ("torch", "triton"):
            if find_spec(f"{package}.{backend}") and find_spec(f"{package}.{backend}.{name}"):
                import_module(f"{package}.{backend}.{name}")
    return True


@torch.compiler.assume_constant_result
def _announce(family: str, device: str, backend: str) -> bool:
    if (family, device) not in _announced:
        _announced.add((family, device))
        _log.info("%s on %s: %s backend", family, device, backend)
    return True
