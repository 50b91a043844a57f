"""isotach serve RUN [LIMIT=VALUE ...]: OpenAI's API and a chat page over one model, with states that can be kept."""

import logging
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from isotach.cli.generate import Device, Run

if TYPE_CHECKING:
    from isotach.serve.limits import Keys, Limits

GIB = 1 << 30
HERE = frozenset({"localhost", "127.0.0.1", "::1"})


def _print_limits(asked: bool) -> None:
    if asked:
        from isotach import config
        from isotach.serve.limits import Limits

        print(config.dumps(Limits()), end="")
        raise typer.Exit


def serve(
    run: Run,
    limits: Annotated[
        list[str] | None,
        typer.Argument(metavar="LIMIT=VALUE", help="Such as rate=60, prompt=100000, timeout=600; all: --print-limits."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model, in the API; RUN's name if left out.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of lines OWNER KEY; requests then need one, and owners see their own.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Folder for states; RUN/serve if left out.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB for states in memory; half of what is free if left out.")
    ] = None,
    disk: Annotated[float, typer.Option(help="GiB for states that no longer fit into memory.")] = 16.0,
    log_text: Annotated[bool, typer.Option("--log-text", help="Write prompts and answers into the log.")] = False,
    device: Device = "auto",
    print_limits: Annotated[
        bool,
        typer.Option(
            "--print-limits", callback=_print_limits, is_eager=True, help="Print all limits as TOML and exit."
        ),
    ] = False,
) -> None:
    """Serve a model at http://HOST:PORT, with a page to chat on. Ctrl-C or SIGTERM lets requests finish and stops.

    The API is OpenAI's under /v1, and /v1/states to keep, fork, export and continue conversations. The log goes to
    standard error, one JSON object per line, without the text of prompts.
    """
    from isotach import config
    from isotach.errors import UserError
    from isotach.serve.limits import Keys, Limits

    settings: dict[str, object] = {}
    for limit in limits or ():
        if "=" not in limit:
            raise UserError(f"serve: expected LIMIT=VALUE, such as rate=60, got {limit}; see --print-limits")
        config.set_dotted(settings, limit)
    parsed = config.parse(Limits, settings, who="serve")
    owners = Keys() if keys is None else Keys.load(keys)
    place = Place(run, store, name, memory, disk, device)
    with _bound(host, port) as listener:
        if not owners and host not in HERE:
            print("No --keys: everybody who reaches this address can read every state", file=sys.stderr)
        _serve(place, parsed, owners, listener, hosts=None if owners or host not in HERE else HERE, log_text=log_text)


class Place(NamedTuple):
    """The model and where its states go, as the command line says it."""

    run: Path
    store: Path | None
    name: str | None
    memory: float | None
    disk: float
    device: str


def _serve(
    place: Place,
    limits: "Limits",
    keys: "Keys",
    listener: socket.socket,
    *,
    hosts: frozenset[str] | None,
    log_text: bool,
) -> None:
    import torch

    from isotach import allocator
    from isotach.infer.open import open_checkpoint
    from isotach.serve.chat import Template
    from isotach.serve.engine import Engine
    from isotach.serve.http import create_app
    from isotach.serve.limits import server
    from isotach.serve.service import Settings
    from isotach.serve.states import StateStore
    from isotach.train.checkpoint import FOLDER, resolve

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the engine alone computes
    allocator.share_arenas()
    checkpoint = resolve(place.run)
    home = next((path for path in (place.run, place.run.parent) if (path / FOLDER).is_dir()), checkpoint)
    decoder, tokenizer = open_checkpoint(checkpoint, device=place.device)
    template = Template.load(checkpoint, tokenizer)
    folder = place.store or home / "serve"
    engine = Engine(
        decoder,
        tokenizer,
        memory=None if place.memory is None else round(place.memory * GIB),
        cache=folder / "cache",
        disk=round(place.disk * GIB),
        queue=limits.queue,
        threads=threads,
    )
    try:
        settings = Settings(
            name=place.name or home.resolve().name,
            template=template,
            store=StateStore(folder / "states", engine.origin, tokenizer),
            keys=keys,
            limits=limits,
            hosts=hosts,
            log_text=log_text,
        )
        _log_to_stderr()
        host, port = listener.getsockname()[:2]
        told = f"{settings.name} at http://{f'[{host}]' if ':' in host else host}:{port}  (states: {folder})"
        running = server(create_app(engine, settings), limits=limits, started=partial(print, told, flush=True))
        # uvicorn raises the signal that stopped it once more, and this is a good end.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        running.run(sockets=[listener])
    finally:
        engine.close(drain=False)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has its address but does not listen yet: told now what would be told after loading the model."""
    from isotach.errors import UserError

    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        fault = f"got {host}:{port} ({error.strerror or error})"
        raise UserError(f"serve: expected a free address, {fault}; choose another --port or --host") from None


def _log_to_stderr() -> None:
    from isotach.serve.limits import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("isotach", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
