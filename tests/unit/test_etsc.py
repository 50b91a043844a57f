"""Conversion of Toeplitz kernels to sums of rotations: exact where it says so, and told where it is not."""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isotach.cli import main
from isotach.data.tokenizer import load_tokenizer
from isotach.infer.generate import Session
from isotach.infer.open import open_checkpoint
from isotach.infer.sample import Sampling
from isotach.models.convert import converted, kernel_errors, log_probability_differences, tnn_layers
from isotach.models.decoder import Decoder, ModelConfig
from isotach.ops.engine import Span, run
from isotach.ops.etsc import ETSC, weights
from isotach.ops.torch import etsc as stretches
from isotach.rng import generator
from isotach.train.checkpoint import resolve, seal


def normal(*shape: int, name: str = "") -> Tensor:
    return torch.randn(shape, generator=generator(0, name, *map(str, shape)), dtype=torch.float64)


def inputs(v: Tensor, kernel: Tensor, gamma: float) -> ETSC.Inputs:
    log_decay = torch.full((1, 1), math.log(gamma), dtype=v.dtype)
    return ETSC.Inputs(v, *(part.to(v.dtype) for part in weights(kernel)), log_decay)


def stepped(rec: ETSC, x: ETSC.Inputs) -> Tensor:
    state, outputs = None, []
    for t in range(x.v.shape[1]):
        output, state = run(rec, x._replace(v=x.v[:, t : t + 1]), state, Span.of(len(x.v), 1, start=t))
        outputs.append(output)
    return torch.cat(outputs, 1)


def ring(v: Tensor, kernel: Tensor, gamma: float) -> Tensor:
    """The same memory in other coordinates: the last m inputs, where the oldest, faded, is added to the newest."""
    memory = deque(torch.zeros(len(kernel), *v.shape[2:], dtype=v.dtype).unbind())
    outputs = []
    for now in v[0]:
        memory.appendleft(now + gamma * memory.pop())
        for j in range(1, len(kernel)):
            memory[j] = gamma * memory[j]
        outputs.append((torch.stack(list(memory)) * kernel).sum(0))
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("period", [5, 12])
def test_a_long_row_is_read_stretch_by_stretch(period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 tokens here, or of a period; as the definition says, and so are the gradients and the state."""
    monkeypatch.setattr(stretches, "STRETCH", 8)
    x, rec = inputs(normal(2, 29, 2, 3), normal(period, 2, 3), 0.9), ETSC(period)
    found = {}
    for backend in ("reference", "torch"):
        own = ETSC.Inputs(*(leaf.clone().requires_grad_() for leaf in x))
        output, state = run(rec, own, None, Span.of(2, 29), backend=backend)
        loss = (output * normal(*output.shape)).sum() + sum((leaf * normal(*leaf.shape)).sum() for leaf in state)
        found[backend] = [output, *state, *torch.autograd.grad(loss, own)]
    torch.testing.assert_close(found["torch"], found["reference"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("period", [1, 2, 3, 8, 17, 64])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_any_kernel_is_the_impulse_response_and_comes_back_fainter(period: int, gamma: float) -> None:
    kernel, rec = normal(period, 2, 3), ETSC(period)
    impulse = torch.zeros(1, 3 * period, 2, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    x = inputs(impulse, kernel, gamma)
    lag = torch.arange(3 * period)
    expected = kernel[lag % period] * gamma ** lag.double()[:, None, None]
    for response in (rec.kernel(x, 3 * period), stepped(rec, x)[0], run(rec, x, None, Span.of(1, 3 * period))[0][0]):
        torch.testing.assert_close(response, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("period", [1, 6, 9])
def test_the_state_is_a_ring_in_other_coordinates(period: int) -> None:
    v, kernel = normal(1, 40, 1, 2, name="v"), normal(period, 1, 2)
    for read in (stepped, lambda rec, x: run(rec, x, None, Span.of(1, 40))[0]):
        output = read(ETSC(period), inputs(v, kernel, 0.95))
        torch.testing.assert_close(output, ring(v, kernel, 0.95), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("period", "closed", "run_out"), [(64, 8e-7, 5e-6), (512, 3e-6, 1.2e-4)])
def test_float32_costs_what_is_known(period: int, closed: float, run_out: float) -> None:
    """Kernels in [0, 10] that never fade: the error of the weights alone, and of the recurrence run that far."""
    kernel = 10 * torch.rand(period, 1, 2, generator=generator(0), dtype=torch.float64)
    impulse = torch.zeros(1, period, 1, 2)
    impulse[:, 0] = 1
    x, rec = inputs(impulse, kernel.float(), 1.0), ETSC(period)
    for response, limit in ((rec.kernel(x, period), closed), (stepped(rec, x)[0], run_out)):
        assert float((response - kernel).norm() / kernel.norm()) < limit


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ETSC(0), "etsc: period must be at least 1; got 0"),
        (
            lambda: run(ETSC(9), inputs(normal(1, 4, 1, 2), normal(5, 1, 2), 0.9), None, Span.of(1, 4)),
            "etsc: period 9 has 5 rotations; got weights for 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- whole models

LAGS = 24


def decoder(**options: Any) -> Decoder:
    table = {
        "vocab": 257,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "hidden": 16,
        "pattern": ("tnn",),
        "tnn": {"gamma": 0.8},
    }
    return Decoder(ModelConfig(**table | options), seed=1)


@pytest.mark.parametrize(
    "options",
    [{}, {"tnn": {"decay": "learned", "gamma": 0.7}}, {"tnn": {"window": 9}}, {"pattern": ("lightning", "tnn")}],
    ids=str,
)
def test_a_converted_model_answers_alike(options: dict[str, Any]) -> None:
    before = decoder(**options).double()
    tokens = torch.randint(257, (1, 3 * LAGS), generator=generator(0))
    beyond = {}
    for form in ("etsc", "published", "ring"):
        after = converted(before, form, lags=LAGS).double()
        (nats,) = log_probability_differences(before, [after], tokens)
        assert float(nats[:LAGS].max()) < 1e-5  # converted weights are float32
        beyond[form] = float(nats[LAGS:].max())
        for i, layer in tnn_layers(before).items():
            other: Any = after.blocks[i].mixer
            near, far = kernel_errors(layer, other, lags=LAGS, reach=3 * LAGS)
            assert near.relative < 1e-6
            assert far.relative > 1e-5 or form == "ring"
    if "window" in options.get("tnn", {}):
        assert beyond["ring"] == 0  # the window was shorter
    else:
        assert 1e-4 < beyond["etsc"] < beyond["ring"] < beyond["published"]  # of kernels that are not trained


def test_the_published_closing_is_one_large_value_behind_the_exact_lags() -> None:
    before = decoder()
    (layer, *_), after = tnn_layers(before).values(), converted(before, "published", lags=LAGS)
    other: Any = after.blocks[0].mixer
    x = other.project(torch.zeros(1, 1, 16), _Scan())[0]
    response = other.recurrence.kernel(x, LAGS + 2).flatten(1)
    undecayed = layer.rpe(torch.arange(LAGS))
    torch.testing.assert_close(response[LAGS], -(0.8**LAGS) * undecayed.sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(response[LAGS + 1], 0.8 ** (LAGS + 1) * undecayed[0], rtol=1e-4, atol=1e-5)


class _Scan:
    """A call on its own."""

    span = Span.of(1, 1)

    def before(self, name: str) -> None:
        return None


def checkpoint(folder: Path, model: Decoder, *, table: str = "") -> Path:
    """A complete checkpoint of `model`, whose recipe also has `table`."""
    folder.mkdir()
    model.save(folder)
    with (folder / "config.toml").open("a") as file:
        file.write(table)
    load_tokenizer("bytes").save(folder)
    (folder / "training.json").write_text(json.dumps({"step": 7}))
    seal(folder)
    return folder


def test_convert_writes_a_checkpoint_that_generates_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "source", decoder(), table=f"\n[train]\nseq_len = {LAGS}\n")
    out = tmp_path / "made" / "converted"
    assert main(["convert", str(source), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["lags"], report["reach"]) == (LAGS, 4 * LAGS)
    tnn, far, etsc, published, ring = report["forms"]
    assert [row["form"] for row in report["forms"]] == ["tnn", "tnn", "etsc", "published", "ring"]
    channels = 2 * 48  # of both layers
    assert tnn["state_bytes"] == 4 * channels * (LAGS + 30)
    assert far["state_bytes"] == 4 * channels * (4 * LAGS + 30)
    assert etsc["state_bytes"] == published["state_bytes"] == 4 * channels * (LAGS + 2)
    assert ring["state_bytes"] == 4 * channels * LAGS
    for row in (etsc, published, ring):
        assert [layer["layer"] for layer in row["layers"]] == [0, 1]
        assert all(layer["within"]["relative"] < 1e-6 < layer["beyond"]["relative"] for layer in row["layers"])
        assert row["nats_within"] < 1e-5
        assert row["seconds"] > 0

    assert resolve(out) == out
    assert sorted(path.name for path in tmp_path.joinpath("made").iterdir()) == ["converted"]
    made, tokenizer = open_checkpoint(out, device="cpu")
    assert made.config.pattern == ("etsc",)
    assert "seq_len = 24" in (out / "config.toml").read_text()
    before, _ = open_checkpoint(source, device="cpu")
    texts = []
    for model in (before, made):
        session = Session(model, tokenizer)
        session.read("def fun")
        texts.append([event.token for event in session.generate(Sampling(temperature=0, max_tokens=16))])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("to", ["etsc", "published", "ring"])
def test_convert_prints_what_each_form_costs(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "source", decoder(depth=1))
    assert main(["convert", str(source), str(tmp_path / "out"), "--lags", "8", "--to", to]) == 0
    printed = capsys.readouterr().out
    assert "lags 8..31" in printed
    assert "ms / token" in printed
    assert "as long as the ring buffer here" in " ".join(printed.split())
    model = Decoder.load(tmp_path / "out")
    assert model.config.pattern == (("tnn",) if to == "ring" else ("etsc",))
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training == {"step": 7, "converted": {"from": str(source), "to": to, "lags": 8}}


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (decoder(), ["out"], "expected train.seq_len in config.toml, found none; give --lags"),
        (decoder(), ["source", "--lags", "4"], "expected the name of a new folder, got one that is taken"),
        (decoder(), ["source/config.toml/out", "--lags", "4"], "config.toml"),
        (decoder(), ["out", "--lags", "0"], "--lags"),
        (decoder(), ["out", "--to", "ssm"], "ssm"),
        (decoder(pattern=("lightning",)), ["out", "--lags", "4"], "got pattern lightning; start from a trained tnn"),
        (converted(decoder(), "etsc", lags=4), ["out", "--lags", "4"], "got pattern etsc"),
        (decoder(tnn={"two_sided": True}), ["out", "--lags", "4"], "expected tnn.two_sided = false, got true"),
    ],
)
def test_convert_refuses(
    model: Decoder, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", model)
    before = sorted(tmp_path.rglob("*"))
    name, *options = arguments
    assert main(["convert", str(source), str(tmp_path / name), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_convert_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "expected a run or a checkpoint folder, found none" in capsys.readouterr().err
