"""Everybody is served as if alone: the engine against sessions, in any mixture of arrivals and cancellations."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isotach.errors import UserError
from isotach.infer.answer import Event
from isotach.infer.batch import Batch
from isotach.infer.generate import Session
from isotach.infer.sample import Sampling
from isotach.infer.snapshot import Snapshot
from isotach.serve import rounds
from isotach.serve.engine import Engine, Full, Request, Ticket
from tests.unit.serving import BYTES, MODELS, ByHand, alone, decoder, joined, tokens

LETTERS = b"ab \xc3\xa9"  # with one character of two bytes
PROMPT = st.binary(min_size=1, max_size=60).map(lambda noise: [LETTERS[byte % len(LETTERS)] for byte in noise])
SAMPLING = st.builds(
    Sampling,
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([0.6, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([{}, {97: 30.0, 256: 20.0}]),
    min_tokens=st.sampled_from([0, 3]),
    ignore_eos=st.booleans(),
    stop=st.sampled_from([(), ("a", "bb"), ("aaab",)]),
    stop_token_ids=st.sampled_from([(), (98,)]),
    logprobs=st.sampled_from([None, 2]),
)
VISIT = st.tuples(PROMPT, SAMPLING, st.integers(0, 6), st.one_of(st.none(), st.integers(1, 8)))


def ended(model: Any, prompt: list[int], sampling: Sampling) -> Session:
    """A session that has written its answer."""
    session = Session(model, BYTES)
    session.read(prompt)
    list(session.generate(sampling))
    return session


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(visits=st.lists(VISIT, min_size=1, max_size=6))
def test_any_mixture_is_served_as_if_alone(
    name: str, visits: list[tuple[list[int], Sampling, int, int | None]]
) -> None:
    """Each visit: a prompt, how to write, rounds after which it comes, rounds after which it leaves."""
    model = decoder(name)
    hand = ByHand(model)
    tickets: dict[int, Any] = {}
    for now in range(16):
        for n, (prompt, sampling, comes, leaves) in enumerate(visits):
            if now == comes:
                tickets[n] = hand.submit(Request(prompt, sampling, checkpoints=(len(prompt) // 2,)))
            if leaves is not None and now == comes + leaves:
                tickets[n].cancel()
        hand.round()
    hand.finish()
    for n, (prompt, sampling, _, leaves) in enumerate(visits):
        got, expected = list(tickets[n]), alone(model, prompt, sampling)
        if leaves is None or tickets[n].usage.completion_tokens == len(expected):
            assert tokens(got) == tokens(expected)
            assert [event.text for event in got] == [event.text for event in expected]
            assert got[-1].finish == expected[-1].finish
            past, same = tickets[n].snapshot(), ended(model, prompt, sampling).past
            assert same is not None
            assert (past.chain.digest, past.unread) == (same.chain.digest, same.unread)
        else:
            assert tokens(got) == tokens(expected)[: len(got)]
        for one, other in zip(got, expected, strict=False):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
    assert hand.rounds.stats().slot_bytes == 0


@pytest.mark.parametrize("name", MODELS)
def test_in_single_precision_logprobs_agree_to_rounding(name: str) -> None:
    model = decoder(name, dtype=torch.float32)
    hand = ByHand(model)
    prompts = [list(b"The state of a conversation"), list(b"ab" * 40), [97], list(b"q" * 17)]
    samplings = [Sampling(seed=n, max_tokens=10, logprobs=3, ignore_eos=True) for n in range(4)]
    tickets = [hand.submit(Request(*both)) for both in zip(prompts, samplings, strict=True)]
    hand.finish()
    for ticket, prompt, sampling in zip(tickets, prompts, samplings, strict=True):
        for one, other in zip(ticket, alone(model, prompt, sampling), strict=True):
            assert one.token == other.token  # no draw here falls within rounding of a boundary
            assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)


# ---- conversations: what is restored is what would be read

TURN = st.tuples(
    st.sampled_from(["say", "edit", "again", "branch"]), PROMPT, st.integers(0, 3), st.integers(0, 9), st.integers(1, 7)
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(turns=st.lists(TURN, min_size=2, max_size=7), room=st.sampled_from([1 << 30, 60_000]))
def test_restored_states_give_what_a_fresh_reading_gives(
    name: str, turns: list[tuple[str, list[int], int, int, int]], room: int
) -> None:
    """Random conversations with edits, regenerations and branches, with plenty of memory and with little."""
    model = decoder(name)
    hand = ByHand(model)
    hand.cache.limit = room
    messages: list[list[int]] = []
    for kind, text, where, seed, length in turns:
        if kind == "edit" and messages:
            messages = [*messages[: where % len(messages)], text]
        elif kind == "branch" and messages:
            cut = messages[where % len(messages)]
            messages = [*messages[: where % len(messages)], cut[: len(cut) // 2] + text]
        elif kind == "say" or not messages:
            messages = [*messages, text]
        prompt = joined(messages)
        ends = [sum(map(len, messages[:n])) for n in range(1, len(messages))]
        sampling = Sampling(seed=seed, max_tokens=length, logprobs=1)
        hand.rounds._memory = room if room > 1 << 20 else max(room, hand.rounds._footprint(len(prompt) + length))
        ticket = hand.submit(Request(prompt, sampling, checkpoints=tuple(ends)))
        hand.finish()
        got, expected = list(ticket), alone(model, prompt, sampling)
        assert tokens(got) == tokens(expected)
        assert [event.logprob for event in got] == pytest.approx([event.logprob for event in expected], abs=1e-9)
        messages = [*messages, tokens(got)]


@pytest.mark.parametrize("name", ["hybrid", "delta"])
def test_earlier_turns_are_skipped_and_edits_are_read_from_the_edited_message(name: str) -> None:
    hand = ByHand(decoder(name))
    messages: list[list[int]] = []
    for n in range(5):
        messages.append(list(b"question number %d, please: " % n))
        prompt = joined(messages)
        ends = tuple(sum(map(len, messages[:k])) for k in range(1, len(messages)))
        ticket = hand.submit(Request(prompt, Sampling(seed=n, max_tokens=9, ignore_eos=True), checkpoints=ends))
        hand.finish()
        if n:
            assert ticket.usage.cached_tokens == len(prompt) - len(messages[-1]) - 1  # an answer's last token is unread
            assert ticket.usage.miss is None
        messages.append(tokens(ticket))
    again = hand.submit(Request(joined(messages[:-1]), Sampling(seed=9, max_tokens=2)))
    hand.finish()
    assert again.usage.cached_tokens == len(joined(messages[:-1])) - 1
    for k in (2, 4, 6):
        edited = [*messages[:k], list(b"something else")]
        ticket = hand.submit(Request(joined(edited), Sampling(seed=1, max_tokens=2)))
        hand.finish()
        assert ticket.usage.cached_tokens >= len(joined(messages[:k])) - 1


def test_a_branch_is_noticed_the_second_time_and_skipped_the_third() -> None:
    hand = ByHand(decoder("lightning"))
    book = list(b"once upon a time there was a monoid " * 9)

    def ask(question: bytes, owner: str = "") -> Any:
        ticket = hand.submit(Request([*book, *question], Sampling(seed=0, max_tokens=1), owner=owner))
        hand.finish()
        return ticket.usage

    assert (ask(b"who?").cached_tokens, ask(b"why not?").miss) == (0, "no checkpoint")
    third = ask(b"where?")
    assert third.cached_tokens == len(book) // 32 * 32
    stranger = ask(b"who?", owner="a stranger")
    assert (stranger.cached_tokens, stranger.miss) == (0, "cold")


def test_what_a_cancelled_request_has_read_is_kept() -> None:
    hand = ByHand(decoder("lightning"))
    text = list(b"a long text " * 200)
    ticket = hand.submit(Request(text, Sampling(max_tokens=4)))
    for _ in range(3):
        hand.round()
    ticket.cancel()
    hand.finish()
    assert list(ticket) == []
    again = hand.submit(Request(text, Sampling(max_tokens=4)))
    hand.finish()
    assert again.usage.cached_tokens == 3 * 512
    with pytest.raises(UserError, match="ended before"):
        ticket.snapshot()


# ---- states


@pytest.mark.parametrize("name", MODELS)
def test_a_snapshot_goes_on_where_its_request_stopped(name: str, tmp_path: Any) -> None:
    model = decoder(name)
    hand = ByHand(model)
    prompt, sampling = list(b"Tell me of states. "), Sampling(seed=5, max_tokens=20, ignore_eos=True)
    first = hand.submit(Request(prompt, sampling.model_copy(update={"max_tokens": 8})))
    hand.finish()
    first.snapshot().save(tmp_path / "state")
    restored = Snapshot.load(tmp_path / "state", model, BYTES)
    assert (tmp_path / "state").stat().st_size <= restored.nbytes() + 65536
    for state in (first.snapshot(), restored):
        ticket = hand.submit(Request([], sampling.model_copy(update={"max_tokens": 12}), state=state))
        hand.finish()
        assert tokens(first.prompt) == []
        assert ticket.usage.cached_tokens == len(prompt) + 7
        second = tokens(ticket)
        written = [*tokens(alone(model, prompt, sampling))]
        assert written[8:] == second
    more = list(b"and then?")
    ticket = hand.submit(Request(more, sampling, state=restored))
    hand.finish()
    assert tokens(ticket) == tokens(alone(model, [*prompt, *written[:8], *more], sampling))


def test_reading_only_leaves_a_state_and_no_event() -> None:
    model = decoder("hybrid")
    hand = ByHand(model)
    ticket = hand.submit(Request(list(b"just read this")))
    hand.finish()
    assert list(ticket) == []
    session = Session(model, BYTES)
    session.read("just read this")
    assert session.past is not None
    assert ticket.snapshot().chain.digest == session.past.chain.digest
    assert ticket.snapshot().unread == session.past.unread
    one = hand.submit(Request([97]))
    hand.finish()
    after = hand.submit(Request([98], Sampling(seed=1, max_tokens=5), state=one.snapshot()))
    hand.finish()
    assert tokens(after) == tokens(alone(model, [97, 98], Sampling(seed=1, max_tokens=5)))


def test_a_stopped_answer_is_remembered_up_to_what_was_shown() -> None:
    model = decoder("lightning")
    prompt, free = list(b"Say something: "), Sampling(seed=6, max_tokens=60, ignore_eos=True)
    text = "".join(event.text for event in alone(model, prompt, free))
    stop = next(text[i : i + 3] for i in range(8, len(text)) if text[i : i + 3].isprintable())
    sampling = free.model_copy(update={"stop": (stop, "never")})
    hand = ByHand(model)
    ticket = hand.submit(Request(prompt, sampling))
    hand.finish()
    session = ended(model, prompt, sampling)
    assert session.past is not None
    assert ticket.snapshot().chain.digest == session.past.chain.digest
    after = Sampling(seed=3, max_tokens=5)
    more = hand.submit(Request([], after, state=ticket.snapshot()))
    hand.finish()
    assert tokens(more) == tokens(session.generate(after))


# ---- what is reported


@pytest.mark.parametrize("name", ["lightning", "softmax"])
def test_logprobs_of_the_prompt_are_those_of_one_forward_pass(name: str) -> None:
    model = decoder(name)
    hand = ByHand(model)
    prompt = list(b"What is the probability of this text? " * 5)
    warm = hand.submit(Request(prompt, Sampling(max_tokens=1)))
    asked = hand.submit(Request(prompt, Sampling(max_tokens=1), checkpoints=(9, 99), prompt_logprobs=3))
    half = hand.submit(Request(prompt[:50]))
    hand.finish()
    behind = hand.submit(Request(prompt[50:], state=half.snapshot(), prompt_logprobs=3))
    hand.finish()
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0][0].log_softmax(-1)
    assert warm.prompt == ()
    assert [drawn.token for drawn in asked.prompt] == prompt
    assert (asked.prompt[0].logprob, asked.prompt[0].top) == (None, ())
    assert asked.usage.cached_tokens == 0
    for start, scored in ((1, asked.prompt[1:]), (50, behind.prompt)):
        assert [drawn.token for drawn in scored] == prompt[start:]
        for at, drawn in enumerate(scored, start):
            assert drawn.logprob == pytest.approx(expected[at - 1][prompt[at]].item(), abs=1e-9)
            best = expected[at - 1].topk(3).values.tolist()
            assert [logprob for _, logprob in drawn.top] == pytest.approx(best, abs=1e-9)


class Alternating:
    """Only a and b, in turn, and the end after six; counts how it is used."""

    def __init__(self) -> None:
        self.said: list[int] = []

    def mask(self) -> Tensor:
        allowed = torch.zeros(257, dtype=torch.bool)
        allowed[256 if len(self.said) == 6 else 97 + len(self.said) % 2] = True
        return allowed

    def accept(self, token: int) -> None:
        self.said.append(token)


class Broken(Alternating):
    def mask(self) -> Tensor:
        if len(self.said) == 2:
            raise ValueError("lost the thread")
        return super().mask()


class Empty(Alternating):
    def mask(self) -> Tensor:
        return super().mask() & (len(self.said) != 3)


def test_constraints_bind_their_own_row_and_fail_alone() -> None:
    model = decoder("lightning")
    hand = ByHand(model)
    free = Sampling(seed=1, max_tokens=12)
    bound = hand.submit(Request([97, 98], Sampling(seed=0), constraint=Alternating()))
    broken = hand.submit(Request([97, 98], Sampling(seed=0), constraint=Broken()))
    empty = hand.submit(Request([97, 98], Sampling(seed=0), constraint=Empty()))
    other = hand.submit(Request([97, 98], free))
    hand.finish()
    events = list(bound)
    assert tokens(events) == [97, 98, 97, 98, 97, 98, 256]
    assert events[-1].finish == "eos"
    assert tokens(other) == tokens(alone(model, [97, 98], free))
    for ticket, error, count in ((broken, RuntimeError, 2), (empty, UserError, 3)):
        got: list[Event] = []
        with pytest.raises(error):
            got.extend(ticket)
        assert ticket.usage.completion_tokens == count
    assert hand.rounds.stats().finished["failed"] == 2


def test_a_state_of_numbers_that_are_none_fails_its_request_alone() -> None:
    model = decoder("lightning")
    hand = ByHand(model)
    read = hand.submit(Request(list(b"read this")))
    hand.finish()
    good = read.snapshot()
    spoilt = good.state._map(lambda leaf: leaf * float("nan") if leaf.is_floating_point() else leaf, list)
    bad = Snapshot(spoilt, good.chain, good.unread, good.weights, good.tokenizer)
    sampling = Sampling(seed=2, max_tokens=6)
    tickets = [hand.submit(Request([97], sampling, state=state)) for state in (good, bad, good)]
    hand.finish()
    assert tokens(tickets[0]) == tokens(tickets[2]) == tokens(alone(model, [*b"read this", 97], sampling))
    with pytest.raises(UserError, match="finite logits"):
        list(tickets[1])


# ---- memory


@pytest.mark.parametrize("name", MODELS)
def test_what_is_reserved_is_never_exceeded(name: str) -> None:
    """Bytes of all states that rows hold, measured in their buffers, against what was reserved for them."""
    model = decoder(name)
    hand = ByHand(model)
    memory = 3 * hand.rounds._footprint(80)
    hand = ByHand(model, memory=memory)
    requests = [Request([97 + n] * (20 + 7 * n), Sampling(seed=n, max_tokens=30, ignore_eos=True)) for n in range(5)]
    tickets = [hand.submit(request) for request in requests]
    most = 0

    def buffers(state: Any) -> int:
        leaves: dict[int, int] = {}
        for block in state.blocks:
            for own in block.values():
                for row in own if isinstance(own, tuple) and not hasattr(own, "_fields") else [own]:
                    for leaf in row:
                        leaves[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return sum(leaves.values())

    def check() -> None:
        nonlocal most
        stats = hand.rounds.stats()
        assert stats.slot_bytes + stats.cache_bytes <= memory
        held = 0 if hand.rounds._batch._state is None else buffers(hand.rounds._batch._state)
        most = max(most, stats.running + stats.reading)
        assert held <= max(stats.slot_bytes, hand.rounds._footprint(80))

    hand.finish(check)
    assert most >= 2
    assert hand.rounds.stats().slot_bytes == 0
    for ticket, request in zip(tickets, requests, strict=True):
        assert request.sampling is not None
        assert tokens(ticket) == tokens(alone(model, request.tokens, request.sampling))


def test_too_much_is_refused_and_the_rest_waits_in_order() -> None:
    model = decoder("softmax")
    need = ByHand(model).rounds._footprint
    hand = ByHand(model, memory=need(100))
    with pytest.raises(UserError, match="shorten it, or ask for fewer tokens"):
        hand.submit(Request([97] * 50, Sampling(max_tokens=60)))
    tickets = [hand.submit(Request([97 + n] * 40, Sampling(seed=n, max_tokens=20, ignore_eos=True))) for n in range(3)]
    hand.round()
    assert (hand.rounds.stats().waiting, tickets[1].usage.queued_s) == (2, None)
    hand.finish()
    assert [ticket.usage.completion_tokens for ticket in tickets] == [20] * 3


# ---- the thread


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(decoder("lightning"), BYTES, memory=1 << 28, queue=4) as engine:
        yield engine


def test_threads_and_coroutines_get_their_own_answers(engine: Engine) -> None:
    model = engine.decoder
    prompts = [list(b"prompt %d " % n * (1 + n % 3)) for n in range(12)]
    samplings = [Sampling(seed=n, max_tokens=15) for n in range(12)]
    got: dict[int, list[int]] = {}

    def visit(n: int) -> None:
        while n not in got:
            try:
                got[n] = tokens(engine.submit(Request(prompts[n], samplings[n])))
            except Full:
                threading.Event().wait(0.01)

    threads = [threading.Thread(target=visit, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {n: tokens(alone(model, prompts[n], samplings[n])) for n in range(12)}
    assert got == expected

    async def read(n: int) -> list[int]:
        return [event.token async for event in engine.submit(Request(prompts[n], samplings[n])).stream()]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*map(read, range(3)))

    assert asyncio.run(together()) == [expected[n] for n in range(3)]


def test_generate_cancels_when_it_is_left(engine: Engine) -> None:
    events = engine.generate("hello", Sampling(max_tokens=10_000, ignore_eos=True))
    assert isinstance(next(events), Event)
    events.close()
    while engine.stats().running:
        threading.Event().wait(0.01)
    assert engine.stats().finished == {"cancelled": 1}


def test_bad_requests_are_refused_in_one_sentence(engine: Engine) -> None:
    other = ByHand(decoder("lightning", seed=1))
    foreign = other.submit(Request([97, 98]))
    other.finish()
    cases: list[tuple[Request, str]] = [
        (Request([]), "at least one token"),
        (Request([257]), "ids from 0 to 256"),
        (Request([97], Sampling(logprobs=300)), "at most 257 alternatives"),
        (Request([97], Sampling(logit_bias={300: 1.0})), "logit_bias: expected ids"),
        (Request([97], Sampling(stop_token_ids=(257,))), "stop_token_ids: expected ids"),
        (Request([97], prompt_logprobs=258), "prompt_logprobs"),
        (Request([97], checkpoints=(2,)), "checkpoints"),
        (Request([97], state=foreign.snapshot()), "use the model that made it"),
    ]
    for request, reason in cases:
        with pytest.raises(UserError, match=reason):
            engine.submit(request)


def test_closing_drains_and_then_takes_nothing() -> None:
    engine = Engine(decoder("lightning"), BYTES, memory=1 << 28)
    ticket = engine.submit(Request([97] * 30, Sampling(seed=0, max_tokens=30, ignore_eos=True)))
    engine.close()
    assert len(list(ticket)) == 30
    assert not engine.alive
    with pytest.raises(Full, match="closing"):
        engine.submit(Request([97]))
    engine.close()
    endless = Engine(decoder("lightning"), BYTES, memory=1 << 28)
    ticket = endless.submit(Request([97], Sampling(max_tokens=10**9, ignore_eos=True)))
    endless.close(timeout=0.05)
    assert ticket.done
    assert endless.stats().finished == {"cancelled": 1}


def test_the_queue_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = threading.Event()
    monkeypatch.setattr(
        engine.decoder, "hidden", lambda *a, real=engine.decoder.hidden, **k: (hold.wait(), real(*a, **k))[1]
    )
    tickets = [engine.submit(Request([97, 98, 99]))]
    while not engine.stats().reading:
        threading.Event().wait(0.01)
    tickets += [engine.submit(Request([97, 98, 99])) for _ in range(4)]
    with pytest.raises(Full, match="4 requests are waiting already"):
        engine.submit(Request([97, 98, 99]))
    hold.set()
    assert all(list(ticket) == [] for ticket in tickets)


def test_a_fault_of_the_engine_reaches_everybody(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    engine = Engine(decoder("lightning"), BYTES, memory=1 << 28)
    monkeypatch.setattr(engine._rounds, "_let_in", lambda: 1 / 0)
    ticket = engine.submit(Request([97]))
    with pytest.raises(RuntimeError, match="it has stopped"):
        list(ticket)
    assert not engine.alive
    assert "ZeroDivisionError" in caplog.text
    engine.close()


def test_a_call_that_cannot_be_made_fails_its_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model = decoder("delta")
    hand = ByHand(model)
    hidden = model.hidden

    def picky(ids: Tensor, state: Any = None, *, span: Any = None) -> Any:
        if (ids == 200).any():
            raise MemoryError("too much")
        return hidden(ids, state, span=span)

    monkeypatch.setattr(model, "hidden", picky)
    sampling = Sampling(seed=0, max_tokens=4)
    good, bad = hand.submit(Request([97] * 9, sampling)), hand.submit(Request([200] * 9, sampling))
    hand.finish()
    with pytest.raises(RuntimeError, match="too much"):
        list(bad)
    monkeypatch.undo()
    assert tokens(good) == tokens(alone(model, [97] * 9, sampling))


def test_the_last_event_and_that_it_is_the_last_are_seen_together() -> None:
    """The engine's thread is stopped between the two for as long as somebody could see only one."""
    ticket = Ticket(None, prompt_tokens=1, cancel=lambda ticket: None)
    put, seen = ticket._put, []

    def slow(event: Event) -> None:
        put(event)
        threading.Event().wait(0.2)

    ticket._put = slow  # type: ignore[method-assign]
    ending = threading.Timer(0.05, ticket.end, kwargs={"event": Event(97, "a", None, (), "length")})

    async def read() -> None:
        ending.start()
        while not ticket._events:
            await asyncio.sleep(0.001)
        async for _ in ticket.stream():
            seen.append(ticket.done)

    asyncio.run(read())
    ending.join()
    assert seen == [True]


def test_states_on_disk_are_loaded_where_nobody_else_waits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = decoder("hybrid"), list(b"a prompt that was read before")
    with Engine(model, BYTES, memory=1 << 28, cache=tmp_path) as engine:
        first = tokens(engine.submit(Request(prompt, Sampling(seed=0, max_tokens=3))))
    threads: list[str] = []
    load = Snapshot.load

    def watched(*args: Any) -> Snapshot:
        threads.append(threading.current_thread().name)
        return load(*args)

    monkeypatch.setattr(Snapshot, "load", watched)
    with Engine(model, BYTES, memory=1 << 28, cache=tmp_path) as engine:
        ticket = engine.submit(Request(prompt, Sampling(seed=0, max_tokens=3)))
        assert tokens(ticket) == first
    assert ticket.usage.cached_tokens == len(prompt) - 1
    assert threads == [threading.current_thread().name]


def test_a_text_in_pieces_leaves_one_state_in_the_cache() -> None:
    model = decoder("lightning")
    hand = ByHand(model)
    state, text = None, list(b"once upon a time " * 20)
    for start in range(0, len(text), 50):
        ticket = hand.submit(Request(text[start : start + 50], state=state))
        hand.finish()
        state = ticket.snapshot()
    assert len(hand.cache._memory) == 1
    again = hand.submit(Request([*text, 97], Sampling(seed=0, max_tokens=3)))
    hand.finish()
    assert again.usage.cached_tokens == len(text) - 1
    assert tokens(again) == tokens(alone(model, [*text, 97], Sampling(seed=0, max_tokens=3)))


# ---- calls that stand still


@pytest.mark.parametrize("name", ["lightning", "hybrid"])
@pytest.mark.parametrize(("length", "writing"), [(1, False), (1, True), (300, True)])
def test_a_long_call_stands_still_for_a_shorter_request(
    name: str, writing: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has its first token before the call is over; and nothing that the call has done is done again."""
    model = decoder(name)
    hand = ByHand(model)
    long, short = list(b"a very long text " * 60), [97, *[98] * (length - 1)]
    sampling = Sampling(seed=1, max_tokens=6, ignore_eos=True)
    others = [hand.submit(Request([99], sampling.model_copy(update={"max_tokens": 40})))] if writing else []
    hand.round()
    waits = hand.submit(Request(long, sampling))
    arrived: list[Any] = []
    calls: list[int] = []
    first: list[int] = []
    forward = model.blocks[0].forward

    def arriving(*args: Any) -> Any:
        calls.append(args[0].shape[1])
        if not arrived and calls[-1] == 512:
            arrived.append(hand.submit(Request(short, sampling)))
            put = arrived[0].put
            arrived[0].put = lambda event: (first.append(waits.read), put(event))
        return forward(*args)

    monkeypatch.setattr(model.blocks[0], "forward", arriving)
    hand.finish()
    assert first[0] == 0  # tokens of the long one, which was at work on its first 512
    assert sum(count for count in calls if count > 1) == len(long) - 1 + length - 1  # the others are steps
    for ticket, prompt in [(waits, long), (arrived[0], short), *((other, [99]) for other in others)]:
        assert tokens(ticket) == tokens(alone(model, prompt, ticket.sampling))


class Clock:
    """Time that passes where it is asked for, and a step takes ten times as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.written = 0.0, 0.0
        step = Batch.step

        def stepped(batch: Batch) -> Any:
            self.now += 0.01
            self.written += 0.01
            return step(batch)

        monkeypatch.setattr(Batch, "step", stepped)
        monkeypatch.setattr(rounds, "time", self)

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now

    def thread_time(self) -> float:
        return 0.0


def test_who_writes_has_half_of_the_time_while_others_read(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, clock = ByHand(decoder("lightning")), Clock(monkeypatch)
    writer = hand.submit(Request([97], Sampling(seed=0, max_tokens=10_000, ignore_eos=True)))
    hand.round()
    reader = hand.submit(Request(list(b"a very long text " * 200)))
    began, written = clock.now, clock.written
    while not reader.done:
        hand.round()
    share = (clock.written - written) / (clock.now - began)
    assert 0.4 < share < 0.6
    writer.cancel()
    hand.finish()


def test_a_flood_of_short_requests_does_not_stop_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody new comes whenever anybody could have a turn."""
    hand, clock = ByHand(decoder("lightning")), Clock(monkeypatch)
    quiet = ByHand(decoder("lightning"))
    text = list(b"a very long text " * 150)
    began = clock.now
    quiet.submit(Request(text))
    quiet.finish()
    alone_s, began = clock.now - began, clock.now
    long, look = hand.submit(Request(text)), hand.rounds._look

    def flooded() -> None:
        if not hand.arrived:
            hand.submit(Request([97, 98], Sampling(seed=0, max_tokens=1)))
        look()

    monkeypatch.setattr(hand.rounds, "_look", flooded)
    while not long.done:
        hand.round()
        assert clock.now - began < 2 * (1 + rounds.PATIENCE) * alone_s + rounds.CREDIT
    hand.finish()


def test_calls_of_a_model_whose_attention_takes_ever_longer_become_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation over all that was read, a microsecond for every token and everything before it; a step takes one."""
    model = decoder("softmax")
    hand, clock, calls = ByHand(model), Clock(monkeypatch), []
    monkeypatch.setattr(clock, "thread_time", lambda: clock.now)
    forward = model.blocks[0].forward

    def reading(x: Tensor, *args: Any) -> Any:
        outputs = forward(x, *args)
        calls.append(x.shape[1])
        clock.now += 1e-6 * x.shape[1] * sum(calls)
        return outputs

    text = list(b"a long text " * 500)
    before = hand.submit(Request([97], Sampling(seed=0, max_tokens=2)))
    hand.finish()
    assert before.done
    monkeypatch.setattr(model.blocks[0], "forward", reading)
    hand.submit(Request(text))
    hand.finish()
    assert calls[0] == 512
    assert sum(calls) == len(text) - 1
    assert calls[:-1] == sorted(calls[:-1], reverse=True)
    assert calls[-2] == 32


@pytest.mark.parametrize("name", ["lightning", "softmax"])
def test_a_call_ends_when_nobody_waits_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(name)
    hand = ByHand(model)
    text = list(b"a long text " * 200)
    ticket = hand.submit(Request(text))
    hand.round()
    forward, last = model.blocks[0].forward, model.blocks[-1].forward

    def leaving(*args: Any) -> Any:
        ticket.cancel()
        return forward(*args)

    def never(*args: Any) -> Any:
        raise AssertionError("it went on to the end")

    monkeypatch.setattr(model.blocks[0], "forward", leaving)
    monkeypatch.setattr(model.blocks[-1], "forward", never)
    hand.finish()
    monkeypatch.setattr(model.blocks[0], "forward", forward)
    monkeypatch.setattr(model.blocks[-1], "forward", last)
    assert hand.rounds.stats().finished == {"cancelled": 1}
    again = hand.submit(Request(text, Sampling(seed=0, max_tokens=4)))
    hand.finish()
    assert again.usage.cached_tokens == 512
    assert tokens(again) == tokens(alone(model, text, Sampling(seed=0, max_tokens=4)))
