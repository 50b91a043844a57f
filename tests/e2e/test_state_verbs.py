"""`isotach state`: keep, inspect, fork, compare and verify, and one sentence for whatever is wrong."""

import json
from pathlib import Path

import pytest
import torch

from isotach import cli
from isotach.infer.generate import Session
from isotach.infer.open import open_checkpoint
from isotach.train.checkpoint import seal, step_folder
from tests.unit.serving import BYTES, decoder

TEXT = "A state is what is left of a text. "


def trained(folder: Path, *, seed: int = 0) -> Path:
    """A run folder with one checkpoint."""
    checkpoint = step_folder(folder, 7)
    checkpoint.mkdir(parents=True)
    decoder("hybrid", seed=seed, dtype=torch.float32).save(checkpoint)
    BYTES.save(checkpoint)
    (checkpoint / "training.json").write_text(json.dumps({"step": 7}))
    seal(checkpoint)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def kept(run: Path, tmp_path: Path) -> Path:
    assert cli.main(["state", "save", str(run), str(tmp_path / "kept"), "-p", TEXT]) == 0
    return tmp_path / "kept"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["state", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_what_is_saved_is_what_a_session_has_read(run: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = open_checkpoint(step_folder(run, 7))
    session = Session(model, tokenizer)
    session.read(TEXT)
    code, out, _ = said(capsys, "inspect", kept, "--json")
    shown = json.loads(out)
    assert session.past is not None
    assert (code, shown["tokens"], shown["chain"]) == (0, len(TEXT), session.past.chain.digest.hex())
    assert (shown["model"], shown["state_bytes"]) == (model.fingerprint(), session.nbytes())
    assert shown["file_bytes"] == kept.stat().st_size <= shown["state_bytes"] + 65536
    assert "float32" in said(capsys, "inspect", kept)[1]


def test_reading_on_from_a_state_is_reading_the_whole(
    run: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = kept.with_name("more")
    assert said(capsys, "save", run, more, "--state", kept, "-p", "And of more.")[0] == 0
    text = kept.with_name("text")
    text.write_text(TEXT + "And of more.")
    code, out, _ = said(capsys, "verify", more, "--run", run, "--file", text)
    assert (code, "within" in out) == (0, True)
    code, out, _ = said(capsys, "verify", more, "--run", run, "-p", TEXT)
    assert (code, "the text is another" in out) == (1, True)
    assert said(capsys, "verify", more)[:2] == (0, f"{more}: whole, {len(TEXT) + 12} tokens\n")


def test_forks_are_the_same_and_what_reads_on_is_not(run: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies = [kept.with_name("one"), kept.with_name("two")]
    assert said(capsys, "fork", kept, *copies)[0] == 0
    assert [copy.read_bytes() for copy in copies] == [kept.read_bytes()] * 2
    assert said(capsys, "diff", *copies)[0] == 0
    more = kept.with_name("more")
    assert said(capsys, "save", run, more, "--state", copies[0], "-p", "!")[0] == 0
    code, out, _ = said(capsys, "diff", kept, more, "--json")
    assert (code, json.loads(out)["same"]) == (1, {"model": True, "tokenizer": True, "tokens": False})
    assert "different" in said(capsys, "diff", kept, more)[1]


def test_whatever_is_wrong_is_one_sentence(run: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = kept.with_name("torn")
    torn.write_bytes(kept.read_bytes()[:-20])
    other = kept.with_name("other")
    another = trained(kept.with_name("another run"), seed=1)
    assert said(capsys, "save", another, other, "-p", TEXT)[0] == 0
    cases = {
        ("inspect", kept.with_name("none")): "found none",
        ("inspect", torn): "whole safetensors file",
        ("inspect", step_folder(run, 7) / "model.safetensors"): "expected format",
        ("fork", torn, kept.with_name("new")): "whole safetensors file",
        ("fork", kept, other): "expected a new name",
        ("diff", kept, torn): "whole safetensors file",
        ("verify", torn): "whole safetensors file",
        ("verify", other, "--run", run): "model that made it",
        ("verify", kept, "-p", TEXT): "expected --run RUN",
        ("save", run, kept, "-p", ""): "at least two tokens",
        ("save", run, kept.with_name("new"), "--state", other): "model that made it",
        ("save", kept.with_name("nowhere"), kept, "-p", "a"): "found none",
        ("burn", kept): "No such command",
    }
    for arguments, reason in cases.items():
        code, out, err = said(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert reason in err
    assert not kept.with_name("new").exists()
