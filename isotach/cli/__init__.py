"""The command line: one file in this folder is one verb, and the file name is its name.

A verb is a plain function called like its file, or a typer application with verbs of its own; it imports what is heavy
inside itself, so that every other verb and `--help` stay quick. Whatever the user can mend is one sentence on standard
error and exit code 2; anything else is a bug and keeps its traceback.
"""

import errno
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from isotach import __version__
from isotach.errors import UserError

# How often GNU OpenMP looks for more work before its threads sleep: for 0.3 ms, not 3. Between the operations of a step
# that is as good, and where other programs want the processors too, far better (docs/log.md).
WAITING = "30000"

# What the file system may answer, and what the user can do about it.
REMEDIES = {
    errno.EACCES: "check its permissions, or choose another place",
    errno.EEXIST: "choose another name",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "choose a place that takes larger files",
    errno.EISDIR: "name a file",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "free some space, or choose another place",
    errno.ENOTDIR: "check the path",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
}


def waiting() -> dict[str, str]:
    """The environment in which threads that wait for work soon sleep, unless the user has chosen; read with torch."""
    return {} if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & {*os.environ} else {"GOMP_SPINCOUNT": WAITING}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 when the verb's own check fails, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.update(waiting())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        result = app()(arguments or ["--help"], prog_name="isotach", standalone_mode=False)
    except UserError as error:
        return _refuse(str(error))
    except typer.TyperException as error:
        command = " ".join(["isotach", *(word for word in arguments[:1] if word in verbs())])
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        return _refuse(f"{command}: {message}{' See' if message.endswith('?') else '; see'} {command} --help")
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = error.filename if error.filename2 is None else error.filename2
        name = "isotach" if place is None else place or "''"
        return _refuse(f"{name}: {error.strerror}; {REMEDIES[error.errno]}")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return result if isinstance(result, int) else 0


def app() -> typer.Typer:
    """The typer application, with one command per verb."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.callback()(isotach)
    for verb in verbs():
        command = getattr(importlib.import_module(f"{__name__}.{verb}"), verb)
        if isinstance(command, typer.Typer):
            application.add_typer(command, name=verb)
        else:
            application.command(verb)(command)
    return application


def verbs() -> list[str]:
    """Names of the files in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"isotach {__version__}")
        raise typer.Exit


def isotach(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models whose time and memory per token do not grow with the context."""


def _refuse(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return 2
