"""A decoder in fewer bits for inference: int8 (nn/linear8.py), a quarter of the bytes, or bfloat16, half of them.

A step that decodes one row reads every weight once and little else, so most of its time is that of their bytes.
Matrices that such a step reads are rounded, and the embedding, of which it reads a row. In eight bits what is small
stays as it is: a gate with a number per head, or a factor of low rank, decides much and weighs little. Blocks as
TransNormerLLM has them get larger matrices on top (models/block8.py).

bfloat16 is for GPUs, whose matrix units take it: products in bfloat16, sums, norms, gates and states in float32, as in
training with precision = "bf16". A CPU reads such weights back into float32, where they lose nothing more.
"""

import copy
import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from isotach.errors import UserError
from isotach.models.block8 import Block8
from isotach.nn.linear8 import Embedding8, Linear8

if TYPE_CHECKING:
    from isotach.models.decoder import Decoder

SMALL = 64  # outputs or inputs below which a matrix stays as it is


def int8(decoder: "Decoder") -> "Decoder":
    """A copy of `decoder` for inference, its matrices rounded; it shares no memory with it.

    UserError where the weights are in eight bits already, or not finite.
    """
    if is_int8(decoder):
        raise UserError(
            "int8: expected weights in floating point, got int8 ones; start from the model they are made of"
        )
    made: dict[nn.Module, nn.Module] = {decoder.embed: Embedding8.of(decoder.embed)}
    made |= {block: Block8(block) for block in decoder.blocks if Block8.fits(block, least=SMALL)}
    inside = {layer for block in made for layer in block.modules()}
    made |= {layer: Linear8.of(layer) for layer in _read_by_a_token(decoder) if layer not in inside}
    # What is in the memo is not copied but taken from it.
    copied = copy.deepcopy(decoder, {id(module): new for module, new in made.items()}).requires_grad_(False)
    gather(copied)
    return copied


def bfloat16(decoder: "Decoder") -> "Decoder":
    """A copy of `decoder` for inference, linear maps and embedding in bfloat16. UserError where it is in fewer bits."""
    if is_int8(decoder) or is_bfloat16(decoder):
        raise UserError("bfloat16: expected weights in float32, got fewer bits; start from the model they are made of")
    copied = copy.deepcopy(decoder).requires_grad_(False)
    for layer in _matrices(copied):
        layer.to(torch.bfloat16)
    return copied


def is_int8(decoder: "Decoder") -> bool:
    return isinstance(decoder.embed, Embedding8)


def is_bfloat16(decoder: "Decoder") -> bool:
    return decoder.embed.weight.dtype == torch.bfloat16


def make_room(decoder: "Decoder", weights: Mapping[str, Tensor]) -> None:
    """Give `decoder` what these weights fit into; nothing changes where all are float32.

    Those in bfloat16 stay so on a GPU alone.
    """
    if any(weight.dtype == torch.bfloat16 for name, weight in weights.items() if name.endswith(".weight")):
        decoder.requires_grad_(False)
        for layer in _matrices(decoder) if decoder.device.type != "cpu" else ():
            layer.to(torch.bfloat16)
    rounded = {name.removesuffix(".weight") for name, weight in weights.items() if weight.dtype == torch.int8}
    for i, block in enumerate(decoder.blocks):
        if f"blocks.{i}.qkvu" in rounded and Block8.fits(block, least=1):
            decoder.blocks[i] = Block8(block, empty=True)
    for name, layer in list(decoder.named_modules()):
        if name in rounded and isinstance(layer, nn.Embedding):
            decoder.set_submodule(name, Embedding8.of(layer, empty=True))
        elif name in rounded and isinstance(layer, nn.Linear):
            decoder.set_submodule(name, Linear8.of(layer, empty=True))
    if rounded:
        decoder.requires_grad_(False)
        gather(decoder)


def gather(decoder: "Decoder") -> None:
    """Lay the integers of a model on the CPU end to end in large pages, where the system has them.

    A step reads all of them once, and in pages of 4 KiB a tenth of its time goes to looking pages up (docs/log.md).
    """
    layers = [layer for layer in decoder.modules() if isinstance(layer, Linear8 | Embedding8)]
    if not hasattr(mmap, "MADV_HUGEPAGE") or decoder.device.type != "cpu" or not layers:
        return
    size = sum(layer.weight.nbytes for layer in layers)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    parts = torch.frombuffer(memory, dtype=torch.int8).split([layer.weight.numel() for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part.view_as(layer.weight).copy_(layer.weight), requires_grad=False)


def _matrices(decoder: "Decoder") -> list[nn.Module]:
    return [layer for layer in decoder.modules() if isinstance(layer, nn.Linear | nn.Embedding)]


@torch.inference_mode()
def _read_by_a_token(decoder: "Decoder") -> list[nn.Linear]:
    """The linear maps that are called for one token, but for small ones."""
    called: dict[nn.Linear, None] = {}

    def note(layer: nn.Module, inputs: object) -> None:
        assert isinstance(layer, nn.Linear)
        called[layer] = None

    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear) and min(layer.weight.shape) >= SMALL]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        decoder(torch.zeros(1, 1, dtype=torch.int64, device=decoder.device))
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)
