"""What the server takes, in the words of OpenAI's API.

Requests are Configs: frozen, and a field that is not here is refused by its name, with the nearest one that is. A null
is a field left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from isotach.config import Config, nearest
from isotach.infer.sample import Sampling
from isotach.rng import seed_of
from isotach.serve.objects import Error

# Fields of OpenAI's API that are understood and refused, with what to do instead.
REFUSED: Mapping[str, str] = {
    "audio": "models here read and write text; leave it out",
    "best_of": "ask for n answers with logprobs and choose among them",
    "function_call": "write it as tool_choice",
    "functions": "write them as tools",
    "guided_json": "write it as response_format",
    "guided_regex": "write it as response_format",
    "guided_grammar": "write it as response_format",
    "modalities": "models here read and write text; leave it out",
    "parallel_tool_calls": "an answer has one call at most; leave it out",
    "previous_response_id": "write the id of a state as state",
    "suffix": "models here read from left to right; leave it out",
}
NESTED = ("messages", "response_format", "stream_options", "tools")  # their parts have names of their own

Id = Annotated[int, Field(ge=0, lt=2**31)]
# A list stops at its first fault: of a million of them nobody reads the second.
Ids = Annotated[list[Id], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
IdLists = Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
StateId = Annotated[str, Field(max_length=64, description="the id of a state of yours: state_ and 32 hex digits")]
SessionName = Annotated[str, Field(pattern=r"^[\w.:@-]{1,128}$", description="1 to 128 letters, digits or . : @ - _")]
ToolName = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
Title = Annotated[str, Field(max_length=200, description="at most 200 characters")]


class ApiError(Exception):
    """An answer that is not 2xx. It says what to do in its message; `param` is the field that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @classmethod
    def of(cls, error: Exception, status: int = 400, *, param: str | None = None, code: str = "invalid_value") -> Self:
        """What a client may know of an error: where files lie on this machine is nobody's business."""
        return cls(status, re.sub(r"(?<!\S)/\S*/(?=[^/\s])", "", str(error)), param=param, code=code)

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, round(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> Error:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Body(Config):
    """A JSON object that a client sends."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


B = TypeVar("B", bound=Body)


def parse(cls: type[B], raw: bytes) -> B:
    """The body of a request. ApiError 400 names the first field that is wrong, and what would be right."""
    try:
        return cls.model_validate_json(raw)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        unknown = (fault for fault in faults if fault["type"] == "extra_forbidden")
        raise _refusal(cls, next(unknown, faults[0])) from None  # a mistyped name is not told as one that is missing


def _refusal(cls: type[Body], fault: Any) -> ApiError:
    if fault["type"] == "json_invalid":
        message = f"body: expected JSON, got something else ({fault['ctx']['error']}); mend that place"
        return ApiError(400, message, code="invalid_json")
    if not fault["loc"]:
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] != "value_error":
            return ApiError(400, f"body: expected a JSON object; {message}")
        return ApiError(400, message, param=message.partition(":")[0], code="invalid_value")
    first, *rest = fault["loc"]
    path = [first if len(first) <= 60 else f"{first[:59]}…"]
    if first in NESTED:  # of a union pydantic also names the member that it tried
        path += [str(part) for part in rest if isinstance(part, int) or (part.isidentifier() and part != "str")]
    name, param = path[-1], ".".join(path)
    if fault["type"] == "extra_forbidden":
        hint = REFUSED.get(name) if len(path) == 1 else None
        if hint is not None:
            return ApiError(400, f"{name}: not supported: {hint}", param=name, code="unsupported_parameter")
        hint = nearest(name, _names(cls, fault["loc"][:-1]))
        return ApiError(400, f"{param}: unknown field; {hint}", param=param, code="unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(400, f"{param}: required; add it", param=param, code="missing_required_parameter")
    field = cls.model_fields.get(path[0])
    expected = field.description if field is not None and len(path) == 1 else None
    if expected is None:
        expected = (fault["msg"][0].lower() + fault["msg"][1:]).removeprefix("input should be ")
    got = ascii(fault["input"])
    got = got if len(got) <= 60 else f"{got[:59]}…"
    return ApiError(400, f"{param}: expected {expected}; got {got}", param=param, code="invalid_value")


def _names(cls: type[Body], location: Iterable[str | int]) -> list[str]:
    """The fields that an object at this place of a request may have."""
    tables = {cls}
    for part in location:
        inside = {
            table for each in tables if part in each.model_fields for table in _tables(each.model_fields[str(part)])
        }
        tables = inside or tables  # a place in a list, and of a union the member that was tried, lead nowhere new
    return sorted({field.alias or name for table in tables for name, field in table.model_fields.items()})


def _tables(annotated: Any) -> Iterator[type[Body]]:
    """The kinds of objects in a field's annotation."""
    annotation = getattr(annotated, "annotation", annotated)
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation
    for inner in get_args(annotation):
        yield from _tables(inner)


# ---- what is written


class JsonSchema(Body):
    name: Annotated[str, Field(max_length=64)] = "answer"
    description: str = ""
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool = True


class Text(Body):
    type: Literal["text"]


class JsonObject(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Regex(Body):
    type: Literal["regex"]
    regex: str = Field(min_length=1, max_length=1 << 16)


class Grammar(Body):
    type: Literal["grammar"]
    grammar: str = Field(min_length=1, max_length=1 << 18)


def _kind(form: Any) -> str | None:
    kind = form.get("type") if isinstance(form, dict) else getattr(form, "type", None)
    return kind if isinstance(kind, str) else None


Form = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[JsonObject, Tag("json_object")]
    | Annotated[JsonSchemaFormat, Tag("json_schema")]
    | Annotated[Regex, Tag("regex")]
    | Annotated[Grammar, Tag("grammar")],
    Discriminator(_kind),
]


class StreamOptions(Body):
    include_usage: bool = False


class Generation(Body):
    """Fields that both kinds of completion have."""

    model: str | None = Field(None, max_length=1000, description="the name of a model of /v1/models")
    temperature: float = Field(1.0, ge=0, le=100, description="a number from 0 to 100")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, up to 1")
    top_k: int = Field(0, ge=-1, lt=2**31, description="a whole number; 0 or -1 for all tokens")
    min_p: float = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    n: int = Field(1, ge=1, le=128, description="a whole number from 1 to 128")
    seed: int | None = Field(None, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
    ) = Field([], description="a string of 1 to 1000 characters, or at most 16 of them")
    stop_token_ids: list[Id] = Field([], max_length=64, description="at most 64 token ids")
    ignore_eos: bool = Field(False, description="true or false")
    min_tokens: int = Field(0, ge=0, lt=2**31, description="a whole number, 0 or more")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: float = Field(1.0, ge=1e-3, le=1e3, description="a number from 0.001 to 1000")
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=1024, description="at most 1024 token ids, as strings, with numbers from -100 to 100"
    )
    response_format: Form = Field(Text(type="text"), description="an object with a type")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(StreamOptions(), description="an object")
    user: str = Field("", max_length=1000, description="at most 1000 characters")
    state: StateId | None = None
    session_id: SessionName | None = None
    store: bool = Field(False, description="true or false")

    @model_validator(mode="after")
    def _go_together(self) -> "Generation":
        if self.state is not None and self.session_id is not None:
            raise ValueError("session_id: expected it without state, got both; a session has its own state")
        if self.response_format.type != "text" and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise ValueError(f"{name}: expected it without response_format, whose form says where the text ends")
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options: expected it with stream = true only; add stream or leave it out")
        return self

    def samplings(
        self, *, max_tokens: int, logprobs: int | None, stop: Iterable[str] = (), stop_token_ids: Iterable[int] = ()
    ) -> list[Sampling]:
        """One per answer, seeded: the first has the request's seed, the others seeds that are drawn from it.

        `stop` and `stop_token_ids` are what ends an answer of this model in any case.
        """
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        first = Sampling(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(dict.fromkeys([*self.stop_token_ids, *stop_token_ids])),
            seed=self.seed,
            stop=tuple(dict.fromkeys([*own, *stop])),
            max_tokens=max_tokens,
            logprobs=logprobs,
        ).seeded()
        assert first.seed is not None
        others = (seed_of(first.seed, "choice", index) >> 1 for index in range(1, self.n))
        return [first, *(first.model_copy(update={"seed": seed}) for seed in others)]


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt: str | Ids | Texts | IdLists = Field(
        description="a string, a list of token ids, or a list of several of either"
    )
    max_tokens: int = Field(16, ge=0, lt=2**31, description="a whole number, 0 or more")
    echo: bool = Field(False, description="true or false")
    logprobs: int | None = Field(None, ge=0, le=20, description="a whole number from 0 to 20")

    @model_validator(mode="after")
    def _writes_something(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected 1 or more, got 0; with echo it may be 0")
        if self.echo and self.stream:
            raise ValueError("echo: expected it without stream; ask for the whole answer at once")
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"min_tokens: expected at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [entry for entry in self.prompt if isinstance(entry, int)]
        return [ids] if ids or not self.prompt else [entry for entry in self.prompt if not isinstance(entry, int)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: ToolName
    arguments: str = Field(max_length=1 << 20)


class Call(Body):
    id: str = Field("", max_length=64)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = Field(None, pattern=r"^[\w-]{1,64}$")
    tool_calls: list[Call] = Field([], max_length=16)
    tool_call_id: str | None = Field(None, pattern=r"^[\w-]{1,64}$")
    refusal: Literal[None] = None  # what OpenAI's client sends back of an answer

    def plain(self) -> dict[str, Any]:
        """For templates: one string, and the roles that they know."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        calls = [call.model_dump() for call in self.tool_calls]
        extras = {"name": self.name, "tool_call_id": self.tool_call_id, "tool_calls": calls}
        return {"role": role, "content": text} | {key: value for key, value in extras.items() if value}


class Function(Body):
    name: ToolName
    description: str = Field("", max_length=1 << 16)
    parameters: dict[str, Any] = {"type": "object"}
    strict: bool = True


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: ToolName


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


Messages = Annotated[list[Message], Field(max_length=100_000, fail_fast=True)]


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: Messages = Field(description="a list of messages")
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="a whole number, 1 or more")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="a whole number, 1 or more")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(0, ge=0, le=20, description="a whole number from 0 to 20")
    tools: list[Tool] = Field([], max_length=128, description="at most 128 functions")
    tool_choice: Literal["none", "auto", "required"] | NamedTool = Field(
        "auto", description='"none", "auto", "required" or a function of tools, as {"type": "function", "function": …}'
    )

    @model_validator(mode="after")
    def _say_it_once(self) -> "ChatRequest":
        if not self.messages and self.state is None and self.session_id is None:
            raise ValueError("messages: expected at least one, got none; only behind a state there may be none")
        self._check_tools()
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected it with logprobs = true only; add logprobs or leave it out")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: expected it or max_completion_tokens, got both; leave one out")
        if (self.limit or self.min_tokens) < self.min_tokens:
            raise ValueError(f"min_tokens: expected at most max_tokens ({self.limit}), got {self.min_tokens}")
        return self

    def _check_tools(self) -> None:
        names = {tool.function.name for tool in self.tools}
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: expected one of tools, got {self.tool_choice.function.name}; add it there")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: expected tools to choose from, got none; add tools")
        if not names or self.tool_choice == "none":
            return
        given = {"response_format": self.response_format.type != "text", "ignore_eos": self.ignore_eos}
        for name, wrong in (given | {"min_tokens": bool(self.min_tokens)}).items():
            if wrong:
                raise ValueError(
                    f"{name}: expected it without tools, whose calls have a form of their own; leave it out"
                )

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


# ---- states and tokens


class StateRequest(Body):
    """POST /v1/states"""

    messages: Messages | None = Field(None, min_length=1, description="a list of at least one message")
    prompt: str | Ids | None = Field(None, description="a string or a list of token ids")
    state: StateId | None = None
    session_id: SessionName | None = None
    title: Title | None = None
    model: str | None = Field(None, max_length=1000, description="the name of a model of /v1/models")

    @model_validator(mode="after")
    def _reads_something(self) -> "StateRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("messages: expected either messages or prompt; give one of them")
        if self.state is not None and self.session_id is not None:
            raise ValueError("session_id: expected it without state, got both; a session has its own state")
        return self


class ForkRequest(Body):
    """POST /v1/states/{id}/fork"""

    messages: int | None = Field(
        None, ge=0, lt=2**31, description="how many of its first messages to keep; 0: what was read before them"
    )
    title: Title | None = None


class TokenizeRequest(Body):
    """POST /tokenize"""

    prompt: str | None = Field(None, description="a string")
    messages: Messages | None = Field(None, min_length=1, description="a list of at least one message")
    add_special_tokens: bool = Field(True, description="true or false; nothing is added here, whichever it is")
    return_token_strs: bool = Field(False, description="true or false")
    model: str | None = Field(None, max_length=1000, description="the name of a model of /v1/models")

    @model_validator(mode="after")
    def _has_something(self) -> "TokenizeRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("prompt: expected either prompt or messages; give one of them")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize"""

    tokens: Ids = Field(description="a list of token ids")
    model: str | None = Field(None, max_length=1000, description="the name of a model of /v1/models")
