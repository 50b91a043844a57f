"""The comparison put together: cells become one row per mixer, rows become tables and a picture.

Every mean is over the seeds of a cell's setting, with the range between the best and the worst. In recall the rate of
learning at which the first seed answered more counts, at each width for itself.
"""

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isotach.errors import UserError
from isotach.eval.table import Cell, TableConfig
from isotach.files import write_atomically

Row = dict[str, Any]


def rows(table: TableConfig, results: Mapping[Cell, Mapping[str, Any]]) -> list[Row]:
    """One row per mixer; cells that are not there yet are left out."""
    out = []
    for name in table.mixers:
        own = {cell: found for cell, found in results.items() if cell.mixer == name}
        row: Row = {"mixer": name, "recall": _recall(table, own), "text": _text(table, own)}
        costs = [found for cell, found in own.items() if cell.kind == "speed"]
        out.append(row | ({"cost": costs[0]} if costs else {}))
    return out


def _recall(table: TableConfig, own: Mapping[Cell, Mapping[str, Any]]) -> list[Row]:
    """Per width: the better rate, accuracy by number of pairs, bytes of state."""
    out = []
    for width in table.recall.widths:
        tried = [r for c, r in own.items() if c.kind == "recall" and c.setting.startswith(f"{width}at")]
        if not tried:
            continue
        best = max(tried, key=lambda result: statistics.mean(result["accuracy"].values()))
        found = [best, *(r for c, r in own.items() if (c.kind, c.setting) == ("recall", str(width)))]
        accuracy = {n: spread([r["accuracy"][n] for r in found]) for n in best["accuracy"]}
        entry = {"width": width, "rate": best["rate"], "accuracy": accuracy, "state_bytes": best["state_bytes"]}
        out.append(entry)
    return out


def _text(table: TableConfig, own: Mapping[Cell, Mapping[str, Any]]) -> Row:
    """Per text: validation loss, and loss by context."""
    out = {}
    for text in table.data:
        found = [r for c, r in own.items() if (c.kind, c.setting) == ("text", text)]
        if found:
            contexts = {c: spread([r["by_context"][c] for r in found]) for c in found[0]["by_context"]}
            out[text] = {"loss": spread([r["valid_loss"] for r in found]), "by_context": contexts}
    return out


def spread(values: Sequence[float]) -> Row:
    """Mean, lowest and highest, and how many."""
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values), "seeds": len(values)}


def markdown(found: Sequence[Row]) -> str:
    """Three tables: recall, loss, cost. What a row lacks is empty."""
    parts = [_recall_table(found)]
    for text in dict.fromkeys(itertools.chain.from_iterable(row["text"] for row in found)):
        parts.append(_text_table(found, text))
    return "\n\n".join([*parts, _cost_table(found)]) + "\n"


def _recall_table(found: Sequence[Row]) -> str:
    grid = sorted(
        {(entry["width"], int(pairs)) for row in found for entry in row["recall"] for pairs in entry["accuracy"]}
    )
    lines = []
    for row in found:
        entries = {entry["width"]: entry for entry in row["recall"]}
        cells = [_mean(entries.get(width, {}).get("accuracy", {}).get(str(pairs)), 100, 1) for width, pairs in grid]
        sizes = " / ".join(f"{entry['state_bytes']:,}" for entry in row["recall"])
        rates = " / ".join(f"{entry['rate']:g}" for entry in row["recall"])
        lines.append([row["mixer"], *cells, sizes, rates])
    head = [f"width {width}, {pairs} pairs" for width, pairs in grid]
    return _table("Recall: % of questions answered", ["mixer", *head, "state, bytes", "rate"], lines)


def _text_table(found: Sequence[Row], text: str) -> str:
    contexts = list(dict.fromkeys(c for row in found if text in row["text"] for c in row["text"][text]["by_context"]))
    lines = []
    for row in found:
        own = row["text"].get(text, {})
        cells = [_mean(own.get("by_context", {}).get(context), 1, 3) for context in contexts]
        lines.append([row["mixer"], _mean(own.get("loss"), 1, 3, ranged=True), *cells])
    head = [f"at {int(context):,} tokens" for context in contexts]
    return _table(f"{text}: loss, nats per token", ["mixer", "validation", *head], lines)


def _cost_table(found: Sequence[Row]) -> str:
    contexts = list(dict.fromkeys(c for row in found if "cost" in row for c in row["cost"]["state_bytes"]))
    lines = []
    for row in found:
        cost = row.get("cost")
        cells = [""] * (3 + len(contexts))
        if cost:
            cells = [
                f"{cost['parameters']:,}",
                f"{cost['train_ms_per_token']:.3f}",
                f"{cost['decode_ms_per_token']:.2f}",
            ]
            cells += [f"{cost['state_bytes'][context]:,}" for context in contexts]
        lines.append([row["mixer"], *cells])
    head = ["parameters", "training, ms/token", "decoding, ms/token"]
    return _table("Cost", ["mixer", *head, *(f"state at {int(c):,}, bytes" for c in contexts)], lines)


def _table(title: str, head: list[str], lines: list[list[str]]) -> str:
    body = [head, ["---"] * len(head), *lines]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def _mean(value: Mapping[str, float] | None, scale: float, digits: int, *, ranged: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{scale * value['mean']:.{digits}f}"
    half = scale * (value["high"] - value["low"]) / 2
    return f"{mean} ± {half:.{digits}f}" if ranged and value["seeds"] > 1 else mean


def draw(found: Sequence[Row], out: Path) -> None:
    """Recall over bytes of state beside loss over context, a colour per mixer. UserError when matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("eval: a picture needs the plot extra; run pip install 'isotach[plot]'") from None
    texts = list(dict.fromkeys(itertools.chain.from_iterable(row["text"] for row in found)))
    with matplotlib.rc_context({"svg.hashsalt": "isotach", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.2 * (1 + len(texts)), 4.6), layout="constrained")
        axes = figure.subplots(1, 1 + len(texts), squeeze=False)[0]
        for index, row in enumerate(found):
            style: Row = {"color": f"C{index % 10}", "marker": "osD^v<>pXh"[index // 10], "markersize": 5}
            _draw_recall(axes[0], row, style)
            for axis, text in zip(axes[1:], texts, strict=True):
                _draw_text(axis, row, text, style)
        axes[0].set(xscale="log", xlabel="bytes of state", ylabel="questions answered, %")
        for axis, text in zip(axes[1:], texts, strict=True):
            axis.set_xscale("log", base=2)
            axis.set(xlabel="context, tokens", ylabel="loss, nats per token", title=text)
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(out, picture.getvalue())


def _draw_recall(axis: Any, row: Row, style: Row) -> None:
    """Accuracy at the largest number of pairs, over the state's size at each width."""
    points = []
    for entry in row["recall"]:
        hardest = entry["accuracy"][max(entry["accuracy"], key=int)]
        points.append((entry["state_bytes"], 100 * hardest["mean"]))
    axis.plot(*(zip(*points, strict=True) if points else ((), ())), label=row["mixer"], **style)


def _draw_text(axis: Any, row: Row, text: str, style: Row) -> None:
    curve = row["text"].get(text, {}).get("by_context", {})
    axis.plot([int(context) for context in curve], [value["mean"] for value in curve.values()], **style)
