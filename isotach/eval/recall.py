"""Multi-query associative recall: pairs k₁ v₁ k₂ v₂ ..., then keys again in any order; every one asks for its value.

    tokens    7 42 3 58 9 51 | 31 3 20 7 12 9 44
    targets   · ·  · ·  · ·  | ·  58 ·  42 · 51 ·

Keys come from the first half of the vocabulary, values from the second; between questions stand random tokens. Gaps
follow a power law, so most questions come soon. A memory of n numbers can hold few pairs; attention holds all: the
task shows how many a state of a given size keeps.

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
    """pairs: per sequence; length: tokens; vocab: half of it keys, half values; power: of the gaps' power law;
    steps, rows: updates and sequences per update; lr: peak, falling on a cosine; warmup: updates.
    """

    pairs: Annotated[int, Field(ge=1)] = 8
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
    """accuracy: share of questions answered with their value, on sequences never trained on; seconds: of training."""

    accuracy: float
    loss: float
    seconds: float


def examples(config: RecallConfig, rows: int, stream: torch.Generator) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Tokens and targets of `rows` sequences; targets that are not asked for are IGNORED.

    ValueError where the pairs and their questions do not fit.
    """
    pairs, half = config.pairs, config.vocab // 2
    slots = (config.length - 2 * pairs) // 2
    if slots < pairs:
        raise ValueError(f"recall: {pairs} pairs need a length of {4 * pairs}; got {config.length}; lengthen it")
    if pairs > half:
        raise ValueError(f"recall: {pairs} pairs need a vocabulary of {2 * pairs}; got {config.vocab}; enlarge it")
    tokens = torch.randint(config.vocab, (rows, config.length), generator=stream)
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
        tokens, targets = examples(config, config.rows, generator(seed, "recall", "train", str(step)))
        loss = _nats(decoder, tokens, targets)
        if not math.isfinite(float(loss.detach())):
            return Recall(0.0, math.inf, time.perf_counter() - begin)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(cosine(step, steps=config.steps, warmup=config.warmup, floor=0.0))
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    return _tested(decoder, config, tests, generator(seed, "recall", "test"), seconds)


def _nats(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean -log p over the questions; only they pass through the head."""
    hidden, _ = decoder.hidden(tokens.to(decoder.device))
    asked = (targets != IGNORED).to(decoder.device)
    return F.cross_entropy(decoder.head(hidden[asked]).float(), targets.to(decoder.device)[asked])


@torch.no_grad()
def _tested(decoder: Decoder, config: RecallConfig, tests: int, stream: torch.Generator, seconds: float) -> Recall:
    right, nats, count = 0, 0.0, 0
    for first in range(0, tests, config.rows):
        tokens, targets = examples(config, min(config.rows, tests - first), stream)
        hidden, _ = decoder.hidden(tokens.to(decoder.device))
        asked = targets != IGNORED
        logits = decoder.head(hidden[asked.to(decoder.device)]).float().cpu()
        right += int((logits.argmax(-1) == targets[asked]).sum())
        nats += float(F.cross_entropy(logits, targets[asked], reduction="sum"))
        count += int(asked.sum())
    return Recall(right / count, nats / count, seconds)
