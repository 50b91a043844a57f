"""A mixer is projections around a recurrence: x -> inputs, inputs -> o, o -> y. Its state is data: {name: State}."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isclose
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotach.config import Config
from isotach.nn.energy import EnergyConfig, EnergyGate
from isotach.nn.memory_cache import CacheConfig, MemoryCache
from isotach.ops.engine import Span, advance
from isotach.ops.recurrence import Paired, Recurrence, Tensors

MixerState = dict[str, Tensors]
Stream = Callable[[str], torch.Generator]
M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Initializes(Protocol):
    """A module that fills its own weights."""

    def initialize(self, stream: Stream, std: float) -> None:
        """Draw every weight from the stream of its name; `std` is the model's for linear maps."""


class Shared(nn.ModuleDict):
    """Modules that several layers of one model use, by name. The model owns them; layers only refer to them."""

    def once(self, name: str, build: Callable[[], M]) -> M:
        """The module called `name`, built by the first layer that asks for it."""
        if name not in self:
            self[name] = build()
        return self[name]  # type: ignore[return-value]


@dataclass(frozen=True)
class Place:
    """Where a layer stands among ALL layers: slopes, positions and bounds may depend on it."""

    index: int
    depth: int
    shared: Shared = field(default_factory=Shared)


class MixerConfig(Config):
    """What every mixer is given; a mixer's own Config adds to it.

    energy: keys weighed by their tokens' salience; cache: memories of earlier segments are kept and read
    """

    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    energy: EnergyConfig | None = None
    cache: CacheConfig | None = None

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; choose a divisor")
        return self


def check_expanded(config: MixerConfig, option: str, unit: int, what: str) -> None:
    """ValueError unless `option` times the model's width is a multiple of `unit`, which is called `what`."""
    expanded = config.width * getattr(config, option)
    if not isclose(expanded, round(expanded)) or round(expanded) % unit:
        raise ValueError(f"{option} times width = {expanded:g} is not a multiple of {what} = {unit}; change it")


class Scan:
    """One call's states: scan(name, rec, inputs) reads the state called `name` and keeps the one after it.

    shared  what earlier layers of the same call left for later ones, by name
    """

    def __init__(self, before: MixerState | None, span: Span, shared: dict[str, Tensor] | None = None) -> None:
        self.span = span
        self.shared: dict[str, Tensor] = {} if shared is None else shared
        self.after: MixerState = {}
        self._before = before or {}

    def before(self, name: str) -> Tensors | None:
        """The state called `name` before this call."""
        state = self._before.get(name)
        return state.now if isinstance(state, Paired) else state

    def __call__(self, name: str, rec: Recurrence, x: Tensors, *, causal: bool = True) -> Tensor:
        output, self.after[name] = advance(rec, x, self._before.get(name), self.span, causal=causal)
        return output


class Mixer(nn.Module, ABC):
    """One layer's token mixing. Subclasses set `recurrence` and `heads` in __init__ and define project and output.

    A model's layers come from `build`, which adds what every mixer may be wrapped in.
    """

    Config: ClassVar[type[Any]]
    causal: bool = True  # False: the tokens are a set, and every one reads them all
    recurrence: Recurrence
    heads: int

    @abstractmethod
    def __init__(self, config: Any, place: Place) -> None:
        super().__init__()
        self.energy: EnergyGate | None = None
        self.cache: MemoryCache | None = None

    @classmethod
    def build(cls, config: Any, place: Place) -> Self:
        """The layer with its energy gate and memory cache; ValueError where its recurrence cannot take them."""
        mixer, name = cls(config, place), cls.__name__.lower()
        if config.energy is not None:
            EnergyGate.check(name, mixer.recurrence)
            mixer.energy = EnergyGate(config.width, getattr(mixer, "kv_heads", mixer.heads), config.energy)
        if config.cache is not None:
            MemoryCache.check(name, mixer.recurrence, causal=mixer.causal)
            mixer.cache = MemoryCache(config.width, config.cache)
        return mixer

    @abstractmethod
    def project(self, x: Float[Tensor, "B T D"], scan: Scan) -> tuple[Tensors, Any]:
        """The recurrence's inputs, and whatever `output` needs besides its result."""

    @abstractmethod
    def output(self, o: Float[Tensor, "B T H V"], aux: Any) -> Float[Tensor, "B T D"]:
        """Back to the model's width."""

    def initialize(self, stream: Stream, std: float) -> None:
        """Draw every weight from the stream of its name: linear maps from N(0, std), biases zero."""
        initialize(self, stream, std)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: MixerState | None,
        span: Span,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MixerState]:
        """y (B, T, D) and the state after it; `state` None is the empty past, `shared` belongs to the model's call."""
        scan = Scan(state, span, shared)
        inputs, aux = self.project(x, scan)
        if self.energy is not None:
            inputs = self.energy(self.recurrence, inputs, x, scan)
        if self.cache is not None:
            o = self.cache(self.recurrence, inputs, x, scan)
        else:
            o = scan("main", self.recurrence, inputs, causal=self.causal)
        return self.output(o, aux), scan.after

    def split(self, x: Float[Tensor, "B T HK"]) -> Float[Tensor, "B T H K"]:
        return x.unflatten(-1, (self.heads, -1))


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """A projection whose weights are left for the model's named seeds to fill."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=torch.get_default_device())
    return layer


def initialize(module: nn.Module, stream: Stream, std: float) -> None:
    """Fill `module`'s children: those that know how do it, linear maps and embeddings from N(0, std)."""
    for name, child in module.named_children():

        def own(parameter: str, prefix: str = name) -> torch.Generator:
            return stream(f"{prefix}.{parameter}")

        if isinstance(child, Initializes):
            child.initialize(own, std)
        elif isinstance(child, nn.Linear | nn.Embedding):
            with torch.no_grad():
                child.weight.normal_(0, std, generator=own("weight"))
                if isinstance(child, nn.Linear) and child.bias is not None:
                    child.bias.zero_()
        else:
            initialize(child, own, std)
