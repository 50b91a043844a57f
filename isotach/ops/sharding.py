"""Calls on tensors that are spread over devices (torch.distributed.tensor): what of a call may be split.

An operator is split over rows, where documents are rows, and over heads: every device calls it for what it has, and
nothing is exchanged. What has no such axis is whole everywhere, and its gradient is the sum of what the devices find.
Anything else that is spread is gathered first. So a layer whose projections are split by heads needs nothing but
that, and the sum behind its last projection.

Operators are declared where they are defined, by the axes that their family declares. PyTorch's rules, whose interface
is experimental, are made of that where such a tensor is first met, so nobody else depends on it.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from isotach import shapes
from isotach.ops.recurrence import Tensors

Axes = tuple[shapes.Axis, ...]
Way = tuple[list[Any], list[Any]]  # placements of what is given back, and of what is taken

WANTED = {"log_decay": "with_decay", "state": "with_state"}  # backward operators are told whether these are


class _Operator(NamedTuple):
    """takes: the axes of tensors, by the names of arguments; gives: outputs' names; over: which axes may be split."""

    name: str
    takes: Mapping[str, Axes]
    gives: Sequence[str]
    over: Sequence[str]


_declared: list[_Operator] = []


def declare(
    name: str,
    *inputs: type[Tensors],
    state: type[Tensors] | None = None,
    output: str,
    over: Sequence[str] = ("B", "H"),
) -> None:
    """The rules of isotach::NAME, which takes fields of `inputs`, and of isotach::NAME_backward, which gives the
    gradients of what it takes.

    state: what it takes as its argument `state`, and gives back besides outputs, if so
    output: the field whose axes outputs have; over: the axes that may be split
    """
    takes = {field: axes for kind in inputs for field, axes in shapes.axes(kind).items()}
    takes |= {"output": takes[output], "grad": takes[output], "grad_output": takes[output]}
    if state is None:
        _declared.append(_Operator(name, takes, ("output",), over))
    else:
        (axes,) = shapes.axes(state).values()
        _declared.append(_Operator(name, {**takes, "state": axes, "grad_state": axes}, ("output", "state"), over))


def spread(x: Tensors) -> bool:
    """Whether inputs lie on several devices. Not asked where a graph is made: rules made before are in it."""
    module = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(leaf, module.DTensor) for leaf in x)


def engage() -> None:
    """Tell PyTorch the rules of all that was declared."""
    from torch.distributed.tensor.experimental import register_sharding

    while _declared:
        operator = _declared.pop()
        forward, backward = (getattr(torch.ops.isotach, operator.name + part).default for part in ("", "_backward"))
        differentiated = [name for name in _arguments(forward) if name in operator.takes]
        register_sharding(forward)(partial(_forward, operator, _arguments(forward)))
        register_sharding(backward)(partial(_backward, operator, _arguments(backward), differentiated))


def _arguments(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def _forward(operator: _Operator, names: Sequence[str], *values: Any) -> list[Way]:
    from torch.distributed.tensor import Replicate, Shard

    given, ways = dict(zip(names, values, strict=False)), []
    for axis in _axes(operator, given):
        gives = []
        for name in operator.gives:
            at = [own.name for own in operator.takes[name]].index(axis) if axis else None
            gives.append(Replicate() if at is None else Shard(at))
        ways.append((gives, [_place(operator, name, value, axis) for name, value in given.items()]))
    return ways


def _backward(operator: _Operator, names: Sequence[str], differentiated: Sequence[str], *values: Any) -> list[Way]:
    from torch.distributed.tensor import Partial, Replicate

    given, ways = dict(zip(names, values, strict=False)), []
    for axis in _axes(operator, given):
        gives: list[Any] = []
        for name in differentiated:
            source = name if name in given else "output"  # which a backward may take instead of what it came from
            place = _place(operator, name, given[source], axis)
            if place is None or not given.get(WANTED.get(name, ""), True):
                gives.append(Replicate())  # an empty tensor
            else:  # where it was not split, every device has found a part of the sum
                gives.append(Partial() if axis and place == Replicate() else place)
        ways.append((gives, [_place(operator, name, value, axis) for name, value in given.items()]))
    return ways


def _axes(operator: _Operator, given: Mapping[str, Any]) -> list[str | None]:
    """What a call may be split over; None is not at all. A pack is one row."""
    packed = given.get("cu_seqlens") is not None
    return [None, *(axis for axis in operator.over if not (packed and axis == "B"))]


def _place(operator: _Operator, name: str, value: Any, axis: str | None) -> Any:
    """The placement of an argument, None for what is no tensor."""
    from torch.distributed.tensor import Replicate, Shard

    if not hasattr(value, "shape"):
        return None
    for at, own in enumerate(operator.takes.get(name, ())):
        if own.name == axis and not (own.shared and value.shape[at] == 1):
            return Shard(at)
    return Replicate()
