"""The decoder's options, and what it says it costs."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isotach import mixers
from isotach.config import parse
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig
from isotach.ops.engine import Span
from isotach.rng import generator
from isotach.train.optim import Optimizer

SMALL = {"vocab": 31, "width": 16, "depth": 3, "heads": 2, "hidden": 24}
CAUSAL = [name for name in mixers.names() if mixers.find(name).causal]


def model(**changes: Any) -> Decoder:
    return Decoder(parse(ModelConfig, SMALL | changes, who="test"))


def tokens(rows: int, time: int) -> torch.Tensor:
    return torch.randint(31, (rows, time), generator=generator(0, "tokens"))


def test_options_left_out_leave_the_weights_as_they_were() -> None:
    plain = model()
    same = model(norm="srms", ffn="glu", ffn_bias=False, embed_norm=False)
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert not any("norm" in name or "bias" in name for name in plain.state_dict())
    for name, weight in model(norm="layer", embed_norm=True, ffn_bias=True).state_dict().items():
        if name in plain.state_dict():
            assert torch.equal(weight, plain.state_dict()[name]), name


@pytest.mark.parametrize("name", CAUSAL)
def test_an_update_is_seen_by_what_comes_after_it(name: str) -> None:
    """Also without gradients, and where what was computed without them before had been kept."""
    decoder, given = model(pattern=[name], depth=2), tokens(1, 9)
    with torch.no_grad():
        decoder(given)
    decoder(given)[0].square().sum().backward()
    with torch.no_grad():
        decoder(given)
    Optimizer(decoder, lr=0.1).step(1.0)
    with torch.no_grad():
        after = decoder(given)[0]
    torch.testing.assert_close(after, decoder(given)[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("norm", "extra"), [("srms", 0), ("rms", 16), ("layer", 32)])
@torch.no_grad()
def test_norms_are_torchs(norm: str, extra: int) -> None:
    """With a mixer and an ffn that give zero, logits are head(norm(embed_norm(embedding)))."""
    decoder = model(norm=norm, embed_norm=True, norm_eps=1e-3)
    assert decoder.parameter_count() == model().parameter_count() + extra * (2 * 3 + 2)
    for block in decoder.blocks:
        block.mixer.out.weight.zero_()
        block.ffn.down.weight.zero_()
    for name, weight in decoder.named_parameters():
        if "norm" in name:
            weight.normal_(generator=generator(0, name))

    def normalised(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        for apply, parameter in zip((torch.mul, torch.add), module.parameters(), strict=False):
            x = apply(x, parameter)
        return x

    given = tokens(2, 5)
    x = normalised(decoder.embed.weight[given] * 16**0.5, decoder.embed_norm)
    expected = normalised(x, decoder.norm) @ decoder.embed.weight.T
    torch.testing.assert_close(decoder(given)[0], expected)


def test_glu_with_biases() -> None:
    decoder = model(ffn_bias=True, activation="silu")
    assert decoder.parameter_count() == model().parameter_count() + 3 * (24 + 24 + 16)
    ffn = decoder.blocks[1].ffn
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            bias = getattr(ffn, name).bias
            assert not bias.any()
            bias.normal_(generator=generator(0, name))
    x = torch.randn(1, 4, 16, generator=generator(0, "x"))
    gate, up = (F.linear(x, part.weight, part.bias) for part in (ffn.gate, ffn.up))
    torch.testing.assert_close(ffn(x, None), F.linear(F.silu(gate) * up, ffn.down.weight, ffn.down.bias))


@torch.no_grad()
def test_the_shifted_channel_mixer_reads_the_token_before() -> None:
    """Beside a mixer of any kind; across pieces, steps and documents."""
    decoder = model(ffn="rwkv7", pattern=["softmax", "lightning"]).double()
    for name, weight in decoder.named_parameters():
        weight.normal_(0, 0.3, generator=generator(0, name))
    ffn, norm = decoder.blocks[1].ffn, decoder.blocks[1].ffn_norm
    x = torch.randn(1, 6, 16, dtype=torch.float64, generator=generator(0, "x"))
    inputs: list[torch.Tensor] = []
    hook = norm.register_forward_hook(lambda module, args, output: inputs.append(output))
    outputs: list[torch.Tensor] = []
    other = ffn.register_forward_hook(lambda module, args, output: outputs.append(output))
    given = tokens(1, 30)
    whole, _ = decoder(given)
    hook.remove()
    other.remove()
    (x,), (y,) = inputs, outputs
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    mixed = x + (before - x) * ffn.shift.share[0]
    expected = (mixed @ ffn.up.weight.T).relu().square() @ ffn.down.weight.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    state, pieces = None, []
    for part in given.split([11, 1, 18], 1):
        logits, state = decoder(part, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)
    bounds = [0, 1, 2, 20, 30]
    packed, _ = decoder(given, span=Span.packed(torch.tensor(bounds)))
    alone = [decoder(given[:, a:b])[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"norm": "batch"}, "norm: .*'srms', 'rms' or 'layer'"),
        ({"ffn": "mlp"}, "ffn: .*'glu' or 'rwkv7'"),
        ({"ffn": "rwkv7", "activation": "silu"}, "ffn = rwkv7 has neither activation nor ffn_bias"),
        ({"embed_norm": 1.5}, "embed_norm"),
    ],
)
def test_bad_options_name_the_key(table: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ModelConfig, SMALL | table, who="recipe.toml")


@pytest.mark.parametrize("name", CAUSAL)
def test_state_bytes_are_those_of_the_state(name: str) -> None:
    decoder = model(pattern=[name])
    for time in (1, 6, 40):
        assert decoder.state_bytes(time) == decoder(tokens(1, time))[1].nbytes(), time


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax", {"positions": "fox", "kv_heads": 1}),
        ("swa", {"window": 5, "sinks": 2}),
        ("delta", {"cache": {"segment": 8}}),
        ("lightning", {"cache": {"segment": 1, "read": "residual"}}),
    ],
)
def test_state_bytes_with_options(name: str, options: dict[str, object]) -> None:
    decoder = model(pattern=[name], **{name: options}, ffn="rwkv7")
    for time in (1, 7, 8, 40):
        assert decoder.state_bytes(time) == decoder(tokens(1, time))[1].nbytes(), time


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_without_memory_of_its_own_is_counted_alike(name: str) -> None:
    with torch.device("meta"):
        planned = model(pattern=[name], ffn="rwkv7")
    real = model(pattern=[name], ffn="rwkv7")
    for count in ("state_bytes", "flops_per_token"):
        assert getattr(planned, count)(77) == getattr(real, count)(77)
    assert planned.parameter_count() == real.parameter_count()


def per_token(decoder: Decoder, first: int, last: int) -> float:
    """FLOPs that each token of the context adds, per layer."""
    return (decoder.flops_per_token(last) - decoder.flops_per_token(first)) / (last - first) / 3


def test_flops_of_what_is_stored() -> None:
    assert per_token(model(pattern=["softmax"]), 10, 1000) == 2 * 2 * (8 + 8)
    assert per_token(model(pattern=["softmax"], softmax={"kv_heads": 1}), 10, 1000) == 2 * 2 * (8 + 8)
    assert per_token(model(pattern=["softmax"], softmax={"positions": "fox"}), 10, 1000) == 2 * 2 * (8 + 8) + 2 * 2
    assert per_token(model(pattern=["tnn"]), 10, 1000) == 2 * 3 * 16
    for constant in ("rwkv7", "swa", "hgrn", "transnormer"):
        assert per_token(model(pattern=[constant]), 10, 1000) == 0
    narrow, wide = (model(pattern=["swa"], swa={"window": size, "sinks": 0}) for size in (8, 32))
    assert wide.flops_per_token(100) - narrow.flops_per_token(100) == 3 * 24 * 2 * 2 * (8 + 8)
    cached = model(pattern=["delta"], delta={"cache": {"segment": 8, "read": "residual"}})
    assert per_token(cached, 80, 160) == 2 * (16 + 2 * 8 * 8) / 8  # the mean input and the memory of every segment
