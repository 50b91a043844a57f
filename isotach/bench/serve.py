"""What serving costs: resuming, waiting, many at once, HTTP itself, and memory over thousands of requests.

Servers are processes of their own (`isotach serve` on untrained weights, for speed does not depend on what they are),
and clients speak HTTP to them, as anybody would. `alone` and `beside` are times to the first token of a short request
by itself, and while a long prompt is read; `bare` is a step of the model with the draw, without a server.
"""

import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch

from isotach.bench.report import Figure, Result, interleave, milliseconds, paired
from isotach.config import parse
from isotach.data.tokenizer import ByteTokenizer
from isotach.infer.answer import Answer
from isotach.infer.batch import Batch
from isotach.infer.calls import read
from isotach.infer.chain import TokenChain
from isotach.infer.sample import Sampling
from isotach.infer.snapshot import Past
from isotach.models.decoder import Decoder, ModelConfig
from isotach.train.checkpoint import TRAINING, seal

PRESETS = ("tnl-44m",)
SHORT = (1, 16, 128)  # tokens of short prompts
STREAMS = 32
PATIENCE = 170.0  # seconds that reading the long prompt may take before it is told from a part of it
BYTES = ByteTokenizer()
LETTERS = range(97, 123)
# Every token a letter, so that every token is a line of a stream.
PLAIN = {str(token): -100 for token in range(BYTES.vocab_size) if token not in LETTERS}
# The model of the soak: what is left of a server when the model costs nothing.
TOY = {"vocab": BYTES.vocab_size, "width": 32, "depth": 2, "heads": 2, "hidden": 32}


def measure(
    *,
    device: torch.device,
    presets: Sequence[str] = PRESETS,
    context: int = 100_000,
    rounds: int = 8,
    tokens: int = 48,
    warm: int = 1_500,
    requests: int = 10_000,
    seconds: float = 300.0,
) -> Result:
    """Untrained presets, one server each, and the soak of a toy: under ten minutes on two idle cores.

    - context: tokens of the long prompt; tokens: of an answer.
    - warm, requests, seconds: of the soak, before memory is looked at and from then on, and how long that may take.
    """
    settings = {"presets": list(presets), "context": context, "tokens": tokens, "warm": warm, "requests": requests}
    result = Result(settings | {"device": str(device)})
    for name in presets:
        decoder = Decoder(parse(ModelConfig, {"preset": name}, who="bench"))
        with served(decoder, device=device) as server:
            decoder = decoder.to(device)
            visit = _Visit(name, server, result, rounds)
            _overhead(visit, decoder, tokens)
            _together(visit, tokens)
            _conversation(visit)
            _beside(visit, context)
            _resume(visit, decoder, context)
    result.rows += (found := soak(warm=warm, requests=requests, seconds=seconds)).rows
    result.figures += found.figures
    return result


@dataclass
class Server:
    """A server that listens: its port, and its process."""

    port: int
    process: int

    def ask(self, path: str, body: dict[str, Any] | None = None, *, method: str = "POST") -> Any:
        """The JSON of an answer, which must be a good one."""
        with closing(self.connect()) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            found = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"bench: {path} was answered {response.status}: {found}")
        return found

    def lines(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        """The lines of a stream; leaving it closes the connection."""
        with closing(self.connect()) as connection:
            connection.request("POST", path, json.dumps({**body, "stream": True}))
            with connection.getresponse() as response:
                while line := response.readline():
                    yield line

    def first(self, body: dict[str, Any]) -> float:
        """Seconds to the first token of a completion."""
        began = time.perf_counter()
        lines = self.lines("/v1/completions", {**body, "max_tokens": 1})
        while not next(lines).startswith(b"data:"):
            pass
        spent = time.perf_counter() - began
        for _ in lines:  # to its end: the next one shall not find this one at work
            pass
        return spent

    def resident(self) -> int:
        """Bytes of memory that the process has."""
        pages = Path(f"/proc/{self.process}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * 4096

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)


@contextmanager
def served(decoder: Decoder, *options: str, device: torch.device) -> Iterator[Server]:
    """`isotach serve` on a checkpoint of the decoder with the bytes as its tokens, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="isotach-") as place:
        folder, log = Path(place, "model"), Path(place, "log")
        folder.mkdir()
        decoder.save(folder)
        BYTES.save(folder)
        (folder / TRAINING).write_text("{}", encoding="utf-8")
        seal(folder)
        code = "import sys; from isotach.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--device", device.type, *options]
        with (
            log.open("wb") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            try:
                assert process.stdout is not None
                address = re.search(r":(\d+)  ", process.stdout.readline())
                if address is None:
                    raise RuntimeError(f"bench: the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
                yield Server(int(address[1]), process.pid)
            finally:
                process.kill()


@dataclass
class _Visit:
    """What the parts of a visit to one server share."""

    name: str
    server: Server
    result: Result
    rounds: int
    random: Random = field(default_factory=lambda: Random(0))

    def prompt(self, length: int) -> list[int]:
        """One that was never there before."""
        return self.random.choices(LETTERS, k=length)

    def row(self, what: str, seconds: Sequence[float], **facts: Any) -> None:
        self.result.rows.append({"model": self.name, "what": what, **milliseconds(seconds), **facts})

    def figure(
        self, what: str, value: float | None, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        self.result.figures.append(Figure(f"{self.name}: {what}", value, at_least=at_least, at_most=at_most))


def _overhead(visit: _Visit, decoder: Decoder, tokens: int) -> None:
    """What a token takes over HTTP, streamed, beside what it takes the model."""
    body = {"prompt": visit.prompt(1), "ignore_eos": True, "logit_bias": PLAIN}
    bias = {int(token): float(value) for token, value in PLAIN.items()}
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, seed=0, logit_bias=bias)
    start = Past(decoder.initial(), TokenChain.empty(BYTES.vocab_size), LETTERS[0])
    seconds: dict[str, list[float]] = {"http": [], "bare": []}

    def keep(who: str, arrivals: Sequence[float]) -> None:
        """The median of a turn's tokens: a pause of the machine is nobody's overhead."""
        seconds[who].append(statistics.median(b - a for a, b in pairwise(arrivals)))

    def streamed() -> None:
        keep("http", [time.perf_counter() for _ in _tokens(visit.server, body, tokens)])

    def bare() -> None:
        batch = Batch(decoder, BYTES)
        batch.join(start, Answer(BYTES, sampling, LETTERS[0]))
        arrivals = []
        while len(batch):
            batch.step()
            arrivals.append(time.perf_counter())
        keep("bare", arrivals)

    interleave({"http": streamed, "bare": bare}, rounds=2 * visit.rounds, device=decoder.device)
    http_s, bare_s = seconds["http"][1:], seconds["bare"][1:]
    visit.row("a token, bare", bare_s)
    visit.row("a token, over HTTP", http_s)
    visit.figure("ms per token over HTTP over a bare step", paired(http_s, bare_s), at_most=1.1)


def _tokens(server: Server, body: dict[str, Any], count: int) -> Iterator[bytes]:
    """The lines of a stream that hold a token."""
    lines = server.lines("/v1/completions", {**body, "max_tokens": count})
    return (line for line in lines if line.startswith(b"data: {"))


def _together(visit: _Visit, tokens: int) -> None:
    """Tokens per second of many streams over one's."""
    speeds: dict[int, list[float]] = {1: [], STREAMS: []}

    def write(count: int) -> Callable[[], None]:
        def one(prompt: list[int]) -> None:
            body = {"prompt": prompt, "ignore_eos": True, "logit_bias": PLAIN}
            assert sum(1 for _ in _tokens(visit.server, body, tokens)) == tokens

        def all_() -> None:
            prompts = [visit.prompt(16) for _ in range(count)]
            began = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(one, prompts))
            speeds[count].append(count * tokens / (time.perf_counter() - began))

        return all_

    turns = max(2, visit.rounds // 3)
    interleave({count: write(count) for count in speeds}, rounds=turns, device=torch.device("cpu"))
    for count, found in speeds.items():
        visit.row(
            f"streams: {count}", [1 / speed for speed in found[1:]], tokens_per_second=statistics.median(found[1:])
        )
    ratio = paired(speeds[STREAMS][1:], speeds[1][1:])
    visit.figure(f"tokens per second of {STREAMS} streams over one", ratio, at_least=4.0)


def _conversation(visit: _Visit, turns: int = 5) -> None:
    """Which part of the earlier turns is skipped when a conversation is told again from its beginning, and edited."""
    talk: list[dict[str, str]] = []
    shares, ends = [], [0]
    known = 0
    for turn in range(turns):
        talk.append({"role": "user", "content": f"{turn} " + bytes(visit.prompt(60)).decode()})
        body = {"messages": talk, "max_tokens": 24, "seed": turn, "ignore_eos": True, "logit_bias": PLAIN}
        answer = visit.server.ask("/v1/chat/completions", {**body, "store": True})
        usage, (choice,) = answer["usage"], answer["choices"]
        if turn:
            shares.append(usage["prompt_tokens_details"]["cached_tokens"] / known)
        known = usage["total_tokens"] - 1  # of an answer the last token is not read until something follows
        detail = visit.server.ask(f"/v1/states/{choice['state']['id']}", method="GET")
        ends = [0, *(message["end"] for message in detail["messages"])]
        talk.append(choice["message"])
    visit.figure("share of earlier turns that is skipped", min(1.0, *shares), at_least=1.0)
    edits = []
    for place in range(2, 2 * turns, 2):
        edited = [*talk[:place], {"role": "user", "content": f"Edited {place}"}]
        usage = visit.server.ask("/v1/chat/completions", {"messages": edited, "max_tokens": 1})["usage"]
        edits.append(usage["prompt_tokens_details"]["cached_tokens"] / (ends[place] - 1))
    visit.figure("share of what is before an edited message that is skipped", min(1.0, *edits), at_least=1.0)


def _beside(visit: _Visit, context: int) -> None:
    """Time to the first token of short requests, alone and while a long prompt is read."""

    def times() -> dict[int, list[float]]:
        found: dict[int, list[float]] = {length: [] for length in SHORT}
        for turn in range(visit.rounds + 1):
            for length in SHORT:
                spent = visit.server.first({"prompt": visit.prompt(length), "ignore_eos": True})
                found[length] += [spent] if turn else []
        return found

    alone = times()
    reading, left = threading.Event(), threading.Event()

    def long() -> None:
        for line in visit.server.lines("/v1/completions", {"prompt": visit.prompt(context), "max_tokens": 1}):
            reading.set()
            if left.is_set() or line.startswith(b"data:"):
                break

    thread = threading.Thread(target=long)
    thread.start()
    reading.wait(60)  # it says how far it is
    beside = times()
    over = not thread.is_alive()
    left.set()
    thread.join()
    if over:
        told = "the long prompt was read before the short ones were timed beside it; take a longer one"
        visit.result.absent.append(f"{visit.name}: {told}")
    for length in SHORT:
        visit.row(f"first token of {length}, alone", alone[length])
        ratio = None
        if not over:
            visit.row(f"first token of {length}, beside", beside[length])
            ratio = statistics.median(beside[length]) / statistics.median(alone[length])
        what = f"first token of a {length}-token prompt beside {context:,} tokens being read, over alone"
        visit.figure(what, ratio, at_most=2.0)


def _resume(visit: _Visit, decoder: Decoder, context: int) -> None:
    """The first token behind a long conversation's state from disk, beside reading it again."""
    prompt = visit.prompt(context)
    part = min(context, 4096)
    began = time.perf_counter()
    _read(decoder, prompt[:part])
    estimate = (time.perf_counter() - began) * context / part
    measured = estimate <= PATIENCE
    began = time.perf_counter()
    stored = visit.server.ask("/v1/states", {"prompt": prompt if measured else prompt[:part]})
    spent = time.perf_counter() - began
    again = spent if measured else spent * context / part
    first = [visit.server.first({"prompt": [LETTERS[0]], "state": stored["id"]}) for _ in range(visit.rounds + 2)][2:]
    state_bytes = decoder.state_bytes(context if measured else part)
    facts = {"tokens": context, "reading_again_s": again, "reading": "measured" if measured else f"from {part}"}
    visit.row("first token behind a state", first, **facts, file_bytes=stored["bytes"], state_bytes=state_bytes)
    middle = statistics.median(first)
    how = "" if measured else f", told from {part:,} tokens"
    visit.figure(f"ms to the first token behind a state of {context:,} tokens", 1e3 * middle, at_most=100.0)
    visit.figure(f"reading it again over that{how}", again / middle, at_least=200.0)
    visit.figure("bytes of its file beside those of the state", stored["bytes"] - state_bytes, at_most=65_536.0)


def _read(decoder: Decoder, ids: Sequence[int]) -> None:
    state = None
    for start in range(0, len(ids), 512):
        _, state = read(decoder, ids[start : start + 512], state)


# ---- memory over thousands of requests


def soak(*, warm: int, requests: int, seconds: float = float("inf"), clients: int = 8) -> Result:
    """Memory of a server from its `warm`-th request on: answers, streams, states and sessions, of which many are left.

    Its caches are so small that they are full long before, so what grows is what is never given back. After so many
    seconds no more is asked for.
    """
    result = Result({"warm": warm, "requests": requests, "clients": clients})
    decoder = Decoder(parse(ModelConfig, TOY, who="bench"))
    options = ("--memory", "0.005", "--disk", "0.01", "--name", "toy")
    with served(decoder, *options, device=torch.device("cpu")) as server, ThreadPoolExecutor(clients) as pool:
        step, done, visit = max(1, requests // 50), 0, _Soaker(server).visit
        list(pool.map(visit, range(warm)))
        sizes, began, spent = [server.resident()], time.perf_counter(), 0.0
        while done < requests and spent < seconds:
            stop = min(done + step, requests)
            list(pool.map(visit, range(warm + done, warm + stop)))
            sizes.append(server.resident())
            done, spent = stop, time.perf_counter() - began
        server.ask("/health", method="GET")
    result.rows.append(
        {
            "model": "toy",
            "what": "soak",
            "ms": 1e3 * spent / done,
            "requests": done,
            "mib_before": sizes[0] / 2**20,
            "mib_after": sizes[-1] / 2**20,
            "mib": [round(size / 2**20, 1) for size in sizes],
        }
    )
    growth = sizes[-1] / sizes[0]
    result.figures.append(Figure(f"memory of a server after {done:,} requests over before", growth, at_most=1.02))
    return result


@dataclass
class _Soaker:
    """One client; what its n-th request is, is a function of n."""

    server: Server

    def visit(self, number: int) -> None:
        random = Random(number)
        text = bytes(random.choices(LETTERS, k=random.randint(1, 300))).decode()
        kind = random.random()
        body: dict[str, Any] = {"max_tokens": random.randint(1, 24), "seed": number}
        chat = {**body, "messages": [{"role": "user", "content": text}]}
        if kind < 0.4:
            self.server.ask("/v1/chat/completions", chat)
        elif kind < 0.55:
            for _ in self.server.lines("/v1/chat/completions", chat):
                pass
        elif kind < 0.75:
            self._leave(chat | {"stream": True, "max_tokens": 10_000}, lines=random.randint(0, 5))
        elif kind < 0.85:
            self._leave(chat | {"max_tokens": 10_000}, lines=0)
        elif kind < 0.95:
            state = self.server.ask("/v1/chat/completions", {**chat, "store": True})["choices"][0]["state"]
            self.server.ask("/v1/completions", {**body, "prompt": text, "state": state["id"]})
            self.server.ask(f"/v1/states/{state['id']}", method="DELETE")
        else:
            self._refusable(chat | {"session_id": f"session-{number % 50}"})

    def _leave(self, body: dict[str, Any], *, lines: int) -> None:
        """Ask, take in so many lines of the answer, and be gone."""
        with closing(self.server.connect()) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            if lines:
                response = connection.getresponse()
                for _ in range(lines):
                    response.readline()

    def _refusable(self, body: dict[str, Any]) -> None:
        """A session may be somebody else's just now."""
        with suppress(RuntimeError):
            self.server.ask("/v1/chat/completions", body)
