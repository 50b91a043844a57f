"""What every benchmark shares: a quiet machine, contenders timed in pairs, and a file that says where it was measured.

A figure is the median over rounds of a ratio between two contenders of the same round: a machine that slows down
slows both. A contender is timed only after its result was compared with float64; a wrong one is refused.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from isotach import __version__
from isotach.errors import UserError
from isotach.files import write_atomically

QUIET = 0.1  # cores that others may keep busy on a machine called idle: 5 % of the two-core machine of the results
WIDTH = 120  # columns that the tables want
Row = dict[str, Any]
K = TypeVar("K")  # whatever a caller names its contenders by


@dataclass(frozen=True)
class Figure:
    """A number that stands for the benchmark, and the bound it is held against."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high

    @property
    def bound(self) -> str:
        """The bound as people write it; empty when there is none."""
        if self.at_least == self.at_most:
            return "" if self.at_least is None else f"= {self.at_least:g}"
        return f"≥ {self.at_least:g}" if self.at_most is None else f"≤ {self.at_most:g}"


@dataclass
class Result:
    """What a benchmark found; `refused` holds a sentence for every row left out because its result was wrong."""

    settings: Row
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def publish(name: str, measure: Callable[[], Result], *, folder: Path, wait: float, console: Console) -> Result:
    """Wait for an idle machine, measure, print the tables and write folder/name.json.

    Raises UserError when the folder cannot be written, before anything is measured.
    """
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: expected a folder that can be written; choose another with --out")

    with console.status("waiting for an idle machine"):
        quiet_before = wait_until_quiet(wait)
    neighbours = Neighbours()
    with console.status(f"measuring {name}"):
        result = measure()
    busy = neighbours.cores()
    idle = None if busy is None else quiet_before and busy < QUIET

    document = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "idle": idle,
        "cores_busy_with_others": busy,
        "settings": result.settings,
        "figures": [{**asdict(figure), "met": figure.met} for figure in result.figures],
        "rows": result.rows,
        "refused": result.refused,
    }
    show(result, console)
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    if busy is None:
        console.print("Whether the machine was idle cannot be told here.")
    elif not idle:
        console.print(
            f"The machine was not idle: others kept {busy:.2f} cores busy. Measure again before you quote this."
        )
    console.print(f"Saved to {path}")
    return result


def interleave(
    contenders: Mapping[K, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[K, list[float]]:
    """Seconds that every contender took in every round, after one round that is not counted.

    The order turns by one each round, so that nobody always inherits the caches of the same neighbour. What a
    contender returns is freed after its clock has stopped.
    """
    names = list(contenders)
    seconds: dict[K, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start = time.perf_counter()
            kept = contenders[name]()
            synchronize(device)
            spent = time.perf_counter() - start
            del kept
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def milliseconds(seconds: Sequence[float]) -> Row:
    """Median and quartiles of the rounds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"ms": 1e3 * middle, "ms_quartiles": [1e3 * low, 1e3 * high], "rounds": len(seconds)}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; infinite when anything is not finite."""
    difference = (got.double() - expected).abs().max() / expected.abs().max()
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


class Neighbours:
    """How many cores other programs keep busy, on average since this object was made.

    Time that a hypervisor took away counts as theirs. Only Linux tells; elsewhere the answer is None.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        now = self._now()
        if self._start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy - own) / max(wall, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Wall seconds, processor seconds of everybody, processor seconds of this process and its ended children."""
        try:
            first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
        except FileNotFoundError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])


def wait_until_quiet(limit: float) -> bool:
    """Wait at most `limit` seconds for one in which nobody else works; False when none came or none can be seen."""
    end = time.monotonic() + limit
    while True:
        neighbours = Neighbours()
        time.sleep(1.0)
        busy = neighbours.cores()
        if busy is None:
            return False
        if busy < QUIET:
            return True
        if time.monotonic() > end:
            return False


def machine() -> Row:
    """The hardware and software that a figure depends on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    allocator = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))
    }
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isotach": __version__,
        "allocator": allocator or "default",
    }


def commit() -> Row | None:
    """The commit of the clone that this package runs from; None when it does not run from a clone."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie inside somebody else's clone
        return {"hash": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "."))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def show(result: Result, console: Console) -> None:
    """Print rows, figures and refusals as Markdown."""
    if result.rows:
        columns = list(
            dict.fromkeys(key for row in result.rows for key in row if not isinstance(row[key], list | dict))
        )
        table = Table(*columns, box=box.MARKDOWN)
        for row in result.rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        console.print(table)
    if result.figures:
        table = Table("figure", "value", "bound", "met", box=box.MARKDOWN)
        for figure in result.figures:
            verdict = ("yes" if figure.met else "no") if figure.bound else ""
            table.add_row(figure.name, _cell(figure.value), figure.bound, verdict)
        console.print(table)
    for sentence in result.refused:
        console.print(f"Refused: {sentence}", markup=False)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
