"""RWKV-7 against its authors' equations, restated token by token, and against their initialisation."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from isotach.config import parse
from isotach.errors import UserError
from isotach.mixers import find
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.state import DecoderState
from isotach.nn.mixer import Place
from isotach.ops.engine import Span
from isotach.rng import generator

D, H = 12, 3
N = D // H
MODEL = {
    "vocab": 31, "width": 16, "depth": 3, "heads": 2, "hidden": 24, "pattern": ["rwkv7"],
    "ffn": "rwkv7", "norm": "layer", "embed_norm": True, "tie": False, "scale_embedding": False,
}  # fmt: skip


def randomised(module: torch.nn.Module) -> None:
    """Every weight from N(0, 0.4), in float64: nothing hides behind zeros."""
    module.double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(0, 0.4, generator=generator(0, name))


def model(**changes: object) -> Decoder:
    decoder = Decoder(parse(ModelConfig, MODEL | changes, who="test"))
    randomised(decoder)
    return decoder


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def restated(w: dict[str, np.ndarray], x: np.ndarray, first_value: np.ndarray | None) -> np.ndarray:
    """The time mixing of rwkv_v7_demo.py in numpy, token by token; states are value by key, as there."""
    outputs, before, states = [], np.zeros(D), np.zeros((H, N, N))
    for t, now in enumerate(x):
        xr, xw, xk, xv, xa, xg = (now + (before - now) * share for share in w["shift.share"])
        before = now
        r, k, v = w["q.weight"] @ xr, w["k.weight"] @ xk, w["v.weight"] @ xv
        decay = w["decay.up.weight"] @ np.tanh(w["decay.down.weight"] @ xw) + w["decay.bias"]
        log_w = -np.log1p(np.exp(-decay)) - 0.5
        if first_value is not None:
            blend = w["blend.up.weight"] @ (w["blend.down.weight"] @ xv) + w["blend.bias"]
            v = v + (first_value[t] - v) * sigmoid(blend)
        a = sigmoid(w["rate.up.weight"] @ (w["rate.down.weight"] @ xa) + w["rate.bias"])
        g = w["gate.up.weight"] @ sigmoid(w["gate.down.weight"] @ xg)
        kk = k * w["removal"]
        k = k * (1 + (a - 1) * w["replacement"])
        row = []
        for h in range(H):
            own = slice(h * N, (h + 1) * N)
            unit = kk[own] / np.linalg.norm(kk[own])
            removed = np.outer(states[h] @ -unit, unit * a[own])
            states[h] = states[h] * np.exp(-np.exp(log_w[own])) + removed + np.outer(v[own], k[own])
            o = states[h] @ r[own]
            o = (o - o.mean()) / np.sqrt(o.var() + 64e-5) * w["norm.weight"][own] + w["norm.bias"][own]
            row.append(o + (r[own] * k[own] * w["bonus"][h]).sum() * v[own])
        outputs.append(w["out.weight"] @ (np.concatenate(row) * g))
    return np.stack(outputs)


@pytest.mark.parametrize("index", [0, 1])
def test_the_layer_is_the_published_one(index: int) -> None:
    cls = find("rwkv7")
    layer = cls(cls.Config(width=D, heads=H, decay_rank=5, rate_rank=4, blend_rank=3, gate_rank=7), Place(index, 2))
    randomised(layer)
    x = torch.randn(1, 40, D, dtype=torch.float64, generator=generator(0, "x"))
    first = torch.randn(1, 40, D, dtype=torch.float64, generator=generator(0, "first"))
    weights = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}
    expected = restated(weights, x[0].numpy(), first[0].numpy() if index else None)
    shared: dict[str, Tensor] = {"rwkv7_first_value": first} if index else {}
    got, _ = layer(x, None, Span.of(1, 40), shared)
    torch.testing.assert_close(got[0].detach(), torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


def test_no_channel_fades_faster_than_published() -> None:
    cls = find("rwkv7")
    layer = cls(cls.Config(width=D, heads=H), Place(0, 2))
    randomised(layer)
    with torch.no_grad():
        layer.decay.bias.fill_(1e4)
    _, state = layer(torch.ones(1, 1, D, dtype=torch.float64), None, Span.of(1, 1))
    layer.k.weight.data.zero_()
    layer.v.weight.data.zero_()
    _, faded = layer(torch.ones(1, 1, D, dtype=torch.float64), state, Span.of(1, 1, start=1))
    fastest = math.exp(-math.exp(-0.5))
    torch.testing.assert_close(faded["main"].state, state["main"].state * fastest, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pattern", [["rwkv7"], ["lightning", "rwkv7", "rwkv7"]])
def test_whole_pieces_steps_packed_and_recomputed_are_one_model(pattern: list[str]) -> None:
    decoder = model(pattern=pattern)
    tokens = torch.randint(31, (1, 50), generator=generator(0, "tokens"))
    whole, end = decoder(tokens)
    for sizes in ([17, 1, 32], [1] * 50):
        state, outputs = None, []
        for part in tokens.split(sizes, 1):
            output, state = decoder(part, state)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state.blocks, end.blocks, rtol=1e-10, atol=1e-12)
    bounds = [0, 1, 2, 30, 50]
    packed, _ = decoder(tokens, span=Span.packed(torch.tensor(bounds)))
    alone = [decoder(tokens[:, a:b])[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-12)
    grads = []
    for decoder.recompute in (False, True):
        loss = decoder(tokens)[0].square().sum()
        grads.append(torch.autograd.grad(loss, list(decoder.parameters()), materialize_grads=True))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_later_layers_read_the_first_value() -> None:
    decoder = model(pattern=["lightning", "rwkv7", "rwkv7"])
    tokens = torch.randint(31, (1, 9), generator=generator(0, "tokens"))
    before = decoder(tokens)[0]
    names = {name.split(".")[1] for name, _ in decoder.named_parameters() if ".blend." in name}
    assert names == {"1", "2"}
    with torch.no_grad():
        decoder.blocks[1].mixer.blend.bias.add_(1)  # the first of these layers has no other value to blend with
    torch.testing.assert_close(decoder(tokens)[0], before)
    with torch.no_grad():
        decoder.blocks[2].mixer.blend.bias.add_(1)
    assert (decoder(tokens)[0] - before).abs().max() > 1e-3


def test_the_channel_mixer_keeps_its_state_beside_the_mixers(tmp_path: object) -> None:
    decoder = model()
    tokens = torch.randint(31, (2, 9), generator=generator(0, "tokens"))
    _, state = decoder(tokens[:, :8])
    assert sorted(state.blocks[0]) == ["ffn_shift", "main", "shift"]
    path = f"{tmp_path}/state"
    state.save(path, weights=decoder.fingerprint(), tokens="")
    loaded = DecoderState.load(path, decoder=decoder, tokens=None)
    assert torch.equal(decoder(tokens[:, 8:], loaded)[0], decoder(tokens[:, 8:], state)[0])


def test_initialisation_is_the_authors() -> None:
    """RWKV-v5/src/model.py and what it writes to the first checkpoint, restated in its own loops."""
    width, heads, depth = 128, 2, 4
    size = width // heads
    table = MODEL | {"width": width, "heads": heads, "depth": depth, "hidden": 4 * width}
    decoder = Decoder(parse(ModelConfig, table, who="test"))
    for layer, block in enumerate(decoder.blocks):
        own = {name: weight.detach().double() for name, weight in block.named_parameters()}
        ratio, rest = layer / (depth - 1), 1 - layer / depth
        linear = np.array([n / (width - 1) - 0.5 for n in range(width)])
        zigzag = np.array([((n % size) - (size - 1) / 2) / ((size - 1) / 2) for n in range(width)])
        zigzag = zigzag * abs(zigzag)
        www = np.array([-6 + 6 * (n / (width - 1)) ** (1 + 1 * ratio**0.3) for n in range(width)])
        ddd = np.arange(width) / width
        expected = {
            "mixer.shift.share": np.stack([1 - ddd ** (p * rest) for p in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]),
            "ffn.shift.share": 1 - ddd[None] ** rest**4,
            "mixer.decay.bias": www + 0.5 + zigzag * 2.5,
            "mixer.rate.bias": -0.19 + zigzag * 0.3 + linear * 0.4,
            "mixer.removal": 0.71 - linear * 0.1,
            "mixer.replacement": np.full(width, 1.02),
            "mixer.bonus": np.full((heads, size), -0.04),
            "mixer.norm.weight": np.full(width, ((1 + layer) / depth) ** 0.7),
            "mixer.out.weight": np.zeros((width, width)),
            "ffn.down.weight": np.zeros((width, 4 * width)),
        }
        if layer:
            expected["mixer.blend.bias"] = 0.73 - linear * 0.4
        for name, value in expected.items():
            torch.testing.assert_close(own[name], torch.from_numpy(value), rtol=1e-5, atol=1e-5, msg=name)
        for name, length in (("q", 1.0), ("k", 0.1), ("v", 1.0)):
            assert orthogonal(own[f"mixer.{name}.weight"], length)
        assert orthogonal(own["ffn.up.weight"].T, 1.0)
        for name, inner in (("decay", 32), ("rate", 32), ("gate", 32)):
            assert not own[f"mixer.{name}.down.weight"].any()
            assert own[f"mixer.{name}.up.weight"].shape == (width, inner)
            assert orthogonal(own[f"mixer.{name}.up.weight"].T, 0.1)


def orthogonal(matrix: Tensor, length: float) -> bool:
    return torch.allclose(matrix @ matrix.T, length**2 * torch.eye(len(matrix), dtype=matrix.dtype), atol=1e-5)


def test_ranks_of_the_released_model() -> None:
    """The 0.1 B of rwkv_v7_demo.py."""
    with torch.device("meta"):
        cls = find("rwkv7")
        layer = cls(cls.Config(width=768, heads=12), Place(1, 12))
    assert [part.down.out_features for part in (layer.decay, layer.rate, layer.blend, layer.gate)] == [64, 64, 32, 128]


def test_options_of_another_channel_mixer_are_refused() -> None:
    for changes in ({"activation": "silu"}, {"ffn_bias": True}):
        with pytest.raises(UserError, match="ffn = rwkv7 has neither activation nor ffn_bias"):
            parse(ModelConfig, MODEL | changes, who="recipe.toml")
    with pytest.raises(UserError, match="decay_rank"):
        parse(ModelConfig, MODEL | {"rwkv7": {"decay_rank": 0}}, who="recipe.toml")
