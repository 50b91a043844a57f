"""Sliding-window attention: full attention under the window's mask, in constant memory."""

import pytest
import torch
from torch import Tensor

from isotach.config import parse
from isotach.errors import UserError
from isotach.mixers.swa import SWA
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.mixer import Place, initialize
from isotach.ops.engine import Span
from isotach.rng import generator


def layer(**options: int) -> SWA:
    made = SWA(SWA.Config(width=32, heads=4, **options), Place(0, 1)).double()
    initialize(torch.nn.ModuleDict({"layer": made}), lambda name: generator(0, name), 0.3)
    return made


def turned(x: Tensor, base: float = 10000.0) -> Tensor:
    """RoPE with complex numbers: channel j and channel j + K/2 are one number, turned by t base^(-2j/K)."""
    half = x.shape[-1] // 2
    rate = (base ** (-torch.arange(half, dtype=torch.float64) / half)).float().double()  # as it is stored
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * rate
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag], -1)


def oracle(mixer: SWA, x: Tensor, *, window: int, sinks: int, groups: int) -> Tensor:
    q, k, v = (
        (x @ part.weight.T).unflatten(-1, (n, 8)) for part, n in ((mixer.q, 4), (mixer.k, groups), (mixer.v, groups))
    )
    k, v = (leaf.repeat_interleave(4 // groups, 2) for leaf in (turned(k), v))
    at = torch.arange(x.shape[1])
    t, s = at[:, None], at
    read = (s <= t) & ((t - s < window) | (s < sinks))
    scores = torch.einsum("bthk,bshk->bhts", turned(q), k) / 8**0.5
    weights = scores.masked_fill(~read, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2) @ mixer.out.weight.T


@pytest.mark.parametrize(("window", "sinks", "groups"), [(5, 0, 4), (5, 3, 2), (1, 1, 1), (100, 4, 4)])
@torch.no_grad()
def test_it_is_full_attention_under_the_mask(window: int, sinks: int, groups: int) -> None:
    mixer = layer(window=window, sinks=sinks, kv_heads=groups)
    x = torch.randn(2, 60, 32, generator=generator(0, "x"), dtype=torch.float64)
    expected = oracle(mixer, x, window=window, sinks=sinks, groups=groups)
    torch.testing.assert_close(mixer(x, None, Span.of(2, 60))[0], expected, rtol=1e-10, atol=1e-12)
    state, steps = None, []
    for t in range(60):
        y, state = mixer(x[:, t : t + 1], state, Span.of(2, 1, start=t))
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-10, atol=1e-12)


def test_memory_does_not_grow() -> None:
    table = {"vocab": 31, "width": 32, "depth": 2, "heads": 4, "hidden": 16, "pattern": ["swa"]}
    decoder = Decoder(parse(ModelConfig, table | {"swa": {"window": 8, "sinks": 2, "kv_heads": 2}}, who="test"))
    tokens = torch.randint(31, (1, 40), generator=generator(0, "tokens"))
    sizes = {decoder(tokens[:, :n])[1].nbytes() for n in (1, 8, 40)}
    keys_and_values, position = 2 * (8 + 2) * 2 * 8 * 4, 8
    assert sizes == {decoder.state_bytes(10**6)} == {2 * (keys_and_values + position)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 0}, "window: input should be greater than or equal to 1"),
        ({"sinks": -1}, "sinks: input should be greater than or equal to 0"),
        ({"kv_heads": 3}, "kv_heads = 3 does not divide heads = 4"),
        ({"windw": 4}, "unknown key windw; did you mean window"),
    ],
)
def test_bad_options_are_told(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(SWA.Config, {"width": 32, "heads": 4} | options, who="swa")
