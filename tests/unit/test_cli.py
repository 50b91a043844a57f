"""One file is one verb, and whatever the user can mend is one sentence and exit code 2."""

import os
import textwrap
from pathlib import Path

import pytest

from isotach import __version__, cli

VERBS = {
    "greet": """
        from typing import Annotated
        import typer

        def greet(name: str, times: Annotated[int, typer.Option(help="How often.")] = 1) -> None:
            '''Say hello.'''
            print(f"hello {name} " * times)
    """,
    "stop": """
        import typer

        def stop(code: int) -> None:
            '''Leave with a code.'''
            raise typer.Exit(code)
    """,
    "fall": """
        import errno
        from isotach.errors import UserError

        FAULTS = {
            "user": UserError("config.toml: unknown key trian;\\n did you mean train?"),
            "full": OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
            "permission": PermissionError(errno.EACCES, "Permission denied", "/etc/x"),
            "network": OSError(errno.ENETDOWN, "Network is down"),
            "interrupt": KeyboardInterrupt(),
            "bug": ValueError("a bug"),
        }

        def fall(kind: str) -> None:
            '''Fail.'''
            raise FAULTS[kind]
    """,
}


@pytest.fixture(autouse=True)
def _verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of three verbs in place of the package's own."""
    for name, source in VERBS.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    monkeypatch.setattr(cli, "__path__", [str(tmp_path)])


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_folder_is_the_list_of_verbs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = said(capsys, "--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)
    (tmp_path / "late.py").write_text("def late() -> None:\n    print('here')\n", encoding="utf-8")
    assert said(capsys, "late") == (0, "here\n", "")


def test_a_verb_gets_its_arguments_and_its_code_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "greet", "you", "--times", "2") == (0, "hello you hello you \n", "")
    assert said(capsys, "stop", "1")[0] == 1
    assert said(capsys, "stop", "0")[0] == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == (0, f"isotach {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gret"], "isotach: No such command 'gret'. Did you mean 'greet'? See isotach --help"),
        (["greet"], "isotach greet: Missing argument 'name'; see isotach greet --help"),
        (["greet", "you", "--tims", "2"], "isotach greet: No such option: --tims"),
        (["greet", "you", "--times", "two"], "isotach greet: Invalid value for '--times': "),
        (["fall", "user"], "config.toml: unknown key trian; did you mean train?"),
        (["fall", "full"], "model.safetensors: No space left on device; free some space, or choose another place"),
        (["fall", "permission"], "/etc/x: Permission denied; check its permissions, or choose another place"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "fall", "interrupt")[0] == 130


@pytest.mark.parametrize(("kind", "error"), [("bug", ValueError), ("network", OSError)])
def test_a_bug_keeps_its_traceback(kind: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        cli.main(["fall", kind])


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, cli.WAITING), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=str,
)
def test_threads_wait_as_the_user_says(
    chosen: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever is done to it
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected
