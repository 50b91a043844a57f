"""What goes wrong in a user's hands, through the command line: one sentence, exit code 2, and nothing lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isotach import cli
from isotach.infer.generate import Event, Session
from isotach.train.checkpoint import step_folder
from isotach.train.metrics import read_log

RECIPE = """
[model]
preset = "tnl-1m"
depth = 1
width = 32
hidden = 48
[data]
train = "text.txt"
cache = "cache"
[train]
steps = 6
batch_tokens = 128
seq_len = 64
warmup = 1
valid_tokens = 128
threads = 1
"""
COMMAND = [sys.executable, "-c", "from isotach.cli import main; raise SystemExit(main())"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a recipe, and what they make: `run`."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("the cat sat on the mat and then it ran under the tree again\n" * 60)
    (folder / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "recipe.toml", "--run", "run"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a command that is refused before it has done or printed anything."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    return err


def written(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON record of one `generate`."""
    capsys.readouterr()
    assert cli.main(["generate", "run", "--seed", "1", "--json", *map(str, arguments)]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lr=3", "unknown key lr; did you mean train.lr?"),
        ("model.lr=3", "unknown key model.lr; did you mean train.lr?"),
        ("data.tran=x", "unknown key data.tran; did you mean train?"),
        ("model.lightning.lrp=all", "lightning: unknown key lrp; did you mean lrpe?"),
        ("model.lightning=3", "lightning: expected a table of options, got 3"),
        ("model.lightning.heads=2", "heads is the same for all mixers; set it in [model]"),
        ("model.heads=a", "model.heads: input should be a valid integer"),
        ("model.heads=5", "heads = 5 does not divide width = 32"),
        ("model.preset=3", "preset: expected a name, got 3"),
        ("model.pattern=softmax", "model.pattern: input should be a valid list; got 'softmax'"),
        ("model.pattern=[softmax]", "quote it for the shell, as in 'model.pattern=[\"a\"]'"),
        ("model.pattern=[3]", "model.pattern.0: input should be a valid string; got 3"),
        ("train=3", "train: expected a table, got 3; write its keys below [train]"),
        ("train.steps=true", "train.steps: got true, but this key is no switch"),
        ("train.betas=[0.9, 1.0]", "train.betas.1: input should be less than 1"),
        ("train.threads=100000", "train.threads: input should be less than or equal to 1024"),
        ("data.train=3", "data.train: input should be a valid string; got 3"),
        ("data.cache=", "data.cache: string should have at least 1 character"),
        ("data.cache=text.txt/x", "got a file where its folder should be; set data.cache to another folder"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason in refused(capsys, "train", "recipe.toml", override, "--run", "never")
    assert not Path("never").exists()


def test_a_run_folder_that_cannot_go_on_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "continue it with --resume or choose another" in refused(capsys, "train", "recipe.toml", "--run", "run")
    begun = tmp_path / "killed before its first checkpoint"
    (begun / "checkpoints").mkdir(parents=True)
    assert "without a checkpoint to continue from; choose another" in refused(
        capsys, "train", "recipe.toml", "--run", begun
    )
    mkdir = os.mkdir

    def locked(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path).parent.name == "checkpoints":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", locked)
    sentence = refused(capsys, "train", "recipe.toml", "--run", tmp_path / "new")
    assert "permission denied; choose another place" in sentence
    assert not (tmp_path / "new" / "log.jsonl").exists()  # known before the first step, not at the first checkpoint


def test_bad_prompts_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zeros").write_bytes(bytes(9))
    (tmp_path / "empty").mkdir()
    cases: dict[tuple[object, ...], str] = {
        (tmp_path / "empty", "-p", "a"): "found neither checkpoints nor a manifest.json",
        ("run/checkpoints", "-p", "a"): "found neither checkpoints nor a manifest.json",
        ("run/log.jsonl", "-p", "a"): "expected a run or a checkpoint folder, found none",
        ("run", "-p", "a", "-p", ""): "prompt 2 of 2 is empty",
        ("run", "-p", "\udcff"): "bytes that are not UTF-8",
        ("run", "--file", ""): "'': No such file",
        ("run", "--file", tmp_path / "zeros"): "got a zero byte",
        ("run", "--state", tmp_path / "empty"): "got a folder",
        ("run", "-p", "a", "--top-k", 10**30): "top_k: input should be less than",
        ("run", "-p", "a", "--repetition-penalty", "1e-320"): "repetition_penalty: input should be greater than",
        ("run", "-p", "a", "--max-tokens", 0): "max_tokens: input should be greater than or equal to 1",
        ("run", "-p", "a", "--seed", -1): "seed: input should be greater than or equal to 0",
        ("run", "-p", "a", "--stop", ""): "stop.0: string should have at least 1 character",
    }
    for arguments, reason in cases.items():
        assert reason in refused(capsys, "generate", *arguments)
    monkeypatch.setattr(sys, "stdin", None)  # as in a daemon
    assert "standard input: expected text, found it closed" in refused(capsys, "generate", "run", "--file", "-")
    read = ("train", "recipe.toml", "data.train=-", "--run", "never")
    assert "standard input: expected text, found it closed" in refused(capsys, *read)
    assert "found none" in refused(capsys, "chat", "run", "--state", tmp_path / "none")
    assert cli.main(["chat", "run"]) == 0


def test_what_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing that is no file is ever replaced by one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    bad = {"pipe": "got a pipe or device", "folder": "got a folder", "file/x": "a file where its folder should be"}
    for name, reason in bad.items():
        target = tmp_path / name
        assert reason in refused(capsys, "generate", "run", "-p", "a", "--save-state", target)
        assert reason in refused(capsys, "tokenize", "missing.txt", "--force", "--out", target)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert "1048576 at most" in refused(capsys, "tokenize", "text.txt", "--vocab", 10**11, "--out", tmp_path / "t")


def test_plot_and_inspect_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_bytes(b"\xff\x00")
    assert "bytes that are not UTF-8" in refused(capsys, "plot", tmp_path)
    assert "expected a run folder with a log.jsonl" in refused(capsys, "plot", "recipe.toml")
    assert "got a folder" in refused(capsys, "plot", "run", "--out", tmp_path)
    (tmp_path / "model.toml").write_text("model = 3")
    assert "model: expected a table, got 3" in refused(capsys, "inspect", tmp_path / "model.toml", "width=64")
    assert "the softmax model beside it" in refused(capsys, "inspect", "recipe.toml", "heads=32")


def test_an_interrupted_answer_keeps_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = written(capsys, "-p", "the cat", "--max-tokens", 12)
    generate = Session.generate

    def interrupted(session: Session, sampling: Any) -> Iterator[Event]:
        for count, event in enumerate(generate(session, sampling), 1):
            yield event
            if count == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "generate", interrupted)
        state = tmp_path / "state"
        command = ["generate", "run", "-p", "the cat", "--seed", "1", "--save-state", str(state)]
        assert cli.main(command) == 130
    rest = written(capsys, "--state", state, "--max-tokens", 7)
    assert rest["tokens"] == whole["tokens"][5:]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def test_a_closed_pipe_is_no_error_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with `| head -1`; the state is saved all the same."""
    state = tmp_path / "state"
    options = ["-p", "the cat", "--temperature", "0", "--max-tokens", "100000", "--save-state", str(state)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    with subprocess.Popen([*COMMAND, "generate", "run", *options], **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert len(written(capsys, "--state", state, "--max-tokens", 3)["tokens"]) == 3


def test_kill_and_resume_equal_a_run_that_was_never_killed(tmp_path: Path) -> None:
    """SIGKILL while every step is being saved; resumed with another number of data workers."""
    start = ["train", "recipe.toml", "train.steps=40", "--run"]
    killed = tmp_path / "killed"
    first = [*COMMAND, *start, str(killed), "train.checkpoint_every=1"]
    with subprocess.Popen(first, env=environment(), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (killed / "log.jsonl").exists():
            time.sleep(0.01)
        while process.poll() is None and len(read_log(killed)) < 15:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert cli.main([*start, str(killed), "--resume", "data.workers=3"]) == 0
    assert cli.main([*start, str(tmp_path / "whole")]) == 0
    for name in ("model.safetensors", "training.safetensors"):
        ends = [step_folder(tmp_path / run, 40) / name for run in ("killed", "whole")]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    assert [record["step"] for record in read_log(killed)] == list(range(1, 41))
