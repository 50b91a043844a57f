"""Foreign checkpoints reproduce their reference logits; damaged ones are refused in one sentence."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isotach.errors import UserError
from isotach.models.adapters import rwkv
from isotach.models.decoder import Decoder
from isotach.rng import generator


@pytest.fixture(scope="module")
def tiny(data_folder: Path) -> Path:
    """A trained RWKV-7 of 829,888 parameters, in rwkv.cpp's format; beside it the logits that rwkv.cpp gives."""
    path = data_folder / "tiny_rwkv" / "tiny-rwkv-7v0-834K-FP32.bin"
    if not path.exists():
        pytest.skip(f"no file {path}")
    return path


@pytest.fixture(scope="module")
def expected(tiny: Path) -> Tensor:
    """After the bytes \"in."""
    return torch.from_numpy(np.fromfile(tiny.with_name("expected-logits-7v0-834K.bin"), "<f4")).double()


def forms(decoder: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of the same tokens, read whole, in two parts and one by one."""
    results = {}
    for form, size in (("whole", tokens.shape[1]), ("parts", 2), ("steps", 1)):
        state, outputs = None, []
        for part in tokens.split(size, 1):
            output, state = decoder(part, state)
            outputs.append(output)
        results[form] = torch.cat(outputs, 1)[0].double()
    return results


# rwkv.cpp allows itself 0.001 in float32; of the float64 difference all but rounding is its own error.
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-3), (torch.float64, 3e-5)])
@torch.no_grad()
def test_rwkv7_gives_the_reference_logits(tiny: Path, expected: Tensor, dtype: torch.dtype, within: float) -> None:
    decoder = rwkv.load(tiny).to(dtype)
    assert decoder.parameter_count() == 829_888
    for form, logits in forms(decoder, torch.tensor([list(b'"in')])).items():
        assert (logits[-1] - expected).abs().sum() <= within, form


@torch.no_grad()
def test_rwkv7_is_one_model_in_all_forms(tiny: Path, tmp_path: Path) -> None:
    decoder = rwkv.load(tiny).double()
    tokens = torch.randint(256, (1, 40), generator=generator(0, "tokens"))
    results = forms(decoder, tokens)
    for form in ("parts", "steps"):
        torch.testing.assert_close(results[form], results["whole"], rtol=1e-9, atol=1e-9, msg=form)
    decoder = rwkv.load(tiny)
    decoder.save(tmp_path)
    assert torch.equal(Decoder.load(tmp_path)(tokens)[0], decoder(tokens)[0])
    assert all(weight.requires_grad for weight in decoder.parameters())


def test_half_precision_files_are_read(tiny: Path, tmp_path: Path) -> None:
    """Matrices in float16, as rwkv.cpp writes them."""
    header, tensors = parts(tiny.read_bytes())
    halved = [(name, shape, 1, data.astype("<f2")) if len(shape) == 2 else (name, shape, 0, data)
              for name, shape, _, data in tensors]  # fmt: skip
    path = tmp_path / "half.bin"
    path.write_bytes(joined(header, halved))
    exact, rounded = rwkv.load(tiny).state_dict(), rwkv.load(path).state_dict()
    for name, weight in exact.items():
        torch.testing.assert_close(rounded[name], weight, rtol=1e-3, atol=1e-7)


def test_damaged_and_foreign_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    header, tensors = parts(whole)
    magic, version, vocab, width, depth, kind = header
    name, shape, _, data = tensors[0]
    faults = {
        "cut off or damaged": [whole[:-1], whole[:20], whole + b"\0", whole[: len(whole) // 2]],
        "does not begin with": [b"", b"GGUF" + whole[4:]],
        "expected version 100 or 101": [joined((magic, 99, *header[2:]), tensors)],
        "expected blocks 13, got 12": [joined((magic, version, vocab, width, 13, kind), tensors)],
        "expected emb.weight of shape \\(256, 65\\)": [joined((magic, version, vocab, 65, depth, kind), tensors)],
        "it lacks head.weight": [joined(header, [t for t in tensors if t[0] != "head.weight"])],
        "more.weight is not one": [joined(header, [*tensors, ("more.weight", shape, 0, data)])],
        "in float32 or float16, got data type 8": [joined(header, [(name, shape, 8, data), *tensors[1:]])],
        "earlier versions are not read": [tiny.with_name("tiny-rwkv-5v2-730K-FP32.bin").read_bytes()],
        "att.k_k of shape": [joined(header, [(n, (1, *s[1:]), k, d[:1]) if n.endswith("att.k_k") else (n, s, k, d)
                                             for n, s, k, d in tensors])],
    }  # fmt: skip
    path = tmp_path / "model.bin"
    for message, contents in faults.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(UserError, match=message):
                rwkv.load(path)
    for missing in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(UserError, match=r"expected a file of rwkv\.cpp, got"):
            rwkv.load(missing)


Tensors = list[tuple[str, tuple[int, ...], int, np.ndarray]]


def parts(content: bytes) -> tuple[tuple[int, ...], Tensors]:
    """Header and float32 tensors (name, dimensions from the fastest on, data type, values) of a file."""
    tensors, at = [], 24
    while at < len(content):
        dimensions, length, kind = struct.unpack_from("<3i", content, at)
        shape = struct.unpack_from(f"<{dimensions}i", content, at + 12)
        at += 12 + 4 * dimensions
        name = content[at : at + length].decode()
        values = np.frombuffer(content, "<f4", int(np.prod(shape)), at + length)
        at += length + values.nbytes
        tensors.append((name, shape, kind, values))
    return struct.unpack("<6i", content[:24]), tensors


def joined(header: tuple[int, ...], tensors: Tensors) -> bytes:
    pieces = [struct.pack("<6i", *header)]
    for name, shape, kind, values in tensors:
        pieces.append(struct.pack(f"<{3 + len(shape)}i", len(shape), len(name), kind, *shape))
        pieces += [name.encode(), values.tobytes()]
    return b"".join(pieces)
