"""A mixer is projections around a recurrence: x -> inputs, inputs -> o, o -> y. Its state is data: {name: State}."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotach.config import Config
from isotach.ops.engine import Span, run
from isotach.ops.recurrence import Recurrence, Tensors

MixerState = dict[str, Tensors]


@dataclass(frozen=True)
class Place:
    """Where a layer stands among ALL layers: slopes and positions may depend on it."""

    index: int
    depth: int


class MixerConfig(Config):
    """What every mixer is given; a mixer's own Config adds to it."""

    width: int = Field(ge=1)
    heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; choose a divisor")
        return self


class Scan:
    """One call's states: scan(name, rec, inputs) reads the state called `name` and keeps the one after it."""

    def __init__(self, before: MixerState | None, span: Span) -> None:
        self.span = span
        self.after: MixerState = {}
        self._before = before or {}

    def __call__(self, name: str, rec: Recurrence, x: Tensors, *, causal: bool = True) -> Tensor:
        output, self.after[name] = run(rec, x, self._before.get(name), self.span, causal=causal)
        return output


class Mixer(nn.Module, ABC):
    """One layer's token mixing. Subclasses set `recurrence` and `heads` in __init__ and define project and output."""

    Config: ClassVar[type[Any]]
    causal: ClassVar[bool] = True
    recurrence: Recurrence
    heads: int

    @abstractmethod
    def __init__(self, config: Any, place: Place) -> None:
        super().__init__()

    @abstractmethod
    def project(self, x: Float[Tensor, "B T D"], scan: Scan) -> tuple[Tensors, Any]:
        """The recurrence's inputs, and whatever `output` needs besides its result."""

    @abstractmethod
    def output(self, o: Float[Tensor, "B T H V"], aux: Any) -> Float[Tensor, "B T D"]:
        """Back to the model's width."""

    def forward(
        self, x: Float[Tensor, "B T D"], state: MixerState | None, span: Span
    ) -> tuple[Float[Tensor, "B T D"], MixerState]:
        """y (B, T, D) and the state after it; `state` None is the empty past."""
        scan = Scan(state, span)
        inputs, aux = self.project(x, scan)
        o = scan("main", self.recurrence, inputs, causal=self.causal)
        return self.output(o, aux), scan.after

    def split(self, x: Float[Tensor, "B T HK"]) -> Float[Tensor, "B T H K"]:
        return x.unflatten(-1, (self.heads, -1))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A bias-free projection whose weights are left for the model's named seeds to fill."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=torch.get_default_device())
    return layer
