"""How a run looks while it runs: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between plain lines; validations, the first and the last step always get one


class Bar:
    """A sink for `train`: shows step, loss, speed and time left on standard error.

    Args:
        steps: updates in all.
        file: where to write; a bar if it is a terminal, else plain lines.
    """

    def __init__(self, steps: int, *, file: TextIO | None = None) -> None:
        self.steps = steps
        self.file = sys.stderr if file is None else file
        console = Console(file=self.file)
        self._bar: Progress | None = None
        if console.is_terminal:
            # Bar, count and time left come first: a narrow terminal cuts off the figures, not them.
            columns = (BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console)
        self._task: TaskID | None = None
        self._line = -float("inf")
        self._valid = ""
        self._spent: list[float] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Show one step's record."""
        step = record["step"]
        self._spent.append(record["seconds"])
        if "valid_loss" in record:
            self._valid = f"  valid {record['valid_loss']:.3f}"
            if "valid_bpb" in record:
                self._valid = f"  valid {record['valid_bpb']:.2f} bits/byte"
        text = f"loss {record['loss']:.3f}{self._valid}  {record['tokens_per_second']:,.0f} tok/s"
        if self._bar is not None:
            if self._task is None:  # here, so that a resumed run's time left counts its own steps only
                self._bar.start()
                self._task = self._bar.add_task(text, total=self.steps, completed=step)
            self._bar.update(self._task, completed=step, description=text)
        elif "valid_loss" in record or step == self.steps or time.monotonic() - self._line > LINE_SECONDS:
            self._line = time.monotonic()
            left = (self.steps - step) * statistics.fmean(self._spent)
            print(f"step {step}/{self.steps}  {text}  {left / 60:.1f} min left", file=self.file, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def describe(record: Mapping[str, Any], *, prefix: str = "") -> str:
    """'loss 1.234 (1.78 bits/byte)' from a log record."""
    bpb = record.get(f"{prefix}bpb")
    return f"loss {record[f'{prefix}loss']:.3f}" + (f" ({bpb:.2f} bits/byte)" if bpb is not None else "")
