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
from collections.abc import Iterator
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
    """widths: of the models, a run each; a wider one has a larger state. rates: of learning; the first seed tries each,
    because no one rate suits every mixer, and the others take the one that was better. task: everything else; one run
    learns all numbers of pairs.
    """

    widths: tuple[int, ...] = (32, 64)
    rates: tuple[float, ...] = (3e-3, 1e-2)
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
    """mixers: every row, a mixer's name and the options of its [model.NAME]; NAME+VARIANT is a second row of a mixer
    with other options; full: the rows with all widths, texts and seeds, the others have the first of each; data: texts
    by name, given on the command line.
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
        widths = table.recall.widths if whole else table.recall.widths[:1]
        for width in widths:
            yield from (Cell("recall", name, f"{width}at{rate:g}", seeds[0]) for rate in table.recall.rates)
            yield from (Cell("recall", name, f"{width}", seed) for seed in seeds[1:])
        for text, seed in itertools.product(list(table.data)[: None if whole else 1], seeds):
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
    last = [cell for cell in todo if cell.kind == "recall" and "at" not in cell.setting]  # need the better rate
    first = [cell for cell in todo if cell not in alone and cell not in last]
    if workers == 1:
        for cell in first + last:
            yield cell, compute(table, folder, cell)
    else:
        with ProcessPoolExecutor(max_workers=workers) as pool:
            for stage in (first, last):
                futures = {cell: pool.submit(compute, table, folder, cell) for cell in stage}
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
    torch.set_flush_denormal(True)  # distance biases make weights so small that a processor takes ten times as long
    try:
        result = {"recall": _recall, "text": _text, "speed": _speed}[cell.kind](table, folder, cell)
    finally:
        torch.set_flush_denormal(False)
    path = folder / cell.file
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(cell) | result, indent=1)
    write_atomically(path, text.encode() + b"\n")
    written: dict[str, Any] = json.loads(text)
    return written


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
    return _parsed(shape | _pattern(table, name))


def text_model(table: TableConfig, name: str) -> ModelConfig:
    """The grid's model with this mixer, its GLU as wide as the parameters allow."""

    def count(hidden: int) -> int:
        shape = table.text.model | _pattern(table, name) | {"hidden": hidden}
        with torch.device("meta"):
            return Decoder(_parsed(shape)).parameter_count()

    one, two = count(8), count(16)
    hidden = 8 * round((table.text.parameters - one) / (two - one) + 1)
    if hidden < 8:
        raise UserError(
            f"table: {name} alone has {one:,} parameters, over the budget of {table.text.parameters:,}; "
            "raise text.parameters"
        )
    return _parsed(table.text.model | _pattern(table, name) | {"hidden": hidden})


def _pattern(table: TableConfig, name: str) -> dict[str, Any]:
    """What a row changes of a model."""
    mixer = name.partition("+")[0]
    return {"pattern": [mixer], mixer: table.mixers[name]}


def _parsed(shape: dict[str, Any]) -> ModelConfig:
    return configuration.parse(ModelConfig, shape, who="table: model")


def _recall(table: TableConfig, folder: Path, cell: Cell) -> dict[str, Any]:
    width, _, rate = cell.setting.partition("at")
    lr = float(rate) if rate else better_rate(table, folder, cell)
    task = table.recall.task.model_copy(update={"lr": lr})
    decoder = Decoder(recall_model(table, cell.mixer, int(width)), seed=cell.seed)
    found = train_recall(decoder, task, seed=cell.seed)
    return asdict(found) | {
        "rate": lr,
        "parameters": decoder.parameter_count(),
        "state_bytes": decoder.state_bytes(task.length),
    }


def better_rate(table: TableConfig, folder: Path, cell: Cell) -> float:
    """The rate at which the first seed answered more; all rates must have been tried."""

    def answered(rate: float) -> float:
        tried = load(folder, Cell("recall", cell.mixer, f"{cell.setting}at{rate:g}", table.seeds[0]))
        return -1.0 if tried is None else statistics.mean(tried["accuracy"].values())

    return max(table.recall.rates, key=answered)


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
