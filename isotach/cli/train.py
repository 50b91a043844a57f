"""isotach train RECIPE [KEY=VALUE ...]: train a model from a recipe."""

import signal
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file with the tables model, data and train.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as train.lr=3e-4.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and log; runs/NAME-OF-RECIPE if left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe and exit.")] = False,
) -> int:
    """Train a model. Ctrl-C or SIGTERM saves a checkpoint and exits; --resume continues to the bit.

    The exit code is 0 when all steps are done, 130 after Ctrl-C and 143 after SIGTERM, as shells and schedulers expect.
    """
    import shlex
    import sys

    from isotach import config
    from isotach.allocator import keep_blocks
    from isotach.train import loop
    from isotach.train.progress import Bar, describe
    from isotach.train.recipe import Recipe

    resolved = config.load(Recipe, recipe, overrides or ())
    if print_config:
        print(config.dumps(resolved), end="")
        return 0
    keep_blocks()
    folder = run or Path("runs") / recipe.stem
    summary = loop.train(resolved, folder, resume=resume, sinks=[Bar(resolved.train.steps)])
    say = f"step {summary.step}/{resolved.train.steps}, {summary.checkpoint}"
    name = shlex.quote(str(folder))
    if summary.stopped is not None:
        print(
            f"Stopped by {summary.stopped} and saved: {say}\n"
            f"Continue with: isotach train {name}/config.toml --run {name} --resume",
            file=sys.stderr,
        )
        return 128 + signal.Signals[summary.stopped]
    if not summary.last:
        print(f"Nothing left to do: {say}; raise train.steps to continue", file=sys.stderr)
        return 0
    valid = f", validation {describe(summary.last, prefix='valid_')}" if "valid_loss" in summary.last else ""
    print(f"Done: {say}: {describe(summary.last)}{valid}", file=sys.stderr)
    print(f"Try: isotach generate {name} -p 'Once upon a time'", file=sys.stderr)
    return 0
