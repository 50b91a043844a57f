"""isotach generate RUN -p TEXT: continue one text, or several at once."""

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from isotach.data.tokenizer import Tokenizer
    from isotach.infer.answer import Event
    from isotach.infer.sample import Sampling

PIECE = 1 << 20  # characters of a file in memory at once

Run = Annotated[Path, typer.Argument(help="Run folder (its newest checkpoint), RUN/best, or a checkpoint folder.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, 1 draws from the model as it is.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this probability together.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens at least this many times as probable as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, tokens that occurred become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Of the draws, the same for every prompt; fresh if left out.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]


def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Text; several make a batch.")] = None,
    file: Annotated[str | None, typer.Option(help="File whose text comes before -p; - is standard input.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Print tokens with their log-probability and this many alternatives.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Continue what --save-state wrote, without reading it.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Write the state after the last token to this file.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Continue a text. What is written goes to standard output as it comes, figures to standard error."""
    from isotach import config
    from isotach.errors import UserError
    from isotach.files import check_writable
    from isotach.infer.batch import generate_batch
    from isotach.infer.generate import Session
    from isotach.infer.open import open_checkpoint
    from isotach.infer.sample import Sampling
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
        "logprobs": logprobs,
    }
    sampling = config.parse(Sampling, settings, who="generate").seeded()
    prompts = prompt or []
    if not prompts and file is None and state is None:
        raise UserError("generate: expected a text to continue, got none; give -p TEXT, --file PATH or --state PATH")
    if len(prompts) > 1 and (file or state or save_state):
        raise UserError(
            f"generate: expected one -p beside --file, --state or --save-state, got {len(prompts)}; run them one by one"
        )
    decoder, tokenizer = open_checkpoint(resolve(run), device=device)
    if save_state is not None:
        check_writable(save_state)
    if len(prompts) > 1:
        events = generate_batch(decoder, tokenizer, prompts, [sampling] * len(prompts))
        _show(events, prompts, tokenizer, sampling, as_json=as_json)
        return
    session = (
        Session(decoder, tokenizer, keep_tokens=False) if state is None else Session.load(state, decoder, tokenizer)
    )
    before, began = len(session), time.perf_counter()
    try:
        session.read(pieces(tokenizer, file, prompts))
        read, seconds = len(session) - before, time.perf_counter() - began
        events = ((0, event) for event in session.generate(sampling))
        _show(events, prompts or [""], tokenizer, sampling, as_json=as_json)
    except (KeyboardInterrupt, BrokenPipeError):
        # A session is whole at any moment, and its past may have taken hours to read.
        if save_state is not None and len(session) > 1:
            session.save(save_state)
        raise
    speed = f"read {read:,} tokens in {seconds:.2f} s"
    print(f"{speed}; state: {session.nbytes():,} bytes after {len(session):,} tokens", file=sys.stderr)
    if save_state is not None:
        session.save(save_state)


def pieces(tokenizer: "Tokenizer", file: str | None, prompts: list[str]) -> Iterator[str]:
    """The text to read, a file in pieces where cutting it does not change its tokens: where every byte is one."""
    from isotach.data.tokenizer import ByteTokenizer
    from isotach.errors import UserError

    if file is not None:
        name = "standard input" if file == "-" else file
        if file == "-" and sys.stdin is None:
            raise UserError(f"{name}: expected text, found it closed; pipe a text into it")
        size = PIECE if isinstance(tokenizer, ByteTokenizer) else -1
        try:
            with open(0 if file == "-" else file, encoding="utf-8", newline="", closefd=file != "-") as stream:
                while piece := stream.read(size):
                    if "\0" in piece:
                        raise UserError(f"{name}: expected UTF-8 text, got a zero byte; convert it first")
                    yield piece
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: expected UTF-8 text, got other bytes ({error.reason}); convert it first"
            ) from None
    yield from prompts


def _show(
    events: "Iterable[tuple[int, Event]]",
    prompts: list[str],
    tokenizer: "Tokenizer",
    sampling: "Sampling",
    *,
    as_json: bool,
) -> None:
    """Print what is written for every prompt, and then how fast it was."""
    answers: list[list[Event]] = [[] for _ in prompts]
    began = time.perf_counter()
    for row, event in _in_order(events, len(prompts)):
        answers[row].append(event)
        if as_json:
            continue
        if len(prompts) > 1 and len(answers[row]) == 1:
            print(f"[{row + 1}] {prompts[row]!r}")
        text = event.text if sampling.logprobs is None else _line(event, tokenizer)
        print(text, end="\n" if event.finish else "", flush=True)
    seconds = time.perf_counter() - began
    if as_json:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(json.dumps(_record(prompt, answer, sampling), ensure_ascii=False))
    written = sum(map(len, answers))
    reasons = ", ".join(str(answer[-1].finish) for answer in answers)
    speed = f"wrote {written:,} tokens in {seconds:.2f} s ({written / seconds:,.0f}/s)"
    print(f"{speed}, seed {sampling.seed}, end: {reasons}", file=sys.stderr)


def _in_order(events: "Iterable[tuple[int, Event]]", rows: int) -> "Iterator[tuple[int, Event]]":
    """Row after row: the first as it comes, later ones held back until those before them are finished."""
    waiting: list[deque[Event]] = [deque() for _ in range(rows)]
    current = 0
    for row, event in events:
        waiting[row].append(event)
        while current < rows and waiting[current]:
            event = waiting[current].popleft()
            yield current, event
            current += event.finish is not None


def _line(event: "Event", tokenizer: "Tokenizer") -> str:
    """A token, its log-probability, and its alternatives."""
    top = "  ".join(f"{tokenizer.decode([token])!r} {logprob:.4f}" for token, logprob in event.top)
    return f"{event.logprob:9.4f}  {tokenizer.decode([event.token])!r:<12}{top}".rstrip() + (
        "" if event.finish else "\n"
    )


def _record(prompt: str, answer: "list[Event]", sampling: "Sampling") -> dict[str, Any]:
    record: dict[str, Any] = {
        "prompt": prompt,
        "text": "".join(event.text for event in answer),
        "tokens": [event.token for event in answer],
        "finish": answer[-1].finish,
        "seed": sampling.seed,
    }
    if sampling.logprobs is not None:
        record |= {"logprobs": [event.logprob for event in answer], "top": [event.top for event in answer]}
    return record
