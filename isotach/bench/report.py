"""What every benchmark shares: a quiet machine, contenders timed in pairs, and a file that says where it was measured.

A figure is the median over rounds of a ratio between two contenders of the same round: a machine that slows down
slows both. A contender is timed only after its result was compared with float64; a wrong one is refused.

What people read, a page and a picture, is made from the stored file alone.
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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from isotach import __version__
from isotach.allocator import allocation
from isotach.bench import picture
from isotach.errors import UserError
from isotach.files import write_atomically

QUIET = 0.1  # cores that others may keep busy on a machine called idle: 5 % of the two-core machine of the results
WIDTH = 160  # columns that the tables want
Row = dict[str, Any]
Clock = Callable[[Callable[[], object]], float]  # seconds that a call takes
Panels = Callable[[Row], Sequence[picture.Panel]]  # what a benchmark draws of its stored result
K = TypeVar("K")  # whatever a caller names its contenders by


@dataclass(frozen=True)
class Figure:
    """A number that stands for the benchmark, None where it was not measured, and the bound it is held against."""

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """met, missed, not measured, or nothing where there is no bound."""
        if self.value is None:
            return "not measured"
        if not self.bound:
            return ""
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return "met" if low <= self.value <= high else "missed"

    @property
    def bound(self) -> str:
        """The bound as people write it; empty when there is none."""
        if self.at_least == self.at_most:
            return "" if self.at_least is None else f"= {self.at_least:g}"
        return f"≥ {self.at_least:g}" if self.at_most is None else f"≤ {self.at_most:g}"


@dataclass
class Result:
    """What a benchmark found.

    refused   a sentence for every row that is missing because its result was wrong
    absent    a sentence for everything that was not measured: who is not installed, what would have taken too long
    """

    settings: Row
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def document(self) -> Row:
        """As it is stored."""
        return asdict(self) | {"figures": [{**asdict(figure), "verdict": figure.verdict} for figure in self.figures]}


def publish(
    name: str,
    measure: Callable[[], Result],
    *,
    folder: Path,
    wait: float,
    console: Console,
    panels: Panels | None = None,
) -> Result:
    """Wait for an idle machine, measure, print the tables, and write folder/name.json, .md, and .svg where `panels`
    finds something to draw in what was stored.

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
        **result.document(),
    }
    console.print(*tables(document), sep="\n\n", markup=False, highlight=False, soft_wrap=True)
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    for written, text in pages(name, document, panels).items():
        write_atomically(folder / written, text.encode())
    if busy is None:
        console.print("Whether the machine was idle cannot be told here.")
    elif not idle:
        console.print(
            f"The machine was not idle: others kept {busy:.2f} cores busy. Measure again before you quote this."
        )
    console.print(f"Saved to {path}")
    return result


def interleave(
    contenders: Mapping[K, Callable[[], object]], *, rounds: int, device: torch.device, clock: Clock | None = None
) -> dict[K, list[float]]:
    """Seconds that every contender took in every round, after one round that is not counted.

    The order turns by one each round, so that nobody always inherits the caches of the same neighbour.

    clock   None for what somebody waits: the time on the wall until the device is done
    """
    clock = partial(wall, device=device) if clock is None else clock
    names = list(contenders)
    seconds: dict[K, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            spent = clock(contenders[name])
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def wall(call: Callable[[], object], *, device: torch.device) -> float:
    """Seconds until the device is done; what the call returns is freed after the clock has stopped."""
    synchronize(device)
    start = time.perf_counter()
    kept = call()
    synchronize(device)
    spent = time.perf_counter() - start
    del kept
    return spent


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
        "allocator": allocation(),
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


def pages(name: str, document: Row, panels: Panels | None) -> dict[str, str]:
    """What people read of a stored result: NAME.md, and NAME.svg where `panels` finds something to draw."""
    drawn = panels(document) if panels else ()
    image = [f"![{', '.join(panel.title for panel in drawn)}]({name}.svg)"] if drawn else []
    parts = [f"# isotach bench {document['benchmark']}", measured_on(document), *image, *tables(document)]
    written = {f"{name}.md": "\n\n".join(parts) + "\n"}
    return written | ({f"{name}.svg": picture.draw(drawn)} if drawn else {})


def measured_on(document: Row) -> str:
    """A sentence: the hardware, the software, the commit and the day of a stored result."""
    on = document["machine"]
    where = on["gpu"] if document["settings"].get("device") == "cuda" else f"{on['cpu']}, {on['threads']} threads"
    commit = document["commit"]
    at = "no commit" if commit is None else commit["hash"][:12] + (" and changes" if commit["modified"] else "")
    busy = "; the machine was not idle" if document["idle"] is False else ""
    return f"{where}, torch {on['torch']}, {at}, {document['date'][:10]}{busy}."


def tables(document: Row) -> list[str]:
    """Rows, figures, and what is missing and why, as Markdown."""
    parts = []
    if rows := document["rows"]:
        columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list | dict)))
        parts.append(markdown(columns, [[_cell(row.get(column)) for column in columns] for row in rows]))
    if document["figures"]:
        parts.append(figures(document))
    parts += [f"Refused: {sentence}" for sentence in document["refused"]]
    return parts + [f"Not measured: {sentence}" for sentence in document.get("absent", ())]


def figures(document: Row) -> str:
    """The figures of a stored result as a Markdown table."""
    fields = ("name", "value", "at_least", "at_most")
    found = [Figure(*(stored[field] for field in fields)) for stored in document["figures"]]
    return markdown(("figure", "value", "bound", ""), [[f.name, _cell(f.value), f.bound, f.verdict] for f in found])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up as plain text."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


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
