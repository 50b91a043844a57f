"""The identity of a sequence of tokens in constant memory: h_{n+1} = sha256(h_n ‖ id_{n+1}), h_0 = sha256("")."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

EMPTY = hashlib.sha256().digest()
SIZE = len(EMPTY)


def digests(ids: Iterable[int], digest: bytes = EMPTY) -> Iterator[bytes]:
    """The chain's digest after every one of `ids`, each hashed as 8 bytes, little-endian, on from `digest`."""
    for token in ids:
        digest = hashlib.sha256(digest + token.to_bytes(8, "little")).digest()
        yield digest


class Digests:
    """The chain's digests after each of some tokens, 32 bytes a token.

    - start: tokens before them.
    """

    def __init__(self, ids: Iterable[int], *, start: int = 0, digest: bytes = EMPTY) -> None:
        self.start = start
        self._joined = b"".join(digests(ids, digest))

    def at(self, position: int) -> bytes:
        """After `position` tokens in all, more than `start`."""
        after = SIZE * (position - self.start)
        return self._joined[after - SIZE : after]


@dataclass(frozen=True, slots=True, eq=False)
class TokenChain:
    """What is remembered of the tokens that a state has read; extending gives a new chain.

    A running sha256 of all ids would be as cheap, but it could be neither stored nor continued.
    """

    digest: bytes
    length: int
    seen: Bool[Tensor, " vocab"]  # which ids occurred: all that a repetition penalty needs

    @classmethod
    def empty(cls, vocab: int) -> "TokenChain":
        return cls(EMPTY, 0, torch.zeros(vocab, dtype=torch.bool))

    def extended(self, ids: Sequence[int]) -> "TokenChain":
        """The chain after `ids`."""
        *_, digest = self.digest, *digests(ids, self.digest)
        seen = self.seen
        if len(ids) != 1 or not seen[ids[0]]:  # one more token is most often one that was there already
            seen = seen.clone()
            seen[torch.tensor(ids, dtype=torch.int64)] = True
        return TokenChain(digest, self.length + len(ids), seen)
