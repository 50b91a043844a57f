"""Shapes as data: what `Float[Tensor, "B #T H K"]` in a NamedTuple says is checked, sliced and drawn from here.

An axis name binds to one size across all fields; `#T` also accepts 1 (the value is shared along that axis), and `1` is
always 1. Where not every number will do, the values stand beside the shape: `Annotated[Float[...], Within(...)]`.
B batch, T time, H heads, K/V key/value width, D model width, S stored tokens.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from isotach.errors import UserError


class Axis(NamedTuple):
    name: str
    shared: bool  # may be 1 whatever the name's size


class Within(NamedTuple):
    """The values from low to high, both included; `remedy` says how to come by them."""

    low: float
    high: float
    remedy: str

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"between {self.low:g} and {self.high:g}"


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
N = TypeVar("N", bound=tuple[Any, ...])

# Plain dicts: torch.compile does not see through functools.cache.
_axes: dict[type, dict[str, tuple[Axis, ...]]] = {}
_limits: dict[type, dict[str, Within]] = {}


def axes(cls: type[tuple[Any, ...]]) -> dict[str, tuple[Axis, ...]]:
    """The declared axes of every tensor field of a NamedTuple class."""
    if cls not in _axes:
        _axes[cls] = {
            field: tuple(Axis(name.lstrip("#"), name.startswith("#")) for name in annotation.dim_str.split())
            for field, annotation in cls.__annotations__.items()
        }
    return _axes[cls]


def limits(cls: type[tuple[Any, ...]]) -> dict[str, Within]:
    """The declared values of every field of a NamedTuple class that declares some."""
    if cls not in _limits:
        _limits[cls] = {
            field: mark
            for field, annotation in cls.__annotations__.items()
            for mark in getattr(annotation, "__metadata__", ())
            if isinstance(mark, Within)
        }
    return _limits[cls]


def check(who: str, value: tuple[Any, ...]) -> dict[str, int]:
    """Bind every axis name to its size; ValueError tells who, expected, got and the remedy."""
    sizes = {"1": 1}
    for field, declared in axes(type(value)).items():
        shape = tuple(getattr(value, field).shape)
        if not _fits(shape, declared, sizes):
            raise ValueError(_complaint(who, field, shape, declared, sizes))
        sizes |= {axis.name: size for axis, size in zip(declared, shape, strict=True) if not axis.shared}
    return sizes


def check_values(who: str, value: tuple[Any, ...]) -> None:
    """UserError where a field holds a number outside its limits; what is not a number is left to show in the result."""
    for field, within in limits(type(value)).items():
        leaf = getattr(value, field).detach()
        if not leaf.numel():
            continue
        for bound, reduce, outside in ((within.high, torch.amax, operator.gt), (within.low, torch.amin, operator.lt)):
            if not math.isinf(bound) and outside(extreme := float(reduce(leaf)), bound):
                raise UserError(f"{who}: {field} must be {within}; got {extreme:g}; {within.remedy}")


def example(
    cls: type[N],
    sizes: Mapping[str, int],
    generator: torch.Generator,
    *,
    draws: Mapping[str, Draw] | None = None,
    shared: Mapping[str, frozenset[str]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> N:
    """Random tensors of the declared shapes: standard normal, or `draws[field]` where the field has a range.

    `shared[field]` names the `#` axes that this example gives length 1.
    """
    sizes = {"1": 1, **sizes}
    fields = {}
    for field, declared in axes(cls).items():
        alone = (shared or {}).get(field, frozenset())
        shape = tuple(1 if axis.shared and axis.name in alone else sizes[axis.name] for axis in declared)
        draw = (draws or {}).get(field, normal)
        value = draw(shape, generator)
        fields[field] = value.to(dtype) if value.is_floating_point() else value
    return cls(**fields)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(low: float, high: float) -> Draw:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low

    return draw


def one_of(*values: float) -> Draw:
    """Each element is one of `values`, with equal chance."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        index = torch.randint(len(values), shape, generator=generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    return draw


def time_slice(value: N, start: int, stop: int) -> N:
    """Tokens start..stop of every field that has a time axis; a field shared along time is kept whole."""
    fields = []
    for field, declared in axes(type(value)).items():
        tensor = getattr(value, field)
        at = next((i for i, axis in enumerate(declared) if axis.name == "T"), None)
        keep = at is None or (declared[at].shared and tensor.shape[at] == 1)
        fields.append(tensor if keep else tensor.narrow(at, start, stop - start))
    return type(value)(*fields)


def batch_slice(value: N, row: int) -> N:
    """One row of every field that has a batch axis, as a batch of one."""
    fields = []
    for field, declared in axes(type(value)).items():
        tensor = getattr(value, field)
        at = next((i for i, axis in enumerate(declared) if axis.name == "B"), None)
        keep = at is None or (declared[at].shared and tensor.shape[at] == 1)
        fields.append(tensor if keep else tensor.narrow(at, row, 1))
    return type(value)(*fields)


def _fits(shape: tuple[int, ...], declared: tuple[Axis, ...], sizes: Mapping[str, int]) -> bool:
    if len(shape) != len(declared):
        return False
    return all(
        size == sizes.get(axis.name, size) or (axis.shared and size == 1)
        for size, axis in zip(shape, declared, strict=True)
    )


def _complaint(
    who: str, field: str, shape: tuple[int, ...], declared: tuple[Axis, ...], sizes: Mapping[str, int]
) -> str:
    names = ", ".join(f"{'1 or ' if axis.shared else ''}{axis.name}" for axis in declared)
    known = ", ".join(str(sizes.get(axis.name, axis.name)) for axis in declared)
    message = f"{who}: {field} must be ({names}) = ({known}); got {shape}."
    swapped = (shape[0], shape[2], shape[1], *shape[3:]) if len(shape) > 2 else shape
    if any(axis.name == "T" for axis in declared) and swapped != shape and _fits(swapped, declared, sizes):
        return f"{message} Isotach is time-major: {field}.transpose(1, 2)."
    return f"{message} Reshape {field} to those axes."
