"""Keys, rates, bodies and the log, without a server."""

import asyncio
import contextlib
import json
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isotach.errors import UserError
from isotach.serve.limits import Call, Gate, Gone, JsonLines, Keys, Limits, Rate, read, server
from isotach.serve.schemas import ApiError

KEY, OTHER = "k" * 32, "o" * 32
SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}


def keys_file(folder: Path, text: str) -> Path:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_key_has_an_owner(tmp_path: Path) -> None:
    keys = Keys.load(keys_file(tmp_path, f"# who may\n\nanna {KEY}\nben {OTHER}\nanna {'n' * 16}\n"))
    assert keys
    assert keys.owner(f"Bearer {KEY}") == "anna"
    assert keys.owner(f"bearer  {OTHER} ") == "ben"
    assert keys.owner(f"Bearer {'n' * 16}") == "anna"


def test_without_keys_everybody_is_the_same() -> None:
    assert not Keys()
    assert Keys().owner(None) == Keys().owner("Bearer x") == ""


@pytest.mark.parametrize(
    "header",
    [None, "", KEY, f"Basic {KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}k", "Bearer", "Bearer \xff", "Bearer "],
)
def test_another_key_is_none(header: str | None) -> None:
    with pytest.raises(ApiError, match="Authorization") as caught:
        Keys([("anna", KEY)]).owner(header)
    assert caught.value.status == 401
    assert caught.value.body()["error"]["code"] == "invalid_api_key"
    assert caught.value.headers == {"www-authenticate": "Bearer"}
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "at least one key"),
        (f"anna {KEY} x", "line 1"),
        (f"# x\n{KEY}", "line 2"),
        ("anna short", "line 1"),
        (f"an/na {KEY}", "line 1"),
        (f"anna {KEY}\nben {KEY}", "line 2.*once"),
    ],
)
def test_a_faulty_file_of_keys_is_refused_without_showing_one(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        Keys.load(keys_file(tmp_path, text))
    assert KEY not in str(caught.value)


def test_a_missing_file_of_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Keys.load(tmp_path / "keys")


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """However early one fits, so the time does not tell which one, nor whether any did."""
    compared = 0

    def counted(first: bytes, second: bytes) -> bool:
        nonlocal compared
        compared += 1
        return first == second

    monkeypatch.setattr("hmac.compare_digest", counted)
    keys = Keys((f"owner{number}", f"{number:032}") for number in range(5))
    for header in (f"Bearer {0:032}", f"Bearer {4:032}", "Bearer x"):
        compared = 0
        with contextlib.suppress(ApiError):
            keys.owner(header)
        assert compared == 5


def test_a_minute_fills_the_bucket_of_each_owner() -> None:
    now = 0.0
    rate = Rate(6, clock=lambda: now)
    for _ in range(6):
        rate.take("anna")
    with pytest.raises(ApiError) as caught:
        rate.take("anna")
    assert caught.value.status == 429
    assert caught.value.headers == {"retry-after": "10"}
    rate.take("ben")
    now = 10.0
    rate.take("anna")
    with pytest.raises(ApiError):
        rate.take("anna")


def call_gate(scope: dict[str, Any], app: Any, **settings: Any) -> tuple[int, dict[str, Any], dict[bytes, bytes]]:
    """Status, JSON body and headers of what the gate lets through or answers itself."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    gate = Gate(app, **{"keys": Keys(), "limits": Limits(), "answered": lambda *_: None, **settings})
    asyncio.run(gate(scope, None, send))  # type: ignore[arg-type]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body or b"{}"), dict(sent[0]["headers"])


async def hello(scope: Any, receive: Any, send: Any) -> None:
    call: Call = scope["state"]["call"]
    call.facts["seen"] = call.owner
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"owner": call.owner}).encode()})


@pytest.mark.parametrize("path", ["/v1/models", "/v1", "/tokenize", "/detokenize", "/tokenizer_info", "/v1/states/x"])
def test_what_costs_something_needs_a_key(path: str) -> None:
    keys = Keys([("anna", KEY)])
    status, body, headers = call_gate({**SCOPE, "path": path}, hello, keys=keys)
    assert status == 401
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert b"x-request-id" in headers
    headed = {**SCOPE, "path": path, "headers": [(b"authorization", f"Bearer {KEY}".encode())]}
    assert call_gate(headed, hello, keys=keys)[:2] == (200, {"owner": "anna"})


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/app.js", "/v11", "/openapi.json"])
def test_other_things_need_none(path: str) -> None:
    assert call_gate({**SCOPE, "path": path}, hello, keys=Keys([("anna", KEY)]))[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("LOCALHOST:1", 200), ("evil.example", 403),
     ("localhost.evil.example", 403), ("", 403), ("[::1", 200), ("localhost:80:x", 200)],
)  # fmt: skip
def test_another_sites_name_does_not_reach_a_server_without_keys(host: str, status: int) -> None:
    hosts = frozenset({"localhost", "127.0.0.1", "::1"})
    assert call_gate({**SCOPE, "headers": [(b"host", host.encode())]}, hello, hosts=hosts)[0] == status


def test_whatever_way_a_call_ends_it_is_cleaned_up_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["call"].after += [lambda: done.append("first"), lambda: done.append("second")]
        raise RuntimeError("a bug")

    caplog.set_level(logging.INFO, logger="isotach.serve")
    with pytest.raises(RuntimeError, match="a bug"):
        call_gate(SCOPE, failing)
    assert done == ["second", "first"]
    line = json.loads(JsonLines().format(caplog.records[-1]))
    assert line["event"] == "request"
    assert line["status"] is None
    assert line["seconds"] >= 0


def test_the_log_is_lines_of_json_without_paths_that_nobody_has(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="isotach.serve")
    call_gate({**SCOPE, "path": "/v1/secret-of-somebody"}, hello, keys=Keys())
    line = JsonLines().format(caplog.records[-1])
    assert "\n" not in line
    assert "secret" not in line
    assert json.loads(line)["seen"] == ""
    assert json.loads(line)["level"] == "info"


def test_the_log_has_tracebacks_in_one_line() -> None:
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", 40, "f", 1, "bad", (), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "ValueError" in json.loads(line)["error"]


def receiving(*messages: dict[str, Any], pause: float = 0.0) -> Callable[[], Any]:
    waiting = [*messages]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        return waiting.pop(0)

    return receive


def taken(receive: Any, headers: dict[str, str] | None = None, *, limit: int = 10, patience: float = 5.0) -> bytes:
    body = bytearray()
    asyncio.run(read(receive, headers or {}, body.extend, limit=limit, patience=patience))
    return bytes(body)


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_parts() -> None:
    assert taken(receiving(part(b"hello", more=True), part(b""))) == b"hello"
    assert taken(receiving(part(b"0123456789"))) == b"0123456789"


@pytest.mark.parametrize(
    ("receive", "headers"),
    [
        (receiving(), {"content-length": "11"}),
        (receiving(), {"content-length": "9" * 30}),
        (receiving(part(b"01234567890")), {}),
        (receiving(part(b"012345", more=True), part(b"678901", more=True)), {"content-length": "3"}),
    ],
)
def test_a_body_that_is_too_large_is_refused_as_soon_as_that_is_known(receive: Any, headers: dict[str, str]) -> None:
    with pytest.raises(ApiError, match="at most 10 bytes") as caught:
        taken(receive, headers)
    assert caught.value.status == 413


def test_a_body_that_drips_is_refused() -> None:
    with pytest.raises(ApiError, match="bytes per second") as caught:
        taken(receiving(*[part(b"x", more=True)] * 9, pause=0.02), patience=0.05)
    assert caught.value.status == 408


def test_a_client_that_leaves_is_gone() -> None:
    with pytest.raises(Gone):
        taken(receiving(part(b"x", more=True), {"type": "http.disconnect"}))


def test_started_means_that_connections_are_accepted() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "lifespan":
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind.endswith("shutdown"):
                return

    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))

        def started() -> None:
            socket.create_connection(listener.getsockname()).close()
            running.should_exit = True

        running = server(app, limits=Limits(), started=started)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname())
        asyncio.run(running.serve(sockets=[listener]))
