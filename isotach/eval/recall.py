"""Multi-query associative recall: pairs k₁ v₁ k₂ v₂ ..., then keys again in any order; every one asks for its value.

    tokens    7 42 3 58 9 51 | 31 3 20 7 12 9 44
    targets   · ·  · ·  · ·  | ·  58 ·  42 · 51 ·

Keys come from the first half of the vocabulary, values from the second; between questions stand random tokens. Gaps
follow a power law, so most questions come soon. A memory of n numbers can hold few pairs; attention holds all: the
task shows how many a state of a given size keeps. A model learns from sequences with few and with many pairs at once,
because many alone are learned late or never, and is tested on each number by itself.

Zoology (arXiv:2312.04927); the layout follows its released code (HazyResearch/zoology).
"""

import math
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from isotach.config import Config
from isotach.models.decoder import Decoder
from isotach.rng import generator
from isotach.train.optim import Optimizer
from isotach.train.schedule import cosine

IGNORED = -100  # a target that is not asked for


class RecallConfig(Config):
    """pairs: numbers of them in a sequence, one for each update in turn; length: tokens, or as many as the pairs need;
    vocab: half of it keys, half values; power: of the gaps' power law; steps, rows: updates and sequences per update;
    lr: peak, falling on a cosine; warmup: updates.
    """

    pairs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (4, 8, 16)
    length: Annotated[int, Field(ge=4)] = 64
    vocab: Annotated[int, Field(ge=4)] = 256
    power: Annotated[float, Field(gt=0)] = 0.01
    steps: Annotated[int, Field(ge=1)] = 1000
    rows: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 3e-3
    warmup: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


@dataclass(frozen=True)
class Recall:
    """accuracy: by number of pairs, the share of questions answered with their value, on sequences never trained on;
    loss: nats per question, likewise; seconds: of training.
    """

    accuracy: dict[int, float]
    loss: dict[int, float]
    seconds: float


def examples(
    config: RecallConfig, pairs: int, rows: int, stream: torch.Generator
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Tokens and targets of `rows` sequences; targets that are not asked for are IGNORED.

    ValueError where the vocabulary has too few keys.
    """
    half, length = config.vocab // 2, max(config.length, 4 * pairs)
    slots = (length - 2 * pairs) // 2
    if pairs > half:
        raise ValueError(f"recall: {pairs} pairs need a vocabulary of {2 * pairs}; got {config.vocab}; enlarge it")
    tokens = torch.randint(config.vocab, (rows, length), generator=stream)
    targets = torch.full_like(tokens, IGNORED)
    keys = torch.rand(rows, half, generator=stream).argsort(1)[:, :pairs]
    values = half + torch.rand(rows, half, generator=stream).argsort(1)[:, :pairs]
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    # Distinct gaps with chances ∝ power · gap^(power - 1): the largest of log(chance) + Gumbel noise.
    gap = torch.arange(1, slots + 1, dtype=torch.float64)
    chance = gap ** (config.power - 1)
    noise = -torch.log(-torch.log(torch.rand(rows, slots, generator=stream, dtype=torch.float64)))
    places = (chance.log() + noise).topk(pairs, 1).indices
    at = 2 * pairs + 2 * places
    tokens.scatter_(1, at, keys)
    targets.scatter_(1, at, values)
    return tokens, targets


def train_recall(decoder: Decoder, config: RecallConfig, *, seed: int = 0, tests: int = 512) -> Recall:
    """Train `decoder` on fresh sequences, and test it on others."""
    if decoder.config.vocab < config.vocab:
        raise ValueError(
            f"recall: the model knows {decoder.config.vocab} tokens; got a task of {config.vocab}; set vocab"
        )
    optimizer = Optimizer(decoder, lr=config.lr, weight_decay=config.weight_decay)
    parameters = list(decoder.parameters())
    begin = time.perf_counter()
    for step in range(config.steps):
        stream = generator(seed, "recall", "train", str(step))
        tokens, targets = examples(config, config.pairs[step % len(config.pairs)], config.rows, stream)
        loss = _nats(decoder, tokens, targets)
        if not math.isfinite(float(loss.detach())):
            nothing = dict.fromkeys(config.pairs, 0.0)
            return Recall(nothing, dict.fromkeys(config.pairs, math.inf), time.perf_counter() - begin)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(cosine(step, steps=config.steps, warmup=config.warmup, floor=0.0))
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    found = {n: _tested(decoder, config, n, tests, generator(seed, "recall", "test", str(n))) for n in config.pairs}
    return Recall({n: right for n, (right, _) in found.items()}, {n: nats for n, (_, nats) in found.items()}, seconds)


def _nats(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean -log p over the questions; only they pass through the head."""
    hidden, _ = decoder.hidden(tokens.to(decoder.device))
    asked = (targets != IGNORED).to(decoder.device)
    return F.cross_entropy(decoder.head(hidden[asked]).float(), targets.to(decoder.device)[asked])


@torch.no_grad()
def _tested(
    decoder: Decoder, config: RecallConfig, pairs: int, tests: int, stream: torch.Generator
) -> tuple[float, float]:
    """Share of right answers and nats per question over `tests` sequences."""
    right, nats, count = 0, 0.0, 0
    for first in range(0, tests, config.rows):
        tokens, targets = examples(config, pairs, min(config.rows, tests - first), stream)
        hidden, _ = decoder.hidden(tokens.to(decoder.device))
        asked = targets != IGNORED
        logits = decoder.head(hidden[asked.to(decoder.device)]).float().cpu()
        right += int((logits.argmax(-1) == targets[asked]).sum())
        nats += float(F.cross_entropy(logits, targets[asked], reduction="sum"))
        count += int(asked.sum())
    return right / count, nats / count
