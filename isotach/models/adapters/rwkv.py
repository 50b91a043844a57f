"""RWKV-7 models in rwkv.cpp's files: a header, then tensors one after another until the file ends.

    header   magic, version, vocabulary, width, depth, data type of most tensors: int32 each
    tensor   number of dimensions, bytes of the name, data type, dimensions from the fastest on: int32 each; name; data

Little-endian; data types 0 float32 and 1 float16, quantised ones are not read.
(github.com/RWKV/rwkv.cpp, docs/FILE_FORMAT.md)
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from isotach import config as configuration
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig

MAGIC = b"fmgg"
VERSIONS = (100, 101)  # they differ for quantised tensors only
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}

MODEL = {
    "emb.weight": "embed.weight",
    "blocks.0.ln0.weight": "embed_norm.weight",
    "blocks.0.ln0.bias": "embed_norm.bias",
    "ln_out.weight": "norm.weight",
    "ln_out.bias": "norm.bias",
    "head.weight": "unembed.weight",
}
BLOCK = {
    "ln1.weight": "mixer_norm.weight",
    "ln1.bias": "mixer_norm.bias",
    "att.x_rwkvag": "mixer.shift.share",
    "att.receptance.weight": "mixer.q.weight",
    "att.key.weight": "mixer.k.weight",
    "att.value.weight": "mixer.v.weight",
    "att.output.weight": "mixer.out.weight",
    "att.w0": "mixer.decay.bias",
    "att.w1": "mixer.decay.down.weight",
    "att.w2": "mixer.decay.up.weight",
    "att.a0": "mixer.rate.bias",
    "att.a1": "mixer.rate.down.weight",
    "att.a2": "mixer.rate.up.weight",
    "att.v0": "mixer.blend.bias",
    "att.v1": "mixer.blend.down.weight",
    "att.v2": "mixer.blend.up.weight",
    "att.g1": "mixer.gate.down.weight",
    "att.g2": "mixer.gate.up.weight",
    "att.k_k": "mixer.removal",
    "att.k_a": "mixer.replacement",
    "att.r_k": "mixer.bonus",
    "att.ln_x.weight": "mixer.norm.weight",
    "att.ln_x.bias": "mixer.norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    "ffn.x_k": "ffn.shift.share",
    "ffn.key.weight": "ffn.up.weight",
    "ffn.value.weight": "ffn.down.weight",
}
UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}  # the first layer has no earlier value; some files hold them


def load(path: str | os.PathLike[str]) -> Decoder:
    """The model in `path`, in float32. UserError where it is not a whole file of an RWKV-7 that is not quantised."""
    try:
        with Path(path).open("rb") as file:
            (vocab, width, depth), tensors = _read(path, file)
    except OSError as error:
        raise UserError(f"{path}: expected a file of rwkv.cpp, got {error.strerror}; check the path") from None
    if "blocks.0.att.r_k" not in tensors:
        raise UserError(f"{path}: expected an RWKV-7, got no blocks.0.att.r_k; earlier versions are not read")
    found = sum(name.endswith(".ln1.weight") for name in tensors)
    _expect(path, "blocks", depth, found)
    names = MODEL | {
        f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for i in range(depth) for theirs, ours in BLOCK.items()
    }
    if odd := sorted((names.keys() ^ tensors.keys()) - UNUSED):
        fault = f"it lacks {odd[0]}" if odd[0] in names else f"{odd[0]} is not one"
        raise UserError(f"{path}: expected the tensors of an RWKV-7, but {fault}; use another copy")
    _expect(path, "emb.weight of shape", (vocab, width), tuple(tensors["emb.weight"].shape))
    config = configuration.parse(ModelConfig, _table(vocab, width, depth, tensors), who=str(path))
    with torch.device("meta"):  # nothing is drawn, for every weight is in the file
        decoder = Decoder(config)
    weights, own = {}, decoder.state_dict()
    for theirs in names.keys() - UNUSED:
        like, tensor = own[names[theirs]], tensors[theirs]
        _expect(path, f"{theirs} of shape", tuple(like.squeeze().shape), tuple(tensor.squeeze().shape))
        weights[names[theirs]] = tensor.view(like.shape)
    decoder.load_state_dict(weights, assign=True)
    return decoder


def _table(vocab: int, width: int, depth: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """[model] of the file; the sizes that its header does not tell are those of tensors."""
    ranks = {"decay_rank": "w1", "rate_rank": "a1", "blend_rank": "v1", "gate_rank": "g1"}
    last = f"blocks.{depth - 1}.att."
    return {
        "vocab": vocab,
        "width": width,
        "depth": depth,
        "heads": len(tensors[last + "r_k"]),
        "hidden": len(tensors["blocks.0.ffn.key.weight"]),
        "pattern": ["rwkv7"],
        "ffn": "rwkv7",
        "norm": "layer",
        "norm_eps": 1e-5,
        "embed_norm": True,
        "scale_embedding": False,
        "tie": False,
        "rwkv7": {option: len(tensors[last + name]) for option, name in ranks.items() if last + name in tensors},
    }


def _read(path: str | os.PathLike[str], file: BinaryIO) -> tuple[tuple[int, int, int], dict[str, Tensor]]:
    """(vocabulary, width, depth), and all tensors by their names in the file."""
    size = os.fstat(file.fileno()).st_size
    damaged = UserError(
        f"{path}: expected a whole file of rwkv.cpp, got one that is cut off or damaged; use another copy"
    )

    def take(count: int) -> bytes:
        if not 0 <= count <= size - file.tell():
            raise damaged
        return file.read(count)

    def integers(count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", take(4 * count))

    if file.read(4) != MAGIC:
        raise UserError(f"{path}: expected a file of rwkv.cpp, got one that does not begin with {MAGIC!r}; convert it")
    version, vocab, width, depth, _ = integers(5)
    if version not in VERSIONS:
        raise UserError(f"{path}: expected version 100 or 101 of rwkv.cpp's files, got {version}; convert it again")
    tensors = {}
    while file.tell() < size:
        dimensions, length, kind = integers(3)
        if not 1 <= dimensions <= 3:
            raise damaged
        shape = integers(dimensions)[::-1]
        name = take(length).decode(errors="replace")
        if kind not in DTYPES:
            raise UserError(
                f"{path}: expected {name} in float32 or float16, got data type {kind}; quantise after reading"
            )
        if min(shape) < 1:
            raise damaged
        values = np.frombuffer(take(math.prod(shape) * DTYPES[kind].itemsize), DTYPES[kind])
        tensors[name] = torch.from_numpy(values.astype(np.float32)).view(shape)
    return (vocab, width, depth), tensors


def _expect(path: str | os.PathLike[str], what: str, expected: object, got: object) -> None:
    if expected != got:
        raise UserError(f"{path}: expected {what} {expected}, got {got}; use another copy")
