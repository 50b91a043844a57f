"""Configuration: TOML in, one sentence out where it is wrong."""

from pathlib import Path

import pytest

from isotach.config import Config, dumps, load
from isotach.errors import UserError


class Inner(Config):
    rate: float = 1.0
    names: tuple[str, ...] = ()


class Outer(Config):
    inner: Inner = Inner()
    steps: int = 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text("steps = 5\n[inner]\nrate = 2.0\n")
    return tmp_path / "r.toml"


def test_overrides_come_last_and_bare_words_are_strings(file: Path) -> None:
    got = load(Outer, file, ["inner.rate=3e-4", "inner.names=['a', 'b']", "steps = 7"])
    assert got == Outer(inner=Inner(rate=3e-4, names=("a", "b")), steps=7)


def test_round_trip(file: Path, tmp_path: Path) -> None:
    got = load(Outer, file)
    (tmp_path / "again.toml").write_text(dumps(got))
    assert load(Outer, tmp_path / "again.toml") == got


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rat=1", "unknown key inner.rat; did you mean rate?"),
        ("inner.zzz=1", "unknown key inner.zzz; valid: names, rate"),
        ("steps=many", "steps: .*integer.*got 'many'"),
        ("inner.rate=nan", "inner.rate: .*finite"),
        ("steps.deep=1", "steps is a value, not a table"),
        ("steps", "expected table.key=value"),
        ("=1", "expected table.key=value"),
        ("inner=1", "inner: .*got 1"),
    ],
)
def test_faults_name_the_key(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(Outer, file, [override])


def test_faulty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        load(Outer, tmp_path / "none.toml")
    with pytest.raises(UserError, match="got a folder"):
        load(Outer, tmp_path)
    for content in (b"steps = ", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(UserError, match="expected TOML, got something else"):
            load(Outer, tmp_path / "bad.toml")
