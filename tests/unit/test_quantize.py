"""Eight bits: half a step is lost of a weight and nothing else, in every form, file and mixer."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isotach import mixers
from isotach.cli import main
from isotach.config import parse
from isotach.data.tokenizer import load_tokenizer
from isotach.errors import UserError
from isotach.infer.generate import Session
from isotach.infer.open import open_checkpoint
from isotach.infer.sample import Sampling
from isotach.models.block8 import Block8
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.quantize import bfloat16, int8
from isotach.models.state import DecoderState
from isotach.nn.linear8 import FEW, Embedding8, Linear8, product, rounded
from isotach.ops.engine import Span
from isotach.rng import generator
from isotach.train.checkpoint import seal

WIDE = {"vocab": 257, "width": 64, "depth": 2, "heads": 2, "hidden": 96}
BFLOAT = 2.0**-8  # what one rounding to bfloat16 changes at most
LINEAR = [name for name in mixers.names() if mixers.find(name).causal]


def decoder(**changes: Any) -> Decoder:
    """Weights large enough for every part to matter."""
    return Decoder(parse(ModelConfig, WIDE | {"init_std": 0.1} | changes, who="test"))


def tokens(rows: int, time: int) -> Tensor:
    return torch.randint(257, (rows, time), generator=generator(0, "tokens"))


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def weights(rows: int = 80, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=generator(0, "weights")) * torch.logspace(-6, 3, rows)[:, None]


def test_a_weight_loses_half_a_step_at_most() -> None:
    weight = weights()
    weight[3], weight[4, 1:] = 0, 0
    whole, scale = rounded(weight)
    assert (whole.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert int(whole.abs().max()) == 127
    lost = (weight.double() - whole.double() * scale.double()[:, None]).abs().amax(1)
    assert bool((lost <= 0.5001 * scale.double()).all())
    assert not whole[3].any()


@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1, 3 * FEW])
def test_products_round_what_they_read_and_write_and_nothing_between(rows: int) -> None:
    whole, scale = rounded(weights())
    x = torch.randn(rows, 96, generator=generator(0, "x"))
    exact = F.linear(x.to(torch.bfloat16).double(), whole.double()) * scale.double()
    got = product(x, whole, scale)
    assert got.dtype == torch.bfloat16
    # Two roundings where the product comes before the scale; sums themselves are off by far less.
    assert bool(((got - exact).abs() <= 2 * BFLOAT * exact.abs() + 1e-6 * exact.abs().amax(0)).all())
    assert product(x.double(), whole, scale).dtype == torch.float64
    assert torch.equal(product(x.double(), whole, scale), F.linear(x.double(), whole.double()) * scale.double())


def test_a_machine_without_bfloat16_products_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, scale = rounded(weights())
    x = torch.randn(2 * FEW, 96, generator=generator(0, "x"))
    usual = product(x, whole, scale)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.testing.assert_close(product(x, whole, scale), usual, rtol=3 * BFLOAT, atol=1e-6)


def test_shapes_and_biases_are_those_of_linear() -> None:
    layer = nn.Linear(96, 80)
    with torch.no_grad():
        torch.testing.assert_close(
            Linear8.of(layer)(torch.ones(2, 3, 96)), layer(torch.ones(2, 3, 96)), rtol=0.05, atol=0.05
        )


def dequantized(decoder: Decoder) -> Decoder:
    """The float model with the weights that the model in eight bits has, in float64: an oracle without its code."""
    exact = copy.deepcopy(decoder).double()
    for module in exact.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and min(module.weight.shape) >= 64:
            whole, scale = rounded(module.weight)
            module.weight.data = whole.double() * scale.double()[:, None]
    return exact


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "silu"}, {"lightning": {"lrpe": "all"}}, {"lightning": {"gate": False}}, {"ffn_bias": True}],
    ids=str,
)
@torch.no_grad()
def test_a_model_in_float64_is_that_of_the_rounded_weights(changes: dict[str, Any], tie: bool) -> None:
    model = decoder(tie=tie, **changes)
    got, _ = int8(model).double()(tokens(2, 9))
    expected, _ = dequantized(model)(tokens(2, 9))
    assert distance(got, expected) < 1e-12
    joined = not ("ffn_bias" in changes or "gate" in changes.get("lightning", {}))
    assert isinstance(int8(model).blocks[0], Block8) == joined


@torch.no_grad()
def test_joined_blocks_are_the_blocks_piece_by_piece() -> None:
    """In float32, too, what they compute differs by rounding activations alone: packed, in pieces, one by one."""
    model = int8(decoder(lightning={"lrpe": "all"}))
    exact = copy.deepcopy(model).double()
    text = tokens(1, 40)
    expected, end = exact(text)
    noise = 3e-2  # of some twenty roundings, each 2^-9
    got, _ = model(text)
    assert distance(got, expected) < noise
    state, steps = None, []
    for t in range(40):
        logits, state = model(text[:, t : t + 1], state)
        steps.append(logits)
    assert state is not None
    assert distance(torch.cat(steps, 1), expected) < noise
    for block, after in zip(end.blocks, state.blocks, strict=True):
        assert distance(after["main"].state, block["main"].state) < noise
    bounds = torch.tensor([0, 13, 13, 40])
    packed, _ = model(text, span=Span.packed(bounds))
    assert distance(packed[:, :13], exact(text[:, :13])[0]) < noise
    assert distance(packed[:, 13:], exact(text[:, 13:])[0]) < noise


@torch.no_grad()
def test_steps_follow_the_weights_wherever_they_go() -> None:
    """Steps gather what they read; a model that moves, is copied, or is given other weights is not the old one."""
    model, other = int8(decoder()), int8(Decoder(decoder().config, seed=1))
    text = tokens(1, 6)
    _, state = model(text)
    _, others = other(text)
    before, expected = model(text[:, :1], state)[0], other(text[:, :1], others)[0]
    copied = copy.deepcopy(model)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(text[:, :1], others)[0], expected)
    assert torch.equal(model(text[:, :1], state)[0], before)
    assert torch.equal(model.double().float()(text[:, :1], state)[0], before)


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    model = int8(decoder())
    _, state = model(tokens(3, 5))
    logits, _ = model(tokens(3, 1), state)
    alone, _ = model(tokens(3, 1)[1:2], state.select(torch.tensor([1])))
    assert distance(logits[1:2], alone) < 1e-2


@torch.no_grad()
def test_a_step_leaves_the_state_it_was_given() -> None:
    model = int8(decoder())
    _, state = model(tokens(1, 5))
    kept = [block["main"].state.clone() for block in state.blocks]
    model(tokens(1, 1), state)
    assert all(torch.equal(block["main"].state, same) for block, same in zip(state.blocks, kept, strict=True))


@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_every_mixer_runs_in_eight_bits(name: str) -> None:
    model = decoder(pattern=[name], depth=1)
    made = int8(model)
    text = tokens(1, 12)
    assert distance(made(text)[0], model(text)[0]) < 0.1
    _, state = made(text[:, :11])
    assert distance(made(text[:, 11:], state)[0][:, -1], made(text)[0][:, -1]) < 0.1
    small = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and min(layer.weight.shape) < 64]
    left = [layer for layer in made.modules() if isinstance(layer, nn.Linear)]
    assert len(left) >= len(small)
    assert any(isinstance(layer, Linear8) for layer in made.modules())


def test_it_costs_a_quarter_and_counts_as_before() -> None:
    model = decoder()
    made = int8(model)
    before, after = (sum(value.nbytes for value in each.state_dict().values()) for each in (model, made))
    assert 0.25 < after / before < 0.27
    assert made.parameter_count() == model.parameter_count()
    assert made.flops_per_token(100) == model.flops_per_token(100)
    assert made.state_bytes(100) == model.state_bytes(100)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    pointers = {value.data_ptr() for value in model.state_dict().values()}
    assert not pointers & {value.data_ptr() for value in made.state_dict().values()}


def test_twice_is_refused_and_so_is_what_is_no_number() -> None:
    made = int8(decoder(depth=1))
    with pytest.raises(UserError, match="int8: expected weights in floating point"):
        int8(made)
    model = decoder(depth=1)
    with torch.no_grad():
        model.blocks[0].ffn.down.weight[3, 4] = torch.inf  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="int8: expected finite weights"):
        int8(model)


@pytest.mark.parametrize(
    "changes", [{}, {"tie": False}, {"pattern": ["lightning", "softmax"], "norm": "rms"}, {"ffn_bias": True}], ids=str
)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    model = decoder(**changes)
    made = int8(model)
    made.save(tmp_path)
    again = Decoder.load(tmp_path)
    assert again.fingerprint() == made.fingerprint() != model.fingerprint()
    assert isinstance(again.embed, Embedding8)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again(tokens(1, 9))[0], made(tokens(1, 9))[0])
    _, state = made(tokens(1, 9))
    state.save(tmp_path / "state", weights=made.fingerprint(), tokens="abc")
    back = DecoderState.load(tmp_path / "state", decoder=again, tokens="abc")
    assert torch.equal(again(tokens(1, 1), back)[0], made(tokens(1, 1), state)[0])
    with pytest.raises(UserError, match="load it with the model that made it"):
        DecoderState.load(tmp_path / "state", decoder=model, tokens=None)


def checkpoint(folder: Path, model: Decoder, table: str = "") -> Path:
    folder.mkdir()
    model.save(folder)
    with (folder / "config.toml").open("a", encoding="utf-8") as file:
        file.write(table)
    load_tokenizer("bytes").save(folder)
    (folder / "training.json").write_text(json.dumps({"step": 7}))
    seal(folder)
    return folder


def test_convert_writes_a_checkpoint_that_is_used_as_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    table = (
        f'\n[data]\ntrain = "{text}"\nvalid_fraction = 0.5\ncache = "{tmp_path / "cache"}"\n'
        "[train]\nseq_len = 32\nbatch_tokens = 64\nvalid_tokens = 256\n"
    )
    source, out = checkpoint(tmp_path / "source", decoder(), table), tmp_path / "out"
    assert main(["convert", str(source), str(out), "--to", "int8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"]["after"] < 0.27 * report["bytes"]["before"]
    assert report["tokens"] == 256
    assert report["nats"]["after"] == pytest.approx(report["nats"]["before"], abs=0.05)
    assert json.loads((out / "training.json").read_text())["converted"]["to"] == "int8"

    model, tokenizer = open_checkpoint(out, device="cpu")
    session = Session(model, tokenizer)
    session.read("to be")
    assert len(list(session.generate(Sampling(temperature=0, max_tokens=8)))) > 0
    session.save(tmp_path / "session")
    assert len(Session.load(tmp_path / "session", model, tokenizer)) == len(session)

    assert main(["convert", str(source), str(tmp_path / "again"), "--to", "int8"]) == 0
    assert "Perplexity" in capsys.readouterr().out
    for arguments in (["--to", "int8"], ["--to", "etsc", "--lags", "4"]):
        assert main(["convert", str(out), str(tmp_path / "more"), *arguments]) == 2
        assert "int8" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_convert_without_a_text_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "source", decoder(depth=1))
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "int8"]) == 0
    assert "Loss not measured" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "more"), "--to", "int8", "--lags", "3"]) == 2
    assert "--lags" in capsys.readouterr().err


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # a CPU's: GPUs have such norms in float32
@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_bfloat16_loses_no_more_than_its_roundings(name: str) -> None:
    """Whole and in steps, against float64; states that sum up keep float32."""
    model = decoder(pattern=[name])
    made = bfloat16(model)
    text = tokens(2, 12)
    expected, _ = copy.deepcopy(made).double()(text) if name != "tnn" else model(text)
    whole, state = made(text)
    if name in ("lightning", "gated_delta", "mamba2", "hgrn", "hla"):
        assert {leaf.dtype for block in state.blocks for own in block.values() for leaf in own} == {torch.float32}
    steps, after = [], made.initial().select(torch.tensor([0, 0]))
    for t in range(text.shape[1]):
        logits, after = made(text[:, t : t + 1], after)
        steps.append(logits)
    for got in (whole, torch.cat(steps, 1)):
        assert got.dtype == torch.bfloat16
        assert distance(got, expected) < 0.05


@torch.no_grad()
def test_bfloat16_is_half_the_bytes_and_a_cpu_reads_it_as_float32(tmp_path: Path) -> None:
    model = decoder(tie=False)
    made = bfloat16(model)
    before, after = (sum(x.nbytes for x in each.state_dict().values()) for each in (model, made))
    assert after < 0.55 * before
    assert made.fingerprint() != model.fingerprint()
    made.save(tmp_path)
    again = Decoder.load(tmp_path)
    assert {x.dtype for x in again.state_dict().values()} == {torch.float32}
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, made.state_dict()[name].float())
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for fewer in (made, int8(model)):
        with pytest.raises(UserError, match="bfloat16: expected weights in float32, got fewer bits"):
            bfloat16(fewer)


@torch.no_grad()
def test_convert_to_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "source", decoder(depth=1))
    out = tmp_path / "out"
    assert main(["convert", str(source), str(out), "--to", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["form"] == "bfloat16"
    assert report["bytes"]["after"] < 0.55 * report["bytes"]["before"]
    model, _ = open_checkpoint(out, device="cpu")
    assert distance(model(tokens(1, 5))[0], open_checkpoint(source, device="cpu")[0](tokens(1, 5))[0]) < 0.05


@pytest.mark.gpu
@torch.no_grad()
def test_bfloat16_on_a_gpu(tmp_path: Path) -> None:
    bfloat16(decoder()).save(tmp_path)
    on_gpu, on_cpu = Decoder.load(tmp_path, "cuda"), Decoder.load(tmp_path)
    assert on_gpu.embed.weight.dtype == torch.bfloat16
    got, expected = on_gpu(tokens(2, 12).cuda())[0], on_cpu(tokens(2, 12))[0]
    assert distance(got.cpu(), expected) < 0.05
