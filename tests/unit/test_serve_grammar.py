"""Whatever a model would like to write, a constrained answer has the form that was asked for."""

import json
import random
import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from isotach.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from isotach.errors import UserError
from isotach.serve.grammar import Grammars
from isotach.serve.schemas import Form

pytest.importorskip("llguidance")

FORM: TypeAdapter[Form] = TypeAdapter(Form)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ä", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LARK = 'start: "yes" | "no" ("!" | "?")*'
TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": ByteTokenizer(),
    "bpe": train_bpe(['{"name": "the fox", "age": 12, "tags": ["ä"]} yes no 2026-11-22\n' * 20], 300),
}


def form(**fields: Any) -> Form:
    return FORM.validate_python(fields)


def schema(content: dict[str, Any]) -> Form:
    return form(type="json_schema", json_schema={"name": "x", "schema": content})


def written(tokenizer: Tokenizer, asked: Form, seed: int, *, most: int = 400) -> str:
    """An answer drawn uniformly from what is allowed, until it may only end."""
    follower = Grammars(tokenizer).follower(asked)
    assert follower is not None
    draw, ids = random.Random(seed), []
    for _ in range(most):
        mask = follower.mask()
        assert mask.shape == (tokenizer.vocab_size,)
        allowed = mask.nonzero().flatten().tolist()
        assert allowed
        assert not set(allowed) & (tokenizer.special - {tokenizer.eos})
        token = draw.choice(allowed)
        if token == tokenizer.eos:
            return tokenizer.decode(ids)
        follower.accept(token)
        ids.append(token)
    raise AssertionError(f"no end after {most} tokens: {tokenizer.decode(ids)!r}")


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_kept(tokenizer: Tokenizer, seed: int) -> None:
    text = written(tokenizer, schema(PERSON), seed)
    person = json.loads(text)
    assert set(person) == {"name", "age", "tags"}
    assert len(person["name"]) <= 8
    assert 0 <= person["age"] <= 150
    assert set(person["tags"]) <= {"ä", "b"}


@pytest.mark.parametrize("seed", range(3))
def test_json_is_spaced_as_python_spaces_it(seed: int) -> None:
    """So that nobody can write spaces for ever."""
    text = written(
        TOKENIZERS["bpe"], schema({**PERSON, "properties": {**PERSON["properties"], "name": {"const": "n"}}}), seed
    )
    assert text == json.dumps(json.loads(text), ensure_ascii=False)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_regular_expression_and_a_grammar_are_kept(tokenizer: Tokenizer) -> None:
    date = r"\d{4}-\d{2}-\d{2}"
    assert re.fullmatch(date, written(tokenizer, form(type="regex", regex=date), 1))
    assert re.fullmatch(r"yes|no[!?]*", written(tokenizer, form(type="grammar", grammar=LARK), 1))


def test_any_object_is_an_object() -> None:
    follower = Grammars(TOKENIZERS["bytes"]).follower(form(type="json_object"))
    assert follower is not None
    assert follower.mask().nonzero().flatten().tolist() == [ord("{")]


def test_text_needs_no_grammar() -> None:
    assert Grammars(TOKENIZERS["bytes"]).follower(form(type="text")) is None


def test_other_tokens_may_end_an_answer() -> None:
    """Such as the end of a turn."""
    tokenizer = TOKENIZERS["bpe"]
    follower = Grammars(tokenizer, ends=(5,)).follower(form(type="regex", regex="a?"))
    assert follower is not None
    assert {5, tokenizer.eos} < set(follower.mask().nonzero().flatten().tolist())


def test_answers_do_not_share_a_place() -> None:
    grammars = Grammars(TOKENIZERS["bytes"])
    first, second = (grammars.follower(form(type="regex", regex="ab")) for _ in range(2))
    assert first is not None
    assert second is not None
    first.accept(ord("a"))
    assert first.mask().nonzero().item() == ord("b")
    assert second.mask().nonzero().item() == ord("a")


@pytest.mark.parametrize(
    "asked",
    [
        schema({"type": "no such type"}),
        schema({"$ref": "https://example.com/x.json"}),
        schema({"uniqueItems": True, "type": "array"}),
        form(type="regex", regex="a(b"),
        form(type="grammar", grammar="start: missing"),
        form(type="grammar", grammar="\0"),
    ],
)
def test_what_cannot_be_followed_is_refused(asked: Form) -> None:
    with pytest.raises(UserError, match="response_format: expected"):
        Grammars(TOKENIZERS["bytes"]).follower(asked)


def test_what_becomes_too_complex_is_refused_on_the_way() -> None:
    follower = Grammars(TOKENIZERS["bytes"]).follower(form(type="regex", regex="((a{1,100}){1,100}){1,100}"))
    assert follower is not None
    follower.mask()
    with pytest.raises(UserError, match="too complex"):  # noqa: PT012  at which of them depends on the library's limits
        for _ in range(100):
            follower.accept(ord("a"))
            follower.mask()
