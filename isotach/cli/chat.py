"""isotach chat RUN: talk with a model that remembers by state, not by reading everything again."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotach.cli.generate import Device, MaxTokens, MinP, RepetitionPenalty, Run, Seed, Stop, Temperature, TopK, TopP

if TYPE_CHECKING:
    from isotach.infer.sample import Sampling
    from isotach.infer.snapshot import Snapshot
    from isotach.serve.chat import Template
    from isotach.serve.engine import Engine

TURN = ("user", "assistant")  # what a past ends with
HELP = """/save PATH  write the conversation's state to a file
/load PATH  continue a conversation from a file
/reset      forget everything
/quit       leave; so does end of input
Ctrl-C      stops an answer"""


def chat(
    run: Run,
    template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja file that says how turns are written down. If left out: the model's own, as the server has it, "
            "or else User: and Assistant: on lines of their own; the answer then ends where the next turn begins."
        ),
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    state: Annotated[Path | None, typer.Option(help="Continue a conversation from a file.")] = None,
    device: Device = "auto",
) -> None:
    """Talk with a model, line by line; /help lists the commands. The state keeps its size however long you talk."""
    import torch

    from isotach import config
    from isotach.errors import UserError
    from isotach.infer.open import open_checkpoint
    from isotach.infer.sample import Sampling
    from isotach.serve.chat import Template
    from isotach.serve.engine import Engine
    from isotach.train.checkpoint import resolve

    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
    }
    sampling = config.parse(Sampling, settings, who="chat").seeded()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the engine alone computes
    checkpoint = resolve(run)
    decoder, tokenizer = open_checkpoint(checkpoint, device=device)
    turns = Template.load(checkpoint, tokenizer, file=template)
    sampling = sampling.model_copy(
        update={"stop": (*sampling.stop, *turns.stop), "stop_token_ids": turns.stop_token_ids}
    )
    with Engine(decoder, tokenizer, threads=threads) as engine:
        past = None if state is None else engine.load(state)
        print(f"seed {sampling.seed}; /help lists the commands", file=sys.stderr)
        while (line := _ask()) is not None:
            command, _, argument = line.strip().partition(" ")
            try:
                match command, argument.strip():
                    case "", "":
                        continue
                    case "/quit", "":
                        return
                    case "/help", "":
                        print(HELP, file=sys.stderr)
                        continue
                    case "/reset", "":
                        past = None
                    case "/load", path if path:
                        past = engine.load(Path(path))
                    case "/save", path if path:
                        _save(past, Path(path))
                    case _ if command.startswith("/"):
                        print(f"{command}: no such command, or a path is missing; /help lists them", file=sys.stderr)
                        continue
                    case _:
                        past = _answer(engine, turns, past, line, sampling)
            except UserError as error:
                print(error, file=sys.stderr)
                continue
            size = (0, 0) if past is None else (past.tokens, past.nbytes())
            print(f"[{size[0]:,} tokens, state {size[1]:,} bytes]", file=sys.stderr)


def _answer(
    engine: "Engine", turns: "Template", past: "Snapshot | None", line: str, sampling: "Sampling"
) -> "Snapshot":
    """Print the answer to a line; what is remembered then, up to where Ctrl-C stopped it."""
    from isotach.serve.engine import Request

    written = turns.write([{"role": "user", "content": line}], before=None if past is None else TURN)
    ticket = engine.submit(Request(written.tokens, sampling, state=past))
    with _on_interrupt(ticket.cancel):
        for event in ticket:
            print(event.text, end="", flush=True)
    print()
    return ticket.snapshot()


def _save(past: "Snapshot | None", path: Path) -> None:
    from isotach.errors import UserError

    if past is None:
        raise UserError(f"{path}: expected a conversation of at least two tokens to save, got none; say something")
    past.save(path)


def _ask() -> str | None:
    """The user's next line; None at the end of input."""
    if sys.stdin is None:  # closed by whoever started this
        return None
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/quit leaves", file=sys.stderr)


@contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C does this and nothing else: an answer stops between two tokens and never half-way through one."""
    previous = signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
