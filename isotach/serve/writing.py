"""From prompts to answers: everything that one HTTP request has the engine do, as it comes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from isotach.errors import UserError
from isotach.infer.answer import Constraint, Event
from isotach.infer.sample import Drawn, Sampling
from isotach.infer.snapshot import Snapshot
from isotach.serve.engine import Engine, Full, Request, Ticket
from isotach.serve.limits import Call, Gone, Limits
from isotach.serve.metrics import Metrics
from isotach.serve.objects import FinishReason, UsageReport
from isotach.serve.schemas import ApiError

RETRY = 5.0  # seconds after which a full engine may be asked again
PROGRESS = 0.5  # seconds after which it is told how far a prompt is read

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """How many tokens of the prompts are read or skipped, and how many there are."""

    read: int
    total: int


@dataclass
class Choice:
    """One answer in the making.

    - sampling: None where nothing is to be written.
    - tokens: all that were written, those of a stop string or the end of text too, which have no part in `text`.
    - ended: whether the last of them was one that ends the text.
    """

    index: int
    sampling: Sampling | None
    constraint: Constraint | None = None
    ticket: Ticket | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    ended: bool = False
    last: float | None = None  # when its last token came

    def take(self, event: Event) -> None:
        self.tokens.append(event.token)
        self.text += event.text
        if event.finish is not None:
            self.finish = "length" if event.finish == "length" else "stop"
            stopping = () if self.sampling is None else self.sampling.stop_token_ids
            self.ended = event.finish == "eos" or (event.finish == "stop" and event.token in stopping)

    def written(self, events: Sequence[Event]) -> Sequence[Event]:
        """Of its last events those whose tokens are part of the text."""
        return events[:-1] if self.ended and events and events[-1].finish else events

    def snapshot(self) -> Snapshot:
        """The state after what was handed out."""
        assert self.ticket is not None
        return self.ticket.snapshot()


@dataclass
class Group:
    """One prompt, and its answers: one is written by the ticket that reads, several go on from what that has read."""

    request: Request
    answers: list[Choice]
    ticket: Ticket | None = None

    @property
    def prompt(self) -> tuple[Drawn, ...]:
        """What the model thought of the prompt, where that was asked for."""
        assert self.ticket is not None
        return self.ticket.prompt


class Writing:
    """All answers of one HTTP request: `begin`, then iterate `events`."""

    def __init__(
        self, engine: Engine, call: Call, groups: Sequence[Group], *, limits: Limits, metrics: Metrics
    ) -> None:
        self.groups = groups
        self._engine, self._call, self._limits, self._metrics = engine, call, limits, metrics

    @property
    def answers(self) -> list[Choice]:
        return [answer for group in self.groups for answer in group.answers]

    async def begin(self) -> None:
        """Submit every prompt. What is refused is refused here, before anything was answered."""
        for group in self.groups:
            request = group.request
            if len(group.answers) == 1:
                (answer,) = group.answers
                request = replace(request, sampling=answer.sampling, constraint=answer.constraint)
                answer.ticket = group.ticket = await self._submit(request)
            else:
                group.ticket = await self._submit(request)

    async def events(self) -> AsyncIterator[tuple[Choice, Event] | Progress | None]:
        """Every token of every answer, and now and then how far the prompts are read; None where there was nothing for
        `limits.keep_alive` seconds.

        Raises ApiError where the request takes too long or the server stops.
        """
        arrived: asyncio.Queue[tuple[Choice, Event] | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._follow(group, arrived)) for group in self.groups]
        deadline, left = self._call.began + self._limits.timeout, len(tasks)
        spoke, told = time.monotonic(), self.progress()
        try:
            while left:
                now = time.monotonic()
                wait = min(spoke + self._limits.keep_alive, deadline, now + PROGRESS if told else deadline) - now
                try:
                    async with asyncio.timeout(wait):
                        item = await arrived.get()
                except TimeoutError:
                    now = time.monotonic()
                    if now >= deadline:
                        message = f"timeout: expected an answer within {self._limits.timeout:g} seconds; ask for less"
                        raise ApiError(504, message, code="timeout") from None
                    progress = self.progress()
                    if progress not in (None, told):
                        yield progress
                    elif now >= spoke + self._limits.keep_alive:
                        yield None
                    else:
                        continue
                    spoke, told = now, progress
                    continue
                spoke = time.monotonic()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    self._observe(*item)
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            self._report()

    def progress(self) -> Progress | None:
        """None where nothing is left to read."""
        tickets = [group.ticket for group in self.groups if group.ticket is not None]
        total = [ticket.usage.prompt_tokens for ticket in tickets]
        read = [ticket.read for ticket in tickets]
        left = any(done < count - 1 for done, count in zip(read, total, strict=True))  # the last one is the first step
        return Progress(sum(read), sum(total)) if left else None

    def usage(self) -> UsageReport:
        read = [group.ticket.usage for group in self.groups if group.ticket is not None]
        prompt = sum(usage.prompt_tokens for usage in read)
        written = sum(answer.ticket.usage.completion_tokens for answer in self.answers if answer.ticket is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {
                "cached_tokens": sum(usage.cached_tokens for usage in read),
                "miss": next((usage.miss for usage in read if usage.miss is not None), None),
            },
        }

    async def _submit(self, request: Request) -> Ticket:
        ticket = await submitted(self._engine, request)
        self._call.after.append(ticket.cancel)
        return ticket

    async def _follow(self, group: Group, arrived: asyncio.Queue[Any]) -> None:
        """Put the events of one prompt's answers into the queue, then None; or what went wrong."""
        try:
            assert group.ticket is not None
            if len(group.answers) > 1:
                snapshot = await finished(group.ticket)
                behind = replace(group.request, tokens=(), state=snapshot, checkpoints=(), prompt_logprobs=None)
                for answer in group.answers:
                    request = replace(behind, sampling=answer.sampling, constraint=answer.constraint)
                    answer.ticket = group.ticket if answer.sampling is None else await self._submit(request)
            await asyncio.gather(*(self._drain(answer, arrived) for answer in group.answers))
        except Exception as error:  # noqa: BLE001  raised where the queue is read
            arrived.put_nowait(error)
        arrived.put_nowait(None)

    async def _drain(self, answer: Choice, arrived: asyncio.Queue[Any]) -> None:
        assert answer.ticket is not None
        if answer.sampling is None:
            await finished(answer.ticket)
            answer.finish = "length"
            return
        async for event in answer.ticket.stream():
            answer.take(event)
            arrived.put_nowait((answer, event))
        if answer.finish is None:
            raise _stopped()

    def _observe(self, answer: Choice, event: Event) -> None:
        now = time.monotonic()
        if answer.last is not None:
            self._metrics.token_after(now - answer.last)
        answer.last = now
        if event.finish is not None and answer.ticket is not None:
            self._metrics.finished(answer.ticket.usage, now - self._call.began)

    def _report(self) -> None:
        """What the log says of all this."""
        usage = self.usage()
        first = [group.ticket.usage for group in self.groups if group.ticket is not None][:1]
        self._call.facts |= {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "miss": usage["prompt_tokens_details"]["miss"],
            "completion_tokens": usage["completion_tokens"],
            "queued_s": _rounded(first[0].queued_s) if first else None,
            "first_token_s": _rounded(first[0].first_token_s) if first else None,
            "finish": [answer.finish for answer in self.answers],
        }


async def submitted(engine: Engine, request: Request) -> Ticket:
    """The engine's ticket for a request. ApiError 400 where it can never be served, 503 where it cannot now."""
    try:
        return await asyncio.to_thread(engine.submit, request)
    except UserError as error:
        raise ApiError.of(error) from None
    except Full as error:
        raise ApiError(503, str(error), code="queue_full", retry_after=RETRY) from None
    except RuntimeError:
        if engine.alive:
            raise
        raise _stopped() from None


async def finished(ticket: Ticket) -> Snapshot:
    """The snapshot of a request that only reads, once it has read."""
    async for _ in ticket.stream():
        pass
    try:
        return ticket.snapshot()
    except UserError as error:
        raise _stopped() from error


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _stopped() -> ApiError:
    return ApiError(503, "server: it is stopping; ask again when it is back", code="stopping", retry_after=RETRY)


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves (Gone). The request's body was read."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watch, worker = asyncio.ensure_future(leaving()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, worker}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise Gone
        return worker.result()
    finally:
        watch.cancel()
        worker.cancel()
