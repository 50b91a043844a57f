"""A benchmark times only what is right, says where it was measured, and writes its file whole."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from isotach import mixers as all_mixers
from isotach.bench import decode, mixers, report, train
from isotach.config import parse
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.state import DecoderState
from isotach.nn.mixer import Mixer
from isotach.ops.recurrence import stored_fields

CPU = torch.device("cpu")


def test_contenders_take_turns_and_ratios_are_paired() -> None:
    calls = ""

    def call(name: str) -> Callable[[], None]:
        def add() -> None:
            nonlocal calls
            calls += name

        return add

    seconds = report.interleave({name: call(name) for name in "abc"}, rounds=3, device=CPU)
    assert calls == "cab" + "abc" + "bca" + "cab"
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    # A machine that is ten times slower in one round changes no ratio.
    assert report.paired([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_relative_error_of_nan_is_infinite() -> None:
    assert report.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2).double()) == float("inf")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells what others do")
def test_own_work_is_not_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples, ten seconds apart, of everybody's work and our own: three cores' worth and one."""
    samples = iter([(0.0, 100.0, 7.0), (10.0, 130.0, 17.0)])
    monkeypatch.setattr(report.Neighbours, "_now", staticmethod(lambda: next(samples)))
    assert report.Neighbours().cores() == pytest.approx(2.0)
    monkeypatch.undo()
    cores = report.Neighbours().cores()
    assert cores is not None
    assert cores >= 0


def test_a_busy_machine_is_waited_for_and_then_called_busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report.Neighbours, "cores", lambda self: 1.5)
    result = report.Result(
        {}, rows=[{"contender": "x", "ms": 1.0}], figures=[report.Figure("ratio", 2.0, at_least=3.0)]
    )
    console = Console(record=True, width=120, file=io.StringIO())
    report.publish("x", lambda: result, folder=tmp_path / "new", wait=0.0, console=console)
    document = json.loads((tmp_path / "new" / "x.json").read_text(encoding="utf-8"))
    assert document["idle"] is False
    ratio = {"name": "ratio", "value": 2.0, "at_least": 3.0, "at_most": None, "verdict": "missed"}
    assert document["figures"] == [ratio]
    assert document["machine"]["torch"] == torch.__version__
    assert "not idle" in console.export_text()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"x.json", "x.md"}
    assert report.pages("x", document, None)["x.md"] == (tmp_path / "new" / "x.md").read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    def measure() -> report.Result:
        raise AssertionError("measured before the place was checked")

    with pytest.raises(UserError, match="can be written"):
        report.publish("x", measure, folder=tmp_path, wait=0.0, console=Console())


def test_decoding_keeps_its_state_and_the_twin_does_not() -> None:
    model = parse(ModelConfig, {"vocab": 17, "width": 16, "depth": 2, "heads": 2, "hidden": 16}, who="test")
    result = decode.compare(Decoder(model), positions=(8, 32), rounds=2)
    sizes = {(row["model"], row["position"]): row["state_bytes"] for row in result.rows}
    assert result.refused == []
    assert sizes["model", 8] == sizes["model", 32]
    assert sizes["model softmax", 32] > 3 * sizes["model softmax", 8]
    assert [figure.verdict for figure in result.figures if "bytes" in figure.name] == ["met"]


def test_the_twin_is_charged_neither_for_copying_nor_for_spare_room() -> None:
    """Its buffers end where a turn does and stay where they are; a turn repeats from the same position."""
    model = parse(ModelConfig, {"vocab": 17, "width": 16, "depth": 2, "heads": 2, "hidden": 16}, who="test")
    twin = Decoder(decode.softmax_twin(model))
    state = decode.read(twin, (8, 32))[8]
    expected = _steps(twin, state)[0]
    kept = decode.reserved(state)
    buffers = [block["main"].k.data_ptr() for block in kept.blocks]
    for _ in range(2):
        logits, after = _steps(twin, decode.rewound(kept))
        torch.testing.assert_close(logits, expected)
        assert [block["main"].k.data_ptr() for block in after.blocks] == buffers
        assert {block["main"].k.shape[1] for block in after.blocks} == {int(after.positions)}


@torch.inference_mode()
def _steps(decoder: Decoder, state: DecoderState) -> tuple[Tensor, DecoderState]:
    """Logits of as many single tokens as a turn has, and the state after them."""
    outputs = []
    for token in range(1 + decode.STEPS):
        logits, state = decoder(torch.tensor([[token]]), state)
        outputs.append(logits)
    return torch.cat(outputs), state


def test_a_wrong_model_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(ModelConfig, {"vocab": 17, "width": 16, "depth": 1, "heads": 2, "hidden": 16}, who="test")
    decoder = Decoder(model)
    assert decode.model_error(decoder) < 1e-4
    exact = Decoder.forward

    def drifting(self: Decoder, tokens: Tensor, state: DecoderState | None = None, **how: Any) -> Any:
        """Right in one pass, wrong token by token: what a broken state looks like."""
        logits, after = exact(self, tokens, state, **how)
        return (logits * 1.01 if state is not None else logits), after

    monkeypatch.setattr(Decoder, "forward", drifting)
    assert decode.model_error(decoder) > decode.CORRECT
    result = decode.compare(decoder, positions=(8,), rounds=1)
    assert (len(result.refused), result.rows, result.figures) == (2, [], [])


@pytest.mark.slow
def test_training_is_compared_at_equal_tokens() -> None:
    result = train.measure(device=CPU, presets=("tnl-1m",), lengths=(128, 512), rounds=1, steps=3)
    assert {(row["model"], row["length"]) for row in result.rows} == {
        (model, length) for model in ("tnl-1m", "tnl-1m softmax") for length in (128, 512)
    }
    assert result.refused == []
    assert any("outside forward" in figure.name for figure in result.figures)


def test_every_causal_mixer_is_measured_and_what_keeps_its_size_has_a_bound() -> None:
    result = mixers.measure(device=CPU, lengths=(40, 600), rounds=1)
    assert result.refused == []
    causal = {name for name in all_mixers.names() if all_mixers.find(name).causal}
    assert {row["mixer"] for row in result.rows} == causal | {"lightning, cached"}
    assert "vicinity" not in causal
    for name in causal:
        layer = mixers.build(name, {}, dtype=torch.float32, device=CPU)
        grows = bool(stored_fields(layer.recurrence.State))
        short, long = (row for row in result.rows if row["mixer"] == name)
        assert (short["tokens"], long["tokens"]) == (40, 600)
        assert (long["state_bytes"] > short["state_bytes"]) == grows
        assert long["step_ms"] > 0
        own = [figure for figure in result.figures if figure.name.startswith(f"{name}: ")]
        assert [figure.at_most for figure in own] == 2 * [None if grows else 1.15]
    assert {figure.at_most for figure in result.figures if figure.name.startswith("lightning, cached: ")} == {None}
    (panel,) = mixers.panels({"rows": result.rows})
    assert {series.name for series in panel.series} == causal | {"lightning, cached"}
    assert {series.group for series in panel.series if series.name in ("softmax", "gla")} == {"grows", "keeps its size"}


def test_a_cost_per_token_is_that_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that adds a tick for every token read, and nine for the first of a call."""
    now = 0.0

    def forward(self: Mixer, x: Tensor, *how: Any) -> Any:
        nonlocal now
        now += x.shape[1] + 9
        return exact(self, x, *how)

    exact = Mixer.forward
    monkeypatch.setattr(mixers, "contenders", lambda: {"gla": {}})
    monkeypatch.setattr(mixers, "SHAPE", {"width": 16, "heads": 2})
    monkeypatch.setattr(Mixer, "forward", forward)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    result = mixers.measure(device=CPU, lengths=(20, 60, 90), rounds=2)
    assert [row["ms_per_token"] for row in result.rows] == pytest.approx([1450, 1150, 1100])
    assert [row.get("step_ms") for row in result.rows] == pytest.approx([1e4, None, 1e4])
    read, step = result.figures
    assert (read.name, step.name) == ("gla: ms per token read at 90 over 20", "gla: ms of a step after 90 over 20")
    assert (read.value, step.value) == pytest.approx((1100 / 1450, 1.0))


def test_a_mixer_that_forgets_between_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Mixer.forward

    def forgetful(self: Mixer, x: Tensor, state: Any, *how: Any) -> Any:
        return exact(self, x, None, *how)

    monkeypatch.setattr(mixers, "contenders", lambda: {"gla": {}, "rwkv7": {}})
    monkeypatch.setattr(mixers, "SHAPE", {"width": 16, "heads": 2})
    monkeypatch.setattr(Mixer, "forward", forgetful)
    result = mixers.measure(device=CPU, lengths=(40, 80), rounds=1)
    assert [sentence.split(":")[0] for sentence in result.refused] == ["gla", "rwkv7"]
    assert (result.rows, result.figures) == ([], [])
