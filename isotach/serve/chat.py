"""Conversations as tokens: a chat template, applied so that no message can forge a turn or blur its end.

    messages -> template -> text -> tokens, and the position where each message ends

The template is the model's own (`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`, beside its
`tokenizer.json`), or DEFAULT where it has none. Special tokens are read in what the template writes, and nowhere else:
a message that spells `<|im_end|>` is a message that spells it. Every message ends at a token boundary, so a
conversation that goes on has the tokens of the shorter one as its beginning, which is what a stored state can continue.
"""

import contextlib
import hashlib
import json
import re
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from isotach.data.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer
from isotach.errors import UserError
from isotach.serve.tools import spell

if TYPE_CHECKING:
    import jinja2

# A turn is a name, a colon, and the text below it, an empty line between turns: what a script or a transcript looks
# like, so a model trained on plain text can follow it. Answers end where the model itself begins the user's next turn.
DEFAULT = (
    "{% for message in messages %}{{ '' if loop.first else '\n\n' }}{{ message.role | capitalize }}:\n"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}{{ '\n\n' }}Assistant:\n{% endif %}"
)
DEFAULT_STOP = ("\n\nUser:",)
MEMORY = 4 << 20  # bytes in which the spelling of answers is remembered
ENTRY = 400  # bytes that remembering takes beside the four of every token

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """tokens: of the conversation, up to where the answer begins. ends: after how many of them each message ends; None
    for one that the template leaves out."""

    tokens: list[int]
    ends: tuple[int | None, ...]

    @property
    def checkpoints(self) -> tuple[int, ...]:
        return tuple(sorted({end for end in self.ends if end}))


class Template:
    """How a model wants conversations written.

    - stop: strings that end an answer. stop_token_ids: tokens that do, beside the tokenizer's end of text.
    - own: whether the model brought it. variables: special tokens that it writes by name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        stop_token_ids: Sequence[int] = (),
        who: str = "chat template",
    ) -> None:
        self.own = source is not None
        self.source = DEFAULT if source is None else source
        self.stop: tuple[str, ...] = () if self.own else DEFAULT_STOP
        self.stop_token_ids = tuple(stop_token_ids)
        self._who = who
        self._tokenizer = tokenizer
        self._special = special_names(tokenizer)
        self.variables = dict(variables or {})
        self._template = _compile(self.source, who)
        # Some templates trim messages; then they are trimmed before their ends are marked, not behind the marks.
        probe = self._render([{"role": role, "content": f" {role}\n"} for role in ("user", "assistant")])
        self._trimmed = {role for role in ("user", "assistant") if f" {role}\n" not in probe}

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, *, file: Path | None = None) -> "Template":
        """The template in a checkpoint folder, or the default one; or that of a file, which must then be there.

        UserError where what is there cannot be used.
        """
        settings, path = _json(folder / "tokenizer_config.json"), folder / "tokenizer_config.json"
        source = settings.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        jinja = file or folder / "chat_template.jinja"
        if (own := _text(jinja)) is not None:
            source, path = own, jinja
        elif file is not None:
            raise UserError(f"{file}: expected a Jinja template, found no file; check the path")
        if not isinstance(source, str | None):
            raise UserError(f"{path}: chat_template: expected a text, got {type(source).__name__}; mend or remove it")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        variables = {name: text for name in names if (text := _spelling(settings.get(name))) is not None}
        return cls(
            tokenizer, source, variables=variables, stop_token_ids=_ends(folder, tokenizer, variables), who=str(path)
        )

    def write(
        self,
        messages: Sequence[Message],
        *,
        before: Sequence[str] | None = None,
        answer: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        spelled: Callable[[str], Sequence[int] | None] = lambda text: None,
    ) -> Written:
        """The tokens of `messages`, and of how an answer begins; without `answer` they end where the last message does.

        - before: roles of the messages that were read already; only what comes behind them is written then.
        - tools: functions that may be called, as the API has them; for templates that speak of them.
        - spelled: the tokens that an answer was generated with, None where they are not known. The tokenizer's own
          spelling of the same text may be another one, and what a state has read is the tokens.

        Raises UserError for what the template refuses.
        """
        nonce = secrets.token_hex(8)
        old = [{"role": role, "content": "x"} for role in before or ()]
        marked = [self._marked(message, place, nonce) for place, message in enumerate([*old, *messages])]
        text = self._render(marked, tools=[self._literal(tool, nonce) for tool in tools] or None)
        if old:
            _, mark, text = text.partition(f"E{nonce}{len(old) - 1};")
            if not mark:
                raise UserError(f"{self._who}: it leaves out the last message, so nothing can be said behind that")
        tokens, ends = self._tokens(text, nonce, spelled)
        places = tuple(ends.get(place) for place in range(len(old), len(marked)))
        if answer:
            return Written(tokens, places)
        if places[-1] is None:
            raise UserError(f"{self._who}: it leaves out the last message, so no state can end there; leave it out too")
        return Written(tokens[: places[-1]], places)

    def _marked(self, message: Message, place: int, nonce: str) -> dict[str, Any]:
        """The message with marks in its content: before what is spelled like a special token, and at its end."""
        content, calls = message.get("content") or "", message.get("tool_calls") or ()
        if message["role"] in self._trimmed:
            content = content.strip()
        if not self.own:  # it does not speak of calls: to it they are what the answer said
            content += "".join(spell(**call["function"]) for call in calls)
        begin = f"S{nonce};" if message["role"] == "assistant" else ""
        marked = {**message, "content": f"{begin}{self._literal(content, nonce)}E{nonce}{place};"}
        if calls:
            marked["tool_calls"] = [self._literal(_parsed(call), nonce) for call in calls]
        return marked

    def _literal(self, value: Any, nonce: str) -> Any:
        """The same with a mark before everything that is spelled like a special token, however deep in it."""
        match value:
            case str() if self._special:
                return re.sub(_any_of(self._special), lambda found: f"L{nonce}{found[0]}", value)
            case dict():
                return {self._literal(key, nonce): self._literal(entry, nonce) for key, entry in value.items()}
            case list():
                return [self._literal(entry, nonce) for entry in value]
            case _:
                return value

    def _tokens(
        self, text: str, nonce: str, spelled: Callable[[str], Sequence[int] | None]
    ) -> tuple[list[int], dict[int, int]]:
        """The tokens of a rendered text, and after how many of them the message at each place ends."""
        names = _any_of(self._special) if self._special else r"(?!)"
        marks = re.compile(
            f"(?P<begin>S{nonce};)|E{nonce}(?P<end>\\d+);|L{nonce}(?P<text>{names})?|(?P<special>{names})"
        )
        tokens: list[int] = []
        ends: dict[int, int] = {}
        plain, at, answer = "", 0, False
        for mark in marks.finditer(text):
            plain, at = plain + text[at : mark.start()], mark.end()
            if mark.lastgroup in (None, "text"):
                plain += mark["text"] or ""
                continue
            ids = spelled(plain) if answer and mark["end"] else None
            tokens += self._tokenizer.encode(plain).tolist() if ids is None else ids
            plain, answer = "", mark["begin"] is not None
            if mark["end"]:
                ends[int(mark["end"])] = len(tokens)
            elif mark["special"]:
                tokens.append(self._special[mark["special"]])
        tokens += self._tokenizer.encode(plain + text[at:]).tolist()
        return tokens, ends

    def _render(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> str:
        import jinja2

        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=True, **self.variables)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise UserError(
                f"messages: this model's chat template refuses them ({error}); change their order"
            ) from None


class Answers:
    """The tokens of answers whose text the tokenizer would spell otherwise, by owner: the latest, in `room` bytes.

    A client sends a conversation back as text. Where an answer's text has two spellings, that of the tokenizer is not
    what the model wrote and its state has read; with this, the state still fits.
    """

    def __init__(self, tokenizer: Tokenizer, *, room: int = MEMORY) -> None:
        self._tokenizer = tokenizer
        self._room = room
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def remember(self, owner: str, text: str, ids: list[int]) -> None:
        if not ids or self._tokenizer.encode(text).tolist() == ids:
            return
        key = self._key(owner, text)
        with self._lock:
            self._drop(key)
            self._ids[key] = array("I", ids)
            self._size += ENTRY + 4 * len(ids)
            while self._size > self._room:
                self._drop(next(iter(self._ids)))

    def find(self, owner: str, text: str) -> list[int] | None:
        key = self._key(owner, text)
        with self._lock:
            if key not in self._ids:
                return None
            self._ids.move_to_end(key)
            return self._ids[key].tolist()

    def _drop(self, key: bytes) -> None:
        if key in self._ids:
            self._size -= ENTRY + 4 * len(self._ids.pop(key))

    @staticmethod
    def _key(owner: str, text: str) -> bytes:
        return hashlib.sha256(f"{owner}\n{text}".encode()).digest()


def special_names(tokenizer: Tokenizer) -> dict[str, int]:
    """How special tokens are spelled in templates, and their ids."""
    if isinstance(tokenizer, ByteTokenizer):
        return {END_OF_TEXT: tokenizer.eos}
    added = tokenizer.definition.get("added_tokens") or ()
    return {entry["content"]: entry["id"] for entry in added if entry["id"] in tokenizer.special}


def _compile(source: str, who: str) -> "jinja2.Template":
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("serve: chat templates need jinja2; pip install 'isotach[serve]'") from None

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], keep_trailing_newline=True
    )
    world.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False, **settings)
    world.globals["raise_exception"] = refuse
    world.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return world.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{who}: expected a Jinja template, got something else ({error}); mend or remove it") from None


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as templates expect them: parsed, where they are JSON."""
    function = dict(call["function"])
    with contextlib.suppress(ValueError, RecursionError):
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}


def _any_of(names: Mapping[str, int]) -> str:
    """A pattern of the names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))


def _ends(folder: Path, tokenizer: Tokenizer, variables: Mapping[str, str]) -> list[int]:
    """Tokens that end an answer, beside the tokenizer's end of text: what the model's files call so."""
    path = folder / "generation_config.json"
    ids = _json(path).get("eos_token_id") or []
    ids = ids if isinstance(ids, list) else [ids]
    if wrong := [token for token in ids if not isinstance(token, int) or not 0 <= token < tokenizer.vocab_size]:
        raise UserError(
            f"{path}: eos_token_id: expected ids below {tokenizer.vocab_size}, got {wrong[0]}; mend or remove it"
        )
    named = special_names(tokenizer).get(variables.get("eos_token", ""))
    return sorted({*ids, *([] if named is None else [named])} - {tokenizer.eos})


def _text(path: Path) -> str | None:
    """The content of a file; None where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected UTF-8 text, got something else ({error}); mend or remove it") from None


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    try:
        data = json.loads(_text(path) or "{}")
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got something else ({error}); mend or remove it") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}; mend or remove it")
    return data


def _spelling(token: Any) -> str | None:
    """A special token of tokenizer_config.json: its text, or a table that has it as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
