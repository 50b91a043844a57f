"""A decoder's whole memory as a value: fork it, pick rows of it, save it, load it into the model that made it.

One row per sequence; for every block the states its mixer keeps; for every row how many tokens it has read. A file is
safetensors: the tensors, and in its header what they belong to. A state is only meaningful together with the weights
that made it and the tokens it has read, so both are named by hashes and checked at load.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from isotach import shapes
from isotach.errors import UserError
from isotach.files import write_atomically
from isotach.nn.mixer import MixerState
from isotach.ops.recurrence import Apart, Tensors, family, grows, rows, stored_fields

FORMAT = "isotach-state-1"
DAMAGED = "it is damaged; use another copy"


class Origin(Protocol):
    """What a state is held against when it comes from outside: a decoder, or what is known of one."""

    @property
    def device(self) -> torch.device: ...

    def fingerprint(self) -> str:
        """The identity of its weights."""

    def template(self) -> "DecoderState":
        """The state of one sequence after one token: which tensors there are, of which shapes and dtypes."""

    def stored(self, block: int, name: str, context: int) -> int:
        """Entries along S that the state called `name` of a block holds after `context` tokens."""


@dataclass(frozen=True)
class DecoderState:
    """blocks: one {name: State} per block; positions (B,) int64: tokens read, the position of the next one.

    In batches that were put together from several states, what grows with the tokens read is Apart, row by row.
    """

    blocks: tuple[MixerState, ...]
    positions: Int[Tensor, "B"]

    @property
    def rows(self) -> int:
        return len(self.positions)

    def select(self, rows: Tensor) -> "DecoderState":
        """The rows named by a LongTensor, in that order, as a state of their own; a row may be taken twice."""
        return self._map(lambda leaf: leaf[rows], lambda states: [states[row] for row in rows.tolist()])

    def fork(self, n: int) -> "DecoderState":
        """n independent copies of every row: row b becomes rows b·n .. b·n + n - 1."""
        return self._map(
            lambda leaf: leaf.repeat_interleave(n, 0), lambda states: [state for state in states for _ in range(n)]
        )

    @staticmethod
    def cat(states: Sequence["DecoderState"]) -> "DecoderState":
        """The rows of several states, in order; what grows is shared with them, not copied."""
        first, *others = states
        return first.exchanged(torch.arange(first.rows), others) if others else first

    def exchanged(self, stay: Tensor, joining: Sequence["DecoderState"]) -> "DecoderState":
        """The rows `stay` (a LongTensor), and behind them all rows of other states, in order; each is copied once."""
        stay = stay.to(self.positions.device)
        blocks = []
        for block, *others in zip(self.blocks, *(state.blocks for state in joining), strict=True):
            blocks.append(
                {name: _exchanged(state, stay, [other[name] for other in others]) for name, state in block.items()}
            )
        return DecoderState(tuple(blocks), _put_together(self.positions, stay, [state.positions for state in joining]))

    def reserved(self, room: Callable[[int, str], int]) -> "DecoderState":
        """The same in buffers that it alone may write into, which take room(block, name) entries in all."""
        blocks = []
        for i, block in enumerate(self.blocks):
            blocks.append({name: _reserved(state, room(i, name)) for name, state in block.items()})
        return DecoderState(tuple(blocks), self.positions)

    def compact(self) -> "DecoderState":
        """The same without spare room, and in memory that holds nothing else."""
        own = self.reserved(lambda block, name: 0)
        return own._map(lambda leaf: leaf.clone() if leaf.untyped_storage().nbytes() > leaf.nbytes else leaf, list)

    @property
    def grows(self) -> bool:
        """Whether a token more takes more memory."""
        return any(grows(state) for block in self.blocks for state in block.values())

    def nbytes(self) -> int:
        """Bytes of all rows, spare room excluded."""
        return sum(_nbytes(state) for block in self.blocks for state in block.values())

    def save(self, path: str | os.PathLike[str], *, weights: str, tokens: str) -> None:
        """Write the state; `weights` is the decoder's fingerprint, `tokens` the chain hash of what was read."""
        leaves = {name: leaf.cpu().contiguous() for name, leaf in self._leaves().items()}
        header = {
            "format": FORMAT,
            "weights": weights,
            "tokens": tokens,
            "positions": json.dumps(self.positions.tolist()),
        }
        header["content"] = _digest(header, leaves)
        write_atomically(path, to_bytes(leaves, header))

    @staticmethod
    def load(path: str | os.PathLike[str], *, decoder: Origin, tokens: str | None) -> "DecoderState":
        """Read a state that `decoder` made; `tokens` is the expected chain hash, None to accept any.

        UserError where the file is missing, torn, of another model, of other tokens, or of other shapes or dtypes.
        """
        file = StateFile.read(path)
        if tokens is not None:
            file.expect("tokens", tokens, file.tokens, "give the tokens that it has read")
        return file.state(decoder)

    def _map(
        self, change: Callable[[Tensor], Tensor], choose: Callable[[Sequence[Tensors]], Sequence[Tensors]]
    ) -> "DecoderState":
        """The same done to every leaf, and to the list of rows where they are apart."""

        def changed(state: Tensors) -> Tensors:
            return _apart(choose(state)) if isinstance(state, Apart) else type(state)(*map(change, state))

        blocks = tuple({name: changed(state) for name, state in block.items()} for block in self.blocks)
        return DecoderState(blocks, change(self.positions))

    def _leaves(self) -> dict[str, Tensor]:
        leaves: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            for name, state in block.items():
                if isinstance(state, Apart):
                    state = family(state[0]).concatenate(state)
                compact = family(state).compact(state)
                leaves |= {f"{i}.{name}.{field}": getattr(compact, field) for field in compact._fields}
        return leaves


@dataclass(frozen=True)
class StateFile:
    """What a file holds, verified to be what was written, but not held against a model yet.

    weights, tokens   the model's fingerprint, and what was said of the tokens
    positions (N,)    tokens read by each row
    leaves            block.name.field: tensor
    """

    path: str | os.PathLike[str]
    weights: str
    tokens: str
    positions: Tensor
    leaves: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "StateFile":
        """UserError where the file is missing, torn or edited. It may be anybody's: nothing in it is believed."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"state {path}: expected a state file, found none; check the path") from None
        except (SafetensorError, OSError) as error:
            reason = "a folder" if os.path.isdir(path) else error
            raise UserError(
                f"state {path}: expected a whole safetensors file, got {reason}; use another copy"
            ) from None
        content, positions = header.pop("content", None), header.get("positions", "")
        found = cls(path, header.get("weights", ""), header.get("tokens", ""), torch.empty(0), leaves)
        found.expect("format", FORMAT, header.get("format"), "save it again with this version")
        found.expect("content", _digest(header, leaves), content, "it was edited or damaged; use another copy")
        if not re.fullmatch(r"\[\d{1,18}(, \d{1,18})*\]", positions):
            found.expect("positions", "a list of numbers", positions, DAMAGED)
        return replace(found, positions=torch.tensor(json.loads(positions), dtype=torch.int64))

    def state(self, origin: Origin) -> DecoderState:
        """The state, on the model's device. UserError where it is not of this model."""
        self.expect("weights", origin.fingerprint(), self.weights, "load it with the model that made it")
        template = origin.template()
        spec = template._leaves()
        self.expect("tensors", sorted(spec), sorted(self.leaves), DAMAGED)
        kinds, found = ([str(each[name].dtype) for name in sorted(spec)] for each in (spec, self.leaves))
        self.expect("dtypes", kinds, found, "use the precision that it was saved with")
        blocks = []
        for i, block in enumerate(template.blocks):
            states = {}
            for name, like in block.items():
                stored = [origin.stored(i, name, position) for position in self.positions.tolist()]
                states[name] = self._fill(f"{i}.{name}", like, stored)
            blocks.append(states)
        state = DecoderState(tuple(blocks), self.positions)
        return state._map(lambda leaf: leaf.to(origin.device), list)

    def _fill(self, name: str, like: Tensors, stored: Sequence[int]) -> Tensors:
        """The state called `name`: of the shapes that rows have which have read, and store, so many tokens.

        Counts inside it decide what is read of its buffers, so they must be the true ones.
        """
        state = type(like)(*(self.leaves[f"{name}.{field}"] for field in like._fields))
        for field, declared in shapes.axes(type(like)).items():
            expected, leaf = list(getattr(like, field).shape), getattr(state, field)
            for at, axis in enumerate(declared):
                if axis.name == "S":
                    expected[at] = max(stored)
            expected[0] = len(self.positions)
            self.expect(f"{name}.{field} of shape", expected, list(leaf.shape), DAMAGED)
            if not leaf.is_floating_point():
                for got, *true in zip(leaf.tolist(), stored, self.positions.tolist(), strict=True):
                    if got not in (*true, max(stored)):
                        self.expect(f"{name}.{field}", true[0], got, DAMAGED)
        return state

    def expect(self, what: str, expected: Any, got: Any, remedy: str) -> None:
        """UserError unless they are equal."""
        if expected != got:
            raise UserError(f"state {self.path}: expected {what} {_brief(expected)}, got {_brief(got)}; {remedy}")


def _digest(header: Mapping[str, str], leaves: Mapping[str, Tensor]) -> str:
    """sha256 of everything in the file."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {tuple(leaf.shape)}".encode())
        digest.update(leaf.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


def _nbytes(state: Tensors) -> int:
    if isinstance(state, Apart):
        return sum(map(_nbytes, state))
    stored, total = stored_fields(type(state)), 0
    for field, leaf in zip(state._fields, state, strict=True):
        if field not in stored:
            total += leaf.nbytes
        elif leaf.shape[1]:
            total += leaf.nbytes // leaf.shape[1] * int(state.length.max())
    return total


def _exchanged(state: Tensors, stay: Tensor, others: Sequence[Tensors]) -> Tensors:
    if grows(state):
        mine = _rows_of(state)
        return _apart([*(mine[row] for row in stay.tolist()), *(row for other in others for row in _rows_of(other))])
    leaves = zip(state, *others, strict=True)
    return type(state)(*(_put_together(leaf, stay, rest) for leaf, *rest in leaves))


def _put_together(leaf: Tensor, stay: Tensor, others: Sequence[Tensor]) -> Tensor:
    joined = leaf.new_empty(len(stay) + sum(map(len, others)), *leaf.shape[1:])
    torch.index_select(leaf, 0, stay, out=joined[: len(stay)])
    if others:
        torch.cat(list(others), out=joined[len(stay) :])
    return joined


def _rows_of(state: Tensors) -> Sequence[Tensors]:
    """What grows, row by row."""
    if isinstance(state, Apart):
        return state
    count = len(state[0])
    return [state] if count == 1 else [_reserved(rows(state, slice(n, n + 1)), 0) for n in range(count)]


def _apart(states: Sequence[Tensors]) -> Tensors:
    """A row alone is simply a state."""
    return states[0] if len(states) == 1 else Apart(states)


def _reserved(state: Tensors, room: int) -> Tensors:
    if isinstance(state, Apart):
        return Apart(_reserved(row, room) for row in state)
    return family(state).reserve(state, room) if grows(state) else state
