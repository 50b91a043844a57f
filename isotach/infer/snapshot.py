"""A conversation as one immutable value that knows what it belongs to, in memory and as a file."""

import base64
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError

from isotach.config import Config
from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.infer.chain import TokenChain
from isotach.models.decoder import Decoder
from isotach.models.state import DecoderState, Origin, StateFile

BASE64 = r"^([0-9A-Za-z+/]{4})*([0-9A-Za-z+/]{2}==|[0-9A-Za-z+/]{3}=)?$"


class Past(NamedTuple):
    """What the tokens so far have left behind.

    - state: the decoder's state; None where it has read nothing yet.
    - chain: identity and count of the tokens that the state has read.
    - unread: the last token, which the state has not read; None where it has read them all.
    """

    state: DecoderState | None
    chain: TokenChain
    unread: int | None

    @property
    def tokens(self) -> int:
        """How many it stands for."""
        return self.chain.length + (self.unread is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A past that is bound to the model and the tokenizer that made it.

    - weights: the decoder's fingerprint, which its precision is part of; tokenizer: the tokenizer's.
    """

    state: DecoderState
    chain: TokenChain
    unread: int | None
    weights: str
    tokenizer: str

    @classmethod
    def of(cls, past: Past, *, weights: str, tokenizer: Tokenizer) -> "Snapshot":
        assert past.state is not None, "a past without a state has nothing to keep"
        return cls(past.state, past.chain, past.unread, weights, tokenizer.fingerprint)

    @property
    def past(self) -> Past:
        return Past(self.state, self.chain, self.unread)

    @property
    def tokens(self) -> int:
        """How many it stands for."""
        return self.past.tokens

    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.state.nbytes()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one file, whose size is that of the state: no token but the unread one is in it."""
        saved = SavedTokens(
            chain=self.chain.digest.hex(),
            read=self.chain.length,
            seen=base64.b64encode(np.packbits(self.chain.seen.numpy()).tobytes()).decode(),
            unread=self.unread,
            tokenizer=self.tokenizer,
        )
        self.state.save(path, weights=self.weights, tokens=saved.model_dump_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], origin: Origin, tokenizer: Tokenizer) -> "Snapshot":
        """What `save` wrote. UserError for a file that is missing, damaged, or of another model, precision or
        tokenizer."""
        file = StateFile.read(path)
        state, saved = file.state(origin), SavedTokens.of(file)
        if saved.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"state {path}: expected the tokenizer of this model, got another; use the one it began with"
            )
        vocab = tokenizer.vocab_size
        packed = np.frombuffer(base64.b64decode(saved.seen), np.uint8)
        fits = len(packed) == -(-vocab // 8) and (saved.unread is None or saved.unread < vocab)
        if state.positions.tolist() != [saved.read] or not fits:
            raise UserError(
                f"state {path}: expected one sequence of {saved.read} tokens, got another; use another copy"
            )
        seen = torch.from_numpy(np.unpackbits(packed, count=vocab).astype(bool))
        chain = TokenChain(bytes.fromhex(saved.chain), saved.read, seen)
        return cls(state, chain, saved.unread, origin.fingerprint(), saved.tokenizer)


class KnownOrigin:
    """What states of a decoder are held against, found out once: its weights must stay as they are."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._fingerprint, self._template = decoder.fingerprint(), decoder.template()

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    def fingerprint(self) -> str:
        return self._fingerprint

    def template(self) -> DecoderState:
        return self._template

    def stored(self, block: int, name: str, context: int) -> int:
        return self._decoder.stored(block, name, context)


class SavedTokens(Config):
    """What a state's file says of the tokens it has read."""

    chain: str = Field(pattern="^[0-9a-f]{64}$")
    read: int = Field(ge=0, lt=2**63)
    seen: str = Field(pattern=BASE64)  # which ids, a bit each
    unread: int | None = Field(ge=0)
    tokenizer: str

    @classmethod
    def of(cls, file: StateFile) -> "SavedTokens":
        """UserError for the state of something else than a session."""
        try:
            return cls.model_validate_json(file.tokens)
        except ValidationError:
            message = f"state {file.path}: expected the state of a session, got a bare one; save a Session"
            raise UserError(message) from None
