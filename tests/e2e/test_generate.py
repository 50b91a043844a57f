"""Generation end to end: a batch equals its rows alone, a continued session equals one that never stopped, and the
command line does both."""

import io
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pytest
import torch

from isotach import cli
from isotach.data.tokenizer import ByteTokenizer, train_bpe
from isotach.errors import UserError
from isotach.infer.answer import Event
from isotach.infer.batch import generate_batch
from isotach.infer.generate import Session
from isotach.infer.open import open_checkpoint
from isotach.infer.sample import Sampling
from isotach.models.decoder import Decoder, ModelConfig
from isotach.serve.ticket import Ticket
from isotach.train.checkpoint import seal, step_folder

BYTES = ByteTokenizer()
PATTERNS = [("lightning",), ("softmax",), ("lightning", "softmax")]
TEXT = "One idea: a layer's memory is a monoid acting on a state. Ein Gedanke, naïve – über Zustände."
PROMPTS = ["M", TEXT, "ab" * 60, "q", "The state of a conversation", TEXT[:17]]
SAMPLINGS = [
    Sampling(seed=1, max_tokens=12),
    Sampling(seed=2, max_tokens=30, temperature=0.7, top_k=20, logprobs=3),
    Sampling(seed=3, max_tokens=18, top_p=0.8, repetition_penalty=1.3),
    Sampling(temperature=0.0, max_tokens=25, logprobs=0, seed=0),
    Sampling(seed=2**62, max_tokens=1),
    Sampling(seed=5, max_tokens=30, min_p=0.05, stop=("e", "an"), temperature=1.5),
]


def model(pattern: tuple[str, ...], *, seed: int = 0, dtype: torch.dtype = torch.float64, vocab: int = 257) -> Decoder:
    """A tiny decoder whose untrained logits depend on what it has read by several nats, not by hundredths."""
    decoder = Decoder(ModelConfig(vocab=vocab, width=32, depth=2, heads=2, hidden=48, pattern=pattern), seed=seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(10)
    return decoder.to(dtype)


@pytest.fixture(scope="module", params=PATTERNS, ids="+".join)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return model(request.param)


def started(decoder: Decoder, prompt: str = TEXT, **settings: int) -> Session:
    session = Session(decoder, BYTES)
    session.read(prompt, **settings)
    return session


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events]


def alone(decoder: Decoder, prompt: str, sampling: Sampling) -> list[Event]:
    return list(started(decoder, prompt).generate(sampling))


def batch(decoder: Decoder, prompts: list[str], samplings: list[Sampling], **settings: int) -> list[list[Event]]:
    answers: list[list[Event]] = [[] for _ in prompts]
    for row, event in generate_batch(decoder, BYTES, prompts, samplings, **settings):
        answers[row].append(event)
    return answers


def test_the_tiny_model_reads_its_context(decoder: Decoder) -> None:
    """Otherwise nothing below could fail."""
    first, second = (alone(decoder, prompt, SAMPLINGS[1])[0].logprob for prompt in (TEXT, "X" + TEXT[1:]))
    assert abs(first - second) > 0.01
    assert len(set(tokens(alone(decoder, TEXT, SAMPLINGS[0])))) > 5


@pytest.mark.parametrize("chunk", [50, 2048])
def test_a_batch_equals_its_rows_alone(decoder: Decoder, chunk: int) -> None:
    for got, prompt, sampling in zip(batch(decoder, PROMPTS, SAMPLINGS, chunk=chunk), PROMPTS, SAMPLINGS, strict=True):
        expected = alone(decoder, prompt, sampling)
        assert tokens(got) == tokens(expected)
        assert [(event.text, event.finish) for event in got] == [(event.text, event.finish) for event in expected]
        assert [event.finish for event in got[:-1]] == [None] * (len(got) - 1)


@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
def test_in_single_precision_a_batch_equals_its_rows_to_rounding(pattern: tuple[str, ...]) -> None:
    decoder = model(pattern, dtype=torch.float32)
    samplings = [sampling.model_copy(update={"logprobs": 5}) for sampling in SAMPLINGS]
    for got, prompt, sampling in zip(batch(decoder, PROMPTS, samplings), PROMPTS, samplings, strict=True):
        for one, other in zip(got, alone(decoder, prompt, sampling), strict=True):
            assert [logprob for _, logprob in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)
            assert one.token == other.token  # no draw here falls within rounding of a boundary


def test_the_size_of_prefill_chunks_changes_nothing(decoder: Decoder) -> None:
    sampling = Sampling(seed=4, max_tokens=20, logprobs=0)
    expected = list(started(decoder).generate(sampling))
    for chunk in (1, 2, 7, 64, len(BYTES.encode(TEXT)), 1000):
        got = list(started(decoder, chunk=chunk).generate(sampling))
        assert tokens(got) == tokens(expected)
        assert [event.logprob for event in got] == pytest.approx([event.logprob for event in expected], abs=1e-9)


def test_text_ids_and_pieces_are_read_alike(decoder: Decoder) -> None:
    ids = BYTES.encode(TEXT)
    whole = started(decoder)
    pieces = Session(decoder, BYTES)
    pieces.read(iter([ids[:10], np.empty(0, np.int32), ids[10:11], ids[11:]]), chunk=16)
    several = Session(decoder, BYTES)
    for part in (ids[:1].tolist(), [], ids[1:40], TEXT.encode()[40:].decode()):
        several.read(part)
    for session in (pieces, several):
        assert session.past.chain.digest == whole.past.chain.digest
        assert [*session.tokens, session.past.unread] == ids.tolist()
        assert len(session) == len(ids)
        assert tokens(list(session.generate(SAMPLINGS[0]))) == tokens(alone(decoder, TEXT, SAMPLINGS[0]))


class Calls(NamedTuple):
    """Tokens that each call read, and rows that each call made logits for."""

    hidden: list[int]
    head: list[int]


@pytest.fixture
def calls(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls([], [])
    hidden, head = decoder.hidden, decoder.head

    def counted_hidden(ids: torch.Tensor, state: Any = None, *, span: Any = None) -> Any:
        seen.hidden.append(ids.numel())
        return hidden(ids, state, span=span)

    def counted_head(x: torch.Tensor) -> torch.Tensor:
        seen.head.append(x.shape[:-1].numel())
        return head(x)

    monkeypatch.setattr(decoder, "hidden", counted_hidden)
    monkeypatch.setattr(decoder, "head", counted_head)
    return seen


def test_no_call_is_larger_than_a_chunk_and_nothing_is_read_twice(decoder: Decoder, calls: Calls) -> None:
    session = Session(decoder, BYTES, keep_tokens=False)
    session.read(iter(["abcdefghij" * 30] * 4), chunk=64)
    assert max(calls.hidden) <= 64
    assert sum(calls.hidden) == 1199  # the last token stays unread
    assert calls.head == []
    calls.hidden.clear()
    list(session.generate(Sampling(seed=0, max_tokens=5)))
    assert calls == Calls([1] * 5, [1] * 5)
    calls.hidden.clear()
    calls.head.clear()
    batch(decoder, [TEXT, "abc" * 100, "d", "e" * 60], [Sampling(seed=0, max_tokens=1)] * 4, chunk=64)
    assert max(calls.hidden) <= 64
    assert sum(calls.head) == 4


def test_logprobs_are_those_of_one_forward_pass(decoder: Decoder) -> None:
    events = alone(decoder, TEXT, SAMPLINGS[1])
    ids = torch.tensor([[*BYTES.encode(TEXT).tolist(), *tokens(events)]])
    with torch.no_grad():
        logprobs = decoder(ids)[0][0].log_softmax(-1)
    start = len(BYTES.encode(TEXT))
    for n, event in enumerate(events):
        row = logprobs[start + n - 1]
        assert event.logprob == pytest.approx(row[event.token].item(), abs=1e-9)
        assert [logprob for _, logprob in event.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-9)


def test_stop_strings_end_the_text_and_are_neither_shown_nor_remembered(decoder: Decoder) -> None:
    free = alone(decoder, TEXT, Sampling(seed=6, max_tokens=60))
    text = "".join(event.text for event in free)
    stop = next(text[i : i + 3] for i in range(10, len(text)) if text[i : i + 3].isprintable())
    session = started(decoder)
    shown, events = "", []
    for event in session.generate(Sampling(seed=6, max_tokens=60, stop=("never written", stop))):
        shown += event.text
        events.append(event)
        assert shown == text[: len(shown)]
        assert not any(shown.endswith(stop[:n]) for n in (1, 2, 3)) or event.finish == "stop"
    assert (shown, events[-1].finish) == (text[: text.index(stop)], "stop")
    assert tokens(events) == tokens(free)[: len(events)]
    assert len(session) < len(BYTES.encode(TEXT)) + len(events)
    again = Session(decoder, BYTES)
    again.read([*session.tokens, session.past.unread])
    sampling = Sampling(seed=8, max_tokens=10)
    assert tokens(list(session.generate(sampling))) == tokens(list(again.generate(sampling)))


def test_the_end_of_text_token_ends_the_text_and_is_not_remembered(decoder: Decoder) -> None:
    sampling = next(
        sampling
        for sampling in (Sampling(seed=seed, temperature=3.0, max_tokens=40) for seed in range(200))
        if alone(decoder, TEXT, sampling)[-1].finish == "eos"
    )
    session = started(decoder)
    events = list(session.generate(sampling))
    assert events[-1].token == BYTES.eos
    assert BYTES.eos not in [*session.tokens, session.past.unread]
    assert tokens(list(session.generate(sampling))) == [BYTES.eos]  # the same position, seed and logits
    (row,) = batch(decoder, [TEXT], [sampling])
    assert tokens(row) == tokens(events)


def test_a_session_is_up_to_date_at_every_event(decoder: Decoder) -> None:
    sampling = Sampling(seed=9, max_tokens=40, temperature=0.5)
    expected = tokens(list(started(decoder).generate(sampling)))
    session = started(decoder)
    for event in session.generate(sampling):
        assert not torch.is_inference_mode_enabled()
        if len(session) >= len(BYTES.encode(TEXT)) + 7 and event.finish is None:
            break  # and abandon the rest
    shown = len(session) - len(BYTES.encode(TEXT))
    assert shown >= 7
    assert tokens(list(session.generate(sampling)))[: 40 - shown] == expected[shown:]


def test_a_fork_is_independent(decoder: Decoder) -> None:
    sampling = Sampling(seed=10, max_tokens=15)
    session = started(decoder)
    fork = session.fork()
    expected = tokens(list(session.generate(sampling)))
    fork.read("something else")
    list(fork.generate(sampling))
    assert tokens(list(started(decoder).generate(sampling))) == expected
    third = started(decoder)
    children = [third.fork() for _ in range(2)]
    assert all(tokens(list(child.generate(sampling))) == expected for child in children)
    assert len(third) == len(BYTES.encode(TEXT))


def test_bad_requests_are_refused_in_one_sentence(decoder: Decoder) -> None:
    session = Session(decoder, BYTES)
    with pytest.raises(UserError, match="at least one token"):
        session.generate(Sampling())
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        generate_batch(decoder, BYTES, ["a", ""], [Sampling()] * 2)
    with pytest.raises(UserError, match="one sampling per prompt"):
        generate_batch(decoder, BYTES, ["a"], [])
    for ids in ([257], [-1], [0.5], [[1, 2]]):
        with pytest.raises(UserError, match="ids from 0 to 256"):
            session.read(ids)
    session.read("a")
    with pytest.raises(UserError, match="257 alternatives"):
        session.generate(Sampling(logprobs=258))
    with pytest.raises(UserError, match="model was trained with"):
        Session(decoder, train_bpe(["some text to learn from " * 9], 270))
    assert list(generate_batch(decoder, BYTES, [], [])) == []


def test_a_saved_session_goes_on_as_if_it_had_never_stopped(decoder: Decoder, tmp_path: Path, calls: Calls) -> None:
    settings = {"seed": 11, "logprobs": 2, "repetition_penalty": 1.2}
    session = started(decoder)
    begun = list(session.generate(Sampling(max_tokens=9, **settings)))
    session.save(tmp_path / "state")
    expected = list(session.generate(Sampling(max_tokens=14, **settings)))
    calls.hidden.clear()
    loaded = Session.load(tmp_path / "state", decoder, BYTES)
    assert list(loaded.generate(Sampling(max_tokens=14, **settings))) == expected  # log-probabilities to the last bit
    assert (
        sum(calls.hidden) == 14 + 1
    )  # one token makes the template that load compares with, and nothing is read again
    uninterrupted = alone(decoder, TEXT, Sampling(max_tokens=23, **settings))
    assert tokens(begun + expected) == tokens(uninterrupted)
    assert loaded.past is not None
    assert session.past is not None
    assert loaded.past.chain.digest == session.past.chain.digest
    assert loaded.past.unread == session.past.unread
    loaded.read(" and then")
    assert len(loaded) == len(session) + len(" and then")


def test_a_saved_linear_session_has_the_size_of_its_state(tmp_path: Path) -> None:
    session = started(model(("lightning",)), "a")
    sizes = []
    for _ in range(3):
        session.read("some more text " * 30)
        session.save(tmp_path / "state")
        sizes.append(((tmp_path / "state").stat().st_size, session.nbytes()))
    assert len({nbytes for _, nbytes in sizes}) == 1
    assert max(size for size, _ in sizes) - min(size for size, _ in sizes) <= 16  # digits of the positions


def test_a_state_of_something_else_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(UserError, match="at least two tokens"):
        started(decoder, "a").save(path)
    with pytest.raises(UserError, match="found none"):
        Session.load(path, decoder, BYTES)
    session = started(decoder)
    session.save(path)
    whole = path.read_bytes()
    pattern = decoder.config.pattern
    with pytest.raises(UserError, match="model that made it"):
        Session.load(path, model(pattern, seed=1), BYTES)
    with pytest.raises(UserError, match="another; use the one it began with"):
        Session.load(path, decoder, train_bpe(["aaaa"], 257))
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="whole safetensors file"):
        Session.load(path, decoder, BYTES)
    path.write_bytes(b"not a state at all")
    with pytest.raises(UserError, match="whole safetensors file"):
        Session.load(path, decoder, BYTES)
    assert session.past is not None
    assert session.past.state is not None
    session.past.state.save(path, weights=decoder.fingerprint(), tokens=session.past.chain.digest.hex())
    with pytest.raises(UserError, match="got a bare one"):
        Session.load(path, decoder, BYTES)
    with pytest.raises(UserError, match="expected a writable place"):
        session.save(path / "inside a file")


# ---- the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = step_folder(folder, 7)
    checkpoint.mkdir(parents=True)
    model(("lightning", "softmax"), dtype=torch.float32).save(checkpoint)
    BYTES.save(checkpoint)
    (checkpoint / "training.json").write_text(json.dumps({"step": 7}))
    seal(checkpoint)
    return folder


def isotach(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Output of one command that succeeds: standard output, standard error."""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


@contextmanager
def standard_input(file: TextIO) -> Iterator[None]:
    """Descriptor 0 reads `file`."""
    before = os.dup(0)
    os.dup2(file.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence on standard error of a command that is refused."""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err


def test_generate_prints_what_the_library_writes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, tokenizer = open_checkpoint(step_folder(run, 7))
    session = Session(decoder, tokenizer)
    session.read(TEXT)
    settings = {"seed": 3, "max_tokens": 20, "temperature": 0.7, "top_k": 30}
    expected = "".join(event.text for event in session.generate(Sampling(**settings)))
    options = [str(part) for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
    out, err = isotach(capsys, "generate", run, "-p", TEXT, *options)
    assert out == expected + "\n"
    assert "seed 3" in err
    assert f"state: {session.nbytes():,} bytes after {len(session):,} tokens" in err
    (run / "prompt.txt").write_text(TEXT[:40], encoding="utf-8")
    assert isotach(capsys, "generate", run, "--file", run / "prompt.txt", "-p", TEXT[40:], *options)[0] == out
    with (run / "prompt.txt").open() as file, standard_input(file):
        assert isotach(capsys, "generate", run, "--file", "-", "-p", TEXT[40:], *options)[0] == out


def test_generate_writes_a_batch_in_order_and_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-tokens", 15, "--seed", 5, "--json", "--logprobs", 2)
    several = ("generate", run, "-p", TEXT, "-p", "q", *options)
    together = [json.loads(line) for line in isotach(capsys, *several)[0].splitlines()]
    for prompt, record in zip((TEXT, "q"), together, strict=True):
        alone = json.loads(isotach(capsys, "generate", run, "-p", prompt, *options)[0])
        assert (alone["prompt"], alone["tokens"], alone["text"]) == (prompt, record["tokens"], record["text"])
        assert alone["logprobs"] == pytest.approx(record["logprobs"], abs=1e-4)
        assert [len(top) for top in record["top"]] == [2] * len(record["tokens"])
    out, _ = isotach(capsys, "generate", run, "-p", TEXT, "-p", "q", *options[:4])
    assert out == "".join(f"[{n}] {r['prompt']!r}\n{r['text']}\n" for n, r in enumerate(together, 1))
    lines, _ = isotach(capsys, "generate", run, "-p", "q", "--max-tokens", 4, "--seed", 5, "--logprobs", 2)
    assert len(lines.splitlines()) == 4


def test_generate_continues_a_saved_state(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "conversation"
    options = ("--seed", 8, "--json")
    whole = json.loads(isotach(capsys, "generate", run, "-p", TEXT, "--max-tokens", 25, *options)[0])
    first, _ = isotach(capsys, "generate", run, "-p", TEXT, "--max-tokens", 10, "--save-state", path, *options)
    second, err = isotach(capsys, "generate", run, "--state", path, "--max-tokens", 15, *options)
    assert "read 0 tokens" in err
    assert json.loads(first)["tokens"] + json.loads(second)["tokens"] == whole["tokens"]


def test_bad_commands_are_refused_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_bytes(b"")
    cases = {
        ("-p", "a", "--temperature", "-1"): "temperature",
        ("-p", "a", "--top-p", "2"): "top_p",
        (): "expected a text to continue",
        ("-p", ""): "at least one token",
        ("-p", "a", "-p", "b", "--state", "x"): "one by one",
        ("--file", tmp_path / "none"): "No such file",
        ("--file", tmp_path): "directory",
        ("--file", tmp_path / "binary"): "expected UTF-8 text",
        ("--file", tmp_path / "empty"): "at least one token",
        ("--state", tmp_path / "binary"): "safetensors",
        ("-p", "a", "--device", "abacus"): "got abacus",
        ("-p", "abc", "--max-tokens", "1", "--seed", "0", "--logprobs", "999"): "alternatives",
    }
    for arguments, reason in cases.items():
        assert reason in refused(capsys, "generate", run, *arguments)
    assert "found none" in refused(capsys, "generate", tmp_path / "nowhere", "-p", "a")
    assert "found no file" in refused(capsys, "chat", run, "--template", tmp_path / "none")


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: object
) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return isotach(capsys, "chat", *arguments)


def test_chat_remembers_saves_and_forgets(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (run, "--seed", 2, "--max-tokens", 12)
    path = tmp_path / "talk"
    whole, err = chat(capsys, monkeypatch, "hello\n\nhow are you?\n/quit\nnever read", *options)
    assert err.count("bytes]") == 2
    one, _ = chat(capsys, monkeypatch, f"hello\n/save {path}\n", *options)
    two, _ = chat(capsys, monkeypatch, "how are you?\n", *options, "--state", path)
    assert one + two == whole
    again, _ = chat(capsys, monkeypatch, f"something\n/reset\nhello\n/load {path}\nhow are you?\n", *options)
    assert again.endswith(whole)
    _, err = chat(capsys, monkeypatch, f"/help\n/nonsense\n/load {tmp_path}/none\n/save {path}\n", *options)
    for told in ("/reset", "/nonsense: no such command", "found none", "at least two tokens"):
        assert told in err


def test_ctrl_c_stops_the_answer_and_not_the_program(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate, answers = Ticket.__iter__, []

    def pressed(ticket: Ticket) -> Iterator[Event]:
        answers.append([])
        for event in iterate(ticket):
            answers[-1].append(event)
            if len(answers) == 1 and len(answers[0]) == 3:
                signal.raise_signal(signal.SIGINT)
            yield event

    monkeypatch.setattr(Ticket, "__iter__", pressed)
    _, err = chat(capsys, monkeypatch, "hello\nhow are you?\n", run, "--seed", 2, "--max-tokens", 300)
    assert 3 <= len(answers[0]) < 300
    assert answers[0][-1].finish is None
    assert answers[1][-1].finish is not None
    assert err.count("bytes]") == 2
