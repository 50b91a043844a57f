"""Reading and writing with a state: prefill in chunks of bounded memory, then one step per token.

    read      state, chain <- tokens up to the last but one;  unread <- the last token
    generate  logits, state <- decoder(unread, state);  unread <- draw(logits)

The last token always stays unread. What a session is, and what it saves, is therefore the same after reading and after
writing, no logits are kept, and a continued session takes exactly the steps that an uninterrupted one takes.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.infer.answer import Answer, Event
from isotach.infer.calls import read
from isotach.infer.chain import TokenChain
from isotach.infer.graphs import Stepper
from isotach.infer.sample import Sampling, draw
from isotach.infer.snapshot import Past, Snapshot
from isotach.models.decoder import Decoder

CHUNK = 2048  # tokens per prefill call: tnl-10m on a CPU reads 9 % slower with 1024 and 2 % faster with 4096

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]


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
        self._stepper = Stepper(decoder, values=True)

    def __len__(self) -> int:
        """Tokens read and written so far."""
        return 0 if self.past is None else self.past.tokens

    def read(self, prompt: Prompt | Iterator[Prompt], *, chunk: int = CHUNK) -> None:
        """Read text or ids behind everything so far, `chunk` tokens per call of the decoder.

        An iterator's pieces are read as they come, so a file of any length is read in the memory of one chunk; each
        piece of text is tokenized by itself. Raises UserError for ids that the tokenizer does not have.
        """
        waiting = [] if self.past is None or self.past.unread is None else [self.past.unread]
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
        if self.past is None or self.past.unread is None:
            raise UserError("generate: expected at least one token to continue, got none; give it some text first")
        return self._generate(self.past, self.past.unread, Answer(self.tokenizer, sampling, self.past.unread))

    def _generate(self, past: Past, unread: int, answer: Answer) -> Iterator[Event]:
        unshown: list[tuple[int, Past]] = []  # tokens read that may yet turn out to be inside a stop string
        finish = None
        while finish is None:
            state = self.decoder.initial() if past.state is None else past.state
            logits, state = self._stepper.step([unread], state)
            chain = past.chain.extended([unread])
            (drawn,) = draw(
                logits, [answer.sampling], positions=[chain.length], seen=chain.seen[None], bias=[answer.bias()]
            )
            event = answer.event(drawn)
            finish = event.finish
            if not answer.ended:
                before, unread = unread, drawn.token
                past = Past(state, chain, unread)
                unshown.append((before, past))
            while len(unshown) > answer.hidden:
                before, shown = unshown.pop(0)
                self._move(shown, [before])
            yield event

    def fork(self) -> "Session":
        """An independent session with the same past, which costs nothing: states are values."""
        other = Session(self.decoder, self.tokenizer, keep_tokens=False)
        other.past, other._stepper = self.past, self._stepper
        other.tokens = None if self.tokens is None else self.tokens[:]
        return other

    def save(self, path: Path) -> None:
        """Write the session to one file, whose size is that of the state: no token but the unread one is in it."""
        if self.past is None or self.past.state is None:
            raise UserError(f"{path}: expected a session of at least two tokens to save, got {len(self)}; read a text")
        Snapshot.of(self.past, weights=self.decoder.fingerprint(), tokenizer=self.tokenizer).save(path)

    @classmethod
    def load(cls, path: Path, decoder: Decoder, tokenizer: Tokenizer) -> "Session":
        """Go on where `save` stopped, reading nothing again: the same tokens as if it had never stopped.

        Raises UserError for a file that is missing, damaged, or of another model, precision or tokenizer.
        """
        session = cls(decoder, tokenizer, keep_tokens=False)
        session.past = Snapshot.load(path, decoder, tokenizer).past
        return session

    def nbytes(self) -> int:
        """Bytes of the state; constant in the number of tokens when every mixer is linear."""
        return 0 if self.past is None or self.past.state is None else self.past.state.nbytes()

    def _absorb(self, ids: list[int], *, unread: int) -> None:
        state, chain = None, TokenChain.empty(self.tokenizer.vocab_size)
        if self.past is not None:
            state, chain = self.past.state, self.past.chain
        if ids:
            _, state = read(self.decoder, ids, state)
        self._move(Past(state, chain.extended(ids), unread), ids)

    def _move(self, past: Past, read: list[int]) -> None:
        self.past = past
        if self.tokens is not None:
            self.tokens.extend(read)


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
