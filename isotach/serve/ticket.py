"""What is asked of the engine, and how the answer comes back from its thread."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from isotach.errors import UserError
from isotach.infer.answer import Constraint, Event
from isotach.infer.sample import Drawn, Sampling
from isotach.infer.snapshot import Snapshot
from isotach.serve.prefix import Miss


class Full(Exception):
    """The engine takes no more requests now; its sentence can be shown. Try again later (503)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to read, and what to write behind it.

    - tokens: what to read, behind `state` if there is one.
    - sampling: how to write; None reads only, and ends without an event.
    - state: continue from it. It must be of the engine's weights and precision.
    - checkpoints: how many of `tokens` stand before each point (such as the end of a message) whose state is kept for
      later requests that begin with the same tokens. What stands between two of them is read by itself.
    - owner: whose the kept states are. They are never shared between owners, nor is it told that they exist.
    - prompt_logprobs: also report log-probabilities of `tokens` and of this many alternatives; nothing of them is then
      taken from the cache.
    - constraint: structured output.
    """

    tokens: Sequence[int]
    sampling: Sampling | None = None
    state: Snapshot | None = None
    checkpoints: tuple[int, ...] = ()
    owner: str = ""
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request has cost so far.

    - prompt_tokens: of the state that it continued and of its own tokens.
    - cached_tokens: of these, how many were not read because a state stood for them.
    - miss: why no more of the tokens were skipped: nothing like them is known ("cold"), their state was dropped for
      lack of memory ("evicted"), or they were read before but no state was kept there ("no checkpoint"). None where
      nothing could have been skipped but what was.
    - queued_s, first_token_s: seconds from submission to the first reading, and to the first event; None before.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    miss: Miss | None = None
    queued_s: float | None = None
    first_token_s: float | None = None


class Ticket:
    """An answer as it comes. Every event is handed out once: iterate in one place, sync or async.

    Iteration ends after the event whose `finish` is set, or without one where the request was cancelled or only reads.
    It raises UserError where this request failed alone (a damaged state gives logits that are not numbers), and
    RuntimeError where the engine failed it.

    - sampling: the request's, with the seed that is really used.
    - read: how many of the prompt's tokens are read or skipped so far.
    - prompt: with prompt_logprobs, the request's tokens and what the model thought of each; complete before the first
      event. The first token of a text has nothing before it: its log-probability is None.
    """

    def __init__(self, sampling: Sampling | None, *, prompt_tokens: int, cancel: Callable[["Ticket"], None]) -> None:
        self.sampling, self.read = sampling, 0
        self.prompt: tuple[Drawn, ...] = ()
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._notify: Callable[[], object] = lambda: None
        self._done = False
        self._error: Exception | None = None
        self._snapshot: Snapshot | None = None
        self._submitted = time.monotonic()
        self._queued: float | None = None
        self._first: float | None = None
        self._prompt_tokens, self._cached, self._written = prompt_tokens, 0, 0
        self._miss: Miss | None = None

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._done)
                if not self._events:
                    break
                event = self._events.popleft()
            yield event
        if self._error is not None:
            raise self._error

    async def stream(self) -> AsyncIterator[Event]:
        """`async for event in ticket.stream()`; leaving it early does not cancel."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(woken.set)

        self._notify = notify
        while True:
            woken.clear()
            with self._changed:  # the last event and that it is the last are seen together
                event, done = self._events.popleft() if self._events else None, self._done
            if event is not None:
                yield event
            elif done:
                break
            else:
                await woken.wait()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End at the next token. From any thread, any number of times; events that are already there still come."""
        if not self._done:
            self._cancel(self)

    @property
    def done(self) -> bool:
        """Whether nothing more comes but events that are already there."""
        return self._done

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._cached, self._written, self._miss, self._queued, self._first)

    def snapshot(self) -> Snapshot:
        """Everything read and every token whose text was handed out.

        ValueError before the ticket is done; UserError where it ended before it had read its tokens.
        """
        if not self._done:
            raise ValueError("ticket: expected it to be done, got one that still writes; iterate to its end first")
        if self._snapshot is None:
            raise UserError("state: expected a request that has read its tokens, got one that ended before; ask again")
        return self._snapshot

    # ---- the engine's side

    def begun(self, *, cached: int, miss: Miss | None) -> None:
        """It is being read; `cached` tokens were skipped."""
        self._queued, self._cached, self._miss = time.monotonic() - self._submitted, cached, miss
        self.read = cached

    def put(self, event: Event) -> None:
        """Hand out an event."""
        with self._changed:
            self._put(event)
            self._changed.notify_all()
        self._notify()

    def end(
        self, *, event: Event | None = None, snapshot: Snapshot | None = None, error: Exception | None = None
    ) -> None:
        """Hand out the last event if there is one; nothing more comes."""
        with self._changed:
            if event is not None:
                self._put(event)
            self._snapshot, self._error, self._done = snapshot, error, True
            self._changed.notify_all()
        self._notify()

    def _put(self, event: Event) -> None:
        if self._first is None:
            self._first = time.monotonic() - self._submitted
        self._written += 1
        self._events.append(event)
