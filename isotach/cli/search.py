"""isotach search RECIPE [KEY=VALUE ...]: find which mixer belongs in which layer."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isotach.search.recipe import Pattern
    from isotach.search.run import Found, Generation


def search(
    recipe: Annotated[Path, typer.Argument(help="TOML file with the tables model, data, train and search.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as search.context=16384.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder for the supernet, scores and front; runs/NAME-OF-RECIPE if left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search that RUN holds.")] = False,
) -> int:
    """Train one model that holds every pattern of mixers, and print the Pareto front of their loss and cost.

    RUN/front/N.toml is the recipe of its N-th point, for `isotach train`. Ctrl-C or SIGTERM saves, and --resume goes on
    to the same front. The exit code is 0 at the end, 130 after Ctrl-C and 143 after SIGTERM.
    """
    import shlex
    import sys

    from isotach import config
    from isotach.search.recipe import SearchRecipe
    from isotach.search.run import search as start
    from isotach.train.progress import Bar

    def watch(generation: "Generation") -> None:
        print(
            f"limit {generation.limit:g}, generation {generation.number}/{resolved.search.generations}: "
            f"best {generation.best:.3f} of {generation.scored} patterns scored",
            file=sys.stderr,
        )

    resolved = config.load(SearchRecipe, recipe, overrides or ())
    folder = run or Path("runs") / recipe.stem
    found = start(resolved, folder, resume=resume, sinks=[Bar(resolved.train.steps)], watch=watch)
    name = shlex.quote(str(folder))
    if found.stopped is not None:
        print(
            f"Stopped by {found.stopped} and saved: {found.step} updates, {found.scored} patterns scored\n"
            f"Continue with: isotach search {name}/config.toml --run {name} --resume",
            file=sys.stderr,
        )
        return 128 + signal.Signals[found.stopped]
    _print(found, cost=resolved.search.cost, context=resolved.search.context)
    ranked = f", last two rankings agree by τ = {found.taus[-1]:.2f}" if found.taus else ""
    print(
        f"Done: {found.step} updates{ranked}, {found.scored} patterns scored: {folder / 'front.json'}", file=sys.stderr
    )
    print(f"Try: isotach train {name}/front/{len(found.front)}.toml --run {name}-trained", file=sys.stderr)
    return 0


def _print(found: "Found", *, cost: str, context: int) -> None:
    """The front, numbered as its recipes, and the uniform patterns below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", f"{cost} at {context:,}", "loss", "pattern")
    for number, point in enumerate(found.front, start=1):
        table.add_row(str(number), f"{point.cost:,.4g}", f"{point.loss:.4f}", _brief(point.pattern))
    table.add_section()
    for point in found.uniform:
        table.add_row("", f"{point.cost:,.4g}", f"{point.loss:.4f}", _brief(point.pattern))
    console = Console()
    Console(width=max(console.width, 110)).print(table)


def _brief(pattern: "Pattern") -> str:
    """'softmax 3×lightning': runs of the same mixer, first layer first."""
    import itertools

    runs = [(name, len(list(same))) for name, same in itertools.groupby(pattern)]
    return " ".join(name if count == 1 else f"{count}×{name}" for name, count in runs)
