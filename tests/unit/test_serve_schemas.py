"""Every field is taken or refused by its name, and every refusal says what would be right."""

import json
from typing import Any

import pytest

from isotach.serve.schemas import (
    REFUSED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StateRequest,
    TokenizeRequest,
    parse,
)

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
# Everything that clients of OpenAI, vLLM and ourselves may send.
COMMON: dict[str, Any] = {
    "model": "m", "temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 7, "stop": ["a", "b"], "stream": True,
    "stream_options": {"include_usage": True}, "presence_penalty": 1, "frequency_penalty": -1, "user": "u",
    "logit_bias": {"5": -100}, "response_format": {"type": "json_object"}, "top_k": -1, "min_p": 0.1,
    "repetition_penalty": 1.1, "stop_token_ids": [3], "state": "state_" + "0" * 32, "store": True,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "look_up"}}
CHAT = {**HELLO, **COMMON, "max_tokens": 5, "logprobs": True, "top_logprobs": 20}
TEXT = {"prompt": "p", **COMMON, "max_tokens": 5, "logprobs": 5, "min_tokens": 0, "ignore_eos": False}


def refusal(cls: Any, body: Any) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse(cls, raw)
    assert caught.value.status == 400
    error = caught.value.body()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize(("cls", "body"), [(ChatRequest, CHAT), (CompletionRequest, TEXT)])
def test_everything_is_taken_together_and_alone(cls: Any, body: dict[str, Any]) -> None:
    needed = {"messages", "prompt"}
    parse(cls, json.dumps(body).encode())
    base = {key: value for key, value in body.items() if key in needed}
    companions = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}
    for name, value in body.items():
        request = parse(cls, json.dumps({**base, name: value, **companions.get(name, {})}).encode())
        if name not in ("response_format", "stream_options", "messages"):
            assert getattr(request, name) == value
        parse(cls, json.dumps({**base, name: None if name not in needed else value}).encode())  # null: left out


def test_other_fields_of_chats() -> None:
    for choice in ("none", "auto", "required", NAMED):
        parse(ChatRequest, json.dumps({**HELLO, "tools": [TOOL], "tool_choice": choice}).encode())
    parse(ChatRequest, json.dumps({**HELLO, "min_tokens": 2, "ignore_eos": True, "session_id": "a.b-c"}).encode())
    assert parse(ChatRequest, json.dumps({**HELLO, "max_completion_tokens": 9}).encode()).limit == 9


@pytest.mark.parametrize("cls", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(
    "name", [*REFUSED, "temprature", "logitbias", "__class__", "best-of", "", "str", "x" * 500, "\ud7ff\n"]
)
def test_unknown_fields_are_refused_by_name(cls: Any, name: str) -> None:
    base = HELLO if cls is ChatRequest else {"prompt": "p"}
    error = refusal(cls, {**base, name: 1})
    assert error.param == (name if len(name) <= 60 else f"{name[:59]}…")
    assert error.param in error.message
    if name == "temprature":
        assert "did you mean temperature?" in error.message


@pytest.mark.parametrize(
    ("cls", "body", "param", "meant"),
    [
        (CompletionRequest, {"promt": "p"}, "promt", "prompt"),
        (CompletionRequest, {"promt": "p", "temperature": -1}, "promt", "prompt"),
        (ChatRequest, {"mesages": HELLO["messages"]}, "mesages", "messages"),
        (ChatRequest, {"messages": [{"rol": "user", "content": "x"}]}, "messages.0.rol", "role"),
        (ChatRequest, {**HELLO, "stream_options": {"include_usge": True}}, "stream_options.include_usge",
         "include_usage"),
        (ChatRequest, {**HELLO, "tools": [{"type": "function", "function": {"nam": "x"}}]}, "tools.0.function.nam",
         "name"),
        (ChatRequest, {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
         "response_format.json_schema.json_schema.shema", "schema"),
        (TokenizeRequest, {"promt": "p"}, "promt", "prompt"),
        (DetokenizeRequest, {"token": [1]}, "token", "tokens"),
    ],
)  # fmt: skip
def test_a_mistyped_name_is_told_as_that(cls: Any, body: dict[str, Any], param: str, meant: str) -> None:
    error = refusal(cls, body)
    assert error.message == f"{param}: unknown field; did you mean {meant}?"
    assert (error.param, error.code) == (param, "unknown_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", "hot"), ("temperature", 1e400), ("temperature", True), ("top_p", 0),
        ("top_p", 1.5), ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 10**9), ("n", 1.5), ("seed", -1),
        ("seed", 2**63), ("stop", ""), ("stop", [""]), ("stop", ["a"] * 17), ("stop", 5), ("stream", "maybe"),
        ("stream_options", {"include": True}), ("presence_penalty", 3), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("logit_bias", {"a": 1}), ("logit_bias", {"5": 101}), ("logit_bias", [5]),
        ("logit_bias", {"-1": 1}), ("response_format", {"type": "xml"}), ("response_format", {}),
        ("response_format", {"type": "regex"}), ("response_format", {"type": "json_schema"}), ("state", 5),
        ("session_id", "a b"), ("session_id", "../x"), ("session_id", "x\n"), ("stop_token_ids", [-1]),
        ("max_tokens", -1), ("max_tokens", 10**30), ("min_tokens", -1), ("user", "u" * 1001), ("model", 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [ChatRequest, CompletionRequest])
def test_wrong_values_are_refused_by_name(cls: Any, field: str, value: Any) -> None:
    error = refusal(cls, {**(HELLO if cls is ChatRequest else {"prompt": "p"}), field: value})
    assert error.param is not None
    assert error.param.partition(".")[0] == field
    assert field in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("cls", "body", "said"),
    [
        (ChatRequest, {}, "messages: required"),
        (ChatRequest, {"messages": []}, "at least one"),
        (ChatRequest, {"messages": None}, "messages: required"),
        (ChatRequest, {"messages": "hello"}, "messages: expected a list"),
        (ChatRequest, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        (ChatRequest, {"messages": [{"content": "x"}]}, "messages.0.role: required"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        (ChatRequest, {"messages": [{"role": "user", "content": "x", "audio": 1}]}, "messages.0.audio"),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "tool_calls.0.function"),
        (ChatRequest, {**HELLO, "tools": [{"type": "function"}]}, "tools.0.function: required"),
        (ChatRequest, {**HELLO, "tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (ChatRequest, {**HELLO, "tool_choice": "required"}, "add tools"),
        (ChatRequest, {**HELLO, "tool_choice": "any"}, "tool_choice: expected"),
        (ChatRequest, {**HELLO, "tools": [{**TOOL, "function": {"name": "x"}}], "tool_choice": NAMED}, "look_up"),
        (ChatRequest, {**HELLO, "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        (ChatRequest, {**HELLO, "tools": [TOOL], "min_tokens": 1}, "min_tokens"),
        (ChatRequest, {**HELLO, "top_logprobs": 3}, "top_logprobs"),
        (ChatRequest, {**HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "leave one out"),
        (ChatRequest, {**HELLO, "max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        (ChatRequest, {**HELLO, "state": "state_" + "0" * 32, "session_id": "a"}, "session_id"),
        (ChatRequest, {**HELLO, "stream_options": {}}, "stream = true"),
        (ChatRequest, {**HELLO, "ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        (ChatRequest, {**HELLO, "logprobs": 3}, "logprobs: expected true or false"),
        (CompletionRequest, {"prompt": "p", "logprobs": True}, "logprobs"),
        (CompletionRequest, {"prompt": "p", "max_tokens": 0}, "max_tokens"),
        (CompletionRequest, {"prompt": "p", "echo": True, "stream": True}, "echo"),
        (CompletionRequest, {"prompt": {"a": 1}}, "prompt: expected"),
        (CompletionRequest, {"prompt": [1, "a"]}, "prompt: expected"),
        (CompletionRequest, {"prompt": [-1]}, "prompt: expected"),
        (CompletionRequest, {"prompt": [[1], "a"]}, "prompt: expected"),
        (CompletionRequest, {"prompt": [2**31]}, "prompt: expected"),
        (StateRequest, {}, "messages or prompt"),
        (StateRequest, {**HELLO, "prompt": "p"}, "messages or prompt"),
        (TokenizeRequest, {}, "prompt"),
        (DetokenizeRequest, {"tokens": "abc"}, "tokens"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(cls: Any, body: dict[str, Any], said: str) -> None:
    error = refusal(cls, body)
    assert said in error.message
    assert error.param


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"5", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}', b'{"temperature": NaN, "prompt": "p"}', b'{"temperature": Infinity, "prompt": "p"}',
        b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b'{"prompt": ' + b"[" * 10_000,
        b'{"n": ' + b"9" * 10_000 + b', "prompt": "p"}', b"{'prompt': 'p'}", b'{"prompt": "p",}', b"\0",
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    refusal(CompletionRequest, raw)


def test_a_million_faults_are_one_refusal() -> None:
    """And cost no more than one."""
    raw = json.dumps({"prompt": [1, "a"] * 500_000}).encode()
    assert len(refusal(CompletionRequest, raw).message) < 400


@pytest.mark.parametrize(
    ("prompt", "several"),
    [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]]), ([], [[]])],
)
def test_prompts(prompt: Any, several: Any) -> None:
    assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompts() == several


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": parts, "name": "x"}, {"role": "assistant", "content": None}]}
    first, second = parse(ChatRequest, json.dumps(body).encode()).messages
    assert first.plain() == {"role": "system", "content": "ab", "name": "x"}
    assert second.plain() == {"role": "assistant", "content": ""}


def test_answers_have_seeds_of_their_own() -> None:
    body = parse(CompletionRequest, json.dumps({"prompt": "p", "n": 3, "seed": 5}).encode())
    seeds = [sampling.seed for sampling in body.samplings(max_tokens=5, logprobs=None)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert seeds == [sampling.seed for sampling in body.samplings(max_tokens=5, logprobs=None)]
    free = parse(CompletionRequest, b'{"prompt": "p", "n": 2}').samplings(max_tokens=5, logprobs=None)
    assert None not in [sampling.seed for sampling in free]
