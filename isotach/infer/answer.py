"""How a text is written on: which tokens may come next, and what the one that was drawn means."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.infer.sample import Drawn, Sampling
from isotach.infer.text import StoppedText

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Event:
    """One generated token.

    - token: its id.
    - text: the text it settles; it may be empty (an unfinished character, a possible stop string) or reach back.
    - logprob: of the token under the model before every filter, in nats; None unless asked for.
    - top: the likeliest tokens and their log-probabilities, as many as asked for.
    - finish: why generation ends with this token: the end-of-text token, a stop string or token, or max_tokens; else
      None.
    """

    token: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish: Finish | None


class Constraint(Protocol):
    """Structured output: which tokens may come next. One object per answer."""

    def mask(self) -> Bool[Tensor, " choices"]:
        """The ids allowed now, at least one; the end-of-text token among them where the text may end."""

    def accept(self, token: int) -> None:
        """`token` was drawn, and does not end the text."""


class Answer:
    """One answer from its first token to its last.

    - sampling: with the seed that is used.
    - before: the last token of the prompt.
    - ended: whether the last token was one that ends the text and is no part of it.
    """

    def __init__(
        self, tokenizer: Tokenizer, sampling: Sampling, before: int, *, constraint: Constraint | None = None
    ) -> None:
        check_sampling(sampling, tokenizer)
        self.sampling, self.ended = sampling.seeded(), False
        self._choices, self._constraint = tokenizer.vocab_size, constraint
        self._ends: dict[int, Finish] = dict.fromkeys(sampling.stop_token_ids, "stop")
        if not sampling.ignore_eos:
            self._ends[tokenizer.eos] = "eos"
        self._text = StoppedText(tokenizer, () if sampling.min_tokens else sampling.stop, before=before)
        self._written: Counter[int] = Counter()
        self._count = 0
        self._bias: Tensor | None = None  # the part that never changes
        if sampling.logit_bias:
            self._bias = torch.zeros(self._choices, dtype=torch.float64)
            self._bias[list(sampling.logit_bias)] = torch.tensor([*sampling.logit_bias.values()], dtype=torch.float64)

    @property
    def hidden(self) -> int:
        """How many of the last tokens have shown none of their text."""
        return self._text.hidden

    def bias(self) -> Float[Tensor, " choices"] | None:
        """What is added to the logits of the next token, -inf to forbid it; None for nothing."""
        sampling, written = self.sampling, self._written
        early = self._ends and self._count < sampling.min_tokens
        repeats = written and (sampling.presence_penalty or sampling.frequency_penalty)
        if not (early or repeats or self._constraint is not None):
            return self._bias
        bias = torch.zeros(self._choices, dtype=torch.float64) if self._bias is None else self._bias.clone()
        if repeats:
            times = torch.tensor([*written.values()], dtype=torch.float64)
            bias[list(written)] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if early:
            bias[list(self._ends)] = -torch.inf
        if self._constraint is not None:
            bias.masked_fill_(~self._constraint.mask(), -torch.inf)
        return bias

    def event(self, drawn: Drawn) -> Event:
        """The event of the next token; its `finish` says whether it is the last."""
        self._count += 1
        self._written[drawn.token] += 1
        finish = self._ends.get(drawn.token)
        if finish is not None:
            self.ended = True
            return Event(drawn.token, self._text.finish(), drawn.logprob, drawn.top, finish)
        if self._constraint is not None:
            self._constraint.accept(drawn.token)
        if self._count > self.sampling.min_tokens:
            self._text.stop = self.sampling.stop
        text = self._text.push(drawn.token)
        if self._text.stopped:
            finish = "stop"
        elif self._count == self.sampling.max_tokens:
            text, finish = text + self._text.finish(), "length"
        return Event(drawn.token, text, drawn.logprob, drawn.top, finish)


def check_sampling(sampling: Sampling, tokenizer: Tokenizer) -> None:
    """Raise UserError for ids, or numbers of them, that the tokenizer does not have."""
    vocab = tokenizer.vocab_size
    if sampling.logprobs is not None and sampling.logprobs > vocab:
        raise UserError(f"logprobs: expected at most {vocab} alternatives, got {sampling.logprobs}")
    for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        if (largest := max(ids, default=0)) >= vocab:
            raise UserError(f"{name}: expected ids from 0 to {vocab - 1}, got {largest}")
