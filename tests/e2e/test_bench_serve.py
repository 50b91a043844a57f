"""The benchmark of serving, small: every figure is there, and what is a property rather than a speed holds."""

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

from isotach.bench import serve
from isotach.models import presets


def test_every_figure_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "toy", serve.TOY)
    monkeypatch.setattr(serve, "SHORT", (1, 16))
    monkeypatch.setattr(serve, "STREAMS", 4)
    small: Any = {"context": 20_000, "rounds": 2, "tokens": 6, "warm": 8, "requests": 24}
    result = serve.measure(device=torch.device("cpu"), presets=("toy",), **small)
    told = {figure.name.removeprefix("toy: "): figure for figure in result.figures}
    for name in (
        "share of earlier turns that is skipped",
        "share of what is before an edited message that is skipped",
        "bytes of its file beside those of the state",
    ):
        assert told[name].verdict == "met", told[name]
    for name in (
        "ms per token over HTTP over a bare step",
        "tokens per second of 4 streams over one",
        "ms to the first token behind a state of 20,000 tokens",
        "reading it again over that",
        "memory of a server after 24 requests over before",
    ):
        assert (told[name].value or 0) > 0
    beside = [figure for name, figure in told.items() if "being read" in name]
    assert len(beside) == 2
    assert result.refused == []
    (soaked,) = (row for row in result.rows if row["what"] == "soak")
    assert soaked["requests"] == 24


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has")
@pytest.mark.timeout(3600)
def test_memory_stays_what_it_is_over_ten_thousand_requests() -> None:
    (figure,) = serve.soak(warm=2_000, requests=10_000).figures
    assert figure.verdict == "met", figure
