"""isotach bench: speed and memory, measured on this machine and saved with what they were measured on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isotach.errors import UserError


class Benchmark(StrEnum):
    ops = "ops"
    families = "families"
    mixers = "mixers"
    decode = "decode"
    train = "train"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


def bench(
    name: Annotated[
        Benchmark,
        typer.Argument(
            help="The operators, every family beside its rivals, every mixer as the text grows, decoding, or training."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME.json, or NAME-cuda.json.")] = Path("benchmarks/results"),
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for an idle machine.")] = 120.0,
    preset: Annotated[list[str] | None, typer.Option(help="Model, once or more (decode, train).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of every contender; fewer for large models.")] = None,
) -> None:
    """Measure, print a table, and save it; exit with code 1 when a result was wrong and so refused."""
    import importlib
    from functools import partial

    import torch
    from rich.console import Console

    from isotach.bench import report
    from isotach.models import presets

    if device == Device.cuda and not torch.cuda.is_available():
        raise UserError("bench: expected a CUDA device, found none; use --device cpu")
    if preset and name not in (Benchmark.decode, Benchmark.train):
        raise UserError("bench: --preset is for decode and train; the others have one shape")
    for each in preset or []:
        presets.preset(each)  # refuses an unknown one before the wait
    choice: dict[str, object] = {"presets": preset} if preset else {}
    choice |= {"rounds": rounds} if rounds else {}
    measure = partial(importlib.import_module(f"isotach.bench.{name}").measure, device=torch.device(device), **choice)
    label = str(name) if device == Device.cpu else f"{name}-{device}"
    console = Console(width=max(Console().width, report.WIDTH))
    if report.publish(label, measure, folder=out, wait=wait, console=console).refused:
        raise typer.Exit(1)
