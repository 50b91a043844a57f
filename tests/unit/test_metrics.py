"""Metrics: units that agree with their definitions, a log that never tells a step twice, pictures."""

import builtins
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from isotach.errors import UserError
from isotach.train.metrics import Board, Log, losses, matmul_rate, peak_flops, peak_memory, read_log
from isotach.train.plot import draw, smooth
from isotach.train.progress import Bar


def record(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, "lr": 1e-3, "tokens": step * 8, "tokens_per_second": 9.0, "seconds": 1.0, **more}


def test_uniform_guesses_over_bytes_cost_eight_bits() -> None:
    found = losses(100 * math.log(256), tokens=100, text_bytes=100)
    assert found == {
        "loss": pytest.approx(math.log(256)),
        "bpb": pytest.approx(8.0),
        "ppl": pytest.approx(256.0),
    }


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    """The same cost of the same text, cut into few or many tokens."""
    few, many = losses(70.0, tokens=10, text_bytes=40), losses(70.0, tokens=40, text_bytes=40)
    assert few["bpb"] == many["bpb"]
    assert few["loss"] == 4 * many["loss"]


def test_what_has_no_value_is_left_out() -> None:
    assert losses(5.0, tokens=1, text_bytes=0).keys() == {"loss", "ppl"}
    assert losses(1e6, tokens=1, text_bytes=1).keys() == {"loss", "bpb"}


def test_the_matrix_rate_and_memory_are_plausible() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < matmul_rate(cpu, torch.float32, size=128) < 1e15
    assert 1e8 < peak_flops(cpu, torch.float32) < 1e15
    block = torch.ones(1 << 25)
    assert block.nbytes < peak_memory(cpu) < 1 << 42  # other tests may have reached any peak before


def test_log_drops_what_comes_after_the_resumed_step(tmp_path: Path) -> None:
    log = Log(tmp_path, after=0)
    for step in range(1, 6):
        log.write(record(step, loss=step / 3))
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [r["step"] for r in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    log = Log(tmp_path, after=3)
    log.write(record(4, loss=7.0))
    log.close()
    found = read_log(tmp_path)
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    assert [r["loss"] for r in found] == [1 / 3, 2 / 3, 1.0, 7.0]


def test_every_line_of_the_log_is_readable_at_once(tmp_path: Path) -> None:
    log = Log(tmp_path, after=0)
    log.write(record(1))
    assert json.loads((tmp_path / "log.jsonl").read_text()) == record(1)
    log.close()


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run folder with a log\.jsonl"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not a log record"):
        read_log(tmp_path)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path, after=0)
    board.write(record(1, loss=3.0))
    board.write(record(2, loss=2.0))
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 2.0)]


def test_tensorboard_missing_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'isotach\[tensorboard\]'"):
        Board(tmp_path, after=0)


def test_smoothing_keeps_constants_and_follows_steps() -> None:
    assert smooth([3.0] * 100) == pytest.approx([3.0] * 100)
    curve = smooth([0.0] * 100 + [1.0] * 100)
    assert curve[99] == 0
    assert curve[-1] > 0.99
    assert curve == sorted(curve)


def test_curves_of_two_runs_become_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log = Log(tmp_path / name, after=0)
        for step in range(1, 30):
            log.write(
                record(step, loss=3 / step, **({"valid_loss": 3 / step, "valid_bpb": 4.0} if step % 9 == 0 else {}))
            )
        log.close()
    draw([tmp_path / "a", tmp_path / "b"], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match="expected a picture format"):
        draw([tmp_path / "a"], tmp_path / "c.nonsense")
    assert not (tmp_path / "c.nonsense").exists()


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    bar = Bar(100, file=text)
    for step in range(1, 101):
        bar.write(record(step, **({"valid_loss": 1.5, "valid_bpb": 2.25} if step == 50 else {})))
    bar.close()
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "50/100", "100/100"]
    assert "loss 2.000  valid 2.25 bits/byte  9 tok/s  0.8 min left" in lines[1]
