"""Checkpoints: complete folders or none, written in the background, verified before anything reads them.

A folder is filled under a temporary name, every file is fsynced, and one rename gives it its final name; so whatever
kills the process, each RUN/checkpoints/step-XXXXXXXX is whole. `manifest.json` has the size and SHA-256 of every other
file: a truncated, edited or foreign folder is refused, with the file and the reason.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from isotach.errors import UserError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
TRAINING = "training.json"
FORMAT = "isotach-checkpoint-1"
TEMPORARY = ".tmp-"
_REMEDY = "restore a good copy, or remove that folder to use the checkpoint before it"


class Checkpoints:
    """Writes the checkpoints of one run, one at a time, in a background thread.

    Args:
        run: the run folder; checkpoints go to RUN/checkpoints.
        keep: how many of the newest stay, at least 1. The one with the lowest validation loss stays as well.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        self.folder = run / FOLDER
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{TEMPORARY}*"):  # of a process that was killed
                shutil.rmtree(leftover)
            probe = self.folder / f"{TEMPORARY}probe"  # refused now, not at the first save
            probe.mkdir()
            probe.rmdir()

    def save(self, fill: Callable[[Path], None], training: dict[str, Any]) -> None:
        """Start writing the checkpoint of step `training["step"]`; returns while the disk works.

        Waits for the write before, and raises what went wrong with it, so no failure is lost and data that `fill`
        reads may be overwritten once `wait` returned.

        Args:
            fill: called in the background with the temporary folder; writes the checkpoint's files into it.
            training: becomes training.json; needs `step`, and `valid_loss` to compete for the best.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(fill, training), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written; raises what went wrong since the last call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, fill: Callable[[Path], None], training: dict[str, Any]) -> None:
        temporary = self.folder / f"{TEMPORARY}{training['step']:08d}"
        try:
            with explained(self.folder):
                temporary.mkdir()
                fill(temporary)
                (temporary / TRAINING).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
                seal(temporary)
                os.rename(temporary, step_folder(self.folder.parent, training["step"]))
                _sync(self.folder)
                self._prune()
        except BaseException as error:  # noqa: BLE001  (raised by the next save or wait)
            self._failure = error
            shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self) -> None:
        folders = step_folders(self.folder.parent)
        keep = {*folders[-self.keep :], _best(folders)}
        for folder in folders:
            if folder not in keep:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        # Under a temporary name first: a kill half-way must not leave half a folder with a final name.
        doomed = folder.with_name(f"{TEMPORARY}{folder.name}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def seal(folder: Path) -> None:
    """Write the manifest of a folder's files; on return everything in it has reached the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return its training.json.

    Raises UserError naming the file and what is wrong with it: missing, truncated, edited, or not one of ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder / MANIFEST}: expected format {FORMAT}, got {manifest['format']!r}; {_REMEDY}")
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise UserError(f"{folder}: expected a checkpoint with a {MANIFEST}, found none; {_REMEDY}") from None
    except (NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / MANIFEST}: expected a checkpoint manifest, got something else; {_REMEDY}") from None
    if TRAINING not in files:
        raise UserError(f"{folder / MANIFEST}: expected {TRAINING} among its files, found it missing; {_REMEDY}")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: expected {size} bytes, found no file; {_REMEDY}")
        if (found := path.stat().st_size) != size:
            raise UserError(f"{path}: expected {size} bytes, got {found}: it was truncated or edited; {_REMEDY}")
        if _sha256(path) != sha256:
            raise UserError(
                f"{path}: expected SHA-256 {sha256[:12]}…, got another: it was edited or damaged; {_REMEDY}"
            )
    try:
        training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    except ValueError:
        training = None
    if not isinstance(training, dict):
        raise UserError(f"{folder / TRAINING}: expected a JSON object, got something else; {_REMEDY}")
    return training


def latest(run: Path) -> Path:
    """The run's newest checkpoint, verified. Raises UserError when there is none or it is damaged."""
    folders = step_folders(run)
    if not folders:
        raise UserError(f"{run}: expected a run folder with a checkpoint, found none; train it first or check the path")
    verify(folders[-1])
    return folders[-1]


def best(run: Path) -> Path:
    """The run's checkpoint with the lowest validation loss, verified. Raises UserError when none was validated."""
    folder = _best(step_folders(run))
    if folder is None:
        raise UserError(f"{run}: expected a checkpoint with a validation loss, found none; use the newest instead")
    verify(folder)
    return folder


def resolve(path: Path) -> Path:
    """The verified checkpoint that a user means by `path`: a checkpoint folder, a run (its newest), or RUN/best."""
    if path.name == "best" and not path.exists():
        return best(path.parent)
    if (path / FOLDER).is_dir():
        return latest(path)
    if not path.is_dir():
        raise UserError(f"{path}: expected a run or a checkpoint folder, found none; check the path")
    if not (path / MANIFEST).exists():
        raise UserError(
            f"{path}: expected a run or a checkpoint folder, found neither {FOLDER} nor a {MANIFEST}; check the path"
        )
    verify(path)
    return path


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return run / FOLDER / f"step-{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; not verified."""
    folder = run / FOLDER
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in paths if path.name.startswith("step-") and path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turns what the disk refuses (full, no permission, read-only) into one UserError sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk said
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        refused = number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
        remedy = "choose another place" if refused else "free space there or choose another place"
        raise UserError(f"{place}: could not be written to: {reason[0].lower()}{reason[1:]}; {remedy}") from error


def _best(folders: list[Path]) -> Path | None:
    """The folder with the lowest recorded validation loss, the newer one of equals; None when none has one."""
    losses = {}
    for folder in folders:
        try:
            loss = json.loads((folder / TRAINING).read_text(encoding="utf-8")).get("valid_loss")
        except (OSError, ValueError, AttributeError):  # damaged: `verify` tells whoever opens it
            continue
        if loss is not None:
            losses[folder] = loss
    return min(reversed(losses), key=losses.__getitem__, default=None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
