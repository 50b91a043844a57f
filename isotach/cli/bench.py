"""isotach bench: speed and memory, measured on this machine and saved with what they were measured on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isotach import bench as benchmarks
from isotach.errors import UserError


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


def bench(
    name: Annotated[str, typer.Argument(help=f"What to measure: {', '.join(benchmarks.names())}.")],
    against: Annotated[
        str | None, typer.Option(help="Whom to compare with, such as fla,sdpa; everybody who is there when left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for NAME.json, NAME.md and NAME.svg; NAME-cuda on a GPU.")] = Path(
        "benchmarks/results"
    ),
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for an idle machine.")] = 120.0,
    preset: Annotated[list[str] | None, typer.Option(help="Model, once or more.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of every contender; fewer for large models.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="After how long nothing new is begun (ops).")] = None,
) -> None:
    """Measure, print a table, and save it; exit with code 1 when a result was wrong and so refused."""
    from isotach.config import nearest

    if name not in benchmarks.names():
        raise UserError(f"bench: {name!r} is no benchmark; {nearest(name, benchmarks.names())}")

    import importlib
    import inspect
    from functools import partial

    import torch
    from rich.console import Console

    from isotach.bench import peers, report
    from isotach.models import presets

    module = importlib.import_module(f"isotach.bench.{name}")
    choice: dict[str, object] = {"against": peers.chosen(against)} if against is not None else {}
    choice |= {"presets": preset} if preset else {}
    choice |= {"rounds": rounds} if rounds else {}
    choice |= {"minutes": minutes} if minutes is not None else {}
    for option in choice:
        if option not in inspect.signature(module.measure).parameters:
            flag = "preset" if option == "presets" else option
            raise UserError(f"bench: {name} takes no --{flag}; leave it out")
    for each in preset or []:
        presets.preset(each)  # refuses an unknown one before the wait
    if device == Device.cuda and not torch.cuda.is_available():
        raise UserError("bench: expected a CUDA device, found none; use --device cpu")

    console = Console(width=max(Console().width, report.WIDTH))
    found = report.publish(
        name if device == Device.cpu else f"{name}-{device}",
        partial(module.measure, device=torch.device(device), **choice),
        folder=out,
        wait=wait,
        console=console,
        panels=getattr(module, "panels", None),
    )
    if found.refused:
        raise typer.Exit(1)
