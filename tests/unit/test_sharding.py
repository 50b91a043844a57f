"""Calls on tensors that are spread over devices: the same as in one process, and split without an exchange.

Two processes do everything once, and leave for every case how wrong it was, how results lie and what was exchanged.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from isotach.ops import backends
from isotach.ops.decay import Decay
from isotach.ops.delta import Delta, SplitDelta
from isotach.ops.elementwise import Elementwise
from isotach.ops.engine import Span, run
from isotach.ops.recurrence import Recurrence
from isotach.ops.window import Window

RANKS = 2
SIZES = {"B": 2, "T": 17, "H": 2, "K": 8, "V": 8, "D": 12, "W": 4}
FAMILIES: dict[str, tuple[Recurrence, str]] = {
    "decay": (Decay(), "head"),
    "decay per channel": (Decay(), "channel"),
    "delta": (Delta(), "token"),
    "split delta": (SplitDelta(), "channel"),
    "elementwise": (Elementwise(), "head"),
    "elementwise, shared": (Elementwise(), "shared"),
    "window": (Window(4), ""),
}
SPLIT_OVER = {Window: ("B", "D"), Elementwise: ("B", "H", "V")}
CASES = [
    (name, backend, axis)
    for name, (rec, _) in FAMILIES.items()
    for axis in SPLIT_OVER.get(type(rec), ("B", "H"))
    for backend in (("torch", "triton") if axis in ("H", "D") else ("torch",))  # the interpreter takes its time
]
AT = {"B": 0, "H": 2, "V": 3, "D": 2}  # in outputs
SUMMED = {("window", "B"): [1], ("elementwise, shared", "H"): [1]}  # gradients that every device has a part of


class Split(NamedTuple):
    """How wrong results were, at most; how they lie; what was exchanged; how the gradients of inputs lie."""

    error: float
    output: str
    exchanged: int
    gradients: list[str]


def drawn(rec: Recurrence, variant: str, rows: int) -> tuple[Any, Any]:
    from isotach import shapes

    stream = torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"draws": rec.ranges, "dtype": torch.float32}
    x = shapes.example(rec.Inputs, SIZES, stream, shared=rec.variants[variant], **how)
    return x, shapes.example(rec.State, SIZES | {"B": rows}, stream, dtype=torch.float32)


def everything(rec: Recurrence, x: Any, state: Any, span: Span, backend: str) -> list[Tensor]:
    x, state = (type(part)(*(leaf.detach().requires_grad_() for leaf in part)) for part in (x, state))
    output, after = run(rec, x, state, span, backend=backend)  # type: ignore[arg-type]
    total = output.square().sum() + after[0].square().sum()
    return [output.detach(), after[0].detach(), *torch.autograd.grad(total, [*x, *state])]


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    from torch.distributed.tensor import DTensor

    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in got]
    return max(float((g - w).norm() / w.norm()) for g, w in zip(whole, want, strict=True))


def family(mesh: Any, name: str, backend: str, axis: str) -> Split:
    """Everything that has the axis is split over it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    from isotach import shapes

    rec, variant = FAMILIES[name]
    x, state = drawn(rec, variant, SIZES["B"])

    def split(value: Any) -> Any:
        leaves = []
        for declared, leaf in zip(shapes.axes(type(value)).values(), value, strict=True):
            at = [own.name for own in declared].index(axis) if axis in {own.name for own in declared} else None
            alone = at is None or leaf.shape[at] == 1
            leaves.append(distribute_tensor(leaf, mesh, [Replicate() if alone else Shard(at)]))
        return type(value)(*leaves)

    span, spread = Span.of(SIZES["B"], SIZES["T"]), (split(x), split(state))
    with CommDebugMode() as counted:
        got = everything(rec, *spread, span, backend)
    lie = [str(leaf.placements[0]) for leaf in got]  # type: ignore[attr-defined]
    return Split(worst(got, everything(rec, x, state, span, backend)), lie[0], counted.get_total_counts(), lie[2:])


def packed(mesh: Any) -> Split:
    """Documents are not split, heads are."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    rec, bounds = Decay(), torch.tensor([0, 3, 3, 15, 17])
    x, state = drawn(rec, "token", 4)
    x = type(x)(*(leaf[:1] for leaf in x))
    want = everything(rec, x, state, Span.packed(bounds), "torch")
    heads = type(x)(*(distribute_tensor(leaf, mesh, [Shard(2)]) for leaf in x))
    before = type(state)(distribute_tensor(state.state, mesh, [Shard(1)]))
    span = Span(Span.packed(bounds).positions, distribute_tensor(bounds, mesh, [Replicate()]))
    with CommDebugMode() as counted:
        got = everything(rec, heads, before, span, "torch")
    return Split(worst(got, want), str(got[0].placements[0]), counted.get_total_counts(), [])  # type: ignore[attr-defined]


def gathered(mesh: Any) -> Split:
    """Tokens cannot be split: what is spread so is gathered first, and right."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    rec = Decay()
    x, state = drawn(rec, "token", SIZES["B"])
    span = Span.of(SIZES["B"], SIZES["T"])
    spread = type(x)(*(distribute_tensor(leaf, mesh, [Shard(1)]) for leaf in x))
    before = type(state)(distribute_tensor(state.state, mesh, [Shard(2)]))
    with CommDebugMode() as counted:
        got = everything(rec, spread, before, span, "torch")
    return Split(worst(got, everything(rec, x, state, span, "torch")), "", counted.get_total_counts(), [])


def norm(mesh: Any, axis: int) -> Split:
    """The kernel of a norm with a gate."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    from isotach.ops import sharding
    from isotach.ops.triton.gated_norm import gated_norm

    sharding.engage()
    x, gate = torch.randn(2, 2, 6, 4, 8, generator=torch.Generator().manual_seed(1))
    gain = torch.linspace(0.5, 1.5, 8)

    def all_of(*leaves: Tensor) -> list[Tensor]:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        y = gated_norm(*leaves, 1e-6, "silu", False)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    placements = [[Shard(axis)], [Shard(axis)], [Replicate()]]
    spread = [distribute_tensor(leaf, mesh, how) for leaf, how in zip((x, gate, gain), placements, strict=True)]
    with CommDebugMode() as counted:
        got = all_of(*spread)
    lie = [str(leaf.placements[0]) for leaf in got]  # type: ignore[attr-defined]
    return Split(worst(got, all_of(x, gate, gain)), lie[0], counted.get_total_counts(), lie[1:])


def layer(mesh: Any, name: str) -> Split:
    """A mixer whose projections are split by heads, and the last one by what it reads: one sum, each way."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from isotach import mixers
    from isotach.models.decoder import Decoder, ModelConfig

    table = ModelConfig(vocab=11, width=32, depth=1, heads=4, hidden=32, pattern=(name,))
    whole, split = (Decoder(table, seed=3).blocks[0].mixer for _ in range(2))
    assert isinstance(whole, mixers.find(name))
    plan: dict[str, Any] = {part: ColwiseParallel(use_local_output=False) for part in ("q", "k", "v")}
    parallelize_module(split, mesh, {**plan, "out": RowwiseParallel()})
    for module in split.modules():  # what is left is the same everywhere
        for key, leaf in list(module.named_parameters(recurse=False)):
            if not isinstance(leaf, DTensor):
                setattr(module, key, nn.Parameter(distribute_tensor(leaf.detach(), mesh, [Replicate()])))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    spread = distribute_tensor(x, mesh, [Replicate()])
    with CommDebugMode() as counted:
        y, state = split(spread, None, Span.of(2, 9))
    exchanged = counted.get_total_counts()
    want, expected = whole(x, None, Span.of(2, 9))
    loss, reference = y.square().sum(), want.square().sum()
    grads = dict(zip(dict(split.named_parameters()), torch.autograd.grad(loss, list(split.parameters())), strict=True))
    exact = torch.autograd.grad(reference, list(whole.parameters()))
    assert state["main"].state.placements == (Shard(1),)
    found = [y.detach(), state["main"].state.detach(), *grads.values()]
    return Split(worst(found, [want, expected["main"].state, *exact]), "", exchanged, [])


def tasks() -> Iterator[tuple[str, Callable[[Any], Split]]]:
    for name, backend, axis in CASES:
        yield f"{name} {backend} {axis}", lambda mesh, case=(name, backend, axis): family(mesh, *case)
    for axis in (0, 1, 2):
        yield f"norm {axis}", lambda mesh, axis=axis: norm(mesh, axis)
    yield "packed", packed
    yield "gathered", gathered
    yield "layer", lambda mesh: layer(mesh, "linear")


def rank(number: int, port: int, folder: str) -> None:
    """One of the processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TRITON_INTERPRET="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=RANKS)
    from torch.distributed.device_mesh import init_device_mesh

    if backends.find_spec("triton"):
        import isotach.ops.triton.decay
        import isotach.ops.triton.delta
        import isotach.ops.triton.elementwise
        import isotach.ops.triton.gated_norm
        import isotach.ops.triton.window  # noqa: F401

        for key, entry in backends._kernels.items():
            if key[1] == "triton":
                backends._kernels[key] = entry._replace(device="cpu")
    mesh, found = init_device_mesh("cpu", (RANKS,)), {}
    for name, task in tasks():
        try:
            found[name] = task(mesh)
        except Exception as error:  # noqa: BLE001  both ranks fail alike, and the next task may not
            found[name] = repr(error)  # type: ignore[assignment]
    Path(folder, f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_everything(tmp_path: Path) -> None:
    """One test, because starting the processes takes most of its time."""
    if torch.cuda.is_available() or sys.platform != "linux":
        pytest.skip("kernels are defined for the GPU")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(rank, args=(port, str(tmp_path)), nprocs=RANKS)
    found, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(RANKS))
    assert found.keys() == second.keys()
    assert {name: what for name, what in found.items() if isinstance(what, str)} == {}  # what failed
    splits = {name: Split(*what) for name, what in found.items()}
    assert {name: split.error for name, split in splits.items() if split.error > 1e-5} == {}

    exchanged = {name: split.exchanged for name, split in splits.items() if split.exchanged}
    assert exchanged == {"gathered": splits["gathered"].exchanged, "layer": 1}  # the sum behind the last projection
    for name, backend, axis in CASES:
        split = splits[f"{name} {backend} {axis}"]
        assert split.output == f"S({AT[axis]})", name
        parts = [number for number, lies in enumerate(split.gradients) if lies.startswith("P")]
        assert parts == SUMMED.get((name, axis), []), name
    for axis in (0, 1, 2):
        assert splits[f"norm {axis}"].output == f"S({axis})"
        assert [lies[0] for lies in splits[f"norm {axis}"].gradients] == ["S", "S", "P"]
    assert splits["packed"].output == "S(2)"
