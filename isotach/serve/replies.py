"""Answers in the words of OpenAI's API, whole or as a stream of events.

A stream is `data: {json}` lines, ended by `data: [DONE]`; what goes wrong after it has begun is a last `data:
{"error": …}`. Comments, which clients pass over, keep the connection from looking dead: while a long prompt is read,
`: progress READ/TOTAL`.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, final

from isotach.data.tokenizer import TextStream, Tokenizer
from isotach.errors import UserError
from isotach.infer.answer import Event
from isotach.infer.sample import Drawn
from isotach.serve import tools
from isotach.serve.chat import special_names
from isotach.serve.objects import (
    AnswerMessage,
    ChatChoice,
    ChatLogprobs,
    Delta,
    FinishReason,
    State,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    UsageReport,
)
from isotach.serve.schemas import ApiError
from isotach.serve.writing import Choice, Group, Progress, Writing

LOWEST = -9999.0  # how OpenAI writes the logarithm of 0, which JSON has no number for
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class Form(ABC):
    """How one endpoint tells an answer."""

    kind: str  # of the whole object
    chunk_kind: str
    prefix: str  # of its id

    @abstractmethod
    def choice(self, answer: Choice, events: Sequence[Event]) -> ChatChoice | TextChoice:
        """A whole answer."""

    @abstractmethod
    def opening(self, answer: Choice) -> ChatChoice | TextChoice | None:
        """What a stream says before the first token."""

    @abstractmethod
    def delta(self, answer: Choice, event: Event) -> ChatChoice | TextChoice | None:
        """What one more token adds in a stream; None for nothing that can be seen."""


@final
class Reply:
    """All answers to one request.

    - keep: called with every finished answer; the state that it stored, None where nobody asked for that.
    """

    def __init__(
        self,
        writing: Writing,
        form: Form,
        *,
        id: str,
        model: str,
        fingerprint: str,
        include_usage: bool,
        keep: Callable[[Choice], Awaitable[State | None]],
    ) -> None:
        self._writing, self._form, self._include_usage, self._keep = writing, form, include_usage, keep
        self._head: dict[str, Any] = {
            "id": f"{form.prefix}-{id}",
            "object": form.kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """One JSON object."""
        events: dict[int, list[Event]] = {answer.index: [] for answer in self._writing.answers}
        async for item in self._writing.events():
            if isinstance(item, tuple):
                events[item[0].index].append(item[1])
        choices = []
        for answer in self._writing.answers:
            choices.append(await self._finished(answer, self._form.choice(answer, events[answer.index])))
        return {**self._head, "choices": choices, "usage": self._writing.usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Lines, as they come."""
        try:
            for answer in self._writing.answers:
                if (choice := self._form.opening(answer)) is not None:
                    yield self._line([choice])
            async for item in self._writing.events():
                if item is None:
                    yield KEEP_ALIVE
                    continue
                if isinstance(item, Progress):
                    yield f": progress {item.read}/{item.total}\n\n".encode()
                    continue
                answer, event = item
                if (choice := self._form.delta(answer, event)) is not None:
                    yield self._line([choice if event.finish is None else await self._finished(answer, choice)])
            if self._include_usage:
                yield self._line([], usage=self._writing.usage())
            yield DONE
        except ApiError as error:
            yield _data(error.body())
        except UserError as error:
            yield _data(ApiError.of(error).body())
        except Exception:
            yield _data(ApiError(500, "server: it failed; the fault is in its log", code="internal_error").body())
            raise

    async def _finished(self, answer: Choice, choice: ChatChoice | TextChoice) -> ChatChoice | TextChoice:
        if answer.sampling is not None and answer.sampling.seed is not None:
            choice["seed"] = answer.sampling.seed
        if (state := await self._keep(answer)) is not None:
            choice["state"] = state
        return choice

    def _line(self, choices: Sequence[ChatChoice | TextChoice], *, usage: UsageReport | None = None) -> bytes:
        last = {"usage": usage} if self._include_usage else {}
        return _data({**self._head, "object": self._form.chunk_kind, "choices": choices, **last})


@final
class ChatForm(Form):
    """/v1/chat/completions

    - calls: whether an answer may be the call of a tool. In a stream it comes at once, when it is complete.
    """

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, speller: "Speller", *, logprobs: bool, calls: bool) -> None:
        self._speller, self._logprobs, self._calls = speller, logprobs, calls

    def choice(self, answer: Choice, events: Sequence[Event]) -> ChatChoice:
        call = self._call(answer)
        message: AnswerMessage = {"role": "assistant", "content": answer.text}
        if call is not None:
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._speller.chat(answer.written(events)) if self._logprobs else None,
            "finish_reason": answer.finish if call is None else "tool_calls",
        }

    def opening(self, answer: Choice) -> ChatChoice:
        delta: Delta = {"role": "assistant", "content": ""}
        return {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, answer: Choice, event: Event) -> ChatChoice | None:
        delta: Delta = {"content": event.text} if event.text else {}
        finish: FinishReason | Literal["tool_calls"] | None = answer.finish if event.finish else None
        if self._calls and tools.begins_call(answer.text):
            delta = {}
            if event.finish and (call := self._call(answer)) is not None:
                delta, finish = {"tool_calls": [{**call, "index": 0}]}, "tool_calls"
            elif event.finish:
                delta = {"content": answer.text}
        if not (delta or event.finish or self._logprobs):
            return None
        return {
            "index": answer.index,
            "delta": delta,
            "logprobs": self._speller.chat(answer.written([event])) if self._logprobs else None,
            "finish_reason": finish,
        }

    def _call(self, answer: Choice) -> ToolCall | None:
        return tools.read(answer.text) if self._calls and answer.finish == "stop" else None


@final
class TextForm(Form):
    """/v1/completions

    - prompts: by the index of an answer, what it stands behind: the text, and the group.
    """

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        tokenizer: Tokenizer,
        speller: "Speller",
        prompts: Mapping[int, tuple[str, Group]],
        *,
        logprobs: bool,
        echo: bool,
    ) -> None:
        self._speller, self._prompts, self._logprobs, self._echo = speller, prompts, logprobs, echo
        self._writers = {}
        for index, (_, group) in prompts.items():
            tokens = group.request.tokens
            before = None if echo or not tokens else tokens[-1]
            self._writers[index] = TextLogprobWriter(tokenizer, speller, before=before)

    def choice(self, answer: Choice, events: Sequence[Event]) -> TextChoice:
        text, group = self._prompts[answer.index]
        echoed = group.prompt if self._echo and self._logprobs else ()
        return {
            "index": answer.index,
            "text": text + answer.text if self._echo else answer.text,
            "logprobs": self._written(answer, [*echoed, *events]),
            "finish_reason": answer.finish,
        }

    def opening(self, answer: Choice) -> None:
        return None

    def delta(self, answer: Choice, event: Event) -> TextChoice | None:
        if not (event.text or event.finish or self._logprobs):
            return None
        return {
            "index": answer.index,
            "text": event.text,
            "logprobs": self._written(answer, [event]),
            "finish_reason": answer.finish if event.finish else None,
        }

    # The token that ends the text is told too: what scores a prompt with it counts on one token behind the prompt.
    def _written(self, answer: Choice, drawn: Sequence[Event | Drawn]) -> TextLogprobs | None:
        return self._writers[answer.index].write(drawn) if self._logprobs else None


@final
class Speller:
    """Tokens as the API shows them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in special_names(tokenizer).items()}
        self._word = next(token for token in range(tokenizer.vocab_size) if token not in tokenizer.special)

    def bytes(self, token: int) -> bytes:
        if token in self._tokenizer.special:
            return self._names.get(token, f"<special {token}>").encode()
        return self._tokenizer.piece(token, self._word)

    def text(self, token: int) -> str:
        """Its text; part of a character is written "bytes:\\xe2", so that different tokens differ."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def chat(self, events: Sequence[Event]) -> ChatLogprobs:
        return {"content": [self._chat_token(event) for event in events]}

    def _chat_token(self, event: Event) -> TokenLogprob:
        top = [self._top(token, logprob) for token, logprob in event.top]
        return {**self._top(event.token, event.logprob), "top_logprobs": top}

    def _top(self, token: int, logprob: float | None) -> TopLogprob:
        return {"token": self.text(token), "logprob": _number(logprob), "bytes": list(self.bytes(token))}

    def tops(self, drawn: Event | Drawn) -> dict[str, float] | None:
        """The likeliest tokens and the one that is there, by their text; None where nothing is known of them."""
        if drawn.logprob is None:
            return None
        both = [*drawn.top, *([] if drawn.token in dict(drawn.top) else [(drawn.token, drawn.logprob)])]
        tops: dict[str, float] = {}
        for token, logprob in both:
            tops.setdefault(self.text(token), _number(logprob))
        return tops


@final
class TextLogprobWriter:
    """The logprobs of one text, token after token: each offset is the length of the text before."""

    def __init__(self, tokenizer: Tokenizer, speller: Speller, *, before: int | None) -> None:
        self._speller, self._stream, self._offset = speller, TextStream(tokenizer, before), 0

    def write(self, drawn: Sequence[Event | Drawn]) -> TextLogprobs:
        offsets = []
        for one in drawn:
            offsets.append(self._offset)
            self._offset += len(self._stream.push(one.token))
        return {
            "tokens": [self._speller.text(one.token) for one in drawn],
            "token_logprobs": [None if one.logprob is None else _number(one.logprob) for one in drawn],
            "top_logprobs": [self._speller.tops(one) for one in drawn],
            "text_offset": offsets,
        }


def _number(logprob: float | None) -> float:
    return LOWEST if logprob is None or logprob < LOWEST else logprob


def _data(content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
