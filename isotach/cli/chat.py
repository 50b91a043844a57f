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
    from isotach.infer.generate import Session
    from isotach.infer.sample import Sampling

HERE = "{user}"
HELP = """/save PATH  write the conversation's state to a file
/load PATH  continue a conversation from a file
/reset      forget everything
/quit       leave; so does end of input
Ctrl-C      stops an answer"""


def chat(
    run: Run,
    template: Annotated[
        str,
        typer.Option(
            help=f"How a turn is written down; {HERE} is your line, \\n a new line. The answer ends where the model "
            f"itself begins the next turn. A template of just {HERE} lets the model continue what you write."
        ),
    ] = f"User: {HERE}\\nAssistant:",
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
    from isotach import config
    from isotach.errors import UserError
    from isotach.infer.generate import Session
    from isotach.infer.open import open_checkpoint
    from isotach.infer.sample import Sampling
    from isotach.train.checkpoint import resolve

    template = template.replace("\\n", "\n")
    if template.count(HERE) != 1:
        raise UserError(f"chat: template: expected {HERE} once, got {template!r}; mark where your line goes")
    cue = template.partition(HERE)[0].rstrip()
    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": [*(stop or ()), *([f"\n{cue}"] if cue else ())],
    }
    sampling = config.parse(Sampling, settings, who="chat").seeded()
    decoder, tokenizer = open_checkpoint(resolve(run), device=device)

    def begin(path: Path | None) -> Session:
        if path is None:
            return Session(decoder, tokenizer, keep_tokens=False)
        return Session.load(path, decoder, tokenizer)

    session = begin(state)
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
                    session = begin(None)
                case "/load", path if path:
                    session = begin(Path(path))
                case "/save", path if path:
                    session.save(Path(path))
                case _ if command.startswith("/"):
                    print(f"{command}: no such command, or a path is missing; /help lists them", file=sys.stderr)
                    continue
                case _:
                    _answer(session, template.replace(HERE, line), sampling)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        print(f"[{len(session):,} tokens, state {session.nbytes():,} bytes]", file=sys.stderr)


def _answer(session: "Session", turn: str, sampling: "Sampling") -> None:
    with _interrupted() as stopped:
        session.read(f"\n{turn}" if len(session) else turn)
        for event in session.generate(sampling):
            print(event.text, end="", flush=True)
            if stopped():
                break
    print()


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
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is only noted, so that an answer stops between two tokens and never half-way through one."""
    presses: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: presses.append(number))
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)
