"""Exact draws from softmax(h Wᵀ / τ) without the logits ever lying in memory.

    l_i = h · W_i, biased and penalized          E_i = -log1p(-u_i)         g_i = -log E_i
    token = argmax_i (l_i + τ g_i)               u_i = (r_i + ½) 2⁻³²

The g are standard Gumbel noise, so the token is distributed as softmax(l / τ), exactly; an argmax is the argmax of the
argmaxes of parts, so W is read once, tile by tile, and a draw from a part of the vocabulary has the same form as one
from all of it: `merge` makes the whole of parts, be they tiles of one device or shards of many. l + τ g has the argmax
of l / τ + g, does not overflow, and is greedy at τ = 0.

The noise is a function of what it is for and of nothing else: r_i is word i mod 4 of Philox4x32-10 with the row's seed
as its key and (position, row, sample, i div 4) as its counter, where i is the token's id in the whole vocabulary. So
neither tiles nor ranks nor the rest of a batch change a draw, and the same logits give the same token fused or not.

FlashSampling (arXiv:2603.15854) for the fused form; Philox is Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (2011). Small u are what large g come from, and there float32 is fine-grained: the largest g is 22.9.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotach import shapes
from isotach.ops.backends import has_kernels

Backend = Literal["auto", "torch", "triton"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
LARGEST = 1 - 2.0**-24  # of u below 1 in float32: -log1p(-1) is infinite
COLDEST = 1e-6  # temperatures below it count as 0: l / τ would overflow, and nothing but the largest l is ever drawn
TILE = {"cpu": 1 << 16, "cuda": 1 << 20}  # logits in memory at once
NUCLEUS, GROWTH = 256, 8  # likeliest tokens that are looked at first, and how many times more where they do not suffice


class Key(NamedTuple):
    """Which noise each row gets. Rows that differ in any field are independent; equal ones draw the same."""

    seed: Annotated[Int[Tensor, " B"], shapes.Within(0, 2**63 - 1, "take isotach.rng.seed_of")]
    position: Annotated[Int[Tensor, " B"], shapes.Within(0, WORD, "count tokens or steps")]
    row: Annotated[Int[Tensor, " B"], shapes.Within(0, WORD, "number the rows")]

    @classmethod
    def of(cls, seed: int, position: int, rows: int, *, device: torch.device | str = "cpu") -> Self:
        """Rows 0, 1, ... of one seed at one position."""
        every = torch.arange(rows, device=device)
        return cls(torch.full_like(every, seed), torch.full_like(every, position), every)


class Tilt(NamedTuple):
    """What is done to each row's logits before noise is added, in the order bias, penalty, temperature.

    temperature   divides them; 0 takes the largest, the smallest id among equals
    bias          added to them, -inf to forbid
    seen, penalty tokens that occurred: positive logits are divided by the penalty, others multiplied
    """

    temperature: Annotated[Float[Tensor, " B"], shapes.Within(0, float("inf"), "0 is greedy")]
    bias: Float[Tensor, "#B V"] | None = None
    seen: Bool[Tensor, "#B V"] | None = None
    penalty: Float[Tensor, " B"] | None = None

    def __call__(self, logits: Float[Tensor, "B n"], start: int) -> Float[Tensor, "B n"]:
        """Logits of n tokens from `start` on, biased and penalized."""
        here = slice(start, start + logits.shape[1])
        if self.bias is not None:
            logits = logits + self.bias[:, here]
        if self.seen is not None and self.penalty is not None:
            penalty = self.penalty[:, None]
            logits = torch.where(
                self.seen[:, here], torch.where(logits > 0, logits / penalty, logits * penalty), logits
            )
        return logits

    def scales(self) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B 1"]]:
        """What noise is multiplied by, and what logits are divided by where probabilities are wanted."""
        cold = self.temperature < COLDEST
        noise, softness = (torch.where(cold, other, self.temperature.float()) for other in (0.0, 1.0))
        return noise[:, None], softness[:, None]


class Filters(NamedTuple):
    """Which tokens each row may draw, in this order, each among what the one before has left.

    top_k   the k likeliest, smaller ids first among equals; 0 for all
    top_p   the fewest likeliest whose probabilities sum to at least top_p; 1 for all. Behind top_k they are
            renormalised: with probabilities .30 .25 .24 .11 .10, top_k = 3 and top_p = 0.35 leave one token, not two
    min_p   those at least min_p times as probable as the likeliest; 0 for all
    """

    top_k: Annotated[Int[Tensor, " B"], shapes.Within(0, WORD, "0 keeps all")]
    top_p: Annotated[Float[Tensor, " B"], shapes.Within(0, 1, "1 keeps all")]
    min_p: Annotated[Float[Tensor, " B"], shapes.Within(0, 1, "0 keeps all")]


class Drawn(NamedTuple):
    """Tokens drawn from a vocabulary, or from a part of one: then `merge` has what it needs.

    token     -1 where a row has no finite largest logit: everything is forbidden, or the model has diverged
    logprob   of the token under softmax(l / τ) before filters, nats; with τ = 1 where it is 0; -inf where token is -1
    score     l + τ g of the token
    mass      log Σ e^{l / τ} of the row
    """

    token: Int[Tensor, "B S"]
    logprob: Float[Tensor, "B S"]
    score: Float[Tensor, "B S"]
    mass: Float[Tensor, " B"]


@torch.no_grad()
def sample(
    hidden: Float[Tensor, "B D"],
    weight: Float[Tensor, "V D"],
    key: Key,
    tilt: Tilt,
    *,
    samples: int = 1,
    start: int = 0,
    backend: Backend = "auto",
) -> Drawn:
    """Draw `samples` tokens for every row from softmax(hidden @ weight.T / temperature).

    hidden    what the output projection reads; on a GPU rounded to the weight's dtype, as matrix units take it
    weight    all rows of the output projection, or a shard of them whose first token is `start`; `tilt` then holds the
              shard's columns. Draws from the shards of a vocabulary `merge` into the draw from all of it

    Logits, noise and sums are float32. Nothing is differentiable. On a GPU nothing waits for the device. "auto" takes
    triton on a GPU where it is installed. Raises ValueError for shapes, and on a CPU UserError for values, that do not
    fit.
    """
    _check(hidden, weight, key, tilt)
    if backend == "triton" or (backend == "auto" and has_kernels("sampling", hidden.device.type)):
        from isotach.ops.triton.sampling import sample as fused

        return fused(hidden, weight, key, tilt, samples=samples, start=start)
    parts = [
        sample_logits(logits, key, tilt, samples=samples, start=start + first)
        for first, logits in _tiles(hidden, weight, tilt, samples)
    ]
    return merge(stacked(parts))


def sample_logits(logits: Float[Tensor, "B V"], key: Key, tilt: Tilt, *, samples: int = 1, start: int = 0) -> Drawn:
    """The same from float32 logits that are there already, biased and penalized; of `tilt` only the temperature counts.

    The definition: `sample` is this for tiles of the vocabulary, merged.
    """
    noise_scale, softness = tilt.scales()
    scores = logits[:, None] + noise_scale[..., None] * _gumbel_range(key, start, start + logits.shape[1], samples)
    score, token = scores.max(-1)
    mass = (logits / softness).logsumexp(-1)
    logprob = logits.gather(-1, token) / softness - mass[:, None]
    return _checked(Drawn(token + start, logprob, score, mass))


@torch.no_grad()
def sample_filtered(
    hidden: Float[Tensor, "B D"],
    weight: Float[Tensor, "V D"],
    key: Key,
    tilt: Tilt,
    filters: Filters,
    *,
    samples: int = 1,
) -> Drawn:
    """As `sample`, of the tokens that the filters leave; with the noise that `sample` adds, and exact.

    A filter is no argmax. The likeliest tokens are collected over the tiles, more than top_k or 256 of them; where a
    row's filters leave all of these, eight times as many in another pass over `weight`. So memory is that of the tokens
    left, not of the vocabulary, and one pass the rule. A row without filters among others costs all a pass more. Waits
    for the device; needs the whole vocabulary.
    """
    _check(hidden, weight, key, tilt)
    shapes.check("sample", _Filtered(hidden, *filters))
    shapes.check_values("sample", filters)
    noise_scale, softness = tilt.scales()
    free = (noise_scale[:, 0] == 0) | ((filters.top_k == 0) & (filters.top_p == 1) & (filters.min_p == 0))
    count = max(NUCLEUS, int(filters.top_k.max()) + 1)
    while True:
        best = _largest(_tiles(hidden, weight, tilt, 1), count, softness)
        kept = _kept(best, filters, softness)
        if count >= len(weight) or not bool((kept[:, -1] & ~free).any()):
            break
        count *= GROWTH
    logits = best.logit.masked_fill(~kept, -torch.inf)
    scores = logits[:, None] + noise_scale[..., None] * gumbel(key, best.token, samples)
    score = scores.amax(-1)
    tokens = best.token[:, None].where(scores == score[..., None], len(weight))
    token, place = tokens.min(-1)
    logprob = best.logit.gather(-1, place) / softness - best.mass[:, None]
    drawn = _checked(Drawn(token, logprob, score, best.mass))
    if not bool(free.any()):
        return drawn
    unfiltered = sample(hidden, weight, key, tilt, samples=samples)
    token, logprob, score = (torch.where(free[:, None], *pair) for pair in zip(unfiltered[:3], drawn[:3], strict=True))
    return Drawn(token, logprob, score, best.mass)


# ---- parts


def stacked(parts: list[Drawn]) -> Drawn:
    """Draws from parts of a vocabulary, in the order of their ids, with a new first axis for `merge`."""
    return Drawn(*(torch.stack(leaves) for leaves in zip(*parts, strict=True)))


def merge(parts: Drawn) -> Drawn:
    """The draw from the whole of the draws from its parts (G, ...), made with one noise keyed by the ids in the whole.

    Associative: parts may be merged in any grouping that keeps their order, which decides only between equal scores.
    """
    score, first = parts.score.max(0, keepdim=True)
    mass = parts.mass.logsumexp(0)
    token = parts.token.gather(0, first)[0]
    logprob = (parts.logprob + parts.mass[..., None]).gather(0, first)[0] - mass[:, None]
    return _checked(Drawn(token, logprob, score[0], mass))


def choose(parts: Drawn, key: Key, tilt: Tilt) -> Drawn:
    """The draw from the whole of draws from its parts (G, ...) that were made with noise of any kind.

    Part k is taken with probability e^{mass_k} / Σ_j e^{mass_j}, by noise of its own, that of the "token" -1 - k.
    Where the temperature is 0 the largest score decides, as in `merge`. The scores returned cannot be merged again; to
    choose among chosen ones, give another key.
    """
    ids = -1 - torch.arange(len(parts.mass), device=parts.mass.device)
    noise = gumbel(key, ids[None], parts.token.shape[-1])
    noise_scale, _ = tilt.scales()
    chance = parts.mass[..., None] + noise.movedim(-1, 0)
    return merge(parts._replace(score=torch.where(noise_scale == 0, parts.score, chance)))


def _checked(drawn: Drawn) -> Drawn:
    """Without a token where there is none: the mass is then -inf, inf or not a number."""
    there = drawn.mass.isfinite()[:, None]
    token, logprob = drawn.token.where(there, -1), drawn.logprob.where(there, -torch.inf)
    return drawn._replace(token=token, logprob=logprob)


# ---- tiles


def _tiles(hidden: Tensor, weight: Tensor, tilt: Tilt, samples: int) -> Iterator[tuple[int, Float[Tensor, "B n"]]]:
    """The biased and penalized logits of so many tokens at a time, and the first of them."""
    each = max(4, TILE[hidden.device.type] // max(1, len(hidden) * samples))
    for first in range(0, len(weight), each):
        yield first, tilt(_project(hidden, weight[first : first + each]), first)


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits in float32, whatever autocast would make of them."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(hidden.to(weight.dtype), weight.mT, out_dtype=torch.float32)
        return hidden.float() @ weight.float().mT


class _Largest(NamedTuple):
    """The k largest logits of every row, largest first and smaller ids first among equals; mass as in Drawn."""

    logit: Float[Tensor, "B k"]
    token: Int[Tensor, "B k"]
    mass: Float[Tensor, " B"]


def _largest(tiles: Iterator[tuple[int, Tensor]], count: int, softness: Float[Tensor, "B 1"]) -> _Largest:
    """Logit and id are packed into one integer, so that no two are equal and none is lost among ties."""
    held, masses = None, []
    for first, logits in tiles:
        masses.append((logits / softness).logsumexp(-1))
        ids = torch.arange(first, first + logits.shape[1], device=logits.device)
        packed = _ordered((logits + 0.0).view(torch.int32).long()) << 32 | WORD - ids  # + 0.0: -0 equals 0
        held = packed if held is None else torch.cat((held, packed), -1)
        held = held.topk(min(count, held.shape[1])).values
    assert held is not None
    logit = _ordered(held >> 32).int().view(torch.float32)
    return _Largest(logit, WORD - (held & WORD), torch.stack(masses).logsumexp(0))


def _ordered(bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """From the bits of float32, as signed integers, to integers in the floats' order, and back."""
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)


def _kept(best: _Largest, filters: Filters, softness: Float[Tensor, "B 1"]) -> Bool[Tensor, "B k"]:
    """Which of the likeliest tokens the filters leave."""
    top_k, top_p, min_p = (column[:, None] for column in filters)
    largest = best.logit[:, :1]
    weight = ((best.logit - largest) / softness).double().exp()
    rank = torch.arange(weight.shape[1], device=weight.device)
    keep = ((rank < top_k) | (top_k == 0)) & (best.logit > -torch.inf)
    everything = (best.mass[:, None] - largest / softness).double().exp()
    probability = weight * keep / torch.where(top_k == 0, everything, (weight * keep).sum(-1, keepdim=True))
    before = probability.cumsum(-1) - probability
    keep &= (before < top_p) | (top_p == 1) | (rank == 0)  # with top_p = 1 rounding must not cut the tail
    return keep & (weight >= min_p)


# ---- noise


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four words of 32 bits from a counter of four and a key of two, all as int64; broadcasts."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        x, y = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # of 64 bits, which as signed ones may be negative
        a, b, c, d = (y >> 32 ^ b ^ k) & WORD, y, (x >> 32 ^ d ^ m) & WORD, x  # b and d are cut where they enter
        k, m = k + WEYL[0] & WORD, m + WEYL[1] & WORD
    return a, b & WORD, c, d & WORD


def gumbel(key: Key, tokens: Int[Tensor, "#B n"], samples: int) -> Float[Tensor, "B S n"]:
    """The noise of any tokens."""
    words = _words(key, tokens >> 2, samples)
    return _gumbel(words.gather(-1, (tokens & 3)[:, None, :, None].expand(*words.shape[:3], 1)).squeeze(-1))


def _gumbel_range(key: Key, start: int, stop: int, samples: int) -> Float[Tensor, "B S n"]:
    """The noise of tokens start..stop: all four words of a counter are used."""
    words = _words(key, torch.arange(start >> 2, (stop + 3) >> 2, device=key.seed.device)[None], samples)
    return _gumbel(words.flatten(-2)[..., start & 3 :][..., : stop - start])


def _words(key: Key, counters: Int[Tensor, "#B m"], samples: int) -> Int[Tensor, "B S m 4"]:
    seed, position, row = (leaf[:, None, None] for leaf in key)
    sample = torch.arange(samples, device=seed.device)[:, None]
    words = philox((position, row, sample, counters[:, None] & WORD), (seed & WORD, seed >> 32))
    return torch.stack(words, -1)


def _gumbel(words: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """From words of 32 bits: -log E, E = -log1p(-u). Of one rounding each, as the kernel does it."""
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=LARGEST)
    return -(-(-u).log1p()).log()


# ---- what may be asked


class _Given(NamedTuple):
    hidden: Float[Tensor, "B D"]
    weight: Float[Tensor, "V D"]
    seed: Int[Tensor, " B"]
    position: Int[Tensor, " B"]
    row: Int[Tensor, " B"]
    temperature: Float[Tensor, " B"]
    bias: Float[Tensor, "#B V"]
    seen: Bool[Tensor, "#B V"]
    penalty: Float[Tensor, " B"]


class _Filtered(NamedTuple):
    hidden: Float[Tensor, "B D"]
    top_k: Int[Tensor, " B"]
    top_p: Float[Tensor, " B"]
    min_p: Float[Tensor, " B"]


def _check(hidden: Tensor, weight: Tensor, key: Key, tilt: Tilt) -> None:
    bias, seen = (weight.new_empty(()).expand(1, len(weight)) if x is None else x for x in (tilt.bias, tilt.seen))
    penalty = tilt.temperature if tilt.penalty is None else tilt.penalty
    shapes.check("sample", _Given(hidden, weight, *key, tilt.temperature, bias, seen, penalty))
    if (tilt.seen is None) != (tilt.penalty is None):
        raise ValueError("sample: expected seen and penalty, or neither; got one of them; pass both")
    if wrong := [name for name, leaf in key._asdict().items() if leaf.dtype != torch.int64]:
        raise ValueError(
            f"sample: expected a key of int64; got {getattr(key, wrong[0]).dtype} for {wrong[0]}; use .long()"
        )
    if not hidden.is_cuda:
        shapes.check_values("sample", key)
        shapes.check_values("sample", tilt)
