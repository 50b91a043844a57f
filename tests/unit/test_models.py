"""The decoder against published counts, an independent restatement, and transformers."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isotach import mixers
from isotach.config import dumps, load, parse
from isotach.errors import UserError
from isotach.mixers.lightning import paper_rates, released_rates
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.presets import PRESETS
from isotach.nn.mixer import Place
from isotach.nn.positions import alibi_slopes, angles, ladder, lrpe
from isotach.ops.engine import Span
from isotach.rng import generator

SMALL = {"vocab": 31, "width": 16, "depth": 3, "heads": 2, "hidden": 24}


def config(**changes: object) -> ModelConfig:
    return parse(ModelConfig, SMALL | changes, who="test")


# Embedding + depth (5 D² + 3 D hidden) + D angles of LRPE, tied; the printed sizes are 0.385 B, 0.399 B, 1.02 B, 6.8 B.
PUBLISHED = {
    "tnl-385m": (50272 * 1024 + 24 * (5 * 1024**2 + 3 * 1024 * 2816) + 1024, 0.385e9, 5e-4),
    "tnl-0.4b": (64000 * 1024 + 24 * (5 * 1024**2 + 3 * 1024 * 2816) + 1024, 0.399e9, 5e-4),
    "tnl-1b": (64000 * 2048 + 16 * (5 * 2048**2 + 3 * 2048 * 5632) + 2048, 1.02e9, 1e-3),
    "tnl-7b": (64000 * 4096 + 30 * (5 * 4096**2 + 3 * 4096 * 11008) + 4096, 6.8e9, 1e-2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    exact, printed, within = PUBLISHED[name]
    with torch.device("meta"):
        count = Decoder(parse(ModelConfig, {"preset": name}, who="test")).parameter_count()
    assert count == exact
    assert abs(count / printed - 1) < within


@pytest.mark.parametrize(
    ("name", "about"), [("tnl-1m", 1e6), ("tnl-10m", 10e6), ("tnl-44m", 44e6), ("tnl-135m", 135e6)]
)
def test_small_sizes(name: str, about: float) -> None:
    with torch.device("meta"):
        count = Decoder(parse(ModelConfig, {"preset": name}, who="test")).parameter_count()
    assert abs(count / about - 1) < 0.1


def test_slopes_are_those_released() -> None:
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    first, last = released_rates(8, Place(0, 24)), released_rates(8, Place(23, 24))
    assert math.isclose(float(first[0]), 0.5 * (1 + 1e-5), rel_tol=1e-6)
    assert math.isclose(float(last[0]), 0.5e-5, rel_tol=1e-5)
    assert float(released_rates(8, Place(0, 1))[0]) == 0.5
    # 95 % of a head's weight lies within ln(20) / rate tokens: 6 to 767 in the first layer.
    assert [round(math.log(20) / float(rate)) for rate in (first[0], first[-1])] == [6, 767]


def test_the_paper_prints_other_rates() -> None:
    assert paper_rates(8, Place(0, 4)).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert paper_rates(8, Place(2, 4)).tolist() == [0.5 * h for h in range(1, 9)]
    chosen = mixers.find("lightning").Config(width=16, heads=2, decay="paper")
    layer = mixers.find("lightning")(chosen, Place(0, 4))
    assert layer.log_decay.tolist() == [-4.0, -8.0]


def restated(weights: dict[str, np.ndarray], x: np.ndarray, rates: np.ndarray, *, with_lrpe: bool) -> np.ndarray:
    """One lightning layer in numpy, token by token, from the published equations."""
    heads, head = len(rates), x.shape[1] // len(rates)

    def silu(y: np.ndarray) -> np.ndarray:
        return y / (1 + np.exp(-y))

    q, k, v = silu(x @ weights["q"].T), silu(x @ weights["k"].T), x @ weights["v"].T
    state = [np.zeros(((2 if with_lrpe else 1) * head, head)) for _ in range(heads)]
    rows = []
    for t in range(len(x)):
        row = []
        for h in range(heads):
            own = slice(h * head, (h + 1) * head)
            qt, kt, vt = q[t, own], k[t, own], v[t, own]
            if with_lrpe:
                theta = 10000 ** (-2 * np.arange(h * head, (h + 1) * head) / x.shape[1])
                qt, kt = (np.concatenate([y * np.cos(t * theta), y * np.sin(t * theta)]) for y in (qt, kt))
            state[h] = np.exp(-rates[h]) * state[h] + np.outer(kt, vt)
            row.append(qt @ state[h])
        o = np.concatenate(row)
        rows.append(o / np.sqrt((o**2).mean() + 1e-6) * (x[t] @ weights["gate"].T))
    return np.stack(rows) @ weights["out"].T


@pytest.mark.parametrize("index", [0, 1, 2])
def test_lightning_is_the_published_layer(index: int) -> None:
    cls = mixers.find("lightning")
    layer = cls(cls.Config(width=16, heads=2), Place(index, 3)).double()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.5, generator=generator(0, name))
    x = torch.randn(1, 40, 16, dtype=torch.float64, generator=generator(0, "x"))
    slopes = np.array([2.0**-4, 2.0**-8])  # H = 2
    weights = {name: getattr(layer, name).weight.detach().numpy() for name in ("q", "k", "v", "gate", "out")}
    expected = restated(weights, x[0].numpy(), slopes * (1 - index / 2 + 1e-5), with_lrpe=index == 0)
    got = layer(x, None, Span.of(1, 40))[0][0].detach()
    # theta and the rates are float32, as released
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_lrpe_depends_on_the_distance_alone() -> None:
    theta = ladder(16).double().view(2, 8)
    q, k = (torch.randn(1, 1, 2, 8, dtype=torch.float64, generator=generator(0, name)) for name in "qk")
    scores = []
    for start in (0, 7, 10**6):
        t, s = (lrpe(x, angles(torch.tensor([[start + d]]), theta)) for x, d in ((q, 5), (k, 0)))
        scores.append((t * s).sum(-1))
    exact = (q * k * torch.cos(5 * theta)).sum(-1)
    for score in scores:
        torch.testing.assert_close(score, exact, rtol=1e-8, atol=1e-9)


def test_softmax_is_transformers_attention() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    shape = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attention_bias=False, attn_implementation="eager"
    )
    theirs = llama.LlamaAttention(shape, 0).double()
    cls = mixers.find("softmax")
    ours = cls(cls.Config(width=32, heads=4, kv_heads=2), Place(0, 1)).double()
    with torch.no_grad():
        for name, projection in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
            getattr(ours, name).weight.copy_(getattr(theirs, projection).weight)
    x = torch.randn(2, 19, 32, dtype=torch.float64, generator=generator(0, "x"))
    rotary = llama.LlamaRotaryEmbedding(shape)
    mask = torch.full((19, 19), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected, _ = theirs(x, rotary(x, torch.arange(19)[None]), mask)
    torch.testing.assert_close(ours(x, None, Span.of(2, 19))[0], expected, rtol=1e-5, atol=1e-6)


def test_each_weight_has_a_stream_of_its_own() -> None:
    short, deep = Decoder(config(depth=2)), Decoder(config(depth=3))
    for name, value in short.state_dict().items():
        assert torch.equal(value, deep.state_dict()[name]), name
    assert not torch.equal(short.embed.weight, Decoder(config(depth=2), seed=1).embed.weight)


@pytest.mark.parametrize("pattern", [("lightning",), ("softmax",), ("lightning", "softmax")])
@pytest.mark.parametrize("tie", [True, False])
def test_packed_equals_separate_and_recomputed_gradients_are_the_same(pattern: tuple[str, ...], tie: bool) -> None:
    model = Decoder(config(pattern=pattern, tie=tie)).double()
    tokens = torch.randint(31, (1, 50), generator=generator(0, "tokens"))
    bounds = [0, 1, 2, 30, 50]
    packed, state = model(tokens, span=Span.packed(torch.tensor(bounds)))
    alone = [model(tokens[:, a:b])[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-12)
    assert state.positions.tolist() == [1, 1, 28, 20]
    grads: list[list[Tensor]] = []
    for recompute in (False, True):
        model.recompute = recompute
        loss = model(tokens, span=Span.packed(torch.tensor(bounds)))[0].square().sum()
        grads.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_flops_are_counted_as_described() -> None:
    matrices = 31 * 16 + 3 * (5 * 16 * 16 + 3 * 16 * 24)
    states = 2 * (16 * 8 + 8 * 8 + 8 * 8)
    assert Decoder(config()).flops_per_token(1000) == 2 * matrices + 4 * states
    softmax = Decoder(config(pattern=("softmax",)))
    assert softmax.flops_per_token(1001) - softmax.flops_per_token(1) == 1000 * 3 * 4 * 16


def test_config_round_trips(tmp_path: Path) -> None:
    model = config(pattern=("lightning", "softmax"), softmax={"kv_heads": 1}, lightning={"lrpe": "all"})
    (tmp_path / "config.toml").write_text(dumps(model))
    assert load(ModelConfig, tmp_path / "config.toml") == model
    for name in PRESETS:
        assert parse(ModelConfig, {"preset": name, "depth": 7}, who="test").depth == 7


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"preset": "tnl-1"}, "preset 'tnl-1' is not known; did you mean tnl-1m?"),
        (SMALL | {"widht": 3}, "unknown key widht; did you mean width?"),
        (SMALL | {"lightning": {"lrp": 1}}, "lightning: unknown key lrp; did you mean lrpe?"),
        (SMALL | {"heads": 3}, "heads = 3 does not divide width = 16"),
        (SMALL | {"pattern": ["lightnin"]}, "mixer 'lightnin' is not known; did you mean lightning?"),
        (SMALL | {"softmax": {"kv_heads": 3}}, "kv_heads = 3 does not divide heads = 2"),
        (SMALL | {"pattern": []}, "pattern"),
        (SMALL | {"depth": "many"}, "depth: .*got 'many'"),
        ({"width": 16}, "required"),
    ],
)
def test_bad_configurations_name_the_key(table: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ModelConfig, table, who="recipe.toml")


def test_saved_models_open_again_and_damaged_ones_do_not(tmp_path: Path) -> None:
    model = Decoder(config(), seed=3)
    model.save(tmp_path)
    assert Decoder.load(tmp_path).fingerprint() == model.fingerprint()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="expected whole safetensors weights"):
        Decoder.load(tmp_path)
    Decoder(config(width=32)).save(tmp_path)
    with pytest.raises(UserError, match=r"do not fit config\.toml"):
        Decoder.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="found none"):
        Decoder.load(tmp_path)


@pytest.mark.parametrize("table", [{"pattern": ["linear"], "linear": {"causal": False}}, {"pattern": ["vicinity"]}])
def test_a_language_model_does_not_look_ahead(table: dict[str, object]) -> None:
    shape = {"vocab": 11, "width": 16, "depth": 1, "heads": 2, "hidden": 16}
    with pytest.raises(ValueError, match="its tokens read later ones, which a language model has to predict"):
        ModelConfig.model_validate(shape | table)
