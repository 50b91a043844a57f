"""Who may ask, how much, and for how long.

`Gate` stands before every route: it knows the owner by the key, counts requests, and whatever way a request ends
(answered, refused, cancelled, its client gone) it cancels what is still being generated for it and writes one line of
log. `read` takes a body of bounded size at a bounded pace; `server` is uvicorn with connections that cannot be held
open by doing nothing.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from isotach.config import Config
from isotach.errors import UserError
from isotach.serve.schemas import ApiError

if TYPE_CHECKING:
    import uvicorn

PACE = 1024  # bytes per second that a client sends at least, once its patience is used up
KEY_LENGTH = 16  # letters of a key at least: shorter ones can be tried out
PRIVATE = ("/v1", "/tokenize", "/detokenize", "/tokenizer_info")  # what needs a key, with everything below it
log = logging.getLogger("isotach.serve")

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Limits(Config):
    """What one request, one key, and the server as a whole may take.

    - body, upload: bytes of a JSON body, and of a state's file.
    - prompt: tokens of a prompt, with those of the state before it. answer: tokens of one answer; default_answer:
      where a chat does not say how many. answers: of one request, over all prompts.
    - rate: requests per minute and key; None for any number.
    - timeout: seconds that a request may take in all. keep_alive: seconds of silence in a stream before a comment.
    - patience: seconds that a client may take to send the head of a request, to begin its body, and to take in what
      was sent to it. idle: that a connection may stay open between requests. drain: that requests have to finish
      when the server stops.
    - connections: that are open at the same time. queue: requests that may wait for the engine.
    """

    body: Count = 32 << 20
    upload: Count = 8 << 30
    prompt: Count = 1 << 22
    answer: Count = 1 << 16
    default_answer: Count = 1024
    answers: Count = 256
    rate: Annotated[float, Field(gt=0)] | None = None
    timeout: Seconds = 3600.0
    keep_alive: Seconds = 10.0
    patience: Seconds = 30.0
    idle: Seconds = 15.0
    drain: Seconds = 30.0
    connections: Count = 512
    queue: Count = 1024


class Keys:
    """API keys and whose they are; without any, everybody is the owner ""."""

    def __init__(self, owners: Iterable[tuple[str, str]] = ()) -> None:
        """Pairs of (owner, key)."""
        self._owners = [(hashlib.sha256(key.encode()).digest(), owner) for owner, key in owners]

    def __bool__(self) -> bool:
        return bool(self._owners)

    @classmethod
    def load(cls, path: Path) -> "Keys":
        """One "OWNER KEY" per line; empty lines and those that begin with # say nothing. An owner may have several.

        Raises UserError for a file that is missing or empty, and for a line that is not that; it shows no key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "other bytes than UTF-8"
            raise UserError(f"{path}: expected a file of keys, got: {reason}; write one OWNER KEY per line") from None
        pairs: list[tuple[str, str]] = []
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or not re.fullmatch(r"[\w.@-]{1,64}", words[0]) or len(words[1]) < KEY_LENGTH:
                raise UserError(
                    f"{path}, line {number}: expected OWNER KEY, the key of {KEY_LENGTH} letters or more; "
                    "make one with: openssl rand -hex 32"
                )
            if words[1] in {key for _, key in pairs}:
                raise UserError(f"{path}, line {number}: expected every key once, got one a second time; make another")
            pairs.append((words[0], words[1]))
        if not pairs:
            raise UserError(f"{path}: expected at least one key, got none; write one OWNER KEY per line")
        return cls(pairs)

    def owner(self, authorization: str | None) -> str:
        """Whose key an Authorization header has. Every key is compared to the end, so time tells nothing of them."""
        if not self._owners:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        presented = hashlib.sha256(key.strip().encode()).digest()
        found = [owner for digest, owner in self._owners if hmac.compare_digest(digest, presented)]
        if scheme.lower() != "bearer" or not found:
            message = "Authorization: expected a key of this server, got another or none; send 'Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key")
        return found[0]


class Rate:
    """A bucket per owner that a minute fills."""

    def __init__(self, per_minute: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # what was left, and when

    def take(self, owner: str) -> None:
        """Count one request; ApiError 429 where there were too many."""
        if self._per_minute is None:
            return
        now, size = self._clock(), max(1.0, self._per_minute)
        left, then = self._buckets.get(owner, (size, now))
        left = min(size, left + (now - then) * self._per_minute / 60)
        if left < 1:
            self._buckets[owner] = left, now
            message = f"rate: expected at most {self._per_minute:g} requests per minute, got more; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=(1 - left) * 60 / self._per_minute)
        self._buckets[owner] = left - 1, now


@dataclass
class Call:
    """One HTTP request: whose it is, what is to be done when it is over, and what its line in the log will say."""

    owner: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    began: float = field(default_factory=time.monotonic)
    after: list[Callable[[], object]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Gate:
    """ASGI: what every request passes through. The route finds its Call as `request.state.call`.

    - answered: told the method, the route and the status of every answer (0 where there was none).
    - hosts: names by which the server may be called, None for any.

    Without keys, whoever can send something is let in; a browser can, on behalf of any page that it shows. So what
    comes from a page of another site is refused, and with `hosts` also what calls the server by a name that was made
    to point here.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        limits: Limits,
        answered: Callable[[str, str | None, int], None],
        hosts: frozenset[str] | None = None,
    ) -> None:
        self._app, self._keys, self._hosts, self._answered = app, keys, hosts, answered
        self._rate = Rate(limits.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Call()
        scope.setdefault("state", {})["call"] = call
        status = 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
            await send(message)

        try:
            refusal = self._refusal(call, scope)
            if refusal is None:
                await self._app(scope, receive, watched)
            else:
                await _respond(watched, refusal)
        finally:
            for finish in reversed(call.after):
                finish()
            self._log(call, scope, status)

    def _refusal(self, call: Call, scope: Scope) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._hosts is not None and _hostname(headers.get(b"host", "")) not in self._hosts:
            message = "Host: expected a name of this machine; open http://localhost, or start the server with --keys"
            return ApiError(403, message, code="unknown_host")
        origin = headers.get(b"origin")
        if not self._keys and origin is not None and origin.partition("://")[2] != headers.get(b"host"):
            message = "Origin: expected this server's own page, got another site's; start the server with --keys"
            return ApiError(403, message, code="unknown_origin")
        path = scope["path"]
        if not any(path == prefix or path.startswith(f"{prefix}/") for prefix in PRIVATE):
            return None
        try:
            call.owner = self._keys.owner(headers.get(b"authorization"))
            self._rate.take(call.owner)
        except ApiError as error:
            return error
        return None

    def _log(self, call: Call, scope: Scope, status: int) -> None:
        path = getattr(scope.get("route"), "path", None)  # its pattern: ids and mistyped paths stay out of the log
        self._answered(scope["method"], path, status)
        facts = {
            "id": call.id,
            "owner": call.owner,
            "method": scope["method"],
            "path": path,
            "status": status or None,
            "seconds": round(time.monotonic() - call.began, 6),
            **call.facts,
        }
        log.info("request", extra={"facts": facts})


class JsonLines(logging.Formatter):
    """One JSON object per line, whoever logs."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


async def _respond(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


class Gone(Exception):
    """The client has left before it had sent everything."""


async def read(
    receive: Receive, headers: Any, take: Callable[[bytes], Any], *, limit: int, patience: float, what: str = "body"
) -> None:
    """Hand a request's body to `take`, piece by piece. ApiError 413 above `limit` bytes, 408 for one that drips."""
    declared = headers.get("content-length", "0")
    received, began, more = 0, asyncio.get_running_loop().time(), True
    too_large = ApiError(
        413, f"{what}: expected at most {limit:,} bytes, got more; send less", param=what, code="body_too_large"
    )
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    while more:
        try:
            async with asyncio.timeout_at(began + patience + received / PACE):
                message = await receive()
        except TimeoutError:
            raise ApiError(
                408, f"{what}: expected {PACE} bytes per second, got fewer; send it faster", code="slow_request"
            ) from None
        if message["type"] == "http.disconnect":
            raise Gone
        chunk = message.get("body", b"")
        received, more = received + len(chunk), message.get("more_body", False)
        if received > limit:
            raise too_large
        take(chunk)


def _hostname(host: str) -> str:
    """Without the port: "[::1]:80" is "::1"."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


def server(app: Any, *, limits: Limits, started: Callable[[], object] = lambda: None) -> "uvicorn.Server":
    """uvicorn for `app`: `run(sockets=[...])` until SIGTERM or SIGINT; requests have limits.drain seconds from then.

    - started: called once connections are accepted.
    """
    try:
        import uvicorn
    except ImportError:
        raise UserError("serve: needs uvicorn and fastapi; pip install 'isotach[serve]'") from None

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started()

    config = uvicorn.Config(
        app,
        http=_connection(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(limits.idle)),
        timeout_graceful_shutdown=max(1, round(limits.drain)),
    )
    return Server(config)


def _connection(limits: Limits) -> type[asyncio.Protocol]:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        """A connection that is closed when its client is silent, deaf, or one too many."""

        _head: asyncio.TimerHandle | None = None  # runs while the head of a request is awaited
        _stalled: asyncio.TimerHandle | None = None  # runs while the client takes nothing in

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
            self._head = self.loop.call_later(limits.patience, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                _stop(self._head)
                self._head = None
            elif self._head is None and self.conn.trailing_data[0]:  # a head that has begun and is not whole
                self._head = self.loop.call_later(limits.patience, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._head)
            _stop(self._stalled)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(limits.patience, self.transport.abort)

        def resume_writing(self) -> None:
            _stop(self._stalled)
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            error = ApiError(400, "HTTP: expected a well-formed HTTP/1.1 request, got something else", code="bad_http")
            body = json.dumps(error.body()).encode()
            lengths = [("content-type", "application/json"), ("content-length", str(len(body)))]
            headers = [*lengths, ("connection", "close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Connection


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
