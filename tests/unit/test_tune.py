"""Choosing configurations: all are tried, what is wrong or does not compile is told, and the table is left alone."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from isotach.bench import ops
from isotach.bench.families import Shape
from isotach.errors import UserError
from isotach.ops.decay import Decay
from isotach.ops.triton import decay
from tests.unit.interpreter import interpreted
from tools import tune

TINY = Shape(heads=1, tokens=40, width=16)
KEY = (torch.float32, 64)


def tuned(family: tune.Family, **how: Any) -> list[dict[str, Any]]:
    passing: dict[str, Any] = {"dtype": torch.float32, "shape": TINY, "device": torch.device("cpu"), "rounds": 3}

    def timed(call: Any) -> float:
        call()
        return 0.001 * decay.CONFIGS[KEY].chunk

    return tune.tune(family, **(passing | {"timed": timed} | how))


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> tune.Family:
    interpreted(monkeypatch, Decay)
    monkeypatch.setattr(ops, "SMALL", TINY)
    monkeypatch.setattr(tune, "SMALL", TINY)
    return tune.FAMILIES["decay"]._replace(tried={"chunk": (16, 32, 64), "block": (16,)})


def test_every_configuration_is_timed(family: tune.Family) -> None:
    before = dict(decay.CONFIGS)
    rows = tuned(family)
    assert before == decay.CONFIGS
    assert [(row["chunk"], row["block"]) for row in rows] == [(32, 32), (16, 16), (32, 16), (64, 16)]
    assert [row["both_ms"] for row in rows] == pytest.approx([32, 16, 32, 64])
    assert [row["anchor"] for row in rows] == [64] * 4


def test_what_is_wrong_is_refused(family: tune.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.CORRECT, torch.float32, 1e-30)
    assert all(row["refused"].startswith("relative error") for row in tuned(family))


def test_what_fails_is_told_and_the_others_go_on(family: tune.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = decay._sweep

    class Fails:
        def __getitem__(self, grid: Any) -> Any:
            if decay.CONFIGS[KEY].chunk == 32:
                raise RuntimeError("out of resource: shared memory\nmore")
            return kernel[grid]

    monkeypatch.setattr(decay, "_sweep", Fails())
    rows = tuned(family)
    assert [row.get("refused") for row in rows] == [*["RuntimeError: out of resource: shared memory", None] * 2]


def test_no_configuration_is_begun_when_time_is_up(family: tune.Family) -> None:
    assert tuned(family, minutes=-1.0) == []


@pytest.mark.parametrize("name", tune.FAMILIES)
def test_every_family_has_a_table(name: str) -> None:
    family = tune.FAMILIES[name]
    for kept in family.table.values():
        assert family.tried.keys() <= kept._asdict().keys()
        assert sum(1 for _ in tune.configurations(kept, family.tried)) > 10


def test_a_width_that_no_kernel_takes_is_refused(family: tune.Family) -> None:
    with pytest.raises(UserError, match="tune: expected heads of at most 256, got 300"):
        tuned(family, shape=TINY._replace(width=300))


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main(["decay"]) == 2
    assert capsys.readouterr().err == "tune: expected a CUDA device, found none; run it where there is one\n"
