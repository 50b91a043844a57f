"""make demo: a small model learns from the Python on this machine, writes some, and shows what a token costs it.

    OUT/run          the training run: checkpoints that every command of isotach opens, log, recipe
    OUT/speed.json   milliseconds per token and bytes of state, by position, for it and for its softmax twin
    OUT/speed.png    the same as a picture

Running it again reuses a finished run, continues one that was stopped, and replaces one that can be neither.
"""

import argparse
import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isotach import cli

os.environ.update(cli.waiting())  # before torch is imported

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from isotach import config
from isotach.bench import decode, report
from isotach.data.stream import open_tokens
from isotach.data.tokenizer import Tokenizer, load_tokenizer
from isotach.errors import UserError
from isotach.files import write_atomically
from isotach.infer.generate import Session
from isotach.infer.open import open_checkpoint
from isotach.infer.sample import Sampling
from isotach.models.decoder import Decoder
from isotach.train import checkpoint
from isotach.train.loop import RECIPE, train
from isotach.train.metrics import read_log
from isotach.train.progress import Bar
from isotach.train.recipe import Recipe, changed

ROOT = Path(__file__).resolve().parents[1]
MODEL, TWIN = "isotach", "isotach softmax"  # what the benchmark calls the model and its twin
PROMPT = 'def read_lines(path):\n    """'
SAMPLING = Sampling(temperature=0.6, seed=0, max_tokens=400)
COLOURS = {MODEL: "#0072B2", TWIN: "#D55E00"}  # Okabe and Ito: told apart by every kind of colour vision, and in grey
UNITS = ("bytes", "KiB", "MiB", "GiB")
Rows = dict[tuple[str, int], report.Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all went well, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Train a small model, let it write, and time its tokens.")
    parser.add_argument("--steps", type=int, help="updates, instead of those of recipes/demo.toml")
    parser.add_argument("--positions", type=_positions, default=decode.POSITIONS, help="such as 1024,4096")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to; what is in it may go")
    options = parser.parse_args(arguments)
    try:
        return demo(options.out, steps=options.steps, positions=options.positions)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Running it again picks up from the newest checkpoint.", file=sys.stderr)
        return 130


def demo(out: Path, *, steps: int | None, positions: Sequence[int]) -> int:
    """All of it, in order."""
    began = time.monotonic()
    run = out / "run"
    stopped = learn(_recipe(steps), run)
    if stopped is not None:
        print(f"Stopped by {stopped} and saved. Running it again continues from there.", file=sys.stderr)
        return 128 + signal.Signals[stopped]
    decoder, tokenizer = open_checkpoint(checkpoint.latest(run), device="cpu")
    write(decoder, tokenizer)
    result = measure(decoder, positions, out / "speed.json")
    if result.refused:
        print(*result.refused, sep="\n", file=sys.stderr)
        return 1
    rows = {(row["model"], row["position"]): row for row in result.rows}
    table(rows, positions)
    picture(rows, positions, out / "speed.png")
    print(f"\nSaved {_shown(run)}, {_shown(out / 'speed.json')} and {_shown(out / 'speed.png')}", end=" ")
    print(f"after {(time.monotonic() - began) / 60:.1f} minutes. Worth trying next:")
    for what, command in next_commands(out):
        print(f"\n  {what}\n    {shlex.join(command)}")
    return 0


def learn(recipe: Recipe, run: Path) -> str | None:
    """Train, or train on, or find that nothing is left to do; the signal that stopped it, if one did."""
    resume = _continues(recipe, run)
    if not resume:
        shutil.rmtree(run, ignore_errors=True)  # `train` refuses a folder that could not go
    print(
        f"A model of {Decoder(recipe.model).parameter_count() / 1e6:.2f} million parameters reads "
        f"{recipe.train.steps * recipe.train.batch_tokens:,} bytes of the Python standard library.",
        flush=True,
    )
    summary = train(recipe, run, resume=resume, sinks=[Bar(recipe.train.steps)])
    if summary.stopped is None:
        again = "" if summary.last else f" It was trained before; to see that again, remove {_shown(run)}."
        found = read_log(run)[-1]["valid_bpb"]
        print(f"It predicts modules that it has not read at {found:.2f} bits per byte.{again}")
    return summary.stopped


def write(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Continue PROMPT on standard output."""
    print(f"\nIt continues a prompt of two lines:\n\n{PROMPT}", end="")
    session = Session(decoder, tokenizer, keep_tokens=False)
    session.read(PROMPT)
    for event in session.generate(SAMPLING):
        print(event.text, end="", flush=True)
    print("\n")


def measure(decoder: Decoder, positions: Sequence[int], path: Path) -> report.Result:
    """Time single tokens of the model and of its untrained softmax twin, and write everything found to `path`."""
    print(
        f"Both this model and an untrained softmax model of the same shape now read {max(positions):,} tokens; on the "
        "way,\nsingle tokens are timed. Most of the next minute or two is the softmax model's reading.",
        flush=True,
    )
    neighbours = report.Neighbours()
    with Console(stderr=True).status("reading and timing"):
        result = decode.compare(decoder, name=MODEL, positions=positions)
    busy = neighbours.cores()
    if busy is not None and busy > report.QUIET:
        print(f"Other programs kept {busy:.1f} cores busy meanwhile: expect better figures on an idle machine.")
    document = {
        "machine": report.machine(),
        "cores_busy_with_others": busy,
        **result.document(),
    }
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    return result


def table(rows: Rows, positions: Sequence[int]) -> None:
    """Print a line per position, and what the first and the last of them say."""
    columns = ("tokens read", "isotach ms", "softmax ms", "isotach state", "softmax state")
    lines = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        lines.add_column(column, justify="right")
    for position in positions:
        ours, theirs = rows[MODEL, position], rows[TWIN, position]
        times = (f"{row['ms']:.2f}" for row in (ours, theirs))
        lines.add_row(f"{position:,}", *times, *(_size(row["state_bytes"]) for row in (ours, theirs)))
    Console().print(lines)
    first, last = min(positions), max(positions)
    ours, theirs = (rows[name, last]["ms"] / rows[name, first]["ms"] for name in (MODEL, TWIN))
    print(
        f"After {last:,} tokens, one more takes {ours:.2f} times as long as after {first:,}; "
        f"with softmax, {theirs:.1f} times."
    )


def picture(rows: Rows, positions: Sequence[int], path: Path) -> None:
    """Write two panels, time and state against context, both axes logarithmic."""
    figure = Figure(figsize=(10, 4), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, wspace=0.04))
    time_axis, state_axis = figure.subplots(1, 2)
    _panel(time_axis, rows, positions, "ms", _milliseconds)
    time_axis.set_title("Time of one more token", loc="left")
    time_axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    _panel(state_axis, rows, positions, "state_bytes", _size)
    state_axis.set_title("Memory of what was read", loc="left")
    state_axis.yaxis.set_major_locator(LogLocator(base=4))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=160)
    write_atomically(path, image.getvalue())


def _panel(axis: Axes, rows: Rows, positions: Sequence[int], key: str, written: Callable[[float], str]) -> None:
    """One line per model, named at its end; `written` turns a value into text with its unit."""
    for name, label, marker in ((MODEL, "isotach", "o"), (TWIN, "softmax", "s")):
        values = [rows[name, position][key] for position in positions]
        axis.plot(positions, values, color=COLOURS[name], marker=marker, linewidth=2, clip_on=False)
        axis.annotate(
            f"{label}\n{written(values[-1])}",
            (positions[-1], values[-1]),
            xytext=(10, 0),
            textcoords="offset points",
            color=COLOURS[name],
            va="center",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(positions, [_count(position) for position in positions])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.margins(y=0.12)
    axis.set_xlabel("tokens read")
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def next_commands(out: Path) -> list[tuple[str, list[str]]]:
    """What is worth trying with what the demo wrote, and the words to type."""
    own = Path(sys.executable).with_name("isotach")
    isotach = "isotach" if shutil.which("isotach") == str(own) else _shown(own)
    run, here = _shown(out / "run"), _shown(Path(__file__))
    state, recipe = _shown(out / "read.state"), _shown(ROOT / "recipes" / "demo.toml")
    return [
        (
            "Read a file, write on, and keep the state, as small as ever, to continue with --state:",
            [isotach, "generate", run, "--file", here, "-p", "def ", "--save-state", state],
        ),
        (
            "See how training went:",
            [isotach, "plot", run, "--out", _shown(out / "curves.png")],
        ),
        (
            "Train on text of your own: docs may be any file or folder",
            [isotach, "train", recipe, f"data.train={_shown(ROOT / 'docs')}", "--run", "runs/docs"],
        ),
    ]


def _recipe(steps: int | None) -> Recipe:
    """recipes/demo.toml on the CPU, with `steps` updates and as much less warmup."""
    path = ROOT / "recipes" / "demo.toml"
    recipe = config.load(Recipe, path, ["train.device=cpu"])
    if steps is None:
        return recipe
    warmup = recipe.train.warmup * steps // recipe.train.steps
    return config.load(Recipe, path, ["train.device=cpu", f"train.steps={steps}", f"train.warmup={warmup}"])


def _continues(recipe: Recipe, run: Path) -> bool:
    """Whether the newest checkpoint of `run` is whole, of this recipe, and of this text."""
    try:
        newest = checkpoint.latest(run)
        before = config.load(Recipe, newest / RECIPE)
        text = open_tokens(recipe.data, "train", load_tokenizer(recipe.data.tokenizer))
        training: dict[str, Any] = checkpoint.verify(newest)
    except UserError:
        return False
    return changed(before, recipe) is None and training["text"] == text.fingerprint


def _positions(text: str) -> tuple[int, ...]:
    """ "64,256" -> (64, 256): rising, all of them at least 1."""
    positions = tuple(sorted({int(part) for part in text.split(",")}))
    if positions[0] < 1:
        raise ValueError
    return positions


def _size(count: float) -> str:
    """Bytes as people read them: 65536 -> "64 KiB"."""
    power = 0
    while count >= 1024 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{float(f'{count:.3g}'):g} {UNITS[power]}"


def _milliseconds(count: float) -> str:
    return f"{float(f'{count:.2g}'):g} ms"


def _count(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


if __name__ == "__main__":
    raise SystemExit(main())
