"""Many sequences over one decoder: read packed, write in step, come and go between two tokens.

Nothing here waits, chooses or keeps: who reads how much, and who is let in, is for the caller to say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.infer.answer import Answer, Event
from isotach.infer.calls import read, read_packed
from isotach.infer.chain import TokenChain
from isotach.infer.generate import CHUNK, Prompt, check_vocabulary, encode
from isotach.infer.graphs import Stepper
from isotach.infer.sample import Drawn, Sampling, draw
from isotach.infer.snapshot import Past
from isotach.models.decoder import Decoder
from isotach.models.state import DecoderState

REPLAY = 32  # tokens after which it pays to read what is shown again, rather than to remember it


@dataclass(eq=False, slots=True)
class Reading:
    """Tokens on their way into a state; the last one stays unread.

    - ids: all of them, the unread last; done: how many were read.
    - state, chain: after those.
    """

    ids: Sequence[int]
    state: DecoderState
    chain: TokenChain
    done: int = 0

    @property
    def left(self) -> int:
        return len(self.ids) - 1 - self.done

    @property
    def past(self) -> Past:
        return Past(self.state, self.chain, self.ids[self.done])


def advance(decoder: Decoder, slices: Sequence[tuple[Reading, int]]) -> list[Float[Tensor, "T D"]]:
    """Read the next so many tokens of each, at least one, in one call; what the head would read of each token.

    Where the call fails nothing has happened.
    """
    parts = [(reading.ids[reading.done : reading.done + count], reading.state) for reading, count in slices]
    outputs = []
    for (reading, count), (ids, _), (hidden, state) in zip(slices, parts, read_packed(decoder, parts), strict=True):
        reading.state, reading.chain = state, reading.chain.extended(ids)
        reading.done += count
        outputs.append(hidden)
    return outputs


@dataclass(eq=False, slots=True)
class Row:
    """One sequence that is being written.

    - chain, unread: of its past; the state is in the batch.
    - shown: while tokens are hidden, a past up to none of them; behind: the tokens after it.
    """

    answer: Answer
    chain: TokenChain
    unread: int
    shown: Past | None = None
    behind: list[int] = field(default_factory=list)


class Batch:
    """Rows that step together, each as if it were alone.

    The states of all rows lie side by side, but for what grows with the tokens read, which stays with its row. When
    rows come or go, the others' states of constant size are copied once, in the step after it.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self._decoder, self._tokenizer = decoder, tokenizer
        self._stepper = Stepper(decoder, values=False)
        self._rows: list[Row] = []
        self._state: DecoderState | None = None  # of these rows
        self._joining: dict[Row, DecoderState] = {}
        self._leaving: set[Row] = set()

    def __len__(self) -> int:
        return len(self._rows) + len(self._joining) - len(self._leaving)

    def join(self, past: Past, answer: Answer) -> Row:
        """A row that writes on after `past`, which has read something or nothing, and has an unread token."""
        assert past.state is not None and past.unread is not None  # noqa: PT018
        row = Row(answer, past.chain, past.unread)
        self._joining[row] = past.state
        return row

    def leave(self, row: Row) -> Past:
        """Take a row out; what it leaves behind, without the tokens whose text was not shown."""
        if row in self._joining:
            return Past(self._joining.pop(row), row.chain, row.unread)
        past = self._shown(row)
        self._leaving.add(row)
        self._let_go()
        return past

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Event | Exception, Past | None]]:
        """One token for every row: its event, or why it has failed.

        A row whose event has `finish` set is out of the batch, and its past is there: up to the last token whose text
        was shown. So is one that has failed, and leaves nothing.
        """
        self._settle()
        if self._state is None:
            return []
        before = self._state
        logits, self._state = self._stepper.step([row.unread for row in self._rows], before)
        chains = [row.chain.extended([row.unread]) for row in self._rows]
        outcomes: list[tuple[Row, Event | Exception, Past | None]] = []
        for place, drawn in enumerate(self._draw(logits, chains)):
            row = self._rows[place]
            outcome, past = self._moved(row, drawn, chains[place], before, place)
            if past is not None or isinstance(outcome, Exception):
                self._leaving.add(row)
            outcomes.append((row, outcome, past))
        self._let_go()
        return outcomes

    def _moved(
        self, row: Row, drawn: Drawn | Exception, chain: TokenChain, before: DecoderState, place: int
    ) -> tuple[Event | Exception, Past | None]:
        """A row's event, and its past where it is finished; `chain` has read the unread token, `before` has not."""
        if isinstance(drawn, Exception):
            return drawn, None
        try:
            event = row.answer.event(drawn)
        except Exception as error:  # noqa: BLE001  of a constraint, which is a plug-in
            return error, None
        if row.answer.ended:  # the token is not remembered, so neither is that the one before it was read
            return event, self._shown(row) if row.answer.hidden else Past(_row(before, place), row.chain, row.unread)
        if row.answer.hidden and row.shown is None:
            row.shown = Past(_row(before, place), row.chain, row.unread)
        row.chain, row.unread = chain, drawn.token
        if not row.answer.hidden:
            row.shown, row.behind = None, []
        else:
            row.behind.append(drawn.token)
            if len(row.behind) >= row.answer.hidden + REPLAY:
                row.shown = self._shown(row)
                row.behind = row.behind[-row.answer.hidden :]
        return event, None if event.finish is None else self._shown(row)

    def _shown(self, row: Row) -> Past:
        """The row's past up to the last token whose text was shown."""
        if row.shown is None:
            assert self._state is not None
            return Past(_row(self._state, self._rows.index(row)), row.chain, row.unread)
        state, chain, unread = row.shown
        again = row.behind[: len(row.behind) - row.answer.hidden]
        if not again or unread is None:
            return row.shown
        ids = [unread, *again[:-1]]
        return Past(read(self._decoder, ids, state)[1], chain.extended(ids), again[-1])

    def _let_go(self) -> None:
        """Free what rows that leave hold: what grows at once, the rest with the copy that the next step makes."""
        if self._leaving and (self._state is None or self._state.grows or not len(self)):
            self._settle()

    def _settle(self) -> None:
        """Let rows out and in."""
        if not self._leaving and not self._joining:
            return
        stay = [place for place, row in enumerate(self._rows) if row not in self._leaving]
        if self._state is not None and stay:
            kept = torch.tensor(stay, device=self._state.positions.device)
            self._state = self._state.exchanged(kept, [*self._joining.values()])
        else:
            self._state = DecoderState.cat([*self._joining.values()]) if self._joining else None
        self._rows = [*(self._rows[place] for place in stay), *self._joining]
        self._joining, self._leaving = {}, set()

    def _draw(self, logits: Float[Tensor, "R vocab"], chains: Sequence[TokenChain]) -> Iterator[Drawn | Exception]:
        """The next token of every row; where one has none, the others still have theirs."""
        bias: list[Tensor | Exception | None] = []
        for row in self._rows:
            try:
                bias.append(row.answer.bias())
            except Exception as error:  # noqa: BLE001  of a constraint, which is a plug-in
                bias.append(error)

        def drawn(places: Sequence[int]) -> list[Drawn]:
            return draw(
                logits[list(places)],
                [self._rows[place].answer.sampling for place in places],
                positions=[chains[place].length for place in places],
                seen=torch.stack([chains[place].seen for place in places]),
                bias=[own for place in places if not isinstance(own := bias[place], Exception)],
            )

        if not any(isinstance(own, Exception) for own in bias):
            try:
                yield from drawn(range(len(bias)))
                return
            except UserError:
                pass  # some row has no next token: find out which
        for place, own in enumerate(bias):
            if isinstance(own, Exception):
                yield own
                continue
            try:
                yield drawn([place])[0]
            except UserError as error:
                yield error


def _row(state: DecoderState, place: int) -> DecoderState:
    return state.select(torch.tensor([place], device=state.positions.device))


def generate_batch(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    *,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, Event]]:
    """Continue every prompt as `Session.generate` would alone, all in one batch; yields (index of the prompt, event).

    Prompts of any lengths are read packed, at most `chunk` tokens per call of the decoder; then the batch steps
    together, and a row leaves when it is finished. Each row has its own seed, filters and stop strings.
    """
    check_vocabulary(decoder, tokenizer)
    if len(prompts) != len(samplings):
        raise UserError(f"generate: expected one sampling per prompt, got {len(samplings)} for {len(prompts)} prompts")
    ids = [encode(tokenizer, prompt).tolist() for prompt in prompts]
    for index, row in enumerate(ids, 1):
        if not row:
            raise UserError(f"generate: prompt {index} of {len(ids)} is empty; give it at least one token")
    answers = [Answer(tokenizer, sampling, row[-1]) for sampling, row in zip(samplings, ids, strict=True)]
    return _generate_batch(decoder, tokenizer, ids, answers, chunk)


def _generate_batch(
    decoder: Decoder, tokenizer: Tokenizer, ids: list[list[int]], answers: list[Answer], chunk: int
) -> Iterator[tuple[int, Event]]:
    if not ids:
        return
    initial, empty = decoder.initial(), TokenChain.empty(tokenizer.vocab_size)
    readings = [Reading(row, initial, empty) for row in ids]
    for slices in _slices(readings, chunk):
        advance(decoder, slices)
    batch = Batch(decoder, tokenizer)
    index = {batch.join(one.past, answer): n for n, (one, answer) in enumerate(zip(readings, answers, strict=True))}
    del readings
    while len(batch):
        for row, outcome, _ in batch.step():
            if isinstance(outcome, Exception):
                raise outcome
            yield index[row], outcome


def _slices(readings: Sequence[Reading], chunk: int) -> Iterator[list[tuple[Reading, int]]]:
    """Everything that is to be read, in calls of at most `chunk` tokens."""
    slices: list[tuple[Reading, int]] = []
    room = chunk
    for reading in readings:
        left = reading.left
        while left:
            count = min(left, room)
            slices.append((reading, count))
            left, room = left - count, room - count
            if not room:
                yield slices
                slices, room = [], chunk
    if slices:
        yield slices
