"""The identity of a sequence of tokens in constant memory: h_{n+1} = sha256(h_n ‖ id_{n+1}), h_0 = sha256("")."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor


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
        return cls(hashlib.sha256().digest(), 0, torch.zeros(vocab, dtype=torch.bool))

    def extended(self, ids: Sequence[int]) -> "TokenChain":
        """The chain after `ids`, each hashed as 8 bytes, little-endian."""
        digest = self.digest
        for token in ids:
            digest = hashlib.sha256(digest + token.to_bytes(8, "little")).digest()
        seen = self.seen.clone()
        seen[torch.tensor(ids, dtype=torch.int64)] = True
        return TokenChain(digest, self.length + len(ids), seen)
