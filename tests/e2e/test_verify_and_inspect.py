"""isotach verify and isotach inspect, as a user calls them."""

import json

import pytest

from isotach.cli import main
from isotach.ops.decay import Decay


def test_verify_prints_the_largest_error_of_every_law(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "decay", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert {verdict["number"] for verdict in verdicts} == {1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12}  # 7 needs a kernel
    for verdict in verdicts:
        assert verdict["holds"]
        assert verdict["error"] <= verdict["limit"]
        assert verdict["backends"] == ["reference", "torch"]


def test_verify_fails_where_a_law_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Decay.read
    monkeypatch.setattr(Decay, "read", lambda self, x, s: read(self, x, s) * 1.001)
    assert main(["verify", "decay"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_verify_names_the_nearest_mixer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "lightening"]) == 2
    assert "did you mean lightning?" in capsys.readouterr().err


def test_inspect_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tnl-385m", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 384_926_720
    rows = {row["context"]: row for row in report["contexts"]}
    state = 4 * (24 * 1024 * 128 + 1024 * 128)  # H dk dh per layer, the first one doubled by LRPE
    assert rows[1024]["state_bytes"] == rows[1_048_576]["state_bytes"] == state
    assert rows[1_048_576]["softmax_cache_bytes"] == pytest.approx(1_048_576 * 24 * 2 * 1024 * 4, rel=1e-6)
    assert rows[1024]["flops_per_token"] == rows[1_048_576]["flops_per_token"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tnl-1"], "did you mean tnl-1m?"),
        (["tnl-1m", "heads=5"], "heads = 5 does not divide width = 128"),
        (["tnl-1m", "widht=5"], "did you mean width?"),
    ],
)
def test_inspect_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
