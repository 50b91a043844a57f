"""A real server in a thread, over a tiny model with random weights."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch

from isotach.data.tokenizer import ByteTokenizer, Tokenizer
from isotach.infer import batch
from isotach.infer.batch import Batch
from isotach.models.decoder import Decoder, ModelConfig
from isotach.serve.chat import Template
from isotach.serve.engine import Engine
from isotach.serve.http import create_app
from isotach.serve.limits import Keys, Limits, server
from isotach.serve.service import Settings
from isotach.serve.states import StateStore

NAME = "tiny"
KEYS = {"anna": "a" * 32, "ben": "b" * 32}


def model(*, vocab: int = 257, seed: int = 0) -> Decoder:
    """In float64, and with logits that depend on the context by nats."""
    config = ModelConfig(vocab=vocab, width=16, depth=2, heads=2, hidden=16, pattern=("lightning", "softmax"))
    decoder = Decoder(config, seed=seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(10)
    return decoder.double()


@dataclass
class Served:
    url: str
    engine: Engine
    port: int

    def client(self, owner: str | None = None, **settings: Any) -> httpx.Client:
        headers = {} if owner is None else {"authorization": f"Bearer {KEYS[owner]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    decoder: Decoder | None = None,
    keys: bool = False,
    memory: int = 1 << 28,
    **limits: Any,
) -> Iterator[Served]:
    tokenizer = tokenizer or ByteTokenizer()
    decoder = decoder or model(vocab=tokenizer.vocab_size)
    bounds = Limits(**limits)
    engine = Engine(decoder, tokenizer, memory=memory, cache=folder / "cache", queue=bounds.queue)
    settings = Settings(
        name=NAME,
        template=Template(tokenizer),
        store=StateStore(folder / "states", engine.origin, tokenizer),
        keys=Keys(KEYS.items() if keys else ()),
        limits=bounds,
    )
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        running = server(create_app(engine, settings), limits=bounds)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield Served(f"http://127.0.0.1:{port}", engine, port)
        finally:
            running.should_exit = True
            thread.join(60)
            engine.close(drain=False)
            assert not thread.is_alive()


@contextlib.contextmanager
def slowly(seconds: float) -> Iterator[None]:
    """Every token takes so long."""
    step = Batch.step

    def slow(batch: Batch) -> Any:
        time.sleep(seconds)
        return step(batch)

    Batch.step = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        Batch.step = step  # type: ignore[method-assign]


@contextlib.contextmanager
def reading_slowly(seconds: float) -> Iterator[None]:
    """Every call that reads takes so long."""
    read = batch.read_packed

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return read(*args)

    batch.read_packed = slow  # type: ignore[assignment]
    try:
        yield
    finally:
        batch.read_packed = read  # type: ignore[assignment]


def settled(engine: Engine, *, seconds: float = 10.0) -> bool:
    """Whether the engine comes to rest."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = engine.stats()
        if stats.running + stats.reading + stats.waiting == 0:
            return True
        time.sleep(0.01)
    return False
