"""From logits to one token: filters, then an exact draw by inverting the distribution function.

The filters act in one order: bias, repetition penalty, temperature, top-k, top-p, min-p. Each sees what the one before
left, renormalised. transformers has the same order. vLLM applies min-p before top-k and top-p; llama.cpp and mlx-lm
filter first and apply the temperature last. With the temperature first, top_p = 0.9 means nine tenths of the
distribution that is really drawn from, and a higher temperature widens the choice; with the temperature last neither
holds.

Everything here is float64, one row per request, and stays where the logits are but for the tokens. A draw uses one
number, and that number is a pure function of the request's seed and the token's position: it depends neither on the
other rows of a batch nor on where a conversation was saved and continued, so no generator state exists that could be
lost.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from isotach.config import Config
from isotach.errors import UserError
from isotach.rng import seed_of

NUCLEUS = 128  # tokens that top-p looks at first, and how many times as many then
GROWTH = 32


class Sampling(Config):
    """How one request is sampled. The defaults draw from the model's own distribution.

    - temperature: divides the logits; 0 takes the likeliest token, the smallest id among equals.
    - top_k: keep the k likeliest tokens, exactly k, smaller ids first among equals; 0 keeps all.
    - top_p: keep the fewest likeliest tokens whose probabilities sum to at least top_p; 1 keeps all.
    - min_p: keep tokens at least min_p times as probable as the likeliest; 0 keeps all.
    - repetition_penalty: positive logits of tokens that occurred anywhere in the context are divided by it, negative
      ones multiplied (CTRL, arXiv:1909.05858); 1 changes nothing, below 1 favours repetition. From 0.001 to 1000.
    - seed: of the draws; None takes fresh entropy when generation starts.
    - presence_penalty, frequency_penalty: taken off the logits of tokens that were already written, once, and for every
      time. From -2 to 2.
    - logit_bias: added to the logits of these ids; from -100, which all but forbids, to 100.
    - stop: strings that end the text; neither they nor any beginning of them is ever emitted.
    - stop_token_ids: ids that end the text as the end-of-text token does, and are no part of it.
    - ignore_eos: the end-of-text token is a token like others.
    - max_tokens: tokens after which generation ends; min_tokens: before which neither a token nor a string ends it.
    - logprobs: also report log-probabilities (nats) of the drawn token and of this many likeliest alternatives. They
      are the model's own, before every filter.
    """

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    ignore_eos: bool = False
    max_tokens: Annotated[int, Field(ge=1)] = 256
    min_tokens: Annotated[int, Field(ge=0)] = 0
    logprobs: Annotated[int, Field(ge=0)] | None = None

    def seeded(self) -> "Sampling":
        """The same with a seed: its own, or fresh entropy, so that what was drawn can be reported and repeated."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbits(63)})


class Drawn(NamedTuple):
    """One token per row, with what was asked to be known about it."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]  # (token, log-probability), likeliest first


def draw(
    logits: Float[Tensor, "R vocab"],
    samplings: Sequence[Sampling],
    *,
    positions: Sequence[int],
    seen: Bool[Tensor, "R choices"],
    bias: Sequence[Float[Tensor, " choices"] | None] = (),
) -> list[Drawn]:
    """Draw the token at `positions[r]` of every row r; `samplings` are seeded.

    seen    ids that occurred, for the repetition penalty. Only these first `choices` ids can be drawn: a vocabulary
            padded beyond its tokenizer is never sampled there
    bias    what is added to each row's logits before all filters, -inf to forbid; None for nothing

    Raises UserError when a row has no finite largest logit, which only a damaged or diverged model produces, and when
    its bias leaves no token.
    """
    logits = logits.detach().double()
    largest, choices = logits.amax(-1), logits[:, : seen.shape[-1]]
    if any(own is not None for own in bias):
        none = choices.new_zeros(choices.shape[-1])
        choices = choices + torch.stack([none if own is None else own.to(none) for own in bias])
        if (choices.amax(-1) == -torch.inf).any():
            raise UserError("draw: every token is forbidden here; allow one")
    if all(sampling.temperature == 0 for sampling in samplings):
        tokens = penalized(choices, samplings, seen).max(-1).indices
    else:
        numbers = [uniform(_seed(sampling), position) for sampling, position in zip(samplings, positions, strict=True)]
        tokens = _inverted(filtered(choices, samplings, seen).exp_(), choices.new_tensor(numbers))
    found, peaks = torch.stack((tokens.double(), largest)).tolist()  # all that is waited for
    _check_finite(peaks)
    asked = any(sampling.logprobs is not None for sampling in samplings)
    logprobs = logits.log_softmax(-1)[:, : seen.shape[-1]] if asked else logits
    return [
        known(int(token), row, alternatives=sampling.logprobs)
        for token, row, sampling in zip(found, logprobs, samplings, strict=True)
    ]


def exact(logits: Float[Tensor, "R vocab"]) -> Float[Tensor, "R vocab"]:
    """Float64. UserError where a row has no finite largest logit."""
    logits = logits.detach().double()
    _check_finite(logits.amax(-1).tolist())
    return logits


def known(token: int, logprobs: Float[Tensor, " choices"], *, alternatives: int | None) -> Drawn:
    """A token with its log-probability and so many of the likeliest; without any where alternatives is None."""
    if alternatives is None:
        return Drawn(token, None, ())
    best = logprobs.topk(alternatives)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Drawn(token, float(logprobs[token]), top)


def filtered(
    logits: Float[Tensor, "R V"], samplings: Sequence[Sampling], seen: Bool[Tensor, "R V"]
) -> Float[Tensor, "R V"]:
    """Logits of the distribution that is drawn from, float64: 0 for the likeliest, -inf for what a filter forbids."""
    x = penalized(logits, samplings, seen)
    x = x - x.amax(-1, keepdim=True)  # from which a temperature is measured, so that none overflows
    # A temperature of 0 is the limit of small ones: the likeliest token with probability 1.
    temperatures = [sampling.temperature or 1.0 for sampling in samplings]
    if any(temperature != 1 for temperature in temperatures):
        x.div_(_column(x, temperatures))
    x = keep_top_k(x, [sampling.top_k if sampling.temperature else 1 for sampling in samplings])
    x = keep_top_p(x, [sampling.top_p for sampling in samplings])
    return keep_min_p(x, [sampling.min_p for sampling in samplings])


def penalized(
    logits: Float[Tensor, "R V"], samplings: Sequence[Sampling], seen: Bool[Tensor, "R V"]
) -> Float[Tensor, "R V"]:
    """Tokens that occurred are less likely, in float64: l / penalty where l > 0, l * penalty where l < 0."""
    logits, penalties = logits.double(), [sampling.repetition_penalty for sampling in samplings]
    if all(penalty == 1 for penalty in penalties):
        return logits
    marked = (seen & (_column(seen, penalties) != 1)).nonzero(as_tuple=True)  # far fewer than all
    rows, ids = (index.to(logits.device) for index in marked)
    before, by = logits[rows, ids], logits.new_tensor(penalties)[rows]
    return logits.index_put((rows, ids), torch.where(before > 0, before / by, before * by))


def keep_top_k(logits: Float[Tensor, "R V"], k: Sequence[int]) -> Float[Tensor, "R V"]:
    """Forbid all but the k largest, exactly k with smaller ids first among equals; k = 0 forbids nothing."""
    if not any(k):
        return logits
    vocab = logits.shape[-1]
    counts = [min(own or vocab, vocab) for own in k]
    ranked = logits.topk(max((count for count in counts if count < vocab), default=1), dim=-1).values
    return _keep(logits, _column(logits, counts).long(), ranked)


def keep_top_p(logits: Float[Tensor, "R V"], p: Sequence[float]) -> Float[Tensor, "R V"]:
    """Forbid all but the fewest largest whose probability is at least p; smaller ids first among equals."""
    if all(own == 1 for own in p):
        return logits
    wanted = _column(logits, p)
    free = wanted == 1  # where rounding must not cut the tail
    vocab, count, largest = logits.shape[-1], NUCLEUS, logits.amax(-1, keepdim=True)
    total = (logits - largest).exp_().sum(-1, keepdim=True)
    while True:  # most often few tokens are enough, and sorting all takes longer than everything else
        count = min(count, vocab)
        ranked = logits.topk(count, dim=-1).values
        probability = (ranked - largest).exp_() / total
        # One at least: of logits that are not numbers, which `draw` refuses afterwards, none is.
        kept = (probability.cumsum(-1) - probability < wanted).sum(-1, keepdim=True).clamp_min(1)
        if count == vocab or bool((free | (kept < count)).all()):
            return _keep(logits, torch.where(free, vocab, kept), ranked)
        count *= GROWTH


def keep_min_p(logits: Float[Tensor, "R V"], p: Sequence[float]) -> Float[Tensor, "R V"]:
    """Forbid tokens less than p times as probable as the likeliest."""
    if not any(p):
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + _column(logits, p).log(), -torch.inf)


def _keep(
    logits: Float[Tensor, "R V"], count: Int[Tensor, "R 1"], ranked: Float[Tensor, "R n"]
) -> Float[Tensor, "R V"]:
    """Forbid all but the `count` largest, which are among `ranked`; nothing where that is the whole vocabulary."""
    everything = count == logits.shape[-1]
    smallest = ranked.gather(-1, torch.where(everything, 1, count) - 1).masked_fill(everything, -torch.inf)
    kept = logits >= smallest
    if bool((everything | (kept.sum(-1, keepdim=True) == count)).all()):
        return logits.masked_fill(~kept, -torch.inf)
    above, equal = logits > smallest, logits == smallest
    room = count - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -torch.inf)


def _column(like: Tensor, values: Sequence[float]) -> Float[Tensor, "R 1"]:
    """In float64, where `like` is."""
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(-1)


def invert(logits: Float[Tensor, "R V"], numbers: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Per row the first token whose cumulative probability exceeds a number in [0, 1): exact to float64.

    In the order of ids, not of probabilities: a rounding difference between two runs then changes the token only when
    a number falls on a boundary, never because two nearly equal tokens changed places.
    """
    return _inverted((logits - logits.amax(-1, keepdim=True)).exp_(), numbers)


def _inverted(weights: Float[Tensor, "R V"], numbers: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The same from what probabilities are in proportion to, which is overwritten."""
    cumulative = weights.cumsum_(-1)
    total = cumulative[:, -1:]
    # number * total may round up to total, which no token exceeds
    target = torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _check_finite(peaks: Sequence[float]) -> None:
    if not all(map(math.isfinite, peaks)):
        raise UserError(
            "draw: expected finite logits, got NaN or infinity; the weights are damaged or their training diverged"
        )


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1), a multiple of 2^-53, that decides the token at `position` of the request with `seed`."""
    return (seed_of(seed, "draw", position) >> 10) * 2.0**-53


def _seed(sampling: Sampling) -> int:
    if sampling.seed is None:
        raise ValueError("draw: expected seeded samplings, got seed None; call Sampling.seeded() once per request")
    return sampling.seed
