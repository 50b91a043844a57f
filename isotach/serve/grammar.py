"""Structured output: answers that a JSON schema, a regular expression or a grammar allows, and no others.

The grammar is followed by llguidance: at every token it says which ones may come next. JSON is written as
`json.dumps` writes it, with one space after commas and colons and none elsewhere, so that no model can go on writing
spaces for ever.
"""

import importlib.util
import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError
from isotach.serve.schemas import Form, Grammar, JsonObject, JsonSchemaFormat, Regex, Text

if TYPE_CHECKING:
    import llguidance

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Follower:
    """How far one answer has followed its grammar (engine.Constraint)."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def mask(self) -> Bool[Tensor, " vocab"]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._vocab, bitorder="little").astype(bool))

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(
                f"response_format: it became too complex ({_brief(self._matcher.get_error())}); simplify it"
            )


class Grammars:
    """Grammars over one vocabulary.

    - ends: tokens that may end an answer where the grammar allows it, beside the end of text.
    """

    def __init__(self, tokenizer: Tokenizer, *, ends: tuple[int, ...] = ()) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec("llguidance") is not None

    def follower(self, form: Form) -> Follower | None:
        """One for every answer; None where any text will do. Building it may take a second for a large schema.

        Raises UserError where the form is not one, or cannot be followed.
        """
        if isinstance(form, Text):
            return None
        try:
            import llguidance
        except ImportError:
            raise UserError("response_format: needs llguidance; pip install 'isotach[serve]'") from None
        vocabulary = self._tokens()
        try:
            grammar = _grammar(form)
        except ValueError as error:
            raise UserError(
                f"response_format: expected {_kind(form)}, got another ({_brief(error)}); mend it"
            ) from None
        matcher = llguidance.LLMatcher(
            vocabulary, grammar, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False)
        )
        # The first mask builds most of what the others need. Here it keeps nobody waiting but who asks for it.
        matcher.compute_bitmask()
        if matcher.is_error():
            fault = _brief(matcher.get_error())
            raise UserError(f"response_format: expected {_kind(form)}, got another ({fault}); mend that part")
        return Follower(matcher, self._tokenizer.vocab_size)

    def _tokens(self) -> "llguidance.LLTokenizer":
        import llguidance

        with self._lock:
            if self._vocabulary is None:
                wrapped: Any = llguidance.TokenizerWrapper(_Pieces(self._tokenizer))
                self._vocabulary = llguidance.LLTokenizer(wrapped, eos_token=[self._tokenizer.eos, *self._ends])
            return self._vocabulary


class _Pieces:
    """A tokenizer as llguidance wants to see it: the bytes of every token."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos
        self.special_token_ids = sorted(tokenizer.special)
        # Any token may stand for what comes before; the first that has text does.
        before = next(token for token in range(tokenizer.vocab_size) if token not in tokenizer.special)
        self.tokens = [
            b"\xff<%d>" % token if token in tokenizer.special else tokenizer.piece(token, before)
            for token in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        ids: list[int] = self._tokenizer.encode(plain).tolist()
        return ids


def _grammar(form: Form) -> str:
    from llguidance import LLMatcher

    match form:
        case JsonObject():
            return LLMatcher.grammar_from_json_schema({"type": "object"}, SPACING)
        case JsonSchemaFormat():
            return LLMatcher.grammar_from_json_schema(json.dumps(form.json_schema.schema_), SPACING)
        case Regex():
            return LLMatcher.grammar_from_regex(form.regex)
        case Grammar():
            return LLMatcher.grammar_from_lark(form.grammar)
        case _:
            raise ValueError(f"no form {form.type}")


def _kind(form: Form) -> str:
    names = {"json_schema": "a JSON schema", "regex": "a regular expression", "grammar": "a Lark grammar"}
    return names.get(form.type, "a form")


def _brief(error: object) -> str:
    """The first line of llguidance's several."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:199]}…"
