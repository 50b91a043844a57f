"""Checkpoints: whole or absent, whatever happens while they are written, and refused when they are not whole."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from isotach.errors import UserError
from isotach.train.checkpoint import Checkpoints, best, latest, resolve, seal, step_folders, verify


def fill(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(text.encode() * 1000)
        (folder / "config.toml").write_text("[model]\n")

    return write


def write(run: Path, losses: dict[int, float | None], *, keep: int = 100) -> None:
    checkpoints = Checkpoints(run, keep=keep)
    for step, loss in losses.items():
        checkpoints.save(fill(f"weights of {step}"), {"step": step, "valid_loss": loss})
    checkpoints.wait()


def steps(run: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in step_folders(run)]


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, {7: 1.5})
    folder = latest(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert (folder / "model.safetensors").read_bytes() == b"weights of 7" * 1000
    assert verify(folder) == {"step": 7, "valid_loss": 1.5}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    write(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 100_000_000: 1.0}, keep=2)
    assert steps(tmp_path) == [5, 100_000_000]  # of equally good ones, the newer
    write(tmp_path / "b", {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5}, keep=1)
    assert steps(tmp_path / "b") == [2, 5]
    assert best(tmp_path / "b").name == "step-00000002"
    assert not list(tmp_path.rglob(".tmp-*"))


def test_names_lead_to_folders(tmp_path: Path) -> None:
    write(tmp_path, {1: 1.0, 2: 2.0})
    first, second = step_folders(tmp_path)
    assert resolve(tmp_path) == second
    assert resolve(tmp_path / "best") == first
    assert resolve(first) == first
    with pytest.raises(UserError, match="expected a run or a checkpoint folder, found none"):
        resolve(tmp_path / "nowhere")
    write(tmp_path / "b", {1: None})
    with pytest.raises(UserError, match="with a validation loss, found none"):
        best(tmp_path / "b")
    with pytest.raises(UserError, match="with a checkpoint, found none"):
        latest(tmp_path / "empty")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def edit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[500] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def edit_training(folder: Path) -> None:
    path = folder / "training.json"
    path.write_text(path.read_text().replace("3", "4"))


def drop(folder: Path) -> None:
    (folder / "config.toml").unlink()


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def foreign_format(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": "other-1", "files": {}}))


def foreign_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')


def foreign_list(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def binary(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\x00\x80")


def forget(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["training.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"model\.safetensors: expected 12000 bytes, got 100: it was truncated or edited"),
        (edit, r"model\.safetensors: expected SHA-256 [0-9a-f]{12}…, got another"),
        (edit_training, r"training\.json: expected SHA-256"),
        (drop, r"config\.toml: expected 8 bytes, found no file"),
        (drop_manifest, r"expected a checkpoint with a manifest\.json, found none"),
        (foreign_format, r"manifest\.json: expected format isotach-checkpoint-1, got 'other-1'"),
        (foreign_json, r"manifest\.json: expected a checkpoint manifest, got something else"),
        (foreign_list, r"manifest\.json: expected a checkpoint manifest, got something else"),
        (binary, r"manifest\.json: expected a checkpoint manifest, got something else"),
        (forget, r"manifest\.json: expected training\.json among its files"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    write(tmp_path, {3: None})
    damage(step_folders(tmp_path)[0])
    with pytest.raises(UserError, match=reason):
        latest(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "", "\ud800"])
def test_training_facts_that_are_none_are_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    """As a folder may be that another program has sealed."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    fill("weights")(folder)
    (folder / "training.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    seal(folder)
    with pytest.raises(UserError, match=r"training\.json: expected a JSON object, got something else; ") as told:
        resolve(tmp_path)
    assert "\n" not in str(told.value)


def test_a_full_disk_is_told_at_the_next_save_and_leaves_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(fill("a"), {"step": 1})
    checkpoints.wait()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(fill("b"), {"step": 2})
        with pytest.raises(UserError, match="no space left on device; free space"):
            checkpoints.save(fill("c"), {"step": 3})
    checkpoints.wait()  # told once
    assert latest(tmp_path).name == "step-00000001"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    checkpoints.save(fill("d"), {"step": 4})
    checkpoints.wait()
    assert steps(tmp_path) == [1, 4]


def test_an_error_in_the_background_is_not_lost(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("a bug, not the user's fault")

    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(broken, {"step": 1})
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.wait()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_saving_returns_before_the_disk_is_done(tmp_path: Path) -> None:
    go = threading.Event()

    def slow(folder: Path) -> None:
        assert go.wait(60)

    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(slow, {"step": 1})
    assert steps(tmp_path) == []
    go.set()
    checkpoints.wait()
    assert steps(tmp_path) == [1]


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from isotach.errors import UserError
from isotach.train.checkpoint import Checkpoints

def fill(folder):
    save_file({"weight": np.zeros(100_000, np.float32)}, folder / "model.safetensors")

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
checkpoints.save(fill, {"step": 2, "valid_loss": None})
try:
    checkpoints.wait()
except UserError as error:
    print(error)
"""


def test_a_file_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """A write that stops half-way, here for a real limit on the size of files."""
    write(tmp_path, {1: None})
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not be written to" in done.stdout
    assert "File too large" in done.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


KILLED = """
import os, signal, sys
from pathlib import Path
from isotach.train import checkpoint

run, fatal = Path(sys.argv[1]), int(sys.argv[2])
count = 0

def counted(call):
    def wrapper(*args, **kwargs):
        global count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapper

def fill(folder):
    with open(folder / "model.safetensors", "wb") as file:
        file.write(b"x" * 500)
        file.flush()
        os.stat(folder)  # a counted call half-way through the file
        file.write(b"x" * 500)

for name in ("fsync", "rename", "stat", "mkdir", "unlink", "rmdir", "open"):
    setattr(os, name, counted(getattr(os, name)))
checkpoints = checkpoint.Checkpoints(run, keep=1)
checkpoints.save(fill, {"step": 2, "valid_loss": None})
checkpoints.wait()
"""


def test_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at every system call of a save: what has a final name is whole, and nothing is ever missing."""
    seen = set()
    for fatal in range(1, 200):
        run = tmp_path / str(fatal)
        write(run, {1: None})
        killed = subprocess.run([sys.executable, "-c", KILLED, str(run), str(fatal)], capture_output=True, text=True)
        for folder in step_folders(run):
            verify(folder)
        seen.add(tuple(steps(run)))
        assert latest(run).name in ("step-00000001", "step-00000002")
        if killed.returncode == 0:
            assert steps(run) == [2]
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        write(run, {3: None}, keep=1)  # the next run clears what the dead one left behind
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003"]
    else:
        pytest.fail("the save never finished")
    assert {(1,), (1, 2), (2,)} <= seen
