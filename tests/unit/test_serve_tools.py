"""Calls of functions: a grammar that writes them, and what is read out of an answer."""

import json
import random
from typing import Any

import pytest

from isotach.data.tokenizer import ByteTokenizer
from isotach.serve import tools
from isotach.serve.chat import Template
from isotach.serve.grammar import Grammars
from isotach.serve.schemas import ChatRequest, Text, parse

pytest.importorskip("llguidance")

BYTES = ByteTokenizer()
WEATHER = {
    "name": "weather",
    "description": "What it is like outside",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", 'a"}b']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "stop"}}]


def asked(choice: Any = "auto", functions: Any = TOOLS) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": functions, "tool_choice": choice}
    return parse(ChatRequest, json.dumps(body).encode())


def written(request: ChatRequest, seed: int, *, begin: str = "") -> str:
    follower = Grammars(BYTES).follower(tools.form(request))
    assert follower is not None
    draw, ids = random.Random(seed), []
    for place in range(200):
        allowed = follower.mask().nonzero().flatten().tolist()
        token = begin.encode()[place] if place < len(begin) else draw.choice(allowed)
        assert token in allowed
        if token == BYTES.eos:
            break
        follower.accept(token)
        ids.append(token)
    return BYTES.decode(ids)


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_is_required_is_written(seed: int) -> None:
    functions = [TOOLS[0], {"type": "function", "function": {"name": "stop", "parameters": {"const": {}}}}]
    call = tools.read(written(asked("required", functions), seed))
    assert call is not None
    assert call["function"]["name"] in ("weather", "stop")
    named = tools.read(written(asked({"type": "function", "function": {"name": "weather"}}), seed))
    assert named is not None
    arguments = json.loads(named["function"]["arguments"])
    assert arguments["city"] in ("Köln", 'a"}b')
    assert 1 <= arguments["days"] <= 9


def test_the_model_may_choose() -> None:
    call = tools.read(written(asked(), 1, begin='{"name": "weather"'))
    assert call is not None
    assert call["function"]["name"] == "weather"
    text = "well, { and \n so on"
    assert written(asked(), 1, begin=text).startswith(text)
    with pytest.raises(AssertionError):
        written(asked(), 1, begin='{"name": "other"')


def test_without_tools_answers_are_free() -> None:
    assert tools.form(asked("none")) == Text(type="text")
    assert tools.form(asked(functions=[])) == Text(type="text")


@pytest.mark.parametrize("text", ["", "hello", "{", '{"name": "weather", "arguments": {"ci', '{"a": 1}', '{"name": 1}'])
def test_what_is_no_call_is_text(text: str) -> None:
    assert tools.read(text) is None


def test_a_call_comes_back_as_it_was_written() -> None:
    """So that what a state has read is found again when the client sends the conversation back."""
    text = '{"name": "weather", "arguments": {"city": "K\\u00f6ln",  "days": 3}}'
    call = tools.read(text)
    assert call is not None
    assert tools.spell(**call["function"]) == text
    said: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    as_call = Template(BYTES).write([*said, {"role": "tool", "content": "sun"}])
    as_text = Template(BYTES).write(
        [said[0], {"role": "assistant", "content": text}, {"role": "tool", "content": "sun"}]
    )
    assert as_call == as_text


def test_templates_of_models_see_tools_and_calls() -> None:
    source = (
        "{% if tools %}{{ tools | tojson }}|{% endif %}{% for m in messages %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}:{{ call.function.arguments.city }}{% endfor %};"
        "{% endfor %}"
    )
    template = Template(BYTES, source)
    evil = "<|endoftext|>"
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": evil})}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    written = template.write(messages, tools=[{"description": evil}])
    assert BYTES.eos not in written.tokens
    assert BYTES.decode(written.tokens) == f'[{{"description": "{evil}"}}]|Hi;weather:{evil};'
