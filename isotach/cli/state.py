"""isotach state VERB: what a model remembers, as a file to keep, look into, copy, compare and check."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotach.cli.generate import Device, Run, pieces

if TYPE_CHECKING:
    from isotach.infer.generate import Session
    from isotach.infer.snapshot import SavedTokens
    from isotach.models.state import StateFile

CLOSE = 1e-4  # nats between log-probabilities of a kept state and of a fresh reading, in float32

State = Annotated[Path, typer.Argument(help="A file that `isotach state save` or `generate --save-state` wrote.")]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Text; several are read one after another.")]
File = Annotated[str | None, typer.Option(help="File whose text comes before -p; - is standard input.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

state = typer.Typer(help="Keep, inspect, fork, compare and verify states: what a model remembers of a text.")


@state.command()
def save(
    run: Run,
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    prompt: Prompt = None,
    file: File = None,
    start: Annotated[Path | None, typer.Option("--state", help="Read behind this state instead of nothing.")] = None,
    device: Device = "auto",
) -> None:
    """Read a text and write what the model remembers of it; generate, chat and this verb continue from there."""
    import sys
    import time

    from isotach.files import check_writable
    from isotach.infer.generate import Session
    from isotach.infer.open import open_checkpoint
    from isotach.train.checkpoint import resolve

    decoder, tokenizer = open_checkpoint(resolve(run), device=device)
    check_writable(path)
    session = Session(decoder, tokenizer, keep_tokens=False)
    if start is not None:
        session = Session.load(start, decoder, tokenizer)
    before, began = len(session), time.perf_counter()
    session.read(pieces(tokenizer, file, prompt or []))
    seconds = time.perf_counter() - began
    session.save(path)
    read = f"read {len(session) - before:,} tokens in {seconds:.2f} s"
    print(f"{read}; {path}: {path.stat().st_size:,} bytes after {len(session):,} tokens", file=sys.stderr)


@state.command()
def inspect(path: State, as_json: AsJson = False) -> None:
    """Say what a state stands for, and what is in it. Needs no model."""
    import json

    from isotach.models.state import StateFile

    file = StateFile.read(path)
    saved = _saved(file)
    known = {
        "tokens": saved.read + (saved.unread is not None),
        "chain": saved.chain,
        "unread": saved.unread,
        "model": file.weights,
        "tokenizer": saved.tokenizer,
        "file_bytes": path.stat().st_size,
        "state_bytes": sum(leaf.nbytes for leaf in file.leaves.values()),
    }
    tensors = {name: (str(leaf.dtype).removeprefix("torch."), list(leaf.shape)) for name, leaf in file.leaves.items()}
    if as_json:
        print(json.dumps(known | {"tensors": tensors}, indent=1))
        return
    for key, value in known.items():
        print(f"{key.replace('_', ' '):<12} {value:,}" if isinstance(value, int) else f"{key:<12} {value}")
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (int(item[0].partition(".")[0]), item[0])):
        print(f"  {name:<24} {dtype:<8} {' × '.join(map(str, shape))}")


@state.command()
def fork(
    path: State, copies: Annotated[list[Path], typer.Argument(metavar="COPY...", help="Files that do not exist yet.")]
) -> None:
    """Verify a state and copy it, so that a conversation can go on in several ways."""
    from isotach.errors import UserError
    from isotach.files import write_atomically
    from isotach.models.state import StateFile

    StateFile.read(path)
    for copy in copies:
        if copy.exists():
            raise UserError(f"{copy}: expected a new name, got a file that is there; choose another")
    content = path.read_bytes()
    for copy in copies:
        write_atomically(copy, content)


@state.command()
def diff(first: State, second: State, as_json: AsJson = False) -> None:
    """Compare two states: model, tokens, and numbers. Exit code 1 where they differ."""
    import json

    import torch

    from isotach.models.state import StateFile

    a, b = StateFile.read(first), StateFile.read(second)
    mine, other = _saved(a), _saved(b)
    same = {
        "model": a.weights == b.weights,
        "tokenizer": mine.tokenizer == other.tokenizer,
        "tokens": (mine.chain, mine.read, mine.unread) == (other.chain, other.read, other.unread),
    }
    apart: dict[str, float | None] = {}
    for name in sorted({*a.leaves, *b.leaves}):
        x, y = a.leaves.get(name), b.leaves.get(name)
        if x is None or y is None or (x.shape, x.dtype) != (y.shape, y.dtype):
            apart[name] = None
        elif not torch.equal(x, y):
            x, y = x.double(), y.double()
            apart[name] = float((x - y).norm() / torch.maximum(x.norm(), y.norm()))
    if as_json:
        print(json.dumps({"same": same, "relative_difference": apart}, indent=1))
    else:
        for what, equal in same.items():
            print(f"{what:<12} {'same' if equal else 'different'}")
        print(f"{'numbers':<12} {f'{len(apart)} of {len(a.leaves)} tensors differ' if apart else 'same'}")
        for name, distance in apart.items():
            print(f"  {name:<24} {'of another shape' if distance is None else f'{distance:.1e} relative'}")
    if apart or not all(same.values()):
        raise typer.Exit(1)


@state.command()
def verify(
    path: State,
    run: Annotated[
        Path | None, typer.Option(help="Run or checkpoint folder of the model that it should be of.")
    ] = None,
    prompt: Prompt = None,
    file: File = None,
    device: Device = "auto",
) -> None:
    """Check that a state is whole and, with --run, of that model; with a text, that reading it again gives the same.

    Exit code 1 where the text is not what it has read, or gives other log-probabilities.
    """
    from isotach.errors import UserError
    from isotach.infer.generate import Session
    from isotach.infer.open import open_checkpoint
    from isotach.models.state import StateFile
    from isotach.train.checkpoint import resolve

    if run is None:
        if prompt or file:
            raise UserError("state verify: expected --run RUN beside a text, got none; name the model that reads it")
        saved = _saved(StateFile.read(path))
        print(f"{path}: whole, {saved.read + (saved.unread is not None):,} tokens")
        return
    decoder, tokenizer = open_checkpoint(resolve(run), device=device)
    kept = Session.load(path, decoder, tokenizer)
    print(f"{path}: whole, {len(kept):,} tokens, of this model")
    if not prompt and file is None:
        return
    fresh = Session(decoder, tokenizer, keep_tokens=False)
    fresh.read(pieces(tokenizer, file, prompt or []))
    if _identity(kept) != _identity(fresh):
        print(f"the text is another: {len(fresh):,} tokens")
        raise typer.Exit(1)
    distance = _distance(kept, fresh)
    print(f"a fresh reading gives log-probabilities within {distance:.1e} nats")
    if not distance <= CLOSE:
        raise typer.Exit(1)


def _saved(file: "StateFile") -> "SavedTokens":
    from isotach.infer.snapshot import SavedTokens

    return SavedTokens.of(file)


def _identity(session: "Session") -> tuple[object, ...]:
    past = session.past
    return () if past is None else (past.chain.digest, past.unread)


def _distance(kept: "Session", fresh: "Session") -> float:
    """Between the log-probabilities of the next token, at most, in nats."""
    from isotach.infer.calls import step

    logprobs = []
    for session in (kept, fresh):
        past = session.past
        assert past is not None
        assert past.unread is not None
        logprobs.append(step(session.decoder, [past.unread], past.state)[0].double().log_softmax(-1))
    return float((logprobs[0] - logprobs[1]).abs().max())
