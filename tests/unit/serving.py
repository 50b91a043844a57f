"""What the tests of serving share: tiny models whose logits depend on what they have read, and an engine by hand."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch

from isotach.data.tokenizer import ByteTokenizer
from isotach.infer.answer import Event
from isotach.infer.generate import Session
from isotach.infer.sample import Sampling
from isotach.infer.snapshot import KnownOrigin
from isotach.models.decoder import Decoder, ModelConfig
from isotach.serve.prefix import PrefixCache
from isotach.serve.rounds import Job, Rounds
from isotach.serve.ticket import Request, Ticket

BYTES = ByteTokenizer()
MODELS: dict[str, dict[str, object]] = {
    "lightning": {"pattern": ("lightning",)},
    "softmax": {"pattern": ("softmax",)},
    "hybrid": {"pattern": ("lightning", "softmax")},
    "tnn": {"pattern": ("tnn",), "tnn": {"rpe_layers": 1}},
    "delta": {"pattern": ("delta",)},
}


@cache
def decoder(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Decoder:
    shape = {"vocab": 257, "width": 16, "depth": 2, "heads": 2, "hidden": 24}
    made = Decoder(ModelConfig.model_validate(shape | MODELS[name]), seed=seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(10 if name != "tnn" else 3)
    return made.to(dtype)


def alone(model: Decoder, prompt: Sequence[int], sampling: Sampling) -> list[Event]:
    """What a session of its own writes."""
    session = Session(model, BYTES)
    session.read(prompt)
    return list(session.generate(sampling))


def joined(messages: Iterable[Sequence[int]]) -> list[int]:
    return [token for message in messages for token in message]


def tokens(events: Iterable[Event]) -> list[int]:
    return [event.token for event in events]


class ByHand:
    """An engine without a thread: rounds are taken when the test says so."""

    def __init__(self, model: Decoder, *, memory: int = 1 << 30, cache: PrefixCache | None = None) -> None:
        origin = KnownOrigin(model)
        self.cache = cache or PrefixCache(origin, BYTES, folder=None, disk=0)
        self.arrived: list[Job] = []
        self.cancelled: set[Ticket] = set()
        self.rounds = Rounds(model, BYTES, origin, cache=self.cache, memory=memory, news=self.news)

    def news(self) -> tuple[list[Job], set[Ticket]]:
        arrived, self.arrived = self.arrived, []
        cancelled, self.cancelled = self.cancelled, set()
        return arrived, cancelled

    def submit(self, request: Request) -> Ticket:
        self.arrived.append(self.rounds.job(request, cancel=self.cancel))
        self.rounds.hurry(len(self.arrived[-1].ids))
        return self.arrived[-1].ticket

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.add(ticket)
        self.rounds.hurry()

    def round(self) -> None:
        self.rounds.round()

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        while self.arrived or self.rounds.jobs:
            self.round()
            check()
