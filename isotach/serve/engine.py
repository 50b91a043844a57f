"""Many conversations over one model: every request as if it were alone, all of them together.

The engine is a thread that owns the model (serve.rounds says what it does), and doors to it from every other thread.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch

from isotach.data.tokenizer import Tokenizer
from isotach.infer.answer import Event
from isotach.infer.generate import Prompt, check_vocabulary, encode
from isotach.infer.sample import Sampling
from isotach.infer.snapshot import KnownOrigin, Snapshot
from isotach.models.decoder import Decoder
from isotach.serve.prefix import PrefixCache
from isotach.serve.rounds import Job, Rounds, Stats
from isotach.serve.ticket import Full, Request, Ticket, Usage

__all__ = ["Engine", "Full", "Request", "Stats", "Ticket", "Usage"]

_log = logging.getLogger("isotach.serve")


class Engine:
    """Continuous batching. Everything here may be called from any thread.

        with Engine(decoder, tokenizer) as engine:
            for event in engine.generate("Once upon a time"):
                print(event.text, end="")

    - memory: bytes for the states of requests and of the cache; None for half of what is free.
    - cache: a folder for states that no longer fit into memory, and for all of them when the engine is closed; None
      drops them.
    - disk: bytes that this folder may take.
    - queue: requests that may wait before `submit` raises Full.
    - threads: of the processor that compute; None for as many as PyTorch has in the calling thread.

    Every thread that computes on several processors keeps threads of its own for that, and where these are more than
    processors, they sleep between two operations instead of waiting awake: a token then takes a quarter longer on two
    cores. So whoever wants speed calls `torch.set_num_threads(1)` before anything else, and names `threads` here.

    Until it is closed the decoder is the engine's alone, and its weights must stay as they are.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        memory: int | None = None,
        cache: Path | None = None,
        disk: int = 16 << 30,
        queue: int = 1024,
        threads: int | None = None,
    ) -> None:
        check_vocabulary(decoder, tokenizer)
        self.decoder, self.tokenizer, self.origin = decoder, tokenizer, KnownOrigin(decoder)
        self.weights = self.origin.fingerprint()
        self._cache = PrefixCache(self.origin, tokenizer, folder=cache, disk=disk)
        memory = _free_memory(decoder.device) // 2 if memory is None else memory
        self._rounds = Rounds(decoder, tokenizer, self.origin, cache=self._cache, memory=memory, news=self._news)
        self._queue = queue
        self._changed = threading.Condition()  # guards the rest
        self._arrived: list[Job] = []
        self._cancelled: set[Ticket] = set()
        self._closing = self._aborting = False
        self._thread = threading.Thread(
            target=self._work, args=(threads or torch.get_num_threads(),), name="isotach-engine", daemon=True
        )
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        """Take a request. UserError for one that can never be served, Full for one that cannot be taken now."""
        job = self._rounds.job(request, cancel=self._cancel)
        with self._changed:
            if not self.alive:
                raise Full("engine: it is closing and takes no more requests; try again later")
            waiting = self._rounds.waiting + len(self._arrived)
            if waiting >= self._queue:
                raise Full(f"engine: {waiting} requests are waiting already; try again later")
            self._arrived.append(job)
            self._rounds.hurry(len(job.ids))
            self._changed.notify_all()
        return job.ticket

    def generate(self, prompt: Prompt, sampling: Sampling | None = None, *, owner: str = "") -> Iterator[Event]:
        """Continue a text or ids; the request is cancelled when the iterator is closed."""
        ids = encode(self.tokenizer, prompt).tolist()
        return _until_closed(self.submit(Request(ids, sampling or Sampling(), owner=owner)))

    def load(self, path: Path) -> Snapshot:
        """A snapshot from a file, verified against the engine's model. UserError where it is of something else."""
        return Snapshot.load(path, self.origin, self.tokenizer)

    def stats(self) -> Stats:
        return self._rounds.stats()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; finish those that are there, or cancel them: at once, or after `timeout` seconds.

        Then the cache's states are put on disk. Calling it again does nothing.
        """
        self._stop(abort=not drain)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._stop(abort=True)
            self._thread.join()
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _stop(self, *, abort: bool) -> None:
        with self._changed:
            self._closing, self._aborting = True, self._aborting or abort
            if abort:
                self._rounds.hurry()
            self._changed.notify_all()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._cancelled.add(ticket)
            self._rounds.hurry()
            self._changed.notify_all()

    def _news(self) -> tuple[list[Job], set[Ticket]]:
        """What came since this was called last; asked for by the thread."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, set()
            if self._aborting:
                cancelled = {job.ticket for job in (*arrived, *self._rounds.jobs)}
            return arrived, cancelled

    def _work(self, threads: int) -> None:
        """The thread."""
        torch.set_num_threads(threads)
        try:
            while self._waited():
                self._rounds.round()
        except Exception:  # noqa: BLE001  a fault of the engine itself; nobody must wait for ever
            _log.exception("the engine has stopped")
        with self._changed:
            self._closing = True
            left = {*self._arrived, *self._rounds.jobs}
        for job in left:
            job.ticket.end(error=RuntimeError("engine: it has stopped; start it again"))

    def _waited(self) -> bool:
        """Wait for something to do; False where nothing comes any more."""
        with self._changed:
            while not (self._arrived or self._rounds.jobs or self._closing):
                self._cancelled.clear()  # of requests that had ended
                self._changed.wait()
            return bool(self._arrived or self._rounds.jobs)


def _until_closed(ticket: Ticket) -> Iterator[Event]:
    try:
        yield from ticket
    finally:
        ticket.cancel()


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where the states will be."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):  # where there is a /proc
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    with suppress(OSError, ValueError):  # in a container that is limited
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)
