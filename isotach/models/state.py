"""A decoder's whole memory as a value: fork it, pick rows of it, save it, load it into the model that made it.

One row per sequence; for every block the states its mixer keeps; for every row how many tokens it has read. A file is
safetensors: the tensors, and in its header what they belong to. A state is only meaningful together with the weights
that made it and the tokens it has read, so both are named by hashes and checked at load.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from isotach import shapes
from isotach.errors import UserError
from isotach.files import write_atomically
from isotach.nn.mixer import MixerState
from isotach.ops.recurrence import Tensors, family

if TYPE_CHECKING:
    from isotach.models.decoder import Decoder

FORMAT = "isotach-state-1"


@dataclass(frozen=True)
class DecoderState:
    """blocks: one {name: State} per block; positions (B,) int64: tokens read, the position of the next one."""

    blocks: tuple[MixerState, ...]
    positions: Int[Tensor, "B"]

    @property
    def rows(self) -> int:
        return len(self.positions)

    def select(self, rows: Tensor) -> "DecoderState":
        """The rows named by a LongTensor, in that order, as a state of their own; a row may be taken twice."""
        return self._map(lambda leaf: leaf[rows])

    def fork(self, n: int) -> "DecoderState":
        """n independent copies of every row: row b becomes rows b·n .. b·n + n - 1."""
        return self._map(lambda leaf: leaf.repeat_interleave(n, 0))

    @staticmethod
    def cat(states: Sequence["DecoderState"]) -> "DecoderState":
        """The rows of several states, in order."""
        blocks = []
        for parts in zip(*(state.blocks for state in states), strict=True):
            blocks.append(
                {name: family(parts[0][name]).concatenate([part[name] for part in parts]) for name in parts[0]}
            )
        return DecoderState(tuple(blocks), torch.cat([state.positions for state in states]))

    def nbytes(self) -> int:
        """Bytes of all rows, spare room excluded."""
        return sum(leaf.nbytes for leaf in self._leaves().values())

    def save(self, path: str | os.PathLike[str], *, weights: str, tokens: str) -> None:
        """Write the state; `weights` is the decoder's fingerprint, `tokens` the chain hash of what was read."""
        leaves = {name: leaf.cpu().contiguous() for name, leaf in self._leaves().items()}
        header = {
            "format": FORMAT,
            "weights": weights,
            "tokens": tokens,
            "positions": json.dumps(self.positions.tolist()),
            "dtypes": json.dumps({name: str(leaf.dtype) for name, leaf in leaves.items()}),
        }
        header["content"] = _digest(header, leaves)
        write_atomically(Path(path), to_bytes(leaves, header))

    @staticmethod
    def load(path: str | os.PathLike[str], *, decoder: "Decoder", tokens: str | None) -> "DecoderState":
        """Read a state that `decoder` made; `tokens` is the expected chain hash, None to accept any.

        UserError where the file is missing, torn, of another model, of other tokens, or of other shapes or dtypes.
        """
        header, leaves = _read(path)
        _expect(path, "format", FORMAT, header.get("format"), "save it again with this version")
        content = header.pop("content", None)
        _expect(path, "content", _digest(header, leaves), content, "it was edited or damaged; use another copy")
        _expect(path, "weights", decoder.fingerprint(), header.get("weights"), "load it with the model that made it")
        if tokens is not None:
            _expect(path, "tokens", tokens, header.get("tokens"), "give the tokens that it has read")
        positions = torch.tensor(json.loads(header["positions"]), dtype=torch.int64)
        template = decoder.template()
        spec = template._leaves()
        dtypes = json.dumps({name: str(leaf.dtype) for name, leaf in spec.items()})
        _expect(path, "dtypes", dtypes, header.get("dtypes"), "use the precision that it was saved with")
        _expect(path, "tensors", sorted(spec), sorted(leaves), "it is damaged; use another copy")
        blocks = []
        for i, block in enumerate(template.blocks):
            blocks.append(
                {name: _fill(path, f"{i}.{name}", like, leaves, len(positions)) for name, like in block.items()}
            )
        return DecoderState(tuple(blocks), positions)._map(lambda leaf: leaf.to(decoder.device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "DecoderState":
        blocks = tuple(
            {name: type(state)(*(change(leaf) for leaf in state)) for name, state in block.items()}
            for block in self.blocks
        )
        return DecoderState(blocks, change(self.positions))

    def _leaves(self) -> dict[str, Tensor]:
        leaves: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            for name, state in block.items():
                compact = family(state).compact(state)
                leaves |= {f"{i}.{name}.{field}": getattr(compact, field) for field in compact._fields}
        return leaves


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"state {path}: expected a state file, found none; check the path") from None
    except (SafetensorError, OSError) as error:
        reason = "a folder" if Path(path).is_dir() else error
        raise UserError(f"state {path}: expected a whole safetensors file, got {reason}; use another copy") from None


def _digest(header: Mapping[str, str], leaves: Mapping[str, Tensor]) -> str:
    """sha256 of everything in the file."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {tuple(leaf.shape)}".encode())
        digest.update(leaf.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _expect(path: str | os.PathLike[str], what: str, expected: Any, got: Any, remedy: str) -> None:
    if expected != got:
        raise UserError(f"state {path}: expected {what} {_brief(expected)}, got {_brief(got)}; {remedy}")


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


def _fill(path: str | os.PathLike[str], name: str, like: Tensors, leaves: dict[str, Tensor], rows: int) -> Tensors:
    """The state called `name`; every axis but rows (B) and stored tokens (S) must be as the decoder makes it."""
    state = type(like)(*(leaves[f"{name}.{field}"] for field in like._fields))
    for field, declared in shapes.axes(type(like)).items():
        expected, got = list(getattr(like, field).shape), list(getattr(state, field).shape)
        for at, axis in enumerate(declared):
            if axis.name == "S" and at < len(got):
                expected[at] = got[at]
        expected[0] = rows
        _expect(path, f"{name}.{field} of shape", expected, got, "it is damaged; use another copy")
    return state
