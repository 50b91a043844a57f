"""`isotach serve`: from a checkpoint to a server, and to a stop that loses nothing."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("fastapi")

from isotach import cli
from isotach.data.tokenizer import ByteTokenizer
from isotach.models.decoder import Decoder, ModelConfig
from isotach.train.checkpoint import TRAINING, seal, step_folder

KEY = "k" * 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose only checkpoint is a tiny model."""
    folder = step_folder(tmp_path / "fable", 1)
    folder.mkdir(parents=True)
    Decoder(ModelConfig(vocab=257, width=16, depth=1, heads=2, hidden=16)).save(folder)
    ByteTokenizer().save(folder)
    (folder / TRAINING).write_text('{"step": 1}', encoding="utf-8")
    seal(folder)
    return tmp_path / "fable"


@contextlib.contextmanager
def command(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its URL; killed at the end if it has not stopped by itself."""
    code = "import sys; from isotach.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(run), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://[\w.:\[\]]+", line)
        if not found:
            assert process.stderr is not None
            raise AssertionError(f"{line!r} {process.stderr.read()}")
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def stopped(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and log of a process that was told to stop."""
    _, err = process.communicate(timeout=60)
    return process.returncode, [json.loads(line) for line in err.splitlines() if line.startswith("{")]


def test_a_conversation_outlives_the_server(run: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "a s3cret"}], "max_tokens": 5, "session_id": "mine"}
    with command(run) as (process, url):
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
        assert answer["model"] == "fable"
        process.send_signal(signal.SIGTERM)
        code, lines = stopped(process)
    assert code == 0
    assert "s3cret" not in json.dumps(lines)
    assert [line["status"] for line in lines if line["event"] == "request"] == [200]
    assert (run / "serve" / "states").is_dir()
    with command(run) as (_, url):
        (state,) = httpx.get(f"{url}/v1/states").json()["data"]
        assert state["session"] == "mine"
        later = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
        before = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
        assert later["usage"]["prompt_tokens"] > before
        assert later["usage"]["prompt_tokens_details"]["cached_tokens"] >= before - 1


def streamed(url: str, tokens: int, lines: list[str]) -> None:
    body = {"prompt": "abc", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with (
        contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
    ):
        lines.extend(line for line in response.iter_lines() if line)


@pytest.mark.parametrize(("drain", "finishes"), [(30, True), (1, False)])
def test_sigterm_lets_requests_finish_for_a_while(run: Path, drain: int, finishes: bool) -> None:
    with command(run, f"drain={drain}", "answer=1000000") as (process, url):
        lines: list[str] = []
        client = threading.Thread(target=streamed, args=(url, 1500 if finishes else 1_000_000, lines))
        client.start()
        while not httpx.get(f"{url}/metrics").text.count('isotach_num_requests_running{model_name="fable"} 1.0'):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, _ = stopped(process)
        client.join(30)
    assert code == 0
    assert (lines[-1:] == ["data: [DONE]"]) is finishes
    assert time.monotonic() - began < 20


def test_interrupted_it_says_so(run: Path) -> None:
    with command(run) as (process, _):
        process.send_signal(signal.SIGINT)
        assert stopped(process)[0] == 130


def test_keys_and_curl(run: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    (tmp_path / "keys").write_text(f"anna {KEY}\n", encoding="utf-8")

    def curl(*words: str) -> str:
        done = subprocess.run(["curl", "-sS", "-N", *words], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    options = ["--keys", str(tmp_path / "keys"), "--name", "a/b", "--store", str(tmp_path / "kept"), "--log-text"]
    with command(run, *options) as (process, url):
        assert json.loads(curl(f"{url}/v1/models"))["error"]["code"] == "invalid_api_key"
        assert json.loads(curl(f"{url}/v1/models", "-H", f"Authorization: Bearer {KEY}"))["data"][0]["id"] == "a/b"
        body = json.dumps({"prompt": "abc", "max_tokens": 3, "ignore_eos": True, "stream": True, "store": True})
        lines = curl(f"{url}/v1/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        assert all(line.startswith("data: {") for line in lines[:-2])
        state = json.loads(lines[-3].removeprefix("data: "))["choices"][0]["state"]
        (file,) = (tmp_path / "kept").rglob("state.safetensors")
        assert file.parent.name == state["id"]
        process.send_signal(signal.SIGTERM)
        _, log = stopped(process)
    assert [line["prompts"] for line in log if "prompts" in line] == [["abc"]]
    assert [len(line["answers"]) for line in log if "answers" in line] == [1]
    assert KEY not in json.dumps(log)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_what_is_wrong_is_told_in_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        for arguments, reason in (
            ([str(run), "--port", port], "choose another --port"),
            ([str(run), "--host", "no.such.host.invalid"], "choose another"),
            ([str(tmp_path / "none"), "--port", "0"], "check the path"),
            ([str(run), "--keys", str(tmp_path / "none")], "write one OWNER KEY per line"),
            ([str(run), "ratte=5"], "did you mean rate?"),
            ([str(run), "prompt=0"], "prompt"),
            ([str(run), "prompt"], "expected LIMIT=VALUE"),
            ([str(run), "--port", "70000"], "65535"),
        ):
            code, _, err = said(capsys, "serve", *arguments)
            assert code == 2
            assert reason in err
            assert err.count("\n") == 1


def test_the_limits_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "serve", "--print-limits")
    assert code == 0
    assert "patience = 30" in out


def test_the_address_is_told_once_somebody_listens(run: Path) -> None:
    """Whoever reads it may connect at once."""
    for _ in range(2):
        with command(run) as (_, url):
            host, _, port = url.removeprefix("http://").partition(":")
            socket.create_connection((host, int(port))).close()
