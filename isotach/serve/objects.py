"""What the server answers, in the words of OpenAI's API: dictionaries, written as they are."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorDetail


class PromptDetails(TypedDict):
    cached_tokens: int
    miss: Literal["cold", "evicted", "no checkpoint"] | None


class UsageReport(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class State(TypedDict):
    id: str
    object: Literal["state"]
    created: int
    model: str
    tokens: int
    bytes: int
    parent: str | None
    session: str | None
    title: str | None
    message_count: int | None


class StoredMessage(TypedDict):
    role: str
    content: str
    end: int | None  # tokens of the state up to its end


class StateDetail(State):
    messages: list[StoredMessage] | None
    before: int | None  # tokens before the first message


class StateList(TypedDict):
    object: Literal["list"]
    data: list[State]
    has_more: bool


class Deleted(TypedDict):
    id: str
    object: Literal["state"]
    deleted: bool


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class ToolCallFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: ToolCallFunction
    index: NotRequired[int]


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ToolCall]]


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    tool_calls: list[ToolCall]


class ChatChoice(TypedDict):
    index: int
    message: NotRequired[AnswerMessage]
    delta: NotRequired[Delta]
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    seed: NotRequired[int]
    state: NotRequired[State]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    seed: NotRequired[int]
    state: NotRequired[State]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: NotRequired[UsageReport | None]


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[UsageReport | None]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    state_bytes: int
    chat_template: Literal["own", "default"]
    structured_output: bool


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: NotRequired[list[str]]


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str
    pad_token: str | None
    chat_template: str
    fingerprint: str


class Health(TypedDict):
    status: str
