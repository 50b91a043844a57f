"""isotach eval: compare mixers on recall, text and speed, a cell at a time."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isotach.errors import UserError


class Evaluation(StrEnum):
    table = "table"


def eval(
    what: Annotated[Evaluation, typer.Argument(help="The comparison of mixers.")],
    recipe: Annotated[Path, typer.Argument(help="TOML, such as recipes/table.toml.")],
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE or NAME=TRAIN,VALID, once or more.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for cells, runs and the table; goes on where it was.")] = Path(
        "runs/table"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Cells computed at a time, a thread each.")] = 1,
) -> None:
    """Compute what is missing, print the tables, and save them as OUT/table.json, OUT/table.md and OUT/table.svg."""
    import json

    from rich.console import Console
    from rich.progress import track

    from isotach import config
    from isotach.bench import report
    from isotach.data.stream import DataConfig
    from isotach.eval import summary
    from isotach.eval import table as tables
    from isotach.files import check_writable, write_atomically

    data = {}
    for each in text or []:
        name, given, files = each.partition("=")
        train, _, valid = files.partition(",")
        if not (name and given and train):
            raise UserError(
                f"eval: expected --text NAME=FILE or NAME=TRAIN,VALID, got {each!r}; give a name and a file"
            )
        for file in filter(None, (train, valid)):
            if not Path(file).exists():
                raise UserError(f"eval: {name}: expected a file, found none at {file}; check the path")
        held_out = {"valid": valid} if valid else {"valid_fraction": 0.1}
        data[name] = config.parse(DataConfig, {"train": train} | held_out, who=f"eval: {name}")
    loaded = config.load(tables.TableConfig, recipe).model_copy(update={"data": data})
    tables.check(loaded)
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "table.json")
    console = Console(stderr=True)
    results = {}
    everything = list(tables.cells(loaded))
    for cell, found in track(
        tables.make(loaded, out, workers=workers), "cells", total=len(everything), console=console, transient=True
    ):
        results[cell] = found
    rows = summary.rows(loaded, results)
    document = {
        "machine": report.machine(),
        "commit": report.commit(),
        "table": loaded.model_dump(mode="json"),
        "rows": rows,
    }
    write_atomically(out / "table.json", json.dumps(document, indent=1).encode() + b"\n")
    write_atomically(out / "table.md", summary.markdown(rows).encode())
    print(summary.markdown(rows), end="")
    summary.draw(rows, out / "table.svg")
