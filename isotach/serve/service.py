"""What the server does, apart from HTTP: requests of the API in, replies and states out."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from isotach.data.tokenizer import ByteTokenizer
from isotach.infer.answer import Constraint
from isotach.infer.generate import encode
from isotach.infer.sample import Sampling
from isotach.infer.snapshot import Snapshot
from isotach.serve import tools
from isotach.serve.chat import Answers, Template, Written, special_names
from isotach.serve.conversations import Basis, Conversations, Said, said
from isotach.serve.engine import Engine, Request
from isotach.serve.grammar import Grammars
from isotach.serve.limits import Call, Keys, Limits
from isotach.serve.metrics import Metrics
from isotach.serve.objects import Detokenized, Model, State, TokenizerInfo, Tokens
from isotach.serve.replies import ChatForm, Form, Reply, Speller, TextForm
from isotach.serve.schemas import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ForkRequest,
    Generation,
    StateRequest,
    TokenizeRequest,
)
from isotach.serve.schemas import Form as AnswerForm
from isotach.serve.states import StateStore
from isotach.serve.writing import Choice, Group, Writing, finished, submitted


@dataclass(frozen=True)
class Settings:
    """What a server has beside its engine.

    - name: of the model, in the API. hosts: see `limits.Gate`. log_text: whether prompts and answers are logged.
    """

    name: str
    template: Template
    store: StateStore
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    hosts: frozenset[str] | None = None
    log_text: bool = False


class Service:
    """One model, its states, and everybody who asks. Methods raise ApiError, or UserError for what the engine refuses
    (400); they belong to the event loop."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings, self.limits = engine, settings, settings.limits
        self.metrics = Metrics(engine.stats, model=settings.name)
        self.conversations = Conversations(settings.store, model=settings.name)
        self._template = settings.template
        self._tokenizer = engine.tokenizer
        self._grammars = Grammars(engine.tokenizer, ends=settings.template.stop_token_ids)
        self._answers = Answers(engine.tokenizer)
        self._speller = Speller(engine.tokenizer)
        self._began = int(time.time())

    # ---- completions

    async def chat(self, call: Call, body: ChatRequest) -> Reply:
        basis = await self._basis(call, body)
        messages = [message.plain() for message in body.messages]
        described = [tool.model_dump() for tool in body.tools] if body.tool_choice != "none" else []
        write = partial(self._template.write, messages, before=basis.roles, tools=described)
        written = await asyncio.to_thread(write, spelled=partial(self._answers.find, call.owner))
        samplings = self._samplings(
            body,
            max_tokens=body.limit or min(self.limits.default_answer, self.limits.answer),
            logprobs=body.top_logprobs if body.logprobs else None,
            stop=self._template.stop,
            stop_token_ids=() if body.ignore_eos else self._template.stop_token_ids,
        )
        request = Request(written.tokens, state=basis.snapshot, checkpoints=written.checkpoints, owner=call.owner)
        (group,) = await self._groups(body, [request], samplings, form=tools.form(body), param="messages")
        form = ChatForm(self._speller, logprobs=body.logprobs, calls=bool(described))
        self._log_text(call, "messages", messages)

        async def keep(answer: Choice) -> State | None:
            """Remember how the answer is spelled, and store the state where that was asked for."""
            self._log_text(call, "answers", [answer.text])
            snapshot = answer.snapshot()
            ids = answer.tokens[: max(0, snapshot.tokens - len(basis) - len(written.tokens))]
            await asyncio.to_thread(self._answers.remember, call.owner, answer.text, ids)
            if not (body.store or body.session_id):
                return None
            told = said(messages, written.ends, before=len(basis))
            told.append(Said(role="assistant", content=answer.text, end=snapshot.tokens))
            return await self._store(call, basis, snapshot, [*written.tokens, *ids], messages=told)

        return await self._reply(call, body, [group], form, keep)

    async def complete(self, call: Call, body: CompletionRequest) -> Reply:
        basis = await self._basis(call, body)
        prompts = body.prompts()
        ids = [await asyncio.to_thread(encode, self._tokenizer, prompt) for prompt in prompts]
        logprobs = body.logprobs if body.echo else None
        requests = [
            Request(row.tolist(), state=basis.snapshot, owner=call.owner, prompt_logprobs=logprobs) for row in ids
        ]
        samplings = self._samplings(body, max_tokens=max(1, body.max_tokens), logprobs=body.logprobs)
        groups = await self._groups(
            body, requests, samplings if body.max_tokens else [], form=body.response_format, param="prompt"
        )
        texts = [prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt) for prompt in prompts]
        behind = {
            answer.index: (text, group) for text, group in zip(texts, groups, strict=True) for answer in group.answers
        }
        wanted = body.logprobs is not None
        form = TextForm(self._tokenizer, self._speller, behind, logprobs=wanted, echo=body.echo)
        self._log_text(call, "prompts", texts)

        async def keep(answer: Choice) -> State | None:
            self._log_text(call, "answers", [answer.text])
            if not (body.store or body.session_id):
                return None
            tokens = [*behind[answer.index][1].request.tokens, *answer.tokens]
            return await self._store(call, basis, answer.snapshot(), tokens, messages=None)

        return await self._reply(call, body, groups, form, keep)

    def _samplings(
        self,
        body: Generation,
        *,
        max_tokens: int,
        logprobs: int | None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> list[Sampling]:
        if max_tokens > self.limits.answer:
            message = f"max_tokens: expected at most {self.limits.answer}, got {max_tokens}; ask for fewer"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        for name, ids in (("logit_bias", map(int, body.logit_bias)), ("stop_token_ids", body.stop_token_ids)):
            if (wrong := next((token for token in ids if token >= self._tokenizer.vocab_size), None)) is not None:
                message = f"{name}: expected token ids below {self._tokenizer.vocab_size}, got {wrong}; see /tokenize"
                raise ApiError(400, message, param=name, code="invalid_value")
        return body.samplings(max_tokens=max_tokens, logprobs=logprobs, stop=stop, stop_token_ids=stop_token_ids)

    async def _groups(
        self,
        body: Generation,
        requests: Sequence[Request],
        samplings: Sequence[Sampling],
        *,
        form: AnswerForm,
        param: str,
    ) -> list[Group]:
        """One per prompt; with no samplings they only read."""
        count = len(requests) * body.n
        if count > self.limits.answers:
            message = f"n: expected at most {self.limits.answers} answers in all, got {count}; ask for fewer"
            raise ApiError(400, message, param="n", code="invalid_value")
        if body.session_id is not None and count > 1:
            message = "session_id: expected it with one prompt and n = 1; a session goes on in one way"
            raise ApiError(400, message, param="session_id", code="invalid_value")
        groups = []
        for place, request in enumerate(requests):
            self._check_length(request, param=param)
            answers = []
            for number in range(body.n):
                follower: Constraint | None = await asyncio.to_thread(self._grammars.follower, form)
                sampling = samplings[number] if samplings else None
                answers.append(Choice(place * body.n + number, sampling, follower if samplings else None))
            groups.append(Group(request, answers))
        return groups

    async def _reply(
        self,
        call: Call,
        body: Generation,
        groups: list[Group],
        form: Form,
        keep: Callable[[Choice], Awaitable[State | None]],
    ) -> Reply:
        writing = Writing(self.engine, call, groups, limits=self.limits, metrics=self.metrics)
        await writing.begin()
        call.facts |= {"stream": body.stream, "n": body.n}
        return Reply(
            writing,
            form,
            id=call.id,
            model=self.settings.name,
            fingerprint=self.fingerprint,
            include_usage=body.stream_options.include_usage,
            keep=keep,
        )

    # ---- states

    async def create(self, call: Call, body: StateRequest) -> State:
        basis = await self._basis(call, body)
        told: list[Said] | None = None
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            write = partial(self._template.write, messages, before=basis.roles, answer=False)
            written: Written = await asyncio.to_thread(write, spelled=partial(self._answers.find, call.owner))
            tokens, checkpoints = written.tokens, written.checkpoints
            told = said(messages, written.ends, before=len(basis))
        else:
            row = await asyncio.to_thread(encode, self._tokenizer, body.prompt or "")
            tokens, checkpoints = row.tolist(), ()
        request = Request(tokens, state=basis.snapshot, checkpoints=checkpoints, owner=call.owner)
        return await self._read(call, basis, request, told, title=body.title)

    async def fork(self, call: Call, id: str, body: ForkRequest) -> State:
        if body.messages is None:
            return await asyncio.to_thread(self.conversations.fork, call.owner, id, title=body.title)
        basis, tokens, told = await asyncio.to_thread(self.conversations.rewound, call.owner, id, body.messages)
        ends = tuple(message.end for message in told or () if message.end is not None)
        request = Request(tokens.tolist(), checkpoints=ends, owner=call.owner)
        return await self._read(call, basis, request, told, title=body.title)

    async def _read(
        self, call: Call, basis: Basis, request: Request, told: Sequence[Said] | None, *, title: str | None
    ) -> State:
        """Read behind `basis` and store the state."""
        self._check_length(request, param="prompt" if told is None else "messages")
        ticket = await submitted(self.engine, request)
        call.after.append(ticket.cancel)
        try:
            async with asyncio.timeout(call.began + self.limits.timeout - time.monotonic()):
                snapshot = await finished(ticket)
        except TimeoutError:
            message = f"timeout: expected to be done within {self.limits.timeout:g} seconds; read less at once"
            raise ApiError(504, message, code="timeout") from None
        call.facts |= {"prompt_tokens": ticket.usage.prompt_tokens, "cached_tokens": ticket.usage.cached_tokens}
        return await self._store(call, basis, snapshot, request.tokens, messages=told, title=title)

    async def _store(
        self,
        call: Call,
        basis: Basis,
        snapshot: Snapshot,
        tokens: Sequence[int],
        *,
        messages: Sequence[Said] | None,
        title: str | None = None,
    ) -> State:
        """Store what came of a request; whose client leaves meanwhile will never know its id, so it is deleted again,
        but for a session's, which has a name.
        """
        keep = partial(self.conversations.keep, call.owner, basis, snapshot, tokens, messages=messages, title=title)
        storing = asyncio.ensure_future(asyncio.to_thread(keep))
        try:
            return await asyncio.shield(storing)
        except asyncio.CancelledError:
            if basis.session is None:
                storing.add_done_callback(partial(self._forget, call.owner))
            raise

    def _forget(self, owner: str, storing: "asyncio.Future[State]") -> None:
        if storing.cancelled() or storing.exception() is not None:
            return
        delete = partial(self.conversations.store.delete, owner, storing.result()["id"])
        asyncio.get_running_loop().run_in_executor(None, delete)

    async def _basis(self, call: Call, body: Generation | StateRequest) -> Basis:
        """What the request continues. A session is this request's until it is over."""
        if body.model is not None and body.model != self.settings.name:
            message = f"model: expected {self.settings.name}, got {body.model[:80]!r}; see /v1/models"
            raise ApiError(404, message, param="model", code="model_not_found")
        if body.session_id is not None:
            self.conversations.hold(call.owner, body.session_id)
            call.after.append(partial(self.conversations.release, call.owner, body.session_id))
        if body.state is None and body.session_id is None:
            return Basis()
        basis = partial(self.conversations.basis, state=body.state, session=body.session_id)
        return await asyncio.to_thread(basis, call.owner)

    def _log_text(self, call: Call, name: str, texts: Sequence[Any]) -> None:
        if self.settings.log_text:
            call.facts.setdefault(name, []).extend(texts)

    def _check_length(self, request: Request, *, param: str) -> None:
        total = len(request.tokens) + (0 if request.state is None else request.state.tokens)
        if total > self.limits.prompt:
            message = f"{param}: expected at most {self.limits.prompt:,} tokens, got {total:,}; send less"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    # ---- what there is

    @property
    def fingerprint(self) -> str:
        return f"isotach-{self.engine.weights[:16]}"

    def model(self) -> Model:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._began,
            "owned_by": "isotach",
            "max_model_len": self.limits.prompt,
            "state_bytes": self.engine.decoder.state_bytes(1),
            "chat_template": "own" if self._template.own else "default",
            "structured_output": self._grammars.available(),
        }

    async def tokenize(self, body: TokenizeRequest) -> Tokens:
        """A text that is the name of a special token and nothing else stands for it: so clients ask for its id."""
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            ids = (await asyncio.to_thread(self._template.write, messages)).tokens
        elif (special := special_names(self._tokenizer).get(body.prompt or "")) is not None:
            ids = [special]
        else:
            ids = (await asyncio.to_thread(self._tokenizer.encode, body.prompt or "")).tolist()
        reply: Tokens = {"tokens": ids, "count": len(ids), "max_model_len": self.limits.prompt}
        if body.return_token_strs:
            reply["token_strs"] = [self._speller.text(token) for token in ids]
        return reply

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        ids = encode(self._tokenizer, body.tokens)
        return {"prompt": await asyncio.to_thread(self._tokenizer.decode, ids)}

    def tokenizer_info(self) -> TokenizerInfo:
        names = {token: name for name, token in special_names(self._tokenizer).items()}
        return {
            "tokenizer_class": "bytes" if isinstance(self._tokenizer, ByteTokenizer) else "tokenizers",
            "vocab_size": self._tokenizer.vocab_size,
            "bos_token": self._template.variables.get("bos_token"),
            "eos_token": names.get(self._tokenizer.eos, ""),
            "pad_token": self._template.variables.get("pad_token"),
            "chat_template": self._template.source,
            "fingerprint": self._tokenizer.fingerprint,
        }
