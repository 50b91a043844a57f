"""The algebra every mixer's memory obeys: summaries of segments compose, and act on a state.

    S_t = a_t · S_{t-1}          a_t = lift(x_t), the summary of one token
    (a · b) · S = b · (a · S)    compose(a, b): first a, then b; associative, with a neutral element
    o_t = emit(x_t, S_t)

For an affine family a summary is the pair (A, B) of S ↦ A∘S + B. The four functions lift, compose, apply and emit
define a family completely. summarize and read are the same mathematics in closed form: here a scan over tokens,
which serves as the oracle; families override them with matrix products.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from isotach import shapes

Tensors = Any  # a NamedTuple of tensors: a family's Inputs, Summary or State

# Of every log_decay: memory that grows by itself overflows, and so would the closed forms.
FADING = shapes.Within(-math.inf, 0.0, "pass the natural logarithm of what is kept, as F.logsigmoid gives it")

_families: dict[type, type["Recurrence"]] = {}


def family(state: Tensors) -> type["Recurrence"]:
    """The family a state belongs to."""
    return _families[type(state)]


class Apart(tuple[Tensors, ...]):
    """The states of a batch, one row each, that are not laid side by side.

    What grows is kept so where rows come and go: nothing is padded to the longest row, and nobody's memory is copied
    when another joins or leaves. `run` takes it wherever it takes a state.
    """

    __slots__ = ()


class Paired(NamedTuple):
    """A state, and the memory that the state after the next token is to be written into.

    `run` takes it wherever it takes a state and one token of every row, and gives back the pair the other way round: so
    two states of fixed places in memory are all that any number of steps needs.
    """

    now: Tensors
    after: Tensors


class Recurrence(ABC):
    """A family of recurrences. `Inputs`, `Summary` and `State` are NamedTuples of annotated tensors.

    Leaves of `Summary` and `State` may carry leading axes after B (lift puts time there): the four definitions must
    broadcast over them.
    """

    Inputs: ClassVar[type[Tensors]]
    Summary: ClassVar[type[Tensors]]
    State: ClassVar[type[Tensors]]

    # How random examples are drawn: usual ranges, the hard values, and which `#` axes a variant shares.
    ranges: ClassVar[Mapping[str, shapes.Draw]] = {}
    hard: ClassVar[Mapping[str, shapes.Draw]] = {}
    variants: ClassVar[Mapping[str, Mapping[str, frozenset[str]]]] = {"": {}}

    # Whether the state after the last token tells every token what it should read, wherever it stands: causal=False.
    both_ways: bool = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @classmethod
    def instances(cls) -> Mapping[str, Self]:
        """What the laws try, by a short label; a family with parameters names a few choices of them."""
        return {"": cls()}

    @abstractmethod
    def lift(self, x: Tensors) -> Tensors:
        """Every token as a segment of length 1: leaves (B, T, ...)."""

    @abstractmethod
    def compose(self, a: Tensors, b: Tensors) -> Tensors:
        """The summary of segment a followed by segment b."""

    @abstractmethod
    def apply(self, a: Tensors, s: Tensors) -> Tensors:
        """The state after a segment, from the state before it."""

    @abstractmethod
    def emit(self, x: Tensors, s: Tensors) -> Tensor:
        """Outputs (B, T, H, V) from the states after each token, leaves (B, T or 1, ...)."""

    @abstractmethod
    def neutral(self, x: Tensors) -> Tensors:
        """The summary of the empty segment, for inputs shaped like x."""

    @abstractmethod
    def initial(self, x: Tensors, rows: int) -> Tensors:
        """The state before the first token of `rows` sequences, for inputs shaped like x."""

    def step(self, x: Tensors, s: Tensors) -> tuple[Tensor, Tensors]:
        """Outputs (B, 1, H, V) of one token, and the state after it; families override it where that saves work."""
        s = self.apply(at_time(self.lift(x), 0), s)
        return self.emit(x, with_time(s)), s

    def stored(self, context: int) -> int:
        """Entries along S of a state that has read `context` tokens; a family that grows, but not for ever, says so."""
        return context

    @staticmethod
    def compact(s: Tensors) -> Tensors:
        """The state without spare room: equal pasts give equal tensors. What is compared, saved and counted."""
        return s

    def room(self, context: int) -> int:
        """Entries along S that a state's buffers have at most while it reads up to `context` tokens."""
        return self.stored(context)

    @staticmethod
    def reserve(s: Tensors, room: int) -> Tensors:
        """The state in buffers that it alone may write into, and that take `room` entries along S in all."""
        return s

    @staticmethod
    def concatenate(states: Sequence[Tensors]) -> Tensors:
        """The rows of several states, in order."""
        return type(states[0])(*(torch.cat(leaves) for leaves in zip(*states, strict=True)))

    def __init_subclass__(cls) -> None:
        _families[cls.State] = cls

    def summarize(self, x: Tensors) -> Tensors:
        """The summary of the whole segment."""
        lifted = self.lift(x)
        total = self.neutral(x)
        for t in range(length(x)):
            total = self.compose(total, at_time(lifted, t))
        return total

    def read(self, x: Tensors, s: Tensors) -> Tensor:
        """Outputs (B, T, H, V) of the segment, from the state before it."""
        lifted = self.lift(x)
        outputs = []
        for t in range(length(x)):
            s = self.apply(at_time(lifted, t), s)
            outputs.append(self.emit(shapes.time_slice(x, t, t + 1), with_time(s)))
        return torch.cat(outputs, 1)


def stored_fields(kind: type[Tensors]) -> set[str]:
    """The fields of a State that grow with the tokens read: those with an axis S."""
    return {field for field, declared in shapes.axes(kind).items() if any(axis.name == "S" for axis in declared)}


def length(x: Tensors) -> int:
    """T, read off the first field that has an unshared time axis."""
    for field, declared in shapes.axes(type(x)).items():
        for at, axis in enumerate(declared):
            if axis.name == "T" and not axis.shared:
                return int(getattr(x, field).shape[at])
    raise TypeError(f"{type(x).__name__} declares no time axis")


def at_time(value: Tensors, t: int) -> Tensors:
    """Leaves (B, T, ...) at one time: (B, ...)."""
    return type(value)(*(leaf[:, t] for leaf in value))


def with_time(value: Tensors) -> Tensors:
    """Leaves (B, ...) as (B, 1, ...)."""
    return type(value)(*(leaf.unsqueeze(1) for leaf in value))


def grows(state: Tensors) -> bool:
    """Whether a state, or what Apart holds, takes more memory with every token."""
    return isinstance(state, Apart) or bool(stored_fields(type(state)))


def rows(value: Tensors, index: Tensor | slice) -> Tensors:
    """The chosen rows of every leaf."""
    return type(value)(*(leaf[index] for leaf in value))


def state_dtype(x: Tensor) -> torch.dtype:
    """Gates, states, summaries and accumulation are float32, or float64 where the inputs are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
