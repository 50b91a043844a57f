"""isotach plot RUN [RUN ...]: curves of one or several runs in one picture."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .svg or .pdf.")] = Path("curves.png"),
) -> None:
    """Draw loss, bits per byte on validation text, learning rate and speed over tokens."""
    from isotach.train.plot import draw

    draw(runs, out)
    print(out)
