"""The demo in small: it leaves what it promises, the commands it names work, and it can be run again at any time."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isotach import cli

ROOT = Path(__file__).parents[2]
SMALL = ("--steps", "3", "--positions", "64,256")

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOMP_SPINCOUNT", "30000")  # what importing it would set for good
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that all runs share, with a token cache beside it, and the clone as working folder."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(ROOT)
        yield folder / "out"


@pytest.fixture(scope="module")
def first(demo: ModuleType, out: Path) -> None:
    assert demo.main([*SMALL, "--out", str(out)]) == 0


def newest(out: Path) -> str:
    return max(path.name for path in (out / "run" / "checkpoints").iterdir())


@pytest.mark.usefixtures("first")
def test_it_leaves_a_checkpoint_a_table_and_a_picture(out: Path) -> None:
    assert newest(out) == "step-00000003"
    document = json.loads((out / "speed.json").read_text(encoding="utf-8"))
    sizes = {(row["model"], row["position"]): row["state_bytes"] for row in document["rows"]}
    assert sizes["isotach", 64] == sizes["isotach", 256]
    assert sizes["isotach softmax", 256] > 3.9 * sizes["isotach softmax", 64]
    assert all(row["ms"] > 0 for row in document["rows"])
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("first")
def test_a_finished_run_is_reused_and_the_commands_it_names_work(
    demo: ModuleType, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([*SMALL, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "trained before" in printed
    assert demo.PROMPT in printed
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("    ") and "isotach " in line]
    assert [command[1] for command in commands] == ["generate", "plot", "train"]
    commands[-1].append("--print-config")
    for name, *words in commands:
        assert Path(shutil.which(name) or ROOT / name).absolute() == Path(sys.executable).with_name("isotach")
        assert cli.main(words) == 0
    assert {"read.state", "curves.png"} <= {path.name for path in out.iterdir()}


@pytest.mark.usefixtures("first")
def test_ctrl_c_saves_and_the_next_run_goes_on(demo: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two steps or three, and continued to its end."""

    class CtrlC:
        def __init__(self, steps: int) -> None: ...

        def write(self, record: Mapping[str, Any]) -> None:
            if record["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

        def close(self) -> None: ...

    shutil.rmtree(out / "run")
    arguments = ["--steps", "6", "--positions", "64", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "Bar", CtrlC)
        assert demo.main(arguments) == 130
    assert newest(out) < "step-00000006"
    assert demo.main(arguments) == 0
    steps = [json.loads(line)["step"] for line in (out / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(1, 7))
    assert newest(out) == "step-00000006"


@pytest.mark.usefixtures("first")
def test_a_damaged_run_is_replaced(demo: ModuleType, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "run" / "checkpoints" / newest(out) / "model.safetensors").write_bytes(b"damaged")
    assert demo.main([*SMALL, "--out", str(out)]) == 0
    assert "trained before" not in capsys.readouterr().out
    assert newest(out) == "step-00000003"


@pytest.mark.parametrize("arguments", [("--positions", "0,64"), ("--positions", "many"), ("--steps", "0")])
def test_bad_numbers_are_refused(demo: ModuleType, out: Path, arguments: tuple[str, ...]) -> None:
    try:
        code = demo.main([*arguments, "--out", str(out / "refused")])
    except SystemExit as refusal:  # argparse's own way
        code = refusal.code
    assert code == 2
