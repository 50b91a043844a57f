"""What the laws are about: every family of recurrences and every mixer, found rather than listed."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import isotach.ops
from isotach import mixers, shapes
from isotach.nn.mixer import Place, initialize
from isotach.ops import backends
from isotach.ops.engine import Span, run
from isotach.ops.recurrence import Recurrence, Tensors, family
from isotach.rng import generator

SIZES = {"B": 2, "T": 37, "H": 2, "K": 4, "V": 6, "G": 1, "D": 16, "W": 4, "P": 2, "R": 3, "U": 2, "L": 40}
CPU = torch.device("cpu")


class Subject(ABC):
    """Something that maps (x, state, span) to (outputs, state), with random examples of x."""

    name: str
    variants: tuple[str, ...]
    causal: bool = True

    @classmethod
    @abstractmethod
    def named(cls, name: str) -> "Subject":
        """The same subject again, in another process."""

    @abstractmethod
    def example(self, variant: str, sizes: dict[str, int], dtype: torch.dtype, *, hard: bool = False) -> Tensors:
        """Random inputs: a NamedTuple of tensors with a time axis."""

    @abstractmethod
    def run(
        self, variant: str, x: Tensors, state: Any, span: Span, *, backend: str = "auto", chunk_size: int | None = None
    ) -> tuple[Tensor, Any]: ...

    @abstractmethod
    def states(self, state: Any) -> list[Tensors]:
        """The states inside `state`, in a fixed order."""

    @abstractmethod
    def rebuild(self, state: Any, states: list[Tensors]) -> Any:
        """`state` with its states replaced."""

    def backends(self) -> tuple[str, ...]:
        return ("auto",)

    def past(self, variant: str, rows: int, dtype: torch.dtype) -> Any:
        """A state that has read a few tokens."""
        sizes = SIZES | {"B": rows, "T": 3}
        with torch.no_grad():
            return self.run(variant, self.example(variant, sizes, dtype), None, Span.of(rows, 3))[1]

    def leaves(self, state: Any) -> list[Tensor]:
        """The floating tensors of a state, spare room excluded."""
        compact = [family(part).compact(part) for part in self.states(state)]
        return [leaf for part in compact for leaf in part if leaf.is_floating_point()]


class Family(Subject):
    def __init__(self, rec: Recurrence, label: str = "") -> None:
        self.rec, self.label, self.variants = rec, label, tuple(rec.variants)
        self.name = f"{rec.name} {label}".strip()

    @classmethod
    def named(cls, name: str) -> "Family":
        found = next(family for family in families() if family.name == name)
        return cls(found.rec, found.label)

    def example(self, variant: str, sizes: dict[str, int], dtype: torch.dtype, *, hard: bool = False) -> Tensors:
        draws = {**self.rec.ranges, **(self.rec.hard if hard else {})}
        stream = generator(0, self.name, variant, str(hard), *map(str, sizes.values()))
        return shapes.example(
            self.rec.Inputs, sizes, stream, draws=draws, shared=self.rec.variants[variant], dtype=dtype
        )

    def run(
        self, variant: str, x: Tensors, state: Any, span: Span, *, backend: str = "auto", chunk_size: int | None = None
    ) -> tuple[Tensor, Any]:
        return run(self.rec, x, state, span, backend=backend, chunk_size=chunk_size)  # type: ignore[arg-type]

    def states(self, state: Any) -> list[Tensors]:
        return [state]

    def rebuild(self, state: Any, states: list[Tensors]) -> Any:
        return states[0]

    def backends(self) -> tuple[str, ...]:
        return backends.available(self.rec, CPU)


class Hidden(NamedTuple):
    x: Float[Tensor, "B T D"]


class Layer(Subject):
    """A mixer at the first, a middle and the last place of a model of three layers; `options` are its Config's."""

    variants = ("first", "middle", "last")

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        self.mixer, self.options = name, options or {}
        self.causal = mixers.find(name).causal and self.options.get("causal", True)
        self.name = name if self.causal or "causal" not in self.options else f"{name} set"
        self.modules: dict[tuple[str, torch.dtype], nn.Module] = {}

    @classmethod
    def named(cls, name: str) -> "Layer":
        return cls(name)

    def module(self, variant: str, dtype: torch.dtype) -> nn.Module:
        """The layer with fixed random weights, drawn in float64 and then rounded."""
        if (variant, dtype) not in self.modules:
            cls = mixers.find(self.mixer)
            place = Place(self.variants.index(variant), len(self.variants))
            config = cls.Config(width=SIZES["D"], heads=SIZES["H"], **self.options)
            layer = cls.build(config, place)
            for part in (layer, place.shared):
                part.double()
                initialize(nn.ModuleDict({"layer": part}), partial(generator, 0, self.name), 0.3)
            with torch.no_grad():  # a map that begins at zero would hide what comes before it
                for name, module in layer.named_modules():
                    if isinstance(module, nn.Linear):
                        module.weight.normal_(0, 0.3, generator=generator(0, self.name, name))
            place.shared.to(dtype)
            self.modules[variant, dtype] = layer.to(dtype)
        return self.modules[variant, dtype]

    def example(self, variant: str, sizes: dict[str, int], dtype: torch.dtype, *, hard: bool = False) -> Tensors:
        return shapes.example(Hidden, sizes, generator(0, self.name, *map(str, sizes.values())), dtype=dtype)

    def run(
        self, variant: str, x: Tensors, state: Any, span: Span, *, backend: str = "auto", chunk_size: int | None = None
    ) -> tuple[Tensor, Any]:
        output, state = self.module(variant, x.x.dtype)(x.x, state, span)
        return output, state

    def states(self, state: Any) -> list[Tensors]:
        return [state[name] for name in sorted(state)]

    def rebuild(self, state: Any, states: list[Tensors]) -> Any:
        return dict(zip(sorted(state), states, strict=True))


def families() -> Iterator[Family]:
    """Every family defined in isotach.ops."""
    for module in pkgutil.iter_modules(isotach.ops.__path__):
        if module.ispkg:
            continue
        for item in vars(import_module(f"isotach.ops.{module.name}")).values():
            found = isinstance(item, type) and issubclass(item, Recurrence) and item is not Recurrence
            if found and item.__module__ == f"isotach.ops.{module.name}":
                yield from (Family(rec, label) for label, rec in item.instances().items())


def layers() -> Iterator[Layer]:
    """Every mixer, and once more as one that reads a set where it can."""
    for name in mixers.names():
        yield Layer(name)
        if "causal" in mixers.find(name).Config.model_fields:
            yield Layer(name, {"causal": False})


def find(name: str | None = None) -> list[Subject]:
    """Every family and mixer, or those called `name`; names of both kinds may coincide."""
    return [subject for subject in (*families(), *layers()) if name in (None, subject.name, subject.name.split()[0])]
