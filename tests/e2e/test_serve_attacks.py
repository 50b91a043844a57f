"""What nobody should send: a 4xx with OpenAI's error object, or a closed connection, and the server goes on."""

import asyncio
import concurrent.futures
import contextlib
import gc
import io
import json
import logging
import socket
import struct
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from isotach.errors import UserError
from isotach.serve.limits import JsonLines
from isotach.serve.states import StateStore
from tests.e2e.serving import Served, model, serving, settled, slowly

CHAT, TEXT, STATES = "/v1/chat/completions", "/v1/completions", "/v1/states"
SHORT = {"prompt": "abc", "max_tokens": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("attacked"), patience=1, body=200_000, prompt=2000, idle=1) as served:
        yield served
        goes_on(served)


def goes_on(served: Served) -> None:
    with served.client() as client:
        assert client.post(TEXT, json=SHORT).json()["usage"]["completion_tokens"] == 2
    assert settled(served.engine)


def refusal(response: Any, *statuses: int) -> dict[str, Any]:
    assert response.status_code in (statuses or (400,)), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@contextlib.contextmanager
def connection(served: Served) -> Iterator[socket.socket]:
    with contextlib.closing(socket.create_connection(("127.0.0.1", served.port), timeout=20)) as raw:
        yield raw


def request(path: str, body: bytes = b"", **headers: str) -> bytes:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    fields = {"host": "localhost", "content-length": str(len(body)), **given}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def everything(raw: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := raw.recv(65536):
            parts.append(part)
    return b"".join(parts)


# ---- bodies


@pytest.mark.parametrize("path", [CHAT, TEXT, STATES, "/tokenize", "/detokenize", f"{STATES}/state_{'0' * 32}/fork"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xc3("}', b'{"prompt": "\\ud800"}', b'{"prompt": NaN}',
     b"[" * 10_000 + b"]" * 10_000, b'{"prompt":' * 10_000 + b"1" + b"}" * 10_000,
     b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", b"\0" * 100],
)  # fmt: skip
def test_malformed_json(served: Served, path: str, body: bytes) -> None:
    with served.client() as client:
        refusal(client.post(path, content=body, headers={"content-type": "application/json"}))


def test_a_huge_body(served: Served) -> None:
    with served.client() as client:
        assert refusal(client.post(TEXT, content=b"x" * 300_000), 413)["code"] == "body_too_large"

        def endless() -> Iterator[bytes]:
            for _ in range(50):
                yield b" " * 10_000

        with contextlib.suppress(Exception):  # the connection may be closed while this side still sends
            refusal(client.post(TEXT, content=endless()), 413)
    with connection(served) as raw:
        raw.sendall(request(TEXT, content_length="999999999999999"))
        assert b"413" in raw.recv(65536)
    goes_on(served)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * 3000},
        {"prompt": [1] * 3000},
        {"prompt": "a", "max_tokens": -1},
        {"prompt": "a", "max_tokens": 2**62},
        {"prompt": "a", "n": 10**9},
        {"prompt": "a", "n": -1},
        {"prompt": "a", "seed": -(2**70)},
        {"prompt": "a", "top_k": 2**40},
        {"prompt": "a", "logprobs": 10**6},
        {"prompt": "a", "logit_bias": {str(2**33): 1}},
        {"prompt": "a", "logit_bias": {"9" * 400: 1}},
        {"prompt": "a", "stop": "x" * 100_000},
        {"prompt": [-5]},
        {"prompt": [2**31 - 1]},
        {"prompt": [[]]},
        {"prompt": ["", "a"]},
        {"prompt": "a", "state": "../../etc/passwd"},
        {"prompt": "a", "session_id": "../../etc/passwd"},
    ],
)
def test_absurd_values(served: Served, body: dict[str, Any]) -> None:
    with served.client() as client:
        refusal(client.post(TEXT, json=body), 400, 404)


@pytest.mark.parametrize("id", ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "state_", "state_" + "g" * 32, "x" * 5000,
                                "state_%00", "state_" + "0" * 31, "STATE_" + "0" * 32, "state_" + "0" * 32 + "%0a",
                                "%ff%fe", "state_" + "٠" * 32])  # fmt: skip
def test_ids_that_are_none(served: Served, id: str) -> None:
    with served.client() as client:
        for method, path, body in (
            ("GET", f"{STATES}/{id}", None),
            ("GET", f"{STATES}/{id}/export", None),
            ("DELETE", f"{STATES}/{id}", None),
            ("POST", f"{STATES}/{id}/fork", {}),
        ):
            error = refusal(client.request(method, path, json=body), 404, 405, 400)
            assert "root" not in error["message"]
        refusal(client.post(TEXT, json={"prompt": "a", "state": id}), 400, 404)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://"])
def test_a_page_of_another_site(served: Served, origin: str) -> None:
    """A browser lets it send such a request, with the user's network behind it; it is not served."""
    simple = {"content-type": "text/plain", "origin": origin}
    with served.client() as client:
        response = client.post(TEXT, content=json.dumps(SHORT), headers=simple)
        assert refusal(response, 403)["code"] == "unknown_origin"
        assert "access-control-allow-origin" not in response.headers
        own = {**simple, "origin": served.url}
        assert client.post(TEXT, content=json.dumps(SHORT), headers=own).status_code == 200


# ---- files


def exported(served: Served, *, bundle: bool) -> bytes:
    with served.client() as client:
        state = client.post(STATES, json={"messages": [{"role": "user", "content": "hello"}]}).json()
        return client.get(f"{STATES}/{state['id']}/export?transcript={str(bundle).lower()}").content


def header(content: bytes, *, size: int | None = None) -> bytes:
    text = content.ljust(-(-len(content) // 8) * 8)
    return struct.pack("<Q", len(text) if size is None else size) + text


def archive(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_states_that_were_tampered_with(served: Served) -> None:
    whole, bundle = exported(served, bundle=False), exported(served, bundle=True)
    tensor = {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 8]}
    hostile = {
        "empty": b"",
        "text": b"hello",
        "truncated": whole[:-8],
        "half a header": whole[:40],
        "edited": whole[:-1] + bytes([whole[-1] ^ 1]),
        "longer": whole + b"\0" * 8,
        "huge header": header(b"{}", size=2**62),
        "negative header": header(b"{}", size=2**64 - 1),
        "deep header": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        "no states": header(json.dumps({"__metadata__": {}}).encode()),
        "huge shape": header(json.dumps({"x": tensor}).encode()) + b"\0" * 8,
        "overlap": header(json.dumps({"x": {**tensor, "shape": [1], "data_offsets": [0, 2**50]}}).encode()) + b"\0" * 8,
        "tar of nothing": archive(),
        "tar of others": archive(evil_txt=b"x"),
        "tar without a state": archive(transcript_json=b"{}"),
        "tar of no transcript": archive(state_safetensors=whole),
        "tar with a bad transcript": archive(transcript_json=b"{", state_safetensors=whole),
        "tar of other tokens": archive(
            transcript_json=json.dumps({"tokens": [1, 2, 3], "note": {}}).encode(), state_safetensors=whole
        ),
        "tar cut short": bundle[: len(bundle) // 2],
        "tar that claims too much": bundle[:124] + b"77777777777\0" + bundle[136:],
    }
    with served.client() as client:
        before = len(client.get(STATES).json()["data"])
        for name, content in hostile.items():
            error = refusal(client.post(f"{STATES}/import", content=content), 400)
            assert "/tmp" not in error["message"], name
        assert len(client.get(STATES).json()["data"]) == before
        assert client.post(f"{STATES}/import", content=whole).status_code == 200
        assert client.post(f"{STATES}/import", content=bundle).status_code == 200


def test_a_state_of_another_model(served: Served, tmp_path: Path) -> None:
    with serving(tmp_path, decoder=model(seed=1)) as other, served.client() as client:
        error = refusal(client.post(f"{STATES}/import", content=exported(other, bundle=True)))
        assert "weights" in error["message"]


def test_a_state_that_is_damaged_on_disk(tmp_path: Path) -> None:
    with serving(tmp_path) as served, served.client() as client:
        state = client.post(STATES, json={"prompt": "hello"}).json()
        (file,) = tmp_path.rglob(f"{state['id']}/state.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        error = refusal(client.post(TEXT, json={**SHORT, "state": state["id"]}))
        assert (error["param"], error["code"]) == ("state", "state_unusable")
        assert str(tmp_path) not in error["message"]
        goes_on(served)


# ---- connections


@pytest.mark.parametrize(
    "raw_bytes",
    [b"\0" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"x" * 50, b"\r\n" * 200,
     b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
     b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
     b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % number for number in range(20_000)) + b"\r\n"],
)  # fmt: skip
def test_what_is_not_http(served: Served, raw_bytes: bytes) -> None:
    with connection(served) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(raw_bytes)
        answer = everything(raw)
        assert not answer or b" 4" in answer.split(b"\r\n")[0]
        if b" 400 " in answer[:20]:
            assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("sent", [b"", b"GET / HT", request(TEXT)[:-2], request(TEXT, b"{}")[:-1]])
def test_a_client_that_sends_nothing_more(served: Served, sent: bytes) -> None:
    """Nothing, half a head, a head without its last line, half a body: closed after `patience`."""
    with connection(served) as raw:
        raw.sendall(sent)
        began = time.monotonic()
        answer = everything(raw)
        assert time.monotonic() - began < 5
        assert not answer or b"408" in answer


def test_a_client_that_sends_drop_by_drop(served: Served) -> None:
    with connection(served) as raw:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in request(TEXT, b'{"prompt": "a"}'):
                raw.sendall(bytes([byte]))
                time.sleep(0.03)
            everything(raw)
        assert time.monotonic() - began < 10
    with connection(served) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")  # and again on a connection that was good once
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += raw.recv(65536)
        raw.sendall(b"GET /hea")
        assert everything(raw) == b""


def test_many_silent_connections_keep_nobody_out(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connection(served)).sendall(b"POST ")
        goes_on(served)


def test_one_connection_too_many(tmp_path: Path) -> None:
    with serving(tmp_path, connections=5) as served, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connection(served)) for _ in range(5)]
        time.sleep(0.2)
        with connection(served) as raw:
            assert everything(raw) == b""
        held[0].close()
        time.sleep(0.2)
        goes_on(served)


LONG = json.dumps({"prompt": "abc", "max_tokens": 5000, "ignore_eos": True}).encode()
STREAM = json.dumps({**json.loads(LONG), "stream": True}).encode()


@pytest.mark.parametrize("stage", ["connected", "half a body", "sent", "waiting", "first bytes", "streaming"])
def test_a_client_that_leaves(served: Served, stage: str) -> None:
    """At whatever stage: what was being written for it ends, and nothing is left behind."""
    body = LONG if stage in ("sent", "waiting") else STREAM
    with slowly(0.005):
        with connection(served) as raw:
            if stage == "half a body":
                raw.sendall(request(TEXT, body)[:-20])
            elif stage != "connected":
                raw.sendall(request(TEXT, body))
            if stage == "waiting":
                time.sleep(0.2)
                assert served.engine.stats().running == 1
            elif stage == "first bytes":
                raw.recv(10)
            elif stage == "streaming":
                for _ in range(20):
                    raw.recv(4096)
            if stage != "connected":
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # with a reset
        assert settled(served.engine, seconds=5)
    goes_on(served)


def test_a_client_that_leaves_while_its_prompt_is_read(served: Served) -> None:
    with connection(served) as raw:
        raw.sendall(request(STATES, json.dumps({"prompt": "x" * 1900}).encode()))
        time.sleep(0.01)
    assert settled(served.engine, seconds=5)
    goes_on(served)


def test_nothing_of_a_request_survives_it(served: Served) -> None:
    """Answered, streamed, refused or left: afterwards there are as many objects of every kind as before."""

    def visit(number: int) -> None:
        talk = {"messages": [{"role": "user", "content": f"number {number}"}], "max_tokens": 3}
        with served.client() as client:
            assert client.post(CHAT, json=talk).status_code == 200
            assert client.post(CHAT, json={**talk, "stream": True}).text.endswith("data: [DONE]\n\n")
            assert client.post(CHAT, json={**talk, "n": 0}).status_code == 400
            state = client.post(STATES, json={"prompt": f"number {number}"}).json()
            client.delete(f"{STATES}/{state['id']}")
        with slowly(0.002), connection(served) as raw:
            raw.sendall(request(TEXT, STREAM))
            raw.recv(1000)
        assert settled(served.engine)

    def objects() -> Counter[str]:
        gc.collect()
        own = ("isotach.serve", "isotach.infer", "starlette", "fastapi", "uvicorn", "h11", "asyncio")
        # asyncio drops timers that were cancelled when there are many of them.
        there = [one for one in gc.get_objects() if type(one) is not asyncio.TimerHandle or not one.cancelled()]
        found = Counter(f"{type(one).__module__}.{type(one).__name__}" for one in there)
        return Counter({name: count for name, count in found.items() if name.startswith(own)})

    for number in range(4):
        visit(number)
    before = objects()
    for number in range(4, 12):
        visit(number)
    grown = {name: count for name, count in (objects() - before).items() if count >= 8}
    # States of what was read stay in the cache, which has a limit.
    assert {name for name in grown if "prefix" not in name and "snapshot" not in name and "chain" not in name} == set()


@pytest.mark.parametrize("session", [None, "kept"])
def test_a_state_that_nobody_waits_for_is_not_left_behind(
    served: Served, session: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client leaves while it is written to disk, and never learns its id; a session's has a name to be found by."""
    create, begun, left, done = StateStore.create, threading.Event(), threading.Event(), threading.Event()

    def slow(store: StateStore, *args: Any, **named: Any) -> Any:
        begun.set()
        assert left.wait(20)
        record = create(store, *args, **named)
        done.set()
        return record

    monkeypatch.setattr(StateStore, "create", slow)
    with served.client() as client:
        before = len(client.get(STATES).json()["data"])
        body = {"prompt": "gone", "max_tokens": 2, "store": True} | ({} if session is None else {"session_id": session})
        with connection(served) as raw:
            raw.sendall(request(TEXT, json.dumps(body).encode()))
            assert begun.wait(20)
        time.sleep(0.5)  # until the server has seen it leave
        left.set()
        assert done.wait(20)
        more = 0 if session is None else 1
        end = time.monotonic() + 10
        while len(client.get(STATES).json()["data"]) != before + more and time.monotonic() < end:
            time.sleep(0.05)
        assert len(client.get(STATES).json()["data"]) == before + more


def test_a_slow_reader_is_dropped(served: Served) -> None:
    """It takes nothing in: neither does it hold the others up, nor is it written for for ever."""
    with contextlib.closing(socket.socket()) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.connect(("127.0.0.1", served.port))
        wide = {"prompt": "abc", "max_tokens": 50_000, "ignore_eos": True, "stream": True, "logprobs": 20, "n": 4}
        raw.sendall(request(TEXT, json.dumps(wide).encode()))
        time.sleep(0.5)
        goes = time.monotonic()
        with served.client() as client:
            assert client.post(TEXT, json=SHORT).status_code == 200
        assert time.monotonic() - goes < 5
        assert settled(served.engine, seconds=60)


def test_a_stream_that_is_silent_says_that_it_lives(tmp_path: Path) -> None:
    with serving(tmp_path, keep_alive=0.05) as served, served.client() as client, slowly(0.25):
        body = {"prompt": "abc", "max_tokens": 3, "ignore_eos": True, "stream": True}
        with client.stream("POST", TEXT, json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = list(response.iter_lines())
    assert ": keep-alive" in lines
    assert lines[-2:] == ["data: [DONE]", ""]
    assert [line for line in lines if line and not line.startswith((":", "data: "))] == []


def test_a_request_that_takes_too_long(tmp_path: Path) -> None:
    with serving(tmp_path, timeout=0.5) as served, served.client() as client:
        with slowly(0.1):
            assert refusal(client.post(TEXT, content=LONG), 504)["code"] == "timeout"
            response = client.post(TEXT, content=STREAM)
            last = [line for line in response.text.splitlines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
            assert settled(served.engine, seconds=5)
        goes_on(served)


def test_more_than_the_queue_holds(tmp_path: Path) -> None:
    """One request at a time fits into the memory, and one may wait."""
    decoder = model()
    memory = int(3.5 * decoder.state_bytes(160))
    with serving(tmp_path, decoder=decoder, queue=1, memory=memory) as served, slowly(0.01):

        def ask(_: int) -> Any:
            with served.client() as client:
                return client.post(TEXT, json={"prompt": "abc", "max_tokens": 150, "ignore_eos": True})

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(ask, range(8))]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) < 8
        for answer in refused:
            assert refusal(answer, 503)["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1


def test_more_than_the_rate(tmp_path: Path) -> None:
    with serving(tmp_path, rate=3, keys=True) as served, served.client("anna") as anna, served.client("ben") as ben:
        answers = [anna.post(TEXT, json=SHORT) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert refusal(answers[-1], 429)["code"] == "rate_limit_exceeded"
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert ben.post(TEXT, json=SHORT).status_code == 200
        with served.client() as nobody:
            assert nobody.get("/health").status_code == 200
            refusal(nobody.post(TEXT, content=b"x" * 10), 401)


def test_a_session_answers_one_at_a_time(tmp_path: Path) -> None:
    with serving(tmp_path) as served, slowly(0.01):

        def ask(text: str) -> Any:
            body = {"messages": [{"role": "user", "content": text}], "session_id": "s", "max_tokens": 60}
            with served.client() as client:
                return client.post(CHAT, json={**body, "ignore_eos": True})

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [*pool.map(ask, "abcd")]
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200
        assert set(codes[1:]) <= {200, 409}
        assert 409 in codes
        for answer in answers:
            if answer.status_code == 409:
                assert refusal(answer, 409)["param"] == "session_id"
        assert ask("e").status_code == 200


def test_a_stopped_engine_is_told(tmp_path: Path) -> None:
    with serving(tmp_path) as served, served.client() as client:
        with slowly(0.02), connection(served) as raw:
            raw.sendall(request(TEXT, STREAM))
            raw.recv(4096)
            served.engine.close(drain=False)
            rest = b""
            while b'"code":"stopping"' not in rest:
                part = raw.recv(65536)
                assert part
                rest += part
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 503
        assert refusal(client.post(TEXT, json=SHORT), 503)
        assert client.get("/metrics").status_code == 200


def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError(f"{tmp_path}/states/x: the disk is full, nothing was written; free some space")

    with serving(tmp_path) as served, served.client() as client:
        monkeypatch.setattr(StateStore, "create", full)
        body = {**SHORT, "store": True}
        for response in (client.post(TEXT, json=body), client.post(STATES, json={"prompt": "abc"})):
            assert refusal(response, 507)["code"] == "not_stored"
        assert '"code":"not_stored"' in client.post(TEXT, json={**body, "stream": True}).text
        monkeypatch.setattr(StateStore, "import_", full)
        error = refusal(client.post(f"{STATES}/import", content=b"x"))
        assert error["message"].startswith("x: the disk is full")
        goes_on(served)


def test_the_log_has_no_text(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="isotach.serve")
    with served.client() as client:
        talk = [{"role": "user", "content": "a s3cret"}]
        assert client.post(CHAT, json={"messages": talk, "max_tokens": 2}).status_code == 200
        assert client.post(CHAT, json={"messages": talk, "temperature": "s3cret"}).status_code == 400
        assert client.post(CHAT, content=b'{"s3cret').status_code == 400
        assert client.get("/v1/s3cret").status_code == 404
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert len([line for line in lines if line["event"] == "request"]) == 4
    assert "s3cret" not in json.dumps(lines)
    first = next(line for line in lines if line["status"] == 200)
    assert first["path"] == CHAT
    assert first["completion_tokens"] == 2
    assert first["finish"] == ["length"]
