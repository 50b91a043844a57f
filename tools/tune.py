"""python -m tools.tune FAMILY: times every configuration of its kernels that this GPU takes, the fastest first.

The tables in isotach/ops/triton are to be chosen by this, once per kind of GPU, so that nothing is tried out while
somebody's model runs; so far they are reasoned (docs/numerics.md). A configuration whose result is wrong is refused,
whatever it takes: compilers have been seen to err.

    python -m tools.tune decay                      decays per head, heads of 128, bfloat16
    python -m tools.tune "channel delta" --width 64 --minutes 8 --out tuned.json
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from isotach.bench import report
from isotach.bench.families import OPERATIONS, Shape
from isotach.bench.limits import clock
from isotach.bench.ops import CORRECT, FILLING, SMALL, Timed, error, ours
from isotach.errors import UserError
from isotach.files import check_writable, write_atomically

ROUNDS = 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


BOTH = {"warps": (4, 8), "stages": (1, 2, 3)}
ERASING = {"chunk": (16, 32, 64), "finer": (16, 32), "block": (32, 64), **BOTH}


class Family(NamedTuple):
    """operation: what is timed (isotach/bench/families.py); place: module and name of the table in isotach.ops.triton
    where its kernels look; tried: values by field.
    """

    operation: str
    place: tuple[str, str]
    tried: Mapping[str, Sequence[int]]

    @property
    def table(self) -> dict[tuple[torch.dtype, int], Any]:
        module, name = self.place
        table: dict[tuple[torch.dtype, int], Any] = getattr(import_module(f"isotach.ops.triton.{module}"), name)
        return table


FAMILIES = {
    "decay": Family("decay", ("decay", "CONFIGS"), {"chunk": (32, 64, 128), "block": (32, 64, 128), **BOTH}),
    "channel": Family("GLA", ("channel", "CONFIGS"), {"chunk": (16, 32), "block": (32, 64, 128), **BOTH}),
    "delta": Family("gated delta", ("delta", "HEADS"), ERASING),
    "channel delta": Family("KDA", ("delta", "CHANNELS"), ERASING),
}


def tune(
    family: Family,
    *,
    dtype: torch.dtype,
    shape: Shape,
    device: torch.device,
    timed: Callable[[Callable[[], object]], float],
    minutes: float = float("inf"),
    rounds: int = ROUNDS,
) -> list[report.Row]:
    """A row per configuration, milliseconds forward and with the backward; what is in the table comes first.

    UserError where the table has no heads of such a width.
    """
    table = family.table
    key = next((key for key in table if key[0] == dtype and shape.width <= key[1]), None)
    if key is None:
        raise UserError(f"tune: expected heads of at most {max(width for _, width in table)}, got {shape.width}")
    kept, end, rows = table[key], time.monotonic() + 60 * minutes, []
    try:
        for config in configurations(kept, family.tried):
            if time.monotonic() > end:
                break
            table[key] = config
            rows.append(config._asdict() | _measured(family.operation, dtype, shape, device, timed, rounds))
    finally:
        table[key] = kept
    return rows


def configurations(kept: Any, tried: Mapping[str, Sequence[int]]) -> Iterator[Any]:
    """The one that is there, and all others; none is refused for the memory that it is thought to take."""
    free = kept._replace(shared=0)
    yield free
    for values in itertools.product(*tried.values()):
        config = free._replace(**dict(zip(tried, values, strict=True)))
        if config != free and getattr(config, "finer", 0) <= config.chunk:
            yield config._replace(anchor=max(config.anchor, config.chunk))


def _measured(
    name: str,
    dtype: torch.dtype,
    shape: Shape,
    device: torch.device,
    timed: Callable[[Callable[[], object]], float],
    rounds: int,
) -> report.Row:
    operation, small = OPERATIONS[name], SMALL._replace(width=shape.width)
    try:
        wrong = error(operation, partial(ours, operation, small, "triton"), operation.draw(small, device, dtype), small)
        if wrong > CORRECT[dtype]:
            return {"refused": f"relative error {wrong:.1e}"}
        leaves = operation.draw(shape, device, dtype)
        call = ours(operation, shape, "triton", *leaves)
        ready = Timed(call, leaves, torch.randn_like(call.forward(*leaves)))
        passes = {"forward_ms": ready.forward, "both_ms": ready.both}
        for run in passes.values():
            run()
        return {field: 1e3 * statistics.median(timed(run) for _ in range(rounds)) for field, run in passes.items()}
    except Exception as fault:  # noqa: BLE001  of a compiler, or of a GPU that has less memory
        return {"refused": f"{type(fault).__name__}: {str(fault).splitlines()[0]}"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description="Time configurations of GPU kernels.")
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--width", type=int, default=128, help="channels of a head")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no configuration after these")
    parser.add_argument("--out", type=Path, help="write the rows to this file as JSON")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("tune: expected a CUDA device, found none; run it where there is one")
    if options.out is not None:
        check_writable(options.out)
    device = torch.device("cuda")
    rows = tune(
        FAMILIES[options.family],
        dtype=DTYPES[options.dtype],
        shape=FILLING._replace(width=options.width),
        device=device,
        timed=clock(device),
        minutes=options.minutes,
    )
    if options.out is not None:
        found = {"machine": report.machine(), "family": options.family, "dtype": options.dtype, "rows": rows}
        write_atomically(options.out, json.dumps(found | {"width": options.width}, indent=1).encode())
    for row in sorted(rows, key=lambda row: row.get("both_ms", float("inf"))):
        print(
            ", ".join(
                f"{field} {value:.4g}" if isinstance(value, float) else f"{field} {value}"
                for field, value in row.items()
            )
        )


if __name__ == "__main__":
    sys.exit(main())
