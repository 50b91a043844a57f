"""The comparison of mixers: every cell of one table, each trained and measured the same way.

A cell is one training run: a mixer, a task, a setting, a seed. It is a file once it is done, so an interrupted table
goes on where it stopped, and cells may be computed on several machines and put together. All models have the same
width, depth and, within rounding of the GLU's width, the same number of parameters.

    recall    accuracy in multi-query associative recall, against pairs and state bytes
    text      validation loss, and loss at multiples of the training length over the same scored tokens
    speed     milliseconds per token: training on long sequences, and decoding one by one; bytes of state
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from isotach import config as configuration
from isotach.config import Config
from isotach.data.stream import DataConfig, open_tokens
from isotach.data.tokenizer import load_tokenizer
from isotach.errors import UserError
from isotach.eval.perplexity import by_context
from isotach.eval.recall import RecallConfig, train_recall
from isotach.files import write_atomically
from isotach.models.decoder import Decoder, ModelConfig
from isotach.rng import generator
from isotach.train import checkpoint
from isotach.train.loop import train
from isotach.train.recipe import Recipe, TrainConfig

Kind = Literal["recall", "text", "speed"]
TIMED = 8  # updates and single tokens timed for a row


class RecallGrid(Config):
    """pairs, widths: the grid; a wider model has a larger state. task: everything else."""

    pairs: tuple[int, ...] = (4, 8, 16)
    widths: tuple[int, ...] = (32, 64)
    task: RecallConfig = RecallConfig()


class TextGrid(Config):
    """parameters: of every model, met by the width of the GLU; contexts: multiples of train.seq_len; windows: scored
    stretches of the validation text.
    """

    model: dict[str, Any]
    parameters: int = Field(ge=1)
    train: TrainConfig
    contexts: tuple[int, ...] = (1, 2, 4, 8)
    windows: Annotated[int, Field(ge=1)] = 64


class TableConfig(Config):
    """mixers: every row, a name and the options of its [model.NAME]; full: the rows with the whole grid and all seeds,
    the others have the first setting and the first seed; data: texts by name, given on the command line.
    """

    mixers: dict[str, dict[str, Any]]
    full: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    recall: RecallGrid
    text: TextGrid
    data: dict[str, DataConfig] = {}


@dataclass(frozen=True)
class Cell:
    kind: Kind
    mixer: str
    setting: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.kind}/{self.mixer}-{self.setting}-{self.seed}.json"


def cells(table: TableConfig) -> Iterator[Cell]:
    """Every cell, rows with the whole grid first."""
    for name in sorted(table.mixers, key=lambda name: name not in table.full):
        whole = name in table.full
        seeds = table.seeds if whole else table.seeds[:1]
        grid = list(itertools.product(table.recall.pairs, table.recall.widths))
        for (pairs, width), seed in itertools.product(grid if whole else grid[-1:], seeds):
            yield Cell("recall", name, f"{pairs}x{width}", seed)
        for text, seed in itertools.product(table.data, seeds):
            yield Cell("text", name, text, seed)
        yield Cell("speed", name, "tokens", 0)


def make(table: TableConfig, folder: Path, *, workers: int = 1) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Compute what is missing in `folder`, yielding every cell with its result as it is done or found."""
    check(table)
    todo = []
    for cell in cells(table):
        if (found := load(folder, cell)) is None:
            todo.append(cell)
        else:
            yield cell, found
    alone = [cell for cell in todo if cell.kind == "speed"]  # timed with nothing beside it
    together = [cell for cell in todo if cell.kind != "speed"]
    if workers == 1:
        for cell in together:
            yield cell, compute(table, folder, cell)
    else:
        with ProcessPoolExecutor(max_workers=workers) as pool:
            futures = {cell: pool.submit(compute, table, folder, cell) for cell in together}
            for cell, future in futures.items():
                yield cell, future.result()
    for cell in alone:
        yield cell, compute(table, folder, cell)


def check(table: TableConfig) -> None:
    """Build every model, on no device, so that a wrong name or option is told before anything is computed."""
    if unknown := sorted(set(table.full) - set(table.mixers)):
        raise UserError(f"table: full names {unknown[0]}, which is not among mixers; add it there")
    for name in table.mixers:
        text_model(table, name)
        for width in table.recall.widths:
            recall_model(table, name, width)


def load(folder: Path, cell: Cell) -> dict[str, Any] | None:
    path = folder / cell.file
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def compute(table: TableConfig, folder: Path, cell: Cell) -> dict[str, Any]:
    """The cell's result, written to its file."""
    torch.set_num_threads(1)
    result = {"recall": _recall, "text": _text, "speed": _speed}[cell.kind](table, folder, cell)
    path = folder / cell.file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(cell) | result, indent=1).encode() + b"\n")
    return asdict(cell) | result


def recall_model(table: TableConfig, name: str, width: int) -> ModelConfig:
    """Two layers; only the mixer differs. Weights begin larger than in a language model, or attention starts flat."""
    shape: dict[str, Any] = {
        "vocab": table.recall.task.vocab,
        "width": width,
        "depth": 2,
        "heads": 2,
        "hidden": 2 * width,
    }
    shape |= {"init_std": 0.1, "tie": False}
    return _parsed(shape | {"pattern": [name], name: table.mixers[name]})


def text_model(table: TableConfig, name: str) -> ModelConfig:
    """The grid's model with this mixer, its GLU as wide as the parameters allow."""

    def count(hidden: int) -> int:
        shape = table.text.model | {"pattern": [name], name: table.mixers[name], "hidden": hidden}
        with torch.device("meta"):
            return Decoder(_parsed(shape)).parameter_count()

    one, two = count(8), count(16)
    hidden = 8 * round((table.text.parameters - one) / (two - one) + 1)
    if hidden < 8:
        raise UserError(
            f"table: {name} alone has {one:,} parameters, over the budget of {table.text.parameters:,}; "
            "raise text.parameters"
        )
    return _parsed(table.text.model | {"pattern": [name], name: table.mixers[name], "hidden": hidden})


def _parsed(shape: dict[str, Any]) -> ModelConfig:
    return configuration.parse(ModelConfig, shape, who="table: model")


def _recall(table: TableConfig, folder: Path, cell: Cell) -> dict[str, Any]:
    pairs, width = map(int, cell.setting.split("x"))
    task = table.recall.task.model_copy(update={"pairs": pairs, "length": max(table.recall.task.length, 8 * pairs)})
    decoder = Decoder(recall_model(table, cell.mixer, width), seed=cell.seed)
    found = train_recall(decoder, task, seed=cell.seed)
    return asdict(found) | {
        "parameters": decoder.parameter_count(),
        "state_bytes": decoder.state_bytes(task.length),
        "length": task.length,
    }


def _text(table: TableConfig, folder: Path, cell: Cell) -> dict[str, Any]:
    settings = table.text.train.model_copy(update={"seed": cell.seed, "threads": 1})
    recipe = Recipe(model=text_model(table, cell.mixer), data=table.data[cell.setting], train=settings)
    run = folder / "runs" / cell.file.removesuffix(".json")
    begun = run.exists() and bool(checkpoint.step_folders(run))
    run.parent.mkdir(parents=True, exist_ok=True)
    train(recipe, run, resume=begun)
    newest = checkpoint.latest(run)
    decoder = Decoder.load(newest)
    ids = open_tokens(recipe.data, "valid", load_tokenizer(recipe.data.tokenizer)).ids
    contexts = [m * settings.seq_len for m in table.text.contexts]
    losses = by_context(decoder, ids, contexts, windows=table.text.windows, scored=settings.seq_len // 2)
    return {
        "valid_loss": json.loads((newest / "training.json").read_text())["valid_loss"],
        "by_context": {str(context): loss for context, loss in losses.items()},
        "parameters": decoder.parameter_count(),
    }


def _speed(table: TableConfig, folder: Path, cell: Cell) -> dict[str, Any]:
    """Medians over updates of one sequence of 2,048 tokens and over single tokens after 1,024."""
    decoder = Decoder(text_model(table, cell.mixer))
    tokens = torch.randint(decoder.config.vocab, (1, 2049), generator=generator(0, "table"))
    train_times, step_times = [], []
    for _ in range(TIMED + 1):
        begin = time.perf_counter()
        logits, _ = decoder(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).backward()
        train_times.append(time.perf_counter() - begin)
    with torch.inference_mode():
        _, state = decoder.hidden(tokens[:, :1024])
        for t in range(1024, 1024 + 4 * TIMED):
            begin = time.perf_counter()
            hidden, state = decoder.hidden(tokens[:, t : t + 1], state)
            decoder.head(hidden)
            step_times.append(time.perf_counter() - begin)
    return {
        "train_ms_per_token": 1e3 * statistics.median(train_times[1:]) / 2048,
        "decode_ms_per_token": 1e3 * statistics.median(step_times[TIMED:]),
        "state_bytes": {str(context): decoder.state_bytes(context) for context in (1024, 65536)},
        "parameters": decoder.parameter_count(),
    }


# ---- putting it together


def rows(table: TableConfig, results: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per mixer: means over seeds, with their number; cells that are not there yet are left out."""

    def mean(kind: Kind, name: str, setting: str, value: str) -> tuple[float, int] | None:
        found = [r[value] for c, r in results.items() if (c.kind, c.mixer, c.setting) == (kind, name, setting)]
        return (statistics.mean(found), len(found)) if found else None

    out = []
    for name in table.mixers:
        row: dict[str, Any] = {"mixer": name}
        for pairs, width in itertools.product(table.recall.pairs, table.recall.widths):
            if got := mean("recall", name, f"{pairs}x{width}", "accuracy"):
                row[f"recall {pairs} pairs, width {width}"] = got[0]
        for text in table.data:
            if got := mean("text", name, text, "valid_loss"):
                row[f"{text} loss"], row["seeds"] = got
            curves = [
                r["by_context"]
                for c, r in results.items()
                if c.kind == "text" and c.mixer == name and c.setting == text
            ]
            for context in curves[0] if curves else ():
                row[f"{text} loss at {context}"] = statistics.mean(curve[context] for curve in curves)
        for cell, found in results.items():
            if cell.kind == "speed" and cell.mixer == name:
                row |= {key: found[key] for key in ("train_ms_per_token", "decode_ms_per_token", "parameters")}
                row |= {f"state bytes at {context}": size for context, size in found["state_bytes"].items()}
        out.append(row)
    return out


def markdown(found: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; what a row lacks is empty."""
    found = list(found)
    columns = list(dict.fromkeys(key for row in found for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_written(row.get(column)) for column in columns) + " |" for row in found]
    return "\n".join(lines) + "\n"


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
