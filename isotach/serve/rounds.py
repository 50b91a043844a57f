"""What the engine's thread does, one round after another.

    let out who was cancelled; let in who fits (scheduler.admit)
    read one call's worth of the prompts that are let in (scheduler.plan, infer.batch.advance)
    write one token in every row (infer.batch.Batch)

A call that reads may take half a second, and nobody waits so long for a token. Between two of its operations it stands
still while others have a round of their own: who came meanwhile and has less to read than it, and, half of the time,
those who write. States are values, so nothing of the call is lost or in the way.

What a request draws is a function of its tokens, its sampling and its seed, so neither its neighbours nor the order of
things can be seen in it. Memory is reserved for the longest that a request may become before it is let in, so nobody
has to be thrown out again; what is not reserved belongs to the prefix cache. States are kept after the prompt and after
the answer, where a request asks for it, where its prompt parts from one that was read before, and where it is cancelled
while it reads.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from isotach import shapes
from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.infer.answer import Answer, Event, check_sampling
from isotach.infer.batch import Batch, Reading, Row, advance
from isotach.infer.calls import head
from isotach.infer.chain import Digests, TokenChain
from isotach.infer.generate import encode
from isotach.infer.sample import Drawn, exact, known
from isotach.infer.snapshot import Past, Snapshot
from isotach.models.decoder import Decoder
from isotach.models.state import DecoderState, Origin
from isotach.serve.prefix import Miss, PrefixCache
from isotach.serve.scheduler import CALL, PATIENCE, ROWS, Demand, admit, pace, plan
from isotach.serve.ticket import Request, Ticket

COPIES = 3  # of what a row keeps of constant size: before a step, after it, and where its text was last shown
HEAD = 64  # tokens whose logits are in memory at once when the prompt's log-probabilities are asked for
DEPTH = 4  # calls that may stand still, one for the other, before no other begins
CREDIT = 1.0  # seconds that newcomers may have beyond PATIENCE times what a request had that stands still for them

News = Callable[[], tuple[Iterable["Job"], Set[Ticket]]]

_log = logging.getLogger("isotach.serve")


@dataclass(frozen=True, slots=True)
class Stats:
    """What the engine is doing and has done. Bytes are of states; counts are since it was started.

    - running: requests that write; reading: that read their prompt; waiting: that were not begun.
    - slot_bytes: reserved for running and reading requests; cache_bytes, disk_bytes: of kept states in memory, on disk.
    - memory: bytes that slots and cache may take together.
    - hits: requests that skipped tokens by the cache; misses: those that could have skipped more, by reason.
    - tokens_read, tokens_skipped: of prompts; tokens_written: of answers.
    - finished: by "eos", "stop", "length", "read", "cancelled", "failed".
    """

    running: int
    reading: int
    waiting: int
    slot_bytes: int
    cache_bytes: int
    disk_bytes: int
    memory: int
    hits: int
    misses: Mapping[Miss, int]
    evictions: int
    tokens_read: int
    tokens_skipped: int
    tokens_written: int
    finished: Mapping[str, int]


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way.

    - ids: what is to be read, the last of it as the first step; past: what comes before them.
    - path: the chain after each of them; need: bytes reserved.
    - cuts: positions whose state is kept, ascending; the last is where reading ends.
    - most: tokens of it that may be read at once.
    - ahead: seconds that newcomers had while it stood still, beyond what it had since.
    - skipped: calls in a row that read nothing of it; scores: of the prompt, where they are asked for.
    - reading: while it reads.
    """

    request: Request
    ticket: Ticket
    ids: list[int]
    past: Past
    path: Digests
    need: int
    cuts: list[int] = field(default_factory=list)
    most: int = CALL
    ahead: float = 0.0
    skipped: int = 0
    scores: list[Drawn] = field(default_factory=list)
    reading: Reading | None = None


@dataclass(eq=False, slots=True)
class Call:
    """One call that reads, while it is made.

    - looked: when somebody last could have had a turn; worked: the same on the clock that stands still while the
      thread does not run, so that what others do on this machine is not the operation's fault.
    - stretch: the longest time on that clock in which nobody could, in seconds.
    - ahead: as its requests have it.
    """

    slices: Sequence[tuple[Job, int]]
    tokens: int
    looked: float
    worked: float
    stretch: float = 0.0
    ahead: float = 0.0


class Rounds:
    """Everything that a model is doing at once. Only `job`, `hurry`, `waiting` and `stats` are for other threads.

    - memory: bytes for the states of requests and of the cache together.
    - news: takes what came since it was last called: requests, and tickets that were cancelled.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        origin: Origin,
        *,
        cache: PrefixCache,
        memory: int,
        news: News,
    ) -> None:
        self._news = news
        self._decoder, self._tokenizer, self._cache, self._memory = decoder, tokenizer, cache, memory
        self._weights, self._initial = origin.fingerprint(), decoder.initial()
        self._empty = TokenChain.empty(tokenizer.vocab_size)
        self._grows, self._footprint = self._initial.grows, _footprint(decoder, origin.template())
        self._waiting: deque[Job] = deque()
        self._readings: list[Job] = []
        self._rows: dict[Row, Job] = {}
        self._batch = Batch(decoder, tokenizer)
        self._reserved = 0
        self._leaving: set[Ticket] = set()  # cancelled, and not yet let out
        self._calls: list[Call] = []  # under way; all but the last stand still
        self._shortest = math.inf  # of the requests that there are news of
        self._wrote, self._step = 0.0, 0.0  # when the last step ended, and how long it took
        self._fastest = math.inf  # of all steps, on the clock of a call's stretch
        self._counts: Counter[str] = Counter()
        self._misses: Counter[Miss] = Counter()
        self._finished: Counter[str] = Counter()
        cache.limit = memory

    # ---- from any thread

    def job(self, request: Request, *, cancel: Callable[[Ticket], None]) -> Job:
        """The request, checked. UserError for one that can never be served."""
        tokens = encode(self._tokenizer, request.tokens).tolist()
        past, sampling = Past(self._initial, self._empty, None), request.sampling
        if request.state is not None:
            if (request.state.weights, request.state.tokenizer) != (self._weights, self._tokenizer.fingerprint):
                raise UserError("state: expected one of this model, got another's; use the model that made it")
            past = request.state.past
        ids = tokens if past.unread is None else [past.unread, *tokens]
        if not ids:
            raise UserError("prompt: expected at least one token, got none; give some text")
        if sampling is not None:
            check_sampling(sampling, self._tokenizer)
            sampling = sampling.seeded()
        if not 0 <= (request.prompt_logprobs or 0) <= self._tokenizer.vocab_size:
            most = self._tokenizer.vocab_size
            raise UserError(f"prompt_logprobs: expected 0 to {most} alternatives, got {request.prompt_logprobs}")
        if bad := [at for at in request.checkpoints if not 0 <= at <= len(tokens)]:
            raise UserError(f"checkpoints: expected 0 to {len(tokens)} tokens, got {bad[0]}")
        before = past.chain.length
        need = self._footprint(before + len(ids) + (0 if sampling is None else sampling.max_tokens))
        if need > self._memory:
            raise UserError(
                f"prompt: expected a state of at most {self._memory:,} bytes, got {before + len(ids):,} tokens, which "
                f"may become one of {need:,}; shorten it, or ask for fewer tokens"
            )
        first = len(ids) - len(tokens) + before
        ticket = Ticket(sampling, prompt_tokens=past.tokens + len(tokens), cancel=cancel)
        path = Digests(ids, start=before, digest=past.chain.digest)
        if request.prompt_logprobs is None:
            self._cache.fetch(request.owner, path, last=before + len(ids) - 1)  # here it keeps nobody else waiting
        return Job(request, ticket, ids, past, path, need, sorted({first + at for at in request.checkpoints}))

    def hurry(self, tokens: int = 0) -> None:
        """There are news: of a request of so many tokens, or else."""
        self._shortest = min(self._shortest, tokens)

    @property
    def waiting(self) -> int:
        """Requests that were not begun."""
        return len(self._waiting)

    def stats(self) -> Stats:
        counts = self._counts
        return Stats(
            running=len(self._rows),
            reading=len(self._readings),
            waiting=self.waiting,
            slot_bytes=self._reserved,
            cache_bytes=self._cache.nbytes,
            disk_bytes=self._cache.disk_bytes,
            memory=self._memory,
            hits=counts["hits"],
            misses=dict(self._misses),
            evictions=self._cache.evictions,
            tokens_read=counts["read"],
            tokens_skipped=counts["skipped"],
            tokens_written=counts["written"],
            finished=dict(self._finished),
        )

    # ---- a round

    @property
    def jobs(self) -> list[Job]:
        """All that are not done."""
        return [*self._waiting, *self._readings, *self._rows.values()]

    def round(self) -> None:
        """Let out and in, one call that reads, one step that writes."""
        self._meet()
        self._read(self._readings, room=CALL)
        self._write()

    def _meet(self) -> None:
        """Let out and in."""
        self._shortest = math.inf
        arrived, cancelled = self._news()
        self._waiting.extend(arrived)
        self._leaving |= cancelled
        if self._leaving:
            self._let_out()
        self._let_in()

    def _let_out(self) -> None:
        """But for those in a call that is under way; they are let out when it is over."""
        busy = self._under_way
        for job in [job for job in self._waiting if job.ticket in self._leaving]:
            self._waiting.remove(job)
            self._finished["cancelled"] += 1
            job.ticket.end()
        for job in [job for job in self._readings if job.ticket in self._leaving and job not in busy]:
            assert job.reading is not None
            self._readings.remove(job)
            self._keep(job, job.reading.past)
            self._end(job, "cancelled")
        for row, job in [(row, job) for row, job in self._rows.items() if job.ticket in self._leaving]:
            del self._rows[row]
            self._end(job, "cancelled", past=self._batch.leave(row))
        self._leaving &= {job.ticket for job in busy}

    @property
    def _under_way(self) -> set[Job]:
        return {job for call in self._calls for job, _ in call.slices}

    def _let_in(self) -> None:
        needs = [job.need for job in self._waiting]
        places = ROWS - len(self._rows) - len(self._readings)
        for _ in range(admit(needs, free=self._memory - self._reserved, rows=places)):
            job = self._waiting.popleft()
            self._reserve(job.need)
            with self._alone(job):
                self._begin(job)

    def _reserve(self, need: int) -> None:
        self._reserved += need
        self._cache.limit = self._memory - self._reserved

    def _begin(self, job: Job) -> None:
        """Find what need not be read."""
        start, last = job.path.start, job.path.start + len(job.ids) - 1
        past, miss, cuts = job.past, None, {*job.cuts}
        if job.request.prompt_logprobs is not None:
            cuts = set()  # everything is read, and nothing kept
        elif last > start:
            found = self._cache.find(job.request.owner, job.path, last=last)
            past, miss = found.past or past, found.miss
            self._counts["hits"] += found.past is not None
            if miss is not None:
                self._misses[miss] += 1
            if found.branch is not None:
                cuts.add(found.branch)
        done, state = past.chain.length, past.state
        assert state is not None
        job.cuts = [*(cut for cut in sorted(cuts) if done < cut < last), last]
        if self._grows:
            longest = last + 1 + (0 if job.ticket.sampling is None else job.ticket.sampling.max_tokens)
            state = state.reserved(lambda block, name: self._decoder.room(block, name, longest))
        job.reading = Reading(job.ids[done - start :], state, past.chain)
        if job.request.prompt_logprobs is not None and len(job.ids) == len(job.request.tokens):
            job.scores.append(Drawn(job.ids[0], None, ()))
        self._counts["skipped"] += done - start
        job.ticket.begun(cached=done, miss=miss)
        self._readings.append(job)
        if not job.reading.left:
            self._has_read(job)

    def _read(self, jobs: Iterable[Job], *, room: int) -> bool:
        """One call of at most `room` tokens, out of what these have to read; whether there was anything."""
        busy = self._under_way
        jobs = [job for job in jobs if job.reading and job not in busy and job.ticket not in self._leaving]
        demands = []
        for job in jobs:
            assert job.reading is not None
            piece = min(job.cuts[0] - job.reading.chain.length, job.most)
            demands.append(Demand(job.reading.left, piece, job.skipped))
            job.skipped += 1
        slices = [(jobs[index], count) for index, count in plan(demands, room=room)]
        if slices:
            self._advance(slices)
        return bool(slices)

    def _advance(self, slices: Sequence[tuple[Job, int]]) -> None:
        """Read so many tokens of each; who makes the call fail fails alone."""
        if len(slices) == 1:
            with self._alone(slices[0][0]):
                self._has_advanced(*slices[0], *self._outputs(slices))
            return
        try:
            outputs = self._outputs(slices)
        except _Broken:
            return
        except Exception:  # noqa: BLE001  whose fault it is shows when they are read one by one
            for each in slices:
                self._advance([each])
            return
        for (job, count), hidden in zip(slices, outputs, strict=True):
            with self._alone(job):
                self._has_advanced(job, count, hidden)

    def _outputs(self, slices: Sequence[tuple[Job, int]]) -> list[Float[Tensor, "T D"]]:
        tokens, ahead = sum(count for _, count in slices), max(job.ahead for job, _ in slices)
        call = Call(slices, tokens, time.perf_counter(), time.thread_time(), ahead=ahead)
        self._calls.append(call)
        try:
            with _Between(self._look):
                outputs = advance(self._decoder, [(job.reading, count) for job, count in slices if job.reading])
        finally:
            self._calls.pop()
            for job, _ in slices:
                job.ahead = call.ahead
        call.stretch = max(call.stretch, time.thread_time() - call.worked)
        for job, _ in slices:
            job.most = pace(job.most, stretch=call.stretch, step=self._fastest)
        return outputs

    # ---- while a call stands still

    def _look(self) -> None:
        """Between two operations of a call."""
        call, now = self._calls[-1], time.perf_counter()
        call.stretch = max(call.stretch, time.thread_time() - call.worked)
        call.ahead = max(0.0, call.ahead - PATIENCE * (now - call.looked))
        writing = bool(self._rows) and now - self._wrote >= self._step  # has as much time as reading
        if writing or (self._shortest < call.tokens and call.ahead < CREDIT):
            self._stand_still(call, now, writing=writing)
            now = time.perf_counter()
        call.looked, call.worked = now, time.thread_time()

    def _stand_still(self, call: Call, since: float, *, writing: bool) -> None:
        """A round of those who may not wait for the end of a call.

        Raises _Broken where nobody waits for the end of the call either. A call of several ends for all or none: one
        that was broken off may have written behind the state that it had been given, which would be copied for it.
        """
        self._meet()
        if all(job.ticket in self._leaving for job, _ in call.slices):
            raise _Broken
        if call.ahead < CREDIT and len(self._calls) < DEPTH:
            short = [job for job in self._readings if job.reading and job.reading.left < call.tokens]
            while self._read(short, room=call.tokens):
                pass
        until = time.perf_counter()
        self._write()
        call.ahead += (until if writing else time.perf_counter()) - since

    @contextmanager
    def _alone(self, job: Job) -> Iterator[None]:
        """What goes wrong inside is this request's end, and nobody else's."""
        try:
            yield
        except _Broken:
            pass
        except Exception as error:  # noqa: BLE001  told to who asked, and logged
            if job in self._readings:
                self._readings.remove(job)
            self._fail(job, error)

    def _has_advanced(self, job: Job, count: int, hidden: Float[Tensor, "T D"]) -> None:
        assert job.reading is not None
        job.skipped, job.ticket.read = 0, job.reading.chain.length
        self._counts["read"] += count
        if job.request.prompt_logprobs is not None:
            following = job.reading.ids[job.reading.done - count + 1 : job.reading.done + 1]
            job.scores += self._scored(following, hidden, alternatives=job.request.prompt_logprobs)
        else:
            at = job.reading.chain.length
            self._cache.mark(job.request.owner, job.path, start=at - count, stop=at)
            if at == job.cuts[0]:
                del job.cuts[0]
                self._keep(job, job.reading.past)
        if not job.reading.left:
            self._has_read(job)

    def _scored(self, tokens: Sequence[int], hidden: Float[Tensor, "T D"], *, alternatives: int) -> Iterator[Drawn]:
        """What the model thought of each of `tokens` before it came."""
        for start in range(0, len(tokens), HEAD):
            logits = exact(head(self._decoder, hidden[start : start + HEAD]))
            logprobs = logits.log_softmax(-1)[:, : self._tokenizer.vocab_size]
            for token, row in zip(tokens[start : start + HEAD], logprobs, strict=True):
                yield known(token, row, alternatives=alternatives)

    def _has_read(self, job: Job) -> None:
        """From reading to writing."""
        assert job.reading is not None
        self._readings.remove(job)
        past, sampling = job.reading.past, job.ticket.sampling
        job.reading, job.ticket.prompt = None, tuple(job.scores)
        if sampling is None:
            self._end(job, "read", past=past)
            return
        answer = Answer(self._tokenizer, sampling, job.ids[-1], constraint=job.request.constraint)
        self._rows[self._batch.join(past, answer)] = job

    def _write(self) -> None:
        """One token in every row."""
        if not self._rows:
            return
        began, worked = time.perf_counter(), time.thread_time()
        try:
            outcomes = self._batch.step()
        except Exception as error:  # noqa: BLE001  told to who asked, and logged
            jobs, self._rows, self._batch = [*self._rows.values()], {}, Batch(self._decoder, self._tokenizer)
            for job in jobs:
                self._fail(job, error)
            return
        self._wrote = time.perf_counter()
        self._step = self._wrote - began
        self._fastest = min(self._fastest, time.thread_time() - worked)
        for row, outcome, past in outcomes:
            job = self._rows[row]
            if isinstance(outcome, Exception):
                del self._rows[row]
                self._fail(job, outcome)
                continue
            self._counts["written"] += 1
            if outcome.finish is not None:
                del self._rows[row]
                self._end(job, outcome.finish, past=past, event=outcome)
                continue
            self._cache.note(job.request.owner, row.chain)
            job.ticket.put(outcome)

    def _keep(self, job: Job, past: Past) -> None:
        """For later requests; of a text that is read piece by piece only the last end: its reader has the others."""
        request = job.request
        if request.prompt_logprobs is not None:
            return
        passing = request.sampling is None and past.chain.length == job.path.start + len(job.ids) - 1
        before = job.past.chain if passing and request.state is not None else None
        self._cache.put(request.owner, past, passing=passing, instead_of=before)

    def _end(
        self,
        job: Job,
        how: str,
        *,
        past: Past | None = None,
        event: Event | None = None,
        error: Exception | None = None,
    ) -> None:
        """Let go of a request that was let in."""
        self._finished[how] += 1
        job.reading = None
        self._reserve(-job.need)
        snapshot = None
        if past is not None and past.state is not None:
            past = past._replace(state=past.state.compact())
            snapshot = Snapshot.of(past, weights=self._weights, tokenizer=self._tokenizer)
            self._keep(job, past)
        job.ticket.end(event=event, snapshot=snapshot, error=error)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, UserError):
            _log.error("a request has failed", exc_info=error)
            error = RuntimeError(f"engine: the request has failed ({error}); see the log")
        self._end(job, "failed", error=error)


class _Broken(Exception):
    """The call was broken off: states are values, so it has done nothing."""


class _Between(TorchFunctionMode):
    """Inside, `look` is called before every operation of this thread, but for those that it makes itself."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look()
        return func(*args, **(kwargs or {}))


def _footprint(decoder: Decoder, template: DecoderState) -> Callable[[int], int]:
    """Bytes that a request needs which becomes so many tokens long."""
    fixed, growing = 0, []
    for i, states in enumerate(template.blocks):
        for name, state in states.items():
            for field_, declared in shapes.axes(type(state)).items():
                leaf = getattr(state, field_)
                named = {axis.name: size for axis, size in zip(declared, leaf.shape, strict=True)}
                if "S" in named:
                    entry = leaf.itemsize * math.prod(size for axis, size in named.items() if axis != "S")
                    growing.append((i, name, entry))
                else:
                    fixed += leaf.nbytes

    def footprint(tokens: int) -> int:
        return COPIES * fixed + sum(entry * decoder.room(i, name, tokens) for i, name, entry in growing)

    return footprint
