"""The routes: OpenAI's, those for states, those for monitors, and the page.

A route reads its body itself, after `limits.Gate` has let the request through, so nothing is parsed for somebody
without a key. Everything that can be wrong with a request is answered with OpenAI's error object.
"""

import asyncio
import mimetypes
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from isotach.errors import UserError
from isotach.serve import objects, schemas
from isotach.serve.conversations import bundle, bundle_size
from isotach.serve.engine import Engine
from isotach.serve.limits import Call, Gate, Gone, read
from isotach.serve.replies import Reply
from isotach.serve.schemas import ApiError, Body, parse
from isotach.serve.service import Service, Settings
from isotach.serve.writing import unless_gone

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

PAGE = Path(__file__).parent / "page"
# The page's own files and nothing else, in nobody's frame.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
B = TypeVar("B", bound=Body)


def create_app(engine: Engine, settings: Settings) -> "FastAPI":
    """The server as an ASGI application. It does not close the engine."""
    try:
        from fastapi import FastAPI
    except ImportError:
        raise UserError("serve: needs fastapi and uvicorn; pip install 'isotach[serve]'") from None
    from isotach import __version__

    service = Service(engine, settings)
    app = FastAPI(
        title="Isotach",
        version=__version__,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False},
    )
    app.state.service = service
    _add_errors(app)
    _add_completions(app, service)
    _add_tokens(app, service)
    _add_states(app, service)
    _add_transfers(app, service)
    _add_monitors(app, service)
    _add_page(app)
    _describe(app, settings.name)
    gate: Any = Gate
    app.add_middleware(
        gate, keys=settings.keys, limits=settings.limits, hosts=settings.hosts, answered=service.metrics.answered
    )
    return app


def _add_errors(app: "FastAPI") -> None:
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    def answer(error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> Response:
        return answer(ApiError.of(error))

    @app.exception_handler(RequestValidationError)
    async def misplaced(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        name = str(fault["loc"][-1])
        return answer(ApiError(400, f"{name}: {fault['msg']}", param=name, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        allowed = (error.headers or {}).get("Allow")
        hints = {404: "there is no such address; see /openapi.json", 405: f"expected {allowed}; change the method"}
        message = f"{request.method}: {hints.get(error.status_code, error.detail)}"
        reply = answer(ApiError(error.status_code, message))
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(Gone)
    async def left(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # to nobody; the log shows it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return answer(ApiError(500, "server: it failed; the fault is in its log", code="internal_error"))


def _add_completions(app: "FastAPI", service: Service) -> None:
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    async def answer(request: Request, reply: Reply, *, stream: bool) -> Response:
        if stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(reply.stream(), media_type="text/event-stream", headers=headers)
        return JSONResponse(await unless_gone(request.receive, reply.whole()))

    @app.post("/v1/chat/completions", **_takes(schemas.ChatRequest), **_gives(objects.ChatCompletion))
    async def chat(request: Request) -> Response:
        """Write the next message of a conversation."""
        body = await _body(service, request, schemas.ChatRequest)
        return await answer(request, await service.chat(_call(request), body), stream=body.stream)

    @app.post("/v1/completions", **_takes(schemas.CompletionRequest), **_gives(objects.Completion))
    async def complete(request: Request) -> Response:
        """Continue texts."""
        body = await _body(service, request, schemas.CompletionRequest)
        return await answer(request, await service.complete(_call(request), body), stream=body.stream)


def _add_tokens(app: "FastAPI", service: Service) -> None:
    from starlette.requests import Request

    @app.post("/tokenize", **_takes(schemas.TokenizeRequest), **_gives(objects.Tokens))
    async def tokenize(request: Request) -> Any:
        """The tokens of a text or a conversation."""
        return await service.tokenize(await _body(service, request, schemas.TokenizeRequest))

    @app.post("/detokenize", **_takes(schemas.DetokenizeRequest), **_gives(objects.Detokenized))
    async def detokenize(request: Request) -> Any:
        """The text of tokens."""
        return await service.detokenize(await _body(service, request, schemas.DetokenizeRequest))

    @app.get("/tokenizer_info", **_gives(objects.TokenizerInfo))
    async def tokenizer_info() -> Any:
        """What the tokenizer is."""
        return service.tokenizer_info()

    @app.get("/v1/models", **_gives(objects.ModelList))
    async def models() -> Any:
        """The one model."""
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}", **_gives(objects.Model))
    async def model(name: str) -> Any:
        """The model, by its name."""
        if name != service.settings.name:
            message = f"model: expected {service.settings.name}, got another; see /v1/models"
            raise ApiError(404, message, param="model", code="model_not_found")
        return service.model()


def _add_states(app: "FastAPI", service: Service) -> None:
    from fastapi import Query
    from starlette.requests import Request

    store = service.conversations

    @app.post("/v1/states", **_takes(schemas.StateRequest), **_gives(objects.State))
    async def create(request: Request) -> Any:
        """Read messages or a prompt, and store the state."""
        body = await _body(service, request, schemas.StateRequest)
        return await unless_gone(request.receive, service.create(_call(request), body))

    @app.get("/v1/states", **_gives(objects.StateList))
    async def states(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(max_length=64)] = None,
        session: Annotated[str | None, Query(max_length=128)] = None,
    ) -> Any:
        """Your states, the newest first; those behind the state `after`, the newest of a session."""
        owner = _call(request).owner
        return await asyncio.to_thread(store.page, owner, limit=limit, after=after, session=session)

    @app.get("/v1/states/{id}", **_gives(objects.StateDetail))
    async def state(request: Request, id: str) -> Any:
        """One state, the messages it has read, and where they end."""
        return store.detail(await asyncio.to_thread(store.record, _call(request).owner, id))

    @app.post("/v1/states/{id}/fork", **_takes(schemas.ForkRequest), **_gives(objects.State))
    async def fork(request: Request, id: str) -> Any:
        """A second state that goes its own way, from here or from an earlier message."""
        body = await _body(service, request, schemas.ForkRequest)
        return await unless_gone(request.receive, service.fork(_call(request), id, body))

    @app.delete("/v1/states/{id}", **_gives(objects.Deleted))
    async def delete(request: Request, id: str) -> Any:
        """Forget a state."""
        owner = _call(request).owner
        await asyncio.to_thread(store.record, owner, id)
        await asyncio.to_thread(store.store.delete, owner, id)
        return {"id": id, "object": "state", "deleted": True}


def _add_transfers(app: "FastAPI", service: Service) -> None:
    from fastapi import Query
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse

    store = service.conversations
    binary = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @app.get("/v1/states/{id}/export", responses={200: {"description": "The file.", **binary}, **_ERRORS})
    async def export(request: Request, id: str, transcript: bool = False) -> Response:
        """The state as a safetensors file; with `transcript` a tar file of it and of what it has read."""
        found = await asyncio.to_thread(store.export, _call(request).owner, id, transcript=transcript)
        headers = {
            "content-length": str(bundle_size(*found[1:])),
            "content-disposition": f'attachment; filename="{id}.{"tar" if transcript else "safetensors"}"',
        }
        return StreamingResponse(bundle(*found), media_type="application/octet-stream", headers=headers)

    @app.post("/v1/states/import", openapi_extra={"requestBody": binary}, **_gives(objects.State))
    async def import_(request: Request, title: Annotated[str | None, Query(max_length=200)] = None) -> Any:
        """Store what an export gave, here or on another server of the same model."""
        with tempfile.TemporaryDirectory(prefix="isotach-") as folder:
            path = Path(folder) / "state"
            with path.open("wb") as file:
                await read(
                    request.receive,
                    request.headers,
                    file.write,
                    limit=service.limits.upload,
                    patience=service.limits.patience,
                )
            return await asyncio.to_thread(store.import_, _call(request).owner, path, title=title)


def _add_monitors(app: "FastAPI", service: Service) -> None:
    from starlette.responses import JSONResponse, Response

    def state(ready: bool) -> Response:
        return JSONResponse({"status": "ok" if ready else "stopped"}, 200 if ready else 503)

    @app.get("/health", **_gives(objects.Health))
    async def health() -> Response:
        """200 while the engine lives."""
        return state(service.engine.alive)

    @app.get("/ready", **_gives(objects.Health))
    async def ready() -> Response:
        """200 while requests are taken."""
        return state(service.engine.alive)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        text, kind = service.metrics.text()
        return Response(text, headers={"content-type": kind})


def _add_page(app: "FastAPI") -> None:
    from starlette.responses import FileResponse, Response

    def serving(path: Path) -> Callable[[], Any]:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"

        async def page() -> Response:
            return FileResponse(path, media_type=kind, headers=PAGE_HEADERS)

        return page

    for path in sorted(PAGE.glob("*")):
        if path.is_file():
            address = "/" if path.name == "index.html" else f"/{path.name}"
            app.get(address, include_in_schema=False)(serving(path))


async def _body(service: Service, request: "Request", cls: type[B]) -> B:
    raw = bytearray()
    await read(
        request.receive, request.headers, raw.extend, limit=service.limits.body, patience=service.limits.patience
    )
    return parse(cls, bytes(raw))


def _call(request: "Request") -> Call:
    call: Call = request.state.call
    return call


# ---- what /openapi.json says

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "What is wrong with the request.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    },
    "5XX": {
        "description": "What is wrong with the server; 503: ask again after Retry-After seconds.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    },
}


def _takes(cls: type[Body]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{cls.__name__}"}
    return {"openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}}


def _gives(cls: type[Mapping[str, Any]]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{cls.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {"response_model": None, "responses": {200: {"description": "OK", "content": content}, **_ERRORS}}


def _describe(app: "FastAPI", model: str) -> None:
    """Put the schemas of requests and answers where the routes point to. There is one model to ask for."""
    from pydantic import TypeAdapter

    kinds: tuple[Any, ...] = (
        schemas.ChatRequest, schemas.CompletionRequest, schemas.StateRequest, schemas.ForkRequest,
        schemas.TokenizeRequest, schemas.DetokenizeRequest, objects.ChatCompletion, objects.Completion,
        objects.State, objects.StateDetail, objects.StateList, objects.Deleted, objects.Model, objects.ModelList,
        objects.Tokens, objects.Detokenized, objects.TokenizerInfo, objects.Health, objects.Error,
    )  # fmt: skip
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            adapters: Any = [(kind.__name__, "validation", TypeAdapter(kind)) for kind in kinds]
            _, shared = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
            components = described().setdefault("components", {}).setdefault("schemas", {})
            components |= shared.get("$defs", {})
            for kind in kinds:
                if issubclass(kind, Body) and "model" in kind.model_fields:
                    components[kind.__name__]["properties"]["model"] = {"const": model}
        return described()

    app.openapi = openapi  # type: ignore[method-assign]
