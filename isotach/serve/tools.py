"""Calls of functions by any model, whether it was trained for them or not.

A call is written as one JSON object, {"name": …, "arguments": …}, and a grammar sees to its form: where a call is
required nothing else can be written, and where it is left to the model (tool_choice "auto") an answer that begins with
a brace is a call and any other one is text. Forms of their own that some models were trained on are not read: they
come as text.
"""

import json
import re
import secrets
from collections.abc import Sequence

from isotach.serve.grammar import SPACING
from isotach.serve.objects import ToolCall
from isotach.serve.schemas import ChatRequest, Form, Grammar, JsonSchema, JsonSchemaFormat, NamedTool, Tool

CALL = re.compile(r'\{"name": "([\w-]+)", "arguments": (.*)\}', re.DOTALL)
BRACE = "{"


def form(body: ChatRequest) -> Form:
    """The form that a request's answers must have, for the sake of its tools or by itself."""
    if not body.tools or body.tool_choice == "none":
        return body.response_format
    chosen = body.tool_choice
    if isinstance(chosen, NamedTool):
        tools: Sequence[Tool] = [tool for tool in body.tools if tool.function.name == chosen.function.name]
    else:
        tools = body.tools
    schema = {"anyOf": [_schema(tool) for tool in tools], "x-guidance": SPACING}
    if chosen == "auto":
        lark = f"start: call | TEXT\ncall: %json {json.dumps(schema)}\nTEXT: /([^{BRACE}](?s:.)*)?/"
        return Grammar(type="grammar", grammar=lark)
    return JsonSchemaFormat(type="json_schema", json_schema=JsonSchema(schema=schema))


def spell(name: str, arguments: str) -> str:
    """A call as an answer spells it, from the JSON text of its arguments."""
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def begins_call(text: str) -> bool:
    return text.startswith(BRACE)


def read(text: str) -> ToolCall | None:
    """The call that an answer is; None for another answer, and for a call that was cut off."""
    found = CALL.fullmatch(text)
    if found is None:
        return None
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": found[1], "arguments": found[2]},
    }


def _schema(tool: Tool) -> dict[str, object]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
