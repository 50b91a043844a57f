"""Curves of runs, read from their logs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotach.errors import UserError
from isotach.files import write_atomically
from isotach.train.metrics import read_log

PANELS = (
    ("loss", "loss, nats per token"),
    ("valid_bpb", "validation, bits per byte"),
    ("lr", "learning rate"),
    ("tokens_per_second", "tokens per second"),
)
SMOOTHING = 0.05  # share of the curve that the moving average looks back over


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write one picture with a panel per quantity and a line per run, over training tokens.

    Training loss is drawn faint as logged and strong as a moving average, validation loss as points beside it.
    Raises UserError when matplotlib is missing, a run has no log, or the format is unknown.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise UserError("plot: expected the plot extra; run pip install 'isotach[plot]'") from None
    logs = {run: read_log(run) for run in runs}
    for run, records in logs.items():
        if not records:
            raise UserError(f"{run}: expected a log with at least one step, found it empty; train first")
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for index, (run, records) in enumerate(logs.items()):
            x, y = _series(records, key)
            if key == "loss":
                axis.plot(x, y, color=f"C{index}", alpha=0.25, linewidth=0.8)
                axis.plot(x, smooth(y), color=f"C{index}", label=run.name)
                axis.plot(*_series(records, "valid_loss"), "o", color=f"C{index}", markersize=4)
            else:
                axis.plot(x, y, color=f"C{index}", label=run.name, marker="o" if key == "valid_bpb" else "")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("training tokens")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=out.suffix[1:] or "png", dpi=150)
    except ValueError:
        raise UserError(f"{out}: expected a picture format, got {out.suffix!r}; use .png, .svg or .pdf") from None
    write_atomically(out, picture.getvalue())


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without start-up bias, over about 5 % of the curve."""
    keep = 1 - 1 / max(1.0, SMOOTHING * len(values))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(record["tokens"], record[key]) for record in records if key in record]
    return [x for x, _ in found], [y for _, y in found]
