"""Reading and writing with a state: prefill in chunks of bounded memory, then one step per token.

    read      state, chain <- tokens up to the last but one;  unread <- the last token
    generate  logits, state <- decoder(unread, state);  unread <- draw(logits)

The last token always stays unread. What a session is, and what it saves, is therefore the same after reading and after
writing, no logits are kept, and a continued session takes exactly the steps that an uninterrupted one takes.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from isotach.config import Config
from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.infer.chain import TokenChain
from isotach.infer.sample import Drawn, Sampling, draw
from isotach.infer.text import StoppedText
from isotach.models.decoder import Decoder
from isotach.models.state import DecoderState
from isotach.ops.engine import Span

CHUNK = 2048  # tokens per prefill call: tnl-10m on a CPU reads 9 % slower with 1024 and 2 % faster with 4096

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Event:
    """One generated token.

    - token: its id.
    - text: the text it settles; it may be empty (an unfinished character, a possible stop string) or reach back.
    - logprob: of the token under the model before every filter, in nats; None unless asked for.
    - top: the likeliest tokens and their log-probabilities, as many as asked for.
    - finish: why generation ends with this token: the end-of-text token, a stop string, or max_tokens; else None.
    """

    token: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish: Finish | None


class Past(NamedTuple):
    """What the tokens so far have left behind.

    - state: the decoder's state; None when there is but one token, the unread one.
    - chain: identity and count of the tokens that the state has read.
    - unread: the last token, which the state has not read.
    """

    state: DecoderState | None
    chain: TokenChain
    unread: int


class Session:
    """A decoder, a tokenizer, and the past of one conversation.

    - past: None before the first prompt. Replaced as a whole, never changed, so that an interrupted call leaves a
      session that can go on.
    - tokens: the ids that the state has read, four bytes each; None when `keep_tokens` is False or the session was
      loaded from a file. Nothing else grows with the length of the session but what growing mixers keep.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, *, keep_tokens: bool = True) -> None:
        check_vocabulary(decoder, tokenizer)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.past: Past | None = None
        self.tokens: array[int] | None = array("I") if keep_tokens else None

    def __len__(self) -> int:
        """Tokens read and written so far."""
        return 0 if self.past is None else self.past.chain.length + 1

    def read(self, prompt: Prompt | Iterator[Prompt], *, chunk: int = CHUNK) -> None:
        """Read text or ids behind everything so far, `chunk` tokens per call of the decoder.

        An iterator's pieces are read as they come, so a file of any length is read in the memory of one chunk; each
        piece of text is tokenized by itself. Raises UserError for ids that the tokenizer does not have.
        """
        waiting = [] if self.past is None else [self.past.unread]
        for piece in prompt if isinstance(prompt, Iterator) else (prompt,):
            ids = encode(self.tokenizer, piece)
            for start in range(0, len(ids), chunk):
                waiting += ids[start : start + chunk].tolist()
                while len(waiting) > chunk:
                    self._absorb(waiting[:chunk], unread=waiting[chunk])
                    waiting = waiting[chunk:]
        if waiting:
            self._absorb(waiting[:-1], unread=waiting[-1])

    def generate(self, sampling: Sampling) -> Iterator[Event]:
        """Write until the end-of-text token, a stop string or max_tokens.

        The session grows by the tokens whose text was handed out: it is up to date at every event, so the caller may
        stop at any of them, then read on, generate again, save or fork. Tokens inside a stop string are left out, and
        so is the end-of-text token, beyond which no model is trained.

        The draw at a position is a function of sampling.seed and the position, so generating 10 and then 20 tokens with
        one seed gives the same tokens as generating 30; `sampling.seeded()` fixes a seed that can be reported. Text is
        decoded from the first token of this call on: a character cut by an earlier max_tokens is not mended.
        """
        check_logprobs(sampling, self.tokenizer)
        if self.past is None:
            raise UserError("generate: expected at least one token to continue, got none; give it some text first")
        return self._generate(self.past, _Request(self.tokenizer, sampling, self.past.unread))

    def _generate(self, past: Past, request: "_Request") -> Iterator[Event]:
        unshown: list[tuple[int, Past]] = []  # tokens read that may yet turn out to be inside a stop string
        finish = None
        while finish is None:
            logits, state = _step(self.decoder, [past.unread], past.state)
            chain = past.chain.extended([past.unread])
            (drawn,) = draw(logits, [request.sampling], positions=[chain.length], seen=chain.seen[None])
            event = request.event(drawn)
            finish = event.finish
            if finish != "eos":
                read, past = past.unread, Past(state, chain, drawn.token)
                unshown.append((read, past))
            while len(unshown) > request.hidden:
                read, shown = unshown.pop(0)
                self._move(shown, [read])
            yield event

    def fork(self) -> "Session":
        """An independent session with the same past, which costs nothing: states are values."""
        other = Session(self.decoder, self.tokenizer, keep_tokens=False)
        other.past = self.past
        other.tokens = None if self.tokens is None else self.tokens[:]
        return other

    def save(self, path: Path) -> None:
        """Write the session to one file, whose size is that of the state: no token but the unread one is in it."""
        if self.past is None or self.past.state is None:
            raise UserError(f"{path}: expected a session of at least two tokens to save, got {len(self)}; read a text")
        chain = self.past.chain
        tokens = _SavedTokens(
            chain=chain.digest.hex(),
            read=chain.length,
            seen=np.packbits(chain.seen.numpy()).tobytes().hex(),
            unread=self.past.unread,
            tokenizer=self.tokenizer.fingerprint,
        )
        self.past.state.save(path, weights=self.decoder.fingerprint(), tokens=tokens.model_dump_json())

    @classmethod
    def load(cls, path: Path, decoder: Decoder, tokenizer: Tokenizer) -> "Session":
        """Go on where `save` stopped, reading nothing again: the same tokens as if it had never stopped.

        Raises UserError for a file that is missing, damaged, or of another model, precision or tokenizer.
        """
        session = cls(decoder, tokenizer, keep_tokens=False)
        state = DecoderState.load(path, decoder=decoder, tokens=None)
        saved = _SavedTokens.of(path)
        if saved.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"state {path}: expected the tokenizer of this model, got another; use the one it began with"
            )
        packed = np.frombuffer(bytes.fromhex(saved.seen), np.uint8)
        seen = np.unpackbits(packed, count=tokenizer.vocab_size).astype(bool)
        if state.positions.tolist() != [saved.read] or saved.unread >= tokenizer.vocab_size:
            raise UserError(
                f"state {path}: expected one sequence of {saved.read} tokens, got another; use another copy"
            )
        chain = TokenChain(bytes.fromhex(saved.chain), saved.read, torch.from_numpy(seen))
        session.past = Past(state, chain, saved.unread)
        return session

    def nbytes(self) -> int:
        """Bytes of the state; constant in the number of tokens when every mixer is linear."""
        return 0 if self.past is None or self.past.state is None else self.past.state.nbytes()

    def _absorb(self, ids: list[int], *, unread: int) -> None:
        state, chain = None, TokenChain.empty(self.tokenizer.vocab_size)
        if self.past is not None:
            state, chain = self.past.state, self.past.chain
        if ids:
            _, state = _hidden(self.decoder, ids, state, None)
        self._move(Past(state, chain.extended(ids), unread), ids)

    def _move(self, past: Past, read: list[int]) -> None:
        self.past = past
        if self.tokens is not None:
            self.tokens.extend(read)


class _SavedTokens(Config):
    """What a state's file says of the tokens it has read; bytes are hex."""

    chain: str = Field(pattern="^[0-9a-f]{64}$")
    read: int = Field(ge=1)
    seen: str = Field(pattern="^([0-9a-f]{2})*$")
    unread: int = Field(ge=0)
    tokenizer: str

    @classmethod
    def of(cls, path: Path) -> "_SavedTokens":
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("tokens", "")
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            raise UserError(f"state {path}: expected the state of a session, got a bare one; save a Session") from None


class _Request:
    """The writing side of one request: what it asked for and how far it got."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, before: int) -> None:
        self.sampling = sampling.seeded()
        self._eos = tokenizer.eos
        self._text = StoppedText(tokenizer, sampling.stop, before=before)
        self._written = 0

    @property
    def hidden(self) -> int:
        """How many of the last tokens have shown none of their text."""
        return self._text.hidden

    def event(self, drawn: Drawn) -> Event:
        """The event of the next token; its `finish` says whether it is the last."""
        self._written += 1
        finish: Finish | None = None
        if drawn.token == self._eos:
            text, finish = self._text.finish(), "eos"
        else:
            text = self._text.push(drawn.token)
            if self._text.stopped:
                finish = "stop"
            elif self._written == self.sampling.max_tokens:
                text, finish = text + self._text.finish(), "length"
        return Event(drawn.token, text, drawn.logprob, drawn.top, finish)


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
    for sampling in samplings:
        check_logprobs(sampling, tokenizer)
    ids = [encode(tokenizer, prompt).tolist() for prompt in prompts]
    for index, row in enumerate(ids, 1):
        if not row:
            raise UserError(f"generate: prompt {index} of {len(ids)} is empty; give it at least one token")
    return _generate_batch(decoder, tokenizer, ids, samplings, chunk)


def _generate_batch(
    decoder: Decoder, tokenizer: Tokenizer, ids: list[list[int]], samplings: Sequence[Sampling], chunk: int
) -> Iterator[tuple[int, Event]]:
    if not ids:
        return
    rows = list(range(len(ids)))
    requests = [_Request(tokenizer, sampling, row[-1]) for sampling, row in zip(samplings, ids, strict=True)]
    chains = [TokenChain.empty(tokenizer.vocab_size).extended(row) for row in ids]
    logits, state = _prefill(decoder, ids, chunk)
    while True:
        drawn = draw(
            logits,
            [requests[row].sampling for row in rows],
            positions=[chains[row].length for row in rows],
            seen=torch.stack([chains[row].seen for row in rows]),
        )
        events = [requests[row].event(one) for row, one in zip(rows, drawn, strict=True)]
        yield from zip(rows, events, strict=True)
        stay = [place for place, event in enumerate(events) if event.finish is None]
        if not stay:
            return
        if len(stay) < len(rows):
            state = state.select(torch.tensor(stay, device=logits.device))
            rows = [rows[place] for place in stay]
        tokens = [drawn[place].token for place in stay]
        for row, token in zip(rows, tokens, strict=True):
            chains[row] = chains[row].extended([token])
        logits, state = _step(decoder, tokens, state)


def _prefill(decoder: Decoder, prompts: list[list[int]], chunk: int) -> tuple[Float[Tensor, "R vocab"], DecoderState]:
    """Logits after the last token of every prompt, and the state: one row per prompt, in their order.

    Neighbours that fit into one chunk share a packed call; a longer prompt is read alone, chunk after chunk.
    """
    logits, states = [], []
    for group in _groups(prompts, chunk):
        if len(group) == 1:
            first, *rest = (group[0][start : start + chunk] for start in range(0, len(group[0]), chunk))
            hidden, state = _hidden(decoder, first, None, None)
            for piece in rest:
                hidden, state = _hidden(decoder, piece, state, None)
            last = hidden[:, -1]
        else:
            lengths = torch.tensor([len(prompt) for prompt in group], device=decoder.device)
            bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            packed = [token for prompt in group for token in prompt]
            hidden, state = _hidden(decoder, packed, None, Span.packed(bounds))
            last = hidden[0, bounds[1:] - 1]
        logits.append(_head(decoder, last))
        states.append(state)
    return torch.cat(logits), DecoderState.cat(states)


def _groups(prompts: list[list[int]], chunk: int) -> Iterator[list[list[int]]]:
    """Runs of neighbouring prompts with at most `chunk` tokens together; a longer prompt is a run of its own."""
    group: list[list[int]] = []
    room = chunk
    for prompt in prompts:
        if group and len(prompt) > room:
            yield group
            group, room = [], chunk
        group.append(prompt)
        room -= len(prompt)
    yield group


@torch.inference_mode()
def _hidden(
    decoder: Decoder, ids: Sequence[int], state: DecoderState | None, span: Span | None
) -> tuple[Float[Tensor, "1 T D"], DecoderState]:
    """Read one row of tokens without computing logits, which would cost vocabulary times chunk in memory."""
    return decoder.hidden(torch.tensor([ids], device=decoder.device), state, span=span)


@torch.inference_mode()
def _head(decoder: Decoder, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R vocab"]:
    return decoder.head(hidden)


@torch.inference_mode()
def _step(
    decoder: Decoder, tokens: list[int], state: DecoderState | None
) -> tuple[Float[Tensor, "R vocab"], DecoderState]:
    """One token for every row."""
    logits, state = decoder(torch.tensor(tokens, device=decoder.device)[:, None], state)
    return logits[:, -1], state


def encode(tokenizer: Tokenizer, prompt: Prompt) -> NDArray[np.integer[Any]]:
    """The ids (tokens,) of a prompt; UserError for ids that the tokenizer does not have."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else np.asarray(prompt)
    if ids.size == 0:
        return np.empty(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise UserError(f"prompt: expected text or a row of ids from 0 to {tokenizer.vocab_size - 1}, got {ids}")
    return ids


def check_vocabulary(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Raise UserError when the tokenizer has ids that the model lacks; a padded model vocabulary is fine."""
    if tokenizer.vocab_size > decoder.config.vocab:
        raise UserError(
            f"tokenizer: expected at most the model's {decoder.config.vocab} tokens, got {tokenizer.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def check_logprobs(sampling: Sampling, tokenizer: Tokenizer) -> None:
    if sampling.logprobs is not None and sampling.logprobs > tokenizer.vocab_size:
        raise UserError(f"logprobs: expected at most {tokenizer.vocab_size} alternatives, got {sampling.logprobs}")
