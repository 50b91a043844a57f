"""Every operation beside every peer that computes it: time, share of what the machine can do, and memory.

A cell is an operation at a size. All who compute it take turns, with a copy and a matrix product among them, so that
every ratio is of the same minutes. Nobody is timed before two comparisons with float64: values and gradients at a size
that ends inside a chunk, and one head at the size that is timed: its outputs, and for Isotach its gradients.

    of_copy     the bytes that the problem takes (families.py) over those that a copy moves in the same time
    of_product  its FLOPs over those of a matrix product in the same time
    MiB         inputs, the output's gradient where there is one, and all that is held at once besides
    times       how many times as long as Isotach takes

On a GPU, times are those of its own clock, behind the clearing of its caches.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isotach.allocator import keep_blocks
from isotach.bench import families, peers
from isotach.bench.bars import OURS, figures
from isotach.bench.families import BACKWARD, BOTH, FORWARD, OPERATIONS, PASSES, Leaves, Operation, Shape
from isotach.bench.limits import COPY, PRODUCT, Limits, clock, peak
from isotach.bench.peers import PEERS, Call
from isotach.bench.picture import Panel, Series
from isotach.bench.report import Result, Row, interleave, milliseconds, paired, relative_error
from isotach.ops import backends
from isotach.ops.backends import Backend
from isotach.ops.engine import run

# Relative errors above which a contender is refused: the largest over the largest, so in bfloat16 a few last bits.
CORRECT = {torch.float32: 1e-4, torch.bfloat16: 0.03}
SMALL = Shape(heads=2, tokens=147)  # crosses chunk boundaries and ends inside a chunk
SECONDS = 1.5  # for the turns of a cell and pass
PATIENCE = 2.0  # seconds: what takes longer is timed once
LENGTHS = (512, 2048, 4096, 8192, 32768, 131072, 1 << 20)


class Cell(NamedTuple):
    """part: what the cell is for: the core, or the operation's length, heads or width."""

    operation: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    part: str = "core"
    passes: tuple[str, ...] = (FORWARD, BOTH)


def _cpu() -> Iterator[Cell]:
    """Float32, a few minutes on two cores; lengths in one row."""
    for operation in ("decay", "decay, learned", "decay per token"):
        yield Cell(operation, Shape())
    yield Cell("decay", Shape(width=64))
    yield Cell("decay", Shape(documents=500), passes=(FORWARD,))
    yield Cell("decay, learned", Shape(tokens=16384), passes=(BOTH,), part="memory")
    # 1,536 channels: three times 512, as published; the backward of its rival alone would take a quarter of a minute.
    yield Cell("TNN", Shape(heads=24, width=64), passes=(FORWARD,))
    for width in (64, 128):
        yield Cell("KDA", Shape(tokens=1024, width=width))  # its rival loops over tokens
        for operation in ("GLA", "GLA, strong", "Mamba-2", "delta", "gated delta", "HLA", "HGRN", "short filter"):
            yield Cell(operation, Shape(width=width))
    for tokens in LENGTHS:
        yield Cell("decay", Shape(heads=2, tokens=tokens, width=64), part="length")
    for batch, heads in ((1, 1), (1, 16), (8, 8)):
        yield Cell("decay", Shape(batch, heads, 2048, 64), part="heads")


def _cuda() -> Iterator[Cell]:
    """Bfloat16; lengths at equal total tokens, so that the batch falls to one row."""
    cell = partial(Cell, dtype=torch.bfloat16)
    for operation in ("decay", "GLA", "KDA", "HGRN"):
        yield cell(operation, FILLING)
    yield cell("gated delta", FLASHQLA)
    yield cell("short filter", FILLING, passes=PASSES)
    for tokens in LENGTHS:
        yield cell("decay", Shape(LENGTHS[-1] // tokens, 16, tokens), part="length")
    for operation in ("decay, learned", "decay per token", "Mamba-2", "delta", "HLA"):
        yield cell(operation, FILLING)
    for batch, heads in ((1, 16), (1, 64), (64, 16)):
        yield cell("decay", Shape(batch, heads, 8192), part="heads")
    for width in (64, 96, 256):
        yield cell("decay", Shape(8, 16, 8192, width), part="width")
    yield cell("decay", Shape(1, 16, 65536, documents=500))


FILLING = Shape(8, 16, 8192)
FLASHQLA = Shape(8, 32, 4096)  # that of FlashQLA's published table for an H200, with as many query as value heads
GRIDS = {"cpu": _cpu, "cuda": _cuda}


def measure(
    *,
    device: torch.device,
    against: Sequence[str] = tuple(PEERS),
    rounds: int = 20,
    minutes: float | None = None,
    cells: Sequence[Cell] | None = None,
) -> Result:
    """All cells of the device's grid, or those given; `rounds` at most of each, fewer where turns are long.

    No cell is begun after `minutes`; those that are left are named. What figures are read off comes first.
    """
    keep_blocks()  # as `isotach train` does: else everybody pays for fresh pages, call after call
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    grid = tuple(GRIDS[device.type]()) if cells is None else tuple(cells)
    result = Result({"device": device.type, "rounds": rounds, "against": list(against)})
    result.absent += peers.absent(against, device)
    table = _Table(result, device, against, rounds)
    for cell in grid:
        if time.monotonic() < end:
            table.add(cell)
        else:
            result.absent.append(f"{cell.operation}, {cell.shape}: no time was left")
    result.settings["limits"] = table.medians()
    result.figures = figures(result.rows, device.type)
    if not torch.cuda.is_available():
        result.figures += figures([], "cuda")  # not measured, and said so
    return result


def ours(operation: Operation, shape: Shape, backend: Backend, *leaves: Tensor) -> Call:
    """The operation as Isotach computes it."""
    span = shape.span(leaves[0].device)

    def forward(*leaves: Tensor) -> Tensor:
        return run(operation.rec, operation.inputs(*leaves), None, span, backend=backend)[0]

    return Call(leaves, forward)


def error(operation: Operation, compute: Callable[..., Call], leaves: Leaves, shape: Shape) -> float:
    """Largest relative error of values and gradients against the float64 definition."""
    call = compute(*leaves)
    output = call.restore(call.forward(*(leaf.contiguous() for leaf in call.inputs)))
    doubles = tuple(leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves)
    definition = ours(operation, shape, "reference", *doubles)
    expected = (call.exact or definition.forward)(*doubles)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], weights)
    exact = torch.autograd.grad(expected, [leaf for leaf in doubles if leaf.requires_grad], weights.double())
    pairs = zip((output, *gradients), (expected, *exact), strict=True)
    return max(relative_error(got.detach(), want.detach()) for got, want in pairs)


def error_at_size(operation: Operation, call: Call, output: Tensor, leaves: Leaves, shape: Shape) -> float:
    """Relative error of the last row's last head; its exact values by float64 chunks, which `error` has compared."""
    alone = tuple(leaf.detach().double() for leaf in operation.alone(leaves))
    definition = ours(operation, shape._replace(batch=1), "torch", *alone)
    with torch.no_grad():
        expected = (call.exact or definition.forward)(*alone)
    (got, *_) = operation.alone((call.restore(output), *leaves[1:]))
    return relative_error(got[:, -expected.shape[1] :], expected)


def gradient_error_at_size(operation: Operation, timed: "Timed", leaves: Leaves, shape: Shape) -> float:
    """As error_at_size, of the gradients of what only that row and head reads; for our own calls."""
    gradients = iter(timed.both())
    whole = tuple(next(gradients) if leaf.requires_grad else leaf for leaf in leaves)
    own = [i for i, leaf in enumerate(leaves) if leaf.requires_grad and i not in operation.shared]
    alone = tuple(leaf.detach().double().requires_grad_() for leaf in operation.alone(leaves))
    expected = ours(operation, shape._replace(batch=1), "torch", *alone).forward(*alone)
    (weights, *_) = operation.alone((timed.weights, *leaves[1:]))
    exact = torch.autograd.grad(expected, [alone[i] for i in own], weights.double())
    got = operation.alone(whole)
    return max(relative_error(got[i], want) for i, want in zip(own, exact, strict=True))


class Timed(NamedTuple):
    """A call on contiguous inputs of its own, with a gradient of its output."""

    call: Call
    inputs: Leaves
    weights: Tensor

    @property
    def learned(self) -> list[Tensor]:
        return [leaf for leaf in self.inputs if leaf.requires_grad]

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.call.forward(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.call.forward(*self.inputs), self.learned, self.weights)

    def of(self, which: str) -> Callable[[], object]:
        """The call that is the pass; before a backward alone, the forward is done here."""
        if which == BACKWARD:
            output = self.call.forward(*self.inputs)
            return partial(torch.autograd.grad, output, self.learned, self.weights, retain_graph=True)
        return self.forward if which == FORWARD else self.both


class _Table:
    """The rows as they are measured, and what is remembered from cell to cell."""

    def __init__(self, result: Result, device: torch.device, against: Sequence[str], rounds: int) -> None:
        self.result, self.device, self.against, self.rounds = result, device, against, rounds
        self.clock = clock(device)
        self.limits: dict[torch.dtype, Limits] = {}
        self.limit_seconds: dict[tuple[str, torch.dtype], list[float]] = {}
        self.errors: dict[tuple[Any, ...], float] = {}
        self.took: dict[tuple[Any, ...], tuple[int, float]] = {}  # tokens in all, and the seconds they took

    def add(self, cell: Cell) -> None:
        """Rows of a cell: contenders whose result is right, passes in order."""
        if cell.dtype not in self.limits:
            self.limits[cell.dtype] = Limits.of(self.device, cell.dtype)
        operation = OPERATIONS[cell.operation]
        compute: dict[str, Callable[..., Call]] = {OURS: partial(ours, operation, cell.shape, "auto")}
        compute |= {peer: call for peer in self.against if (call := peers.find(peer, cell.operation, self.device))}
        leaves = operation.draw(cell.shape, self.device, cell.dtype)
        timed = {}
        for name in compute:
            late = [which for which in cell.passes if self._too_long(cell, which, name)]
            for which in late:
                self.result.absent.append(f"{name}: {cell.operation}, {cell.shape}, {which}: would take too long")
            if len(late) < len(cell.passes) and (ready := self._prepare(cell, name, compute[name], leaves)):
                timed[name] = ready
        for which in cell.passes:
            self._pass(cell, which, timed, leaves)

    def medians(self) -> Row:
        """GB/s of a copy and GFLOP/s of a product in every dtype, over all rounds."""
        found: Row = {}
        for (name, dtype), seconds in self.limit_seconds.items():
            rate = 1e-9 * self.limits[dtype].work[name] / statistics.median(seconds)
            found[f"{name}, {_name(dtype)}"] = rate
        return found

    def _prepare(self, cell: Cell, name: str, compute: Callable[..., Call], leaves: Leaves) -> Timed | None:
        """The contender, compared; None and a sentence where its result is wrong or there is none."""
        try:
            wrong = self._small_error(cell, name, compute)
            call = compute(*leaves)
            inputs = tuple(x.detach().contiguous().requires_grad_(x.requires_grad) for x in call.inputs)
            with torch.no_grad():
                output = call.forward(*inputs)
            operation, timed = OPERATIONS[cell.operation], Timed(call, inputs, torch.randn_like(output))
            wrong = max(wrong, error_at_size(operation, call, output, leaves, cell.shape))
            if name == OURS and cell.passes != (FORWARD,):
                wrong = max(wrong, gradient_error_at_size(operation, timed, leaves, cell.shape))
        except Exception as fault:  # noqa: BLE001 (of another program, as a rule: the others are measured all the same)
            self._refuse(cell, name, f"{type(fault).__name__}: {fault}")
            return None
        if wrong > CORRECT[cell.dtype]:
            self._refuse(cell, name, f"relative error {wrong:.1e}, over {CORRECT[cell.dtype]:.0e}")
            return None
        self.errors[cell, name] = wrong
        return timed

    def _small_error(self, cell: Cell, name: str, compute: Callable[..., Call]) -> float:
        """`error` at a small size of the same width, remembered."""
        shape = SMALL._replace(width=cell.shape.width, documents=min(cell.shape.documents, 20))
        key = (cell.operation, name, cell.dtype, shape)
        if key not in self.errors:
            operation = OPERATIONS[cell.operation]
            if name == OURS:
                compute = partial(ours, operation, shape, "auto")
            leaves = operation.draw(shape, self.device, cell.dtype)
            self.errors[key] = error(operation, compute, leaves, shape)
        return self.errors[key]

    def _refuse(self, cell: Cell, name: str, why: str) -> None:
        self.result.refused.append(f"{name}: {cell.operation}, {cell.shape}, {_name(cell.dtype)}: {why}")

    def _pass(self, cell: Cell, which: str, timed: dict[str, Timed], leaves: Leaves) -> None:
        calls, once = self._try(cell, which, timed)
        limits = self.limits[cell.dtype]
        turn = sum(seconds for _, seconds in once.values()) + sum(map(self.clock, limits.calls.values()))
        rounds = max(3, min(self.rounds, int(SECONDS / turn)))
        seconds = interleave(calls | limits.calls, rounds=rounds, device=self.device, clock=self.clock)
        for name in limits.calls:
            self.limit_seconds.setdefault((name, cell.dtype), []).extend(seconds[name])
        seconds |= {name: [spent] for name, (_, spent) in once.items() if name not in calls}
        for name in once:
            self._row(cell, which, timed[name], name, seconds, once[name][0], leaves)

    def _try(
        self, cell: Cell, which: str, timed: dict[str, Timed]
    ) -> tuple[dict[str, Callable[[], object]], dict[str, tuple[int, float]]]:
        """What can take turns; and bytes held and seconds of one call, of everybody who did one in time."""
        calls: dict[str, Callable[[], object]] = {}
        once: dict[str, tuple[int, float]] = {}
        for name, contender in timed.items():
            if self._too_long(cell, which, name):
                continue
            try:
                call = contender.of(which)
                if self.device.type == "cuda":
                    call()  # compiles
                spent = self.clock(call)
                held = 0 if spent > PATIENCE else peak(call, self.device)
            except Exception as fault:  # noqa: BLE001 (as above; memory may not suffice for a gradient, say)
                self._refuse(cell, name, f"{which}: {type(fault).__name__}: {fault}")
                continue
            self.took[_kind(cell, which, name)] = (cell.shape.batch * cell.shape.tokens, spent)
            once[name] = (held, spent)
            if spent <= PATIENCE:
                calls[name] = call
        return calls, once

    def _too_long(self, cell: Cell, which: str, name: str) -> bool:
        """Whether a peer would be too slow, by its time for fewer tokens as if that grew as they do."""
        if name == OURS or (known := self.took.get(_kind(cell, which, name))) is None:
            return False
        tokens, seconds = known
        return seconds * cell.shape.batch * cell.shape.tokens / tokens > PATIENCE

    def _row(
        self,
        cell: Cell,
        which: str,
        timed: Timed,
        name: str,
        seconds: dict[str, list[float]],
        held: int,
        leaves: Leaves,
    ) -> None:
        operation, limits = OPERATIONS[cell.operation], self.limits[cell.dtype]
        moved = families.moved(which, leaves, timed.weights)
        flops = families.flops(operation, which, cell.shape)
        spent = statistics.median(seconds[name])
        row: Row = {"operation": cell.operation, "shape": str(cell.shape), "pass": which, "contender": name}
        row |= milliseconds(seconds[name]) | {"GB/s": 1e-9 * moved / spent}
        row["of_copy"] = moved / limits.work[COPY] * _ratio(seconds[COPY], seconds[name])
        if flops is not None:
            row["GFLOP/s"] = 1e-9 * flops / spent
            row["of_product"] = flops / limits.work[PRODUCT] * _ratio(seconds[PRODUCT], seconds[name])
        if held:
            given = sum(x.nbytes for x in timed.inputs) + (0 if which == FORWARD else timed.weights.nbytes)
            row["MiB"] = (given + held) / 2**20
            row["of_least"] = (given + held) / families.least(which, leaves, timed.weights)
        if name != OURS and OURS in seconds:
            row["times"] = _ratio(seconds[name], seconds[OURS])
        row["error"] = self.errors[cell, name]
        row["at"] = {**cell.shape._asdict(), "dtype": _name(cell.dtype), "part": cell.part, "bytes": moved}
        row["at"] |= {"flops": flops} | ({"backend": _backend(operation, leaves)} if name == OURS else {})
        self.result.rows.append(row)


def _kind(cell: Cell, which: str, name: str) -> tuple[Any, ...]:
    """What cells have in common that differ in their number of tokens."""
    return cell.operation, name, which, cell.shape.heads, cell.shape.width


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    """Of the rounds, or of the medians where one was timed once."""
    if len(numerator) == len(denominator):
        return paired(numerator, denominator)
    return statistics.median(numerator) / statistics.median(denominator)


def _backend(operation: Operation, leaves: Leaves) -> str:
    """Which of the family's functions is taken."""
    kernel = backends.find(operation.rec, "auto", operation.inputs(*leaves), None)
    return "triton" if kernel is not None and ".triton." in kernel.__module__ else "torch"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the picture


def panels(document: Row) -> list[Panel]:
    """Time per token against length; and rates against intensity, under the two limits."""
    return [*_lengths(document), *_roofline(document)]


def _lengths(document: Row) -> Iterator[Panel]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in document["rows"]:
        if row.get("at", {}).get("part") == "length" and row["pass"] == BOTH:
            tokens = row["at"]["batch"] * row["at"]["tokens"]
            lines.setdefault(row["contender"], []).append((row["at"]["tokens"], 1e3 * row["ms"] / tokens))
    if lines:
        series = tuple(Series(name, tuple(points)) for name, points in lines.items())
        yield Panel("Fading attention, forward and backward", "tokens in a row", "microseconds per token", series)


def _roofline(document: Row) -> Iterator[Panel]:
    """Each operation's widest core cell, forward; packs for themselves."""
    found: dict[str, tuple[float, float]] = {}
    dtype = ""
    for row in document["rows"]:
        at = row.get("at", {})
        if at.get("part") == "core" and row["pass"] == FORWARD and row["contender"] == OURS and at["flops"]:
            packed = ", packed" if at["documents"] > 1 else ""
            found[row["operation"] + packed] = (at["flops"] / at["bytes"], row["GFLOP/s"])
            dtype = at["dtype"]
    if not found:
        return
    copy, product = (document["settings"]["limits"][f"{name}, {dtype}"] for name in (COPY, PRODUCT))
    lowest, highest = min(x for x, _ in found.values()), max(x for x, _ in found.values())
    ends = (lowest / 2, max(2 * product / copy, 2 * highest))
    limit = ((ends[0], copy * ends[0]), (product / copy, product), (ends[1], product))
    series = (Series("copy, product", limit, faint=True), *(Series(name, (at,), OURS) for name, at in found.items()))
    yield Panel("Rate of every operation, forward", "FLOP per byte that must move", "GFLOP/s", series)
