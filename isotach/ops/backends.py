"""Which function computes a family: the registry, and the choice between registered kernels.

A kernel's whole contract is (rec, x, s, cu_seqlens, chunk_size) -> (outputs (B, T, H, V), state after the last token).
Beside it may stand a step, (rec, x, s, into) -> the same for one token, the state written into `into` where that is a
state and not None; it has no gradient. Both belong to a family, never to a mixer.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.recurrence import Recurrence, Tensors

Backend = Literal["auto", "reference", "torch", "triton"]
Kernel = Callable[[Any, Tensors, Tensors, Tensor | None, int | None], tuple[Tensor, Tensors]]
Step = Callable[[Any, Tensors, Tensors, Tensors | None], tuple[Tensor, Tensors]]
Refusal = Callable[[Tensors, int | None], str | None]


def _everything(x: Tensors, chunk_size: int | None) -> None:
    """What a kernel refuses that takes every call."""


class Entry(NamedTuple):
    """A kernel, the kind of device it runs on where it does not run on all, and what it says to what it cannot take."""

    kernel: Kernel
    device: str | None = None
    refusal: Refusal = _everything
    step: Step | None = None


_kernels: dict[tuple[type[Recurrence], str], Entry] = {}
_loaded: set[tuple[str, str]] = set()
_announced: set[tuple[str, str, str]] = set()
_log = logging.getLogger("isotach")


def register(
    family: type[Recurrence],
    backend: str,
    *,
    device: str | None = None,
    refusal: Refusal = _everything,
    step: Step | None = None,
) -> Callable[[Kernel], Kernel]:
    """Make the decorated function the `backend` of `family`, on `device` only where it is named.

    refusal(x, chunk_size) says what of a call the kernel cannot take ("takes this; got that"), None where it serves.
    """

    def add(kernel: Kernel) -> Kernel:
        _kernels[family, backend] = Entry(kernel, device, refusal, step)
        return kernel

    return add


def no_second_derivative(name: str, backend: str) -> Callable[..., None]:
    """The autograd rule of a backward that has none itself."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{name}: the {backend} backend has no second derivative; got a backward through its backward; "
            "use backend='reference' for gradients of gradients"
        )

    return refuse


def find(rec: Recurrence, backend: str, x: Tensors, chunk_size: int | None) -> Kernel | None:
    """The kernel that serves `rec` for inputs like x, None where the engine's own loop does.

    "auto" takes triton where the family has it for this device and this call, otherwise torch. A backend asked for by
    name that cannot serve raises ValueError.
    """
    device = x[0].device.type
    if sharding.spread(x):
        available(rec, x[0].device)  # so that all that may be called has been declared
        sharding.engage()
    if backend == "auto":
        obstacle = _obstacle(rec, "triton", x, chunk_size)
        backend = "triton" if obstacle is None else "torch"
        _announce(rec.name, device, "triton backend" if obstacle is None else f"torch backend ({obstacle})")
    elif obstacle := _obstacle(rec, backend, x, chunk_size):
        raise ValueError(f"{rec.name}: {obstacle}; use backend='torch'")
    entry = _kernels.get((type(rec), backend))
    return None if entry is None else entry.kernel


def find_step(rec: Recurrence, backend: str, x: Tensors, s: Tensors) -> Step | None:
    """The kernel that moves `rec` on by one token, None where its definition does: where there is no kernel, even if
    its backend is asked for by name, where inputs are spread over devices, and where somebody wants gradients.
    """
    if backend not in ("auto", "triton") or _obstacle(rec, "triton", x, None) is not None or sharding.spread(x):
        return None
    wanted = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (*x, *s))
    return None if wanted else _kernels[type(rec), "triton"].step


def available(rec: Recurrence, device: torch.device) -> tuple[str, ...]:
    """The backends that can serve `rec` on `device`, the reference first."""
    _load(type(rec).__module__, device.type)
    own = [
        name
        for (family, name), entry in _kernels.items()
        if family is type(rec) and entry.device in (None, device.type)
    ]
    return ("reference", *sorted({"torch", *own}))


def _obstacle(rec: Recurrence, backend: str, x: Tensors, chunk_size: int | None) -> str | None:
    """Why `backend` cannot compute `rec` for inputs like x; the engine's loop stands in for torch."""
    device = x[0].device.type
    _load(type(rec).__module__, device)
    entry = _kernels.get((type(rec), backend))
    if entry is None:
        return None if backend == "torch" else f"no {backend} backend is registered on {device}"
    if entry.device not in (None, device):
        return f"the {backend} backend runs on {entry.device}, the inputs are on {device}"
    refused = entry.refusal(x, chunk_size)
    return None if refused is None else f"the {backend} backend {refused}"


# Constant results, because torch.compile cannot trace an import or a log call; memoised in plain sets, because it does
# not see through functools.cache.
@torch.compiler.assume_constant_result
def _load(module: str, device: str) -> bool:
    """Import what computes the family of isotach.ops.NAME on `device`: isotach.ops.torch.NAME, on a GPU triton.NAME."""
    package, _, name = module.rpartition(".")
    if (module, device) not in _loaded and package == "isotach.ops":
        _loaded.add((module, device))
        for backend in ("torch", "triton") if device == "cuda" and find_spec("triton") else ("torch",):
            if find_spec(f"{package}.{backend}") and find_spec(f"{package}.{backend}.{name}"):
                import_module(f"{package}.{backend}.{name}")
    return True


@torch.compiler.assume_constant_result
def has_kernels(name: str, device: str) -> bool:
    """Whether isotach.ops.triton.NAME can serve `device`; then it is imported. For kernels that belong to no family."""
    if device != "cuda" or find_spec("triton") is None:
        return False
    import_module(f"isotach.ops.triton.{name}")
    return True


@torch.compiler.assume_constant_result
def _announce(family: str, device: str, choice: str) -> bool:
    if (family, device, choice) not in _announced:
        _announced.add((family, device, choice))
        _log.info("%s on %s: %s", family, device, choice)
    return True
