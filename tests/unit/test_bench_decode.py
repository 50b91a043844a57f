"""The model in eight bits beside llama.cpp: whoever is absent is named, whoever is wrong is refused."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pytest
import torch

from isotach.bench import decode, llama
from isotach.config import parse
from isotach.models.decoder import Decoder, ModelConfig

TINY = parse(ModelConfig, {"vocab": 97, "width": 64, "depth": 2, "heads": 2, "hidden": 64}, who="test")
EIGHT = "tiny int8: times faster than llama.cpp at"


class Stub:
    """A llama.cpp that takes a microsecond per token of context, and half of it without flash attention."""

    answer = llama.ANSWER

    def __init__(self, contexts: Sequence[int], *, steps: int, threads: int) -> None:
        self.contexts, self.ended = contexts, False
        assert (steps, threads) == (decode.STEPS, torch.get_num_threads())

    def seconds(self, context: int, *, flash: bool) -> float:
        assert context in self.contexts
        return 1e-6 * context / (1 if flash else 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        assert not self.ended
        self.ended = True


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "READ", 16)


@pytest.mark.usefixtures("short")
def test_figures_are_ratios_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "missing", lambda: None)
    monkeypatch.setattr(llama, "Llama", Stub)
    result = decode.in_eight_bits(TINY, name="tiny", rounds=2)
    assert (result.refused, result.absent) == ([], [])
    rows = {(row["model"], row["position"]): row for row in result.rows}
    assert rows.keys() == {
        (model, position) for model in ("tiny float32", "tiny int8", *decode.PEERS) for position in decode.TIMES_FASTER
    }
    small, large = (rows[f"tiny {kind}", 1024]["weight_bytes"] for kind in ("int8", "float32"))
    assert 0.25 < small / large < 0.28
    assert [figure.name for figure in result.figures[:3]] == [f"{EIGHT} {at:,}" for at in decode.TIMES_FASTER]
    assert [figure.at_least for figure in result.figures] == [0.8, 3.0, 8.0, None, None, None]
    assert all(figure.value is not None and figure.value > 0 for figure in result.figures)


@pytest.mark.usefixtures("short")
def test_who_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "missing", lambda: "llama.cpp: not installed")
    result = decode.in_eight_bits(TINY, name="tiny", rounds=1)
    assert result.absent == ["llama.cpp: not installed"]
    assert {row["model"] for row in result.rows} == {"tiny float32", "tiny int8"}
    assert {figure.verdict for figure in result.figures} == {"not measured"}


@pytest.mark.usefixtures("short")
def test_wrong_ones_are_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "missing", lambda: None)
    monkeypatch.setattr(llama, "Llama", type("Wrong", (Stub,), {"answer": " Rome"}))
    monkeypatch.setattr(decode, "rounding_error", lambda decoder: 0.5)
    result = decode.in_eight_bits(TINY, name="tiny", rounds=1)
    assert [sentence.split(":")[0] for sentence in result.refused] == ["tiny int8", "llama.cpp"]
    assert {row["model"] for row in result.rows} == {"tiny float32"}


@pytest.mark.usefixtures("short")
def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from isotach.models.decoder import Decoder
    from isotach.models.quantize import int8

    model = int8(Decoder(TINY))
    assert decode.rounding_error(model) < decode.ROUNDED / 3
    right = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, w, s: right(x, w, s.flip(0)))
    assert decode.rounding_error(model) > decode.ROUNDED


@pytest.mark.slow
def test_llama_cpp_answers_behind_a_doubled_cache() -> None:
    if absence := llama.missing():
        pytest.skip(absence)
    with llama.Llama((2048, 1024), steps=2, threads=1) as peer:
        assert peer.answer == llama.ANSWER
        for flash in (True, False, True):  # a turn leaves the cache as it was
            assert peer.seconds(2048, flash=flash) > 0
            assert peer.seconds(1024, flash=flash) > 0


def test_on_a_gpu_the_limit_is_what_must_be_read_and_written() -> None:
    result = decode.in_sixteen_bits(Decoder(TINY), name="tiny", rounds=2)
    assert result.refused == []
    assert [row["rows"] for row in result.rows] == list(decode.ROWS)
    one, *_, most = result.rows
    assert one["weight_bytes"] == most["weight_bytes"]
    assert 1 <= one["weight_bytes"] / (2 * Decoder(TINY).parameter_count()) < 1.01  # what is no matrix is whole
    assert most["state_bytes"] == 256 * one["state_bytes"] == 256 * Decoder(TINY).state_bytes(1)
    assert all(0 < row["of_limit"] < 2 for row in result.rows)
    assert [(figure.at_least, figure.verdict != "") for figure in result.figures] == [(0.5, True), (0.65, True)]


def test_without_a_gpu_its_figures_are_named_and_not_measured() -> None:
    assert {figure.verdict for figure in decode._shares("tiny", {})} == {"not measured"}
