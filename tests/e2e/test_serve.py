"""The server as its clients see it: OpenAI's Python client against a real port, and states over HTTP."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from isotach.data.tokenizer import ByteTokenizer, train_bpe  # noqa: E402
from isotach.infer.generate import Session  # noqa: E402
from isotach.infer.sample import Sampling  # noqa: E402
from isotach.serve import tools  # noqa: E402
from tests.e2e.serving import KEYS, NAME, Served, model, reading_slowly, serving  # noqa: E402

BYTES = ByteTokenizer()
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, naïve world"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And now?"},
]
ASCII = {str(token): -100 for token in [*range(32), *range(127, 257)]}  # a random model writes text with this bias


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(served: Served, path: str, body: dict[str, Any], *, owner: str | None = None, status: int = 200) -> Any:
    with served.client(owner) as client:
        response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def get(served: Served, path: str, *, owner: str | None = None, status: int = 200) -> Any:
    with served.client(owner) as client:
        response = client.get(path)
    assert response.status_code == status, response.text
    return response.json()


def refused(served: Served, path: str, body: dict[str, Any], *, status: int = 400, owner: str | None = None) -> Any:
    error = post(served, path, body, status=status, owner=owner)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


# ---- OpenAI's client


def test_models(client: Any) -> None:
    (found,) = client.models.list().data
    assert found.id == NAME
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="expected tiny"):
        client.models.retrieve("gpt")


def test_an_answer_is_what_a_session_alone_writes(client: Any) -> None:
    settings = {"max_tokens": 20, "seed": 5, "temperature": 0.8, "top_p": 0.9}
    answer = client.chat.completions.create(model=NAME, messages=TALK, **settings)
    session = Session(model(), BYTES)
    session.read(
        "System:\nBe brief.\n\nUser:\nHello, naïve world\n\nAssistant:\nHi.\n\nUser:\nAnd now?\n\nAssistant:\n"
    )
    sampling = Sampling(**settings, stop=("\n\nUser:",))
    assert answer.choices[0].message.content == "".join(event.text for event in session.generate(sampling))
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(session) - answer.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint.startswith("isotach-")


def test_a_stream_says_the_same(client: Any) -> None:
    settings = {
        "model": NAME,
        "messages": TALK,
        "max_tokens": 20,
        "seed": 6,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in body if chunk.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        told = [token for part in own if part.logprobs for token in part.logprobs.content]
        assert [(token.token, token.bytes) for token in told] == [
            (token.token, token.bytes) for token in choice.logprobs.content
        ]
        assert [token.logprob for token in told] == pytest.approx(
            [t.logprob for t in choice.logprobs.content], abs=1e-9
        )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_a_stream_without_usage_has_none(client: Any) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=TALK, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_many_at_once_are_each_as_alone(served: Served) -> None:
    async def answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model=NAME, messages=TALK[: 2 + seed % 2], max_tokens=5 + seed, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(12)))

    got = asyncio.run(answers())
    for seed, text in enumerate(got):
        body = {"messages": TALK[: 2 + seed % 2], "max_tokens": 5 + seed, "seed": seed}
        assert post(served, "/v1/chat/completions", body)["choices"][0]["message"]["content"] == text


def test_log_probabilities_are_the_models(client: Any) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, max_tokens=6, logprobs=True, top_logprobs=3, temperature=0
    )
    for token in answer.choices[0].logprobs.content:
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
        assert token.logprob == best[0]  # at temperature 0 the likeliest is taken
        assert token.bytes == token.top_logprobs[0].bytes
    text = b"".join(bytes(token.bytes) for token in answer.choices[0].logprobs.content)
    assert text.decode("utf-8", "replace") == answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept(client: Any, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ä", "fox"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    settings = {"model": NAME, "messages": TALK, "response_format": form, "seed": 3, "max_tokens": 60}
    answer = client.chat.completions.create(**settings, stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    person = json.loads(text)
    assert person["name"] in ("ä", "fox")
    assert 0 <= person["age"] <= 99


def test_other_forms(served: Served) -> None:
    asked = {"messages": TALK, "max_tokens": 60, "seed": 1}
    for form, fits in (
        ({"type": "regex", "regex": r"\d{4}-\d\d"}, lambda text: text[4] == "-" and text.replace("-", "").isdigit()),
        ({"type": "grammar", "grammar": 'start: "yes" | "no"'}, lambda text: text in ("yes", "no")),
        ({"type": "text"}, lambda text: True),
    ):
        answer = post(served, "/v1/chat/completions", {**asked, "response_format": form})
        assert fits(answer["choices"][0]["message"]["content"])
    bad = {**asked, "response_format": {"type": "regex", "regex": "("}}
    assert "regular expression" in refused(served, "/v1/chat/completions", bad)["message"]


def test_tools_are_called(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Rom"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    settings = {"model": NAME, "tools": [tool], "seed": 3, "max_tokens": 90}
    talk: list[Any] = TALK[:2]
    answer = client.chat.completions.create(messages=talk, tool_choice="required", **settings).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Köln", "Rom")
    stream = client.chat.completions.create(messages=talk, tool_choice="required", stream=True, **settings)
    deltas = [chunk.choices[0] for chunk in stream]
    (streamed,) = [made for part in deltas for made in part.delta.tool_calls or []]
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert not any(part.delta.content for part in deltas)
    assert deltas[-1].finish_reason == "tool_calls"
    cut = client.chat.completions.create(messages=talk, tool_choice="required", **{**settings, "max_tokens": 5})
    assert (cut.choices[0].finish_reason, cut.choices[0].message.content) == ("length", '{"nam')
    # The call and what came of it go back as part of the conversation; what was read is skipped.
    result = {"role": "tool", "content": "sun", "tool_call_id": call.id}
    later = client.chat.completions.create(messages=[*talk, answer.message, result], tool_choice="none", **settings)
    assert later.usage.prompt_tokens_details.cached_tokens >= len(tools.spell("weather", call.function.arguments))
    free = client.chat.completions.create(messages=talk, logit_bias=ASCII | {"123": -100}, **settings)
    assert free.choices[0].message.tool_calls is None
    assert free.choices[0].message.content


def test_stop_strings_and_tokens_end_an_answer(client: Any) -> None:
    settings = {"model": NAME, "prompt": "abc", "max_tokens": 60, "seed": 2, "logit_bias": ASCII}
    whole = client.completions.create(**settings)
    text = whole.choices[0].text
    assert len(text) == 60
    assert whole.choices[0].finish_reason == "length"
    stopped = client.completions.create(**settings, stop=text[20:23])
    assert stopped.choices[0].text == text[: text.index(text[20:23])]
    assert stopped.choices[0].finish_reason == "stop"
    ended = client.completions.create(**settings, extra_body={"stop_token_ids": [ord(text[30])]})
    assert ended.choices[0].text == text[: text.index(text[30])]
    assert ended.choices[0].finish_reason == "stop"


def test_settings_reach_the_sampler(served: Served) -> None:
    asked = {"prompt": "abc", "max_tokens": 30, "seed": 2}

    def text(**more: Any) -> str:
        return post(served, "/v1/completions", {**asked, **more})["choices"][0]["text"]

    plain = text()
    assert text() == plain
    assert text(seed=3) != plain
    assert text(temperature=0) == text(temperature=0, seed=9) == text(top_k=1)
    assert text(logit_bias={"97": 100}) == "a" * 30
    assert len(set(text(logit_bias=ASCII, frequency_penalty=2, presence_penalty=2))) > 15
    for setting in ({"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 1.5}, {"top_k": 3}):
        assert text(**setting) == text(**setting)
    ended = post(served, "/v1/completions", {**asked, "logit_bias": {"256": 100}})["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    usage = post(served, "/v1/completions", {**asked, "logit_bias": {"256": 100}, "min_tokens": 4})["usage"]
    assert usage["completion_tokens"] == 5
    usage = post(served, "/v1/completions", {**asked, "logit_bias": {"256": 100}, "ignore_eos": True})["usage"]
    assert usage["completion_tokens"] == 30


def test_completions_of_several_prompts(client: Any) -> None:
    settings = {"model": NAME, "max_tokens": 5, "seed": 4}
    both = client.completions.create(prompt=["abc", "über"], n=2, **settings)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    ids = client.completions.create(prompt=[list(b"abc"), list("über".encode())], n=2, **settings)
    assert [choice.text for choice in ids.choices] == [choice.text for choice in both.choices]
    assert client.completions.create(prompt="über", **settings).choices[0].text == both.choices[2].text
    assert both.usage.prompt_tokens == 3 + 5
    assert both.usage.completion_tokens == 20


def test_echo_scores_the_prompt(client: Any) -> None:
    """What lm-eval reads: the log-probabilities of a prompt's tokens, and one token behind them."""
    prompt = list("naïve".encode())
    settings = {"model": NAME, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    scored = client.completions.create(prompt=prompt, **settings).choices[0]
    told = scored.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + 1
    assert told.tokens[:6] == ["n", "a", "bytes:\\xc3", "bytes:\\xaf", "v", "e"]
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    assert told.text_offset[:6] == [0, 1, 2, 2, 3, 4]
    assert scored.text.startswith("naïve")
    for top, logprob in zip(told.top_logprobs[1:], told.token_logprobs[1:], strict=True):
        assert max(top.values()) >= logprob
        assert logprob in top.values()
    # Each is what would have been reported had that token been written behind the ones before it.
    for place in (1, 3, 5):
        forced = client.completions.create(
            model=NAME, prompt=prompt[:place], max_tokens=1, logprobs=1, logit_bias={str(prompt[place]): 100}
        ).choices[0]
        assert forced.logprobs.token_logprobs[0] == pytest.approx(told.token_logprobs[place], abs=1e-9)
    only = client.completions.create(model=NAME, prompt=prompt, max_tokens=0, echo=True, logprobs=1, n=2)
    assert [choice.text for choice in only.choices] == ["naïve"] * 2
    assert only.choices[1].logprobs.token_logprobs[1:] == pytest.approx(told.token_logprobs[1:6], abs=1e-9)
    assert only.usage.completion_tokens == 0


def test_the_token_that_ends_a_text_is_scored_too(client: Any) -> None:
    """Whoever scores a prompt counts on one token behind it."""
    settings = {"model": NAME, "prompt": "abc", "max_tokens": 1, "echo": True, "logprobs": 1}
    scored = client.completions.create(**settings, logit_bias={"256": 100}).choices[0]
    assert scored.finish_reason == "stop"
    assert scored.text == "abc"
    assert scored.logprobs.tokens == ["a", "b", "c", "<|endoftext|>"]


def test_a_conversation_that_goes_on_skips_what_was_read(served: Served) -> None:
    """Of every earlier turn all tokens, also where an answer is no valid text and comes back spelled otherwise."""
    talk, skipped = [TALK[0]], []
    for turn in range(4):
        talk = [*talk, {"role": "user", "content": f"And {turn}?"}]
        answer = post(served, "/v1/chat/completions", {"messages": talk, "max_tokens": 12, "seed": turn})
        talk = [*talk, answer["choices"][0]["message"]]
        usage = answer["usage"]
        skipped.append((usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]))
    assert "\ufffd" in "".join(message["content"] for message in talk)  # otherwise this would show nothing
    for (cached, _), (_, before) in zip(skipped[1:], skipped, strict=False):
        assert cached >= before  # and the answer that came after `before`, but for its last token
    edited = [*talk[:3], {"role": "user", "content": "No: and one?"}]
    usage = post(served, "/v1/chat/completions", {"messages": edited, "max_tokens": 1})["usage"]
    kept = len(BYTES.encode("".join(message["content"] for message in talk[:3])))
    assert usage["prompt_tokens_details"]["cached_tokens"] >= kept


def test_errors_are_openais(client: Any, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=TALK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=TALK, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as audio:
        client.chat.completions.create(model=NAME, messages=TALK, audio={"voice": "x", "format": "wav"})
    assert audio.value.code == "unsupported_parameter"
    for path, body, param in (
        ("/v1/completions", {"prompt": [300]}, None),
        ("/v1/completions", {"prompt": ""}, None),
        ("/v1/completions", {"prompt": []}, None),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [300]}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10**8}, "max_tokens"),
        ("/v1/completions", {"prompt": ["a"] * 300}, "n"),
        ("/v1/completions", {"prompt": ["a", "b"], "session_id": "x"}, "session_id"),
        ("/detokenize", {"tokens": [257]}, None),
    ):
        assert refused(served, path, body)["param"] == param


def test_tokens(served: Served) -> None:
    assert post(served, "/tokenize", {"prompt": "naïve"})["tokens"] == list("naïve".encode())
    assert post(served, "/tokenize", {"prompt": "<|endoftext|>"})["tokens"] == [256]
    assert post(served, "/tokenize", {"prompt": "x", "return_token_strs": True})["token_strs"] == ["x"]
    talk = post(served, "/tokenize", {"messages": TALK})
    assert talk["count"] == len(talk["tokens"])
    assert post(served, "/detokenize", {"tokens": talk["tokens"]})["prompt"].startswith("System:\nBe brief.")
    info = get(served, "/tokenizer_info")
    assert info["eos_token"] == "<|endoftext|>"
    assert info["vocab_size"] == 257


def test_monitors(served: Served) -> None:
    assert get(served, "/health") == get(served, "/ready") == {"status": "ok"}
    with served.client() as client:
        text = client.get("/metrics").text
        post(served, "/v1/completions", {"prompt": "a", "max_tokens": 7})
        later = client.get("/metrics").text

    def value(text: str, name: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    assert value(later, "isotach_generation_tokens_total") - value(text, "isotach_generation_tokens_total") == 7
    first = "isotach_time_to_first_token_seconds_count"
    assert value(later, first) - value(text, first) == 1
    between = "isotach_inter_token_latency_seconds_count"
    assert value(later, between) - value(text, between) == 6
    for name in (
        "isotach_num_requests_running{", "isotach_num_requests_waiting{", "isotach_prompt_tokens_total{",
        "isotach_request_success_total{", 'isotach_state_bytes{model_name="tiny",where="cache"}',
        "isotach_state_cache_hits_total{", "isotach_state_cache_evictions_total{",
        'isotach_state_cache_misses_total{model_name="tiny",reason="cold"}', "isotach_e2e_request_latency_seconds_sum{",
    ):  # fmt: skip
        assert name in later


def test_the_description_is_complete(served: Served) -> None:
    document = get(served, "/openapi.json")
    text = json.dumps(document)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(document["components"]["schemas"])
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert {"messages", "temperature", "state", "session_id", "store"} <= set(chat["properties"])
    assert "/v1/states/{id}/fork" in document["paths"]


def test_the_page(served: Served) -> None:
    with served.client() as client:
        page = client.get("/")
        if page.status_code == 404:
            pytest.skip("no page yet")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert client.get("/../service.py").status_code == 404
        assert client.get("/%2e%2e/service.py").status_code == 404


# ---- states


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def heard(detail: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in detail["messages"]]


def test_behind_a_state_an_answer_is_what_it_is_behind_the_messages(served: Served) -> None:
    asked = {"max_tokens": 15, "seed": 3, "logprobs": True}
    whole = post(served, "/v1/chat/completions", {"messages": TALK, **asked})
    for count in range(1, 4):
        state = post(served, "/v1/states", {"messages": TALK[:count]})
        assert state["message_count"] == count
        rest = post(served, "/v1/chat/completions", {"messages": TALK[count:], "state": state["id"], **asked})
        assert texts(rest) == texts(whole)
        assert rest["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
        assert rest["usage"]["prompt_tokens_details"]["cached_tokens"] >= state["tokens"] - 1
    assert post(served, "/v1/chat/completions", {"messages": TALK[3:], "state": state["id"], **asked, "n": 2})[
        "choices"
    ]


def test_an_answer_can_be_kept_and_gone_on_with(served: Served) -> None:
    first = post(served, "/v1/chat/completions", {"messages": TALK[:2], "max_tokens": 9, "seed": 1, "store": True})
    state = first["choices"][0]["state"]
    assert state["title"] == "Hello, naïve world"
    detail = get(served, f"/v1/states/{state['id']}")
    assert heard(detail) == [*TALK[:2], first["choices"][0]["message"]]
    talk = [*TALK[:2], first["choices"][0]["message"], TALK[3]]
    asked = {"max_tokens": 9, "seed": 2, "store": True, "n": 2}
    stateless = post(served, "/v1/chat/completions", {"messages": talk, **asked})
    continued = post(served, "/v1/chat/completions", {"messages": TALK[3:], "state": state["id"], **asked})
    assert texts(stateless) == texts(continued)
    for choice in continued["choices"]:
        later = get(served, f"/v1/states/{choice['state']['id']}")
        assert heard(later) == [*talk, choice["message"]]
        assert later["parent"] == state["id"]


def test_a_conversation_forks_and_rewinds(served: Served) -> None:
    talk: list[dict[str, str]] = []
    state = None
    for turn in range(3):
        said = {"role": "user", "content": f"Turn {turn}"}
        more = {} if state is None else {"state": state["id"]}
        asked = {"messages": [said], "max_tokens": 8, "seed": turn, "store": True, **more}
        choice = post(served, "/v1/chat/completions", asked)["choices"][0]
        state, talk = choice["state"], [*talk, said, choice["message"]]
    assert state is not None
    copy = post(served, f"/v1/states/{state['id']}/fork", {"title": "another way"})
    assert copy["id"] != state["id"]
    assert (copy["parent"], copy["title"], copy["tokens"]) == (state["id"], "another way", state["tokens"])
    for count in range(1, 7):
        early = post(served, f"/v1/states/{state['id']}/fork", {"messages": count})
        assert heard(get(served, f"/v1/states/{early['id']}")) == talk[:count]
        asked = {"max_tokens": 8, "seed": 7, "messages": [{"role": "user", "content": "Anew"}]}
        got = post(served, "/v1/chat/completions", {**asked, "state": early["id"]})
        expected = post(served, "/v1/chat/completions", {**asked, "messages": [*talk[:count], *asked["messages"]]})
        assert texts(got) == texts(expected)
    # An answer is written again behind the state before it.
    before = post(served, f"/v1/states/{state['id']}/fork", {"messages": 5})
    again = post(served, "/v1/chat/completions", {"messages": [], "state": before["id"], "max_tokens": 8, "seed": 2})
    assert texts(again) == [talk[5]["content"]]
    assert refused(served, f"/v1/states/{state['id']}/fork", {"messages": 7})["param"] == "messages"


def test_a_state_says_where_its_messages_end(served: Served) -> None:
    """So that whoever is given it can go back to any place of it, also to before the first message."""
    text = "What was read before. "
    before = post(served, "/v1/states", {"prompt": text})
    for state, count in ((None, 0), (before["id"], len(text))):
        more = {} if state is None else {"state": state}
        kept = {"max_tokens": 8, "seed": 1, "store": True}
        choice = post(served, "/v1/chat/completions", {"messages": TALK[:2], **kept, **more})["choices"][0]
        choice = post(served, "/v1/chat/completions", {"messages": TALK[3:], **kept, "state": choice["state"]["id"]})[
            "choices"
        ][0]
        detail = get(served, f"/v1/states/{choice['state']['id']}")
        assert detail["before"] == count
        assert [message["role"] for message in detail["messages"]] == [
            "system",
            "user",
            "assistant",
            "user",
            "assistant",
        ]
        for place, message in enumerate(detail["messages"], 1):
            early = post(served, f"/v1/states/{detail['id']}/fork", {"messages": place})
            assert early["tokens"] == message["end"]
            assert get(served, f"/v1/states/{early['id']}")["before"] == count
        if count == 0:
            assert refused(served, f"/v1/states/{detail['id']}/fork", {"messages": 0})["param"] == "messages"
            continue
        first = post(served, f"/v1/states/{detail['id']}/fork", {"messages": 0})
        assert (first["tokens"], first["message_count"]) == (count, None)
        asked = {"messages": TALK[:2], **kept}
        assert texts(post(served, "/v1/chat/completions", {**asked, "state": first["id"]})) == texts(
            post(served, "/v1/chat/completions", {**asked, "state": before["id"]})
        )
    with served.client() as client:
        content = client.get(f"/v1/states/{detail['id']}/export?transcript=true").content
        arrived = client.post("/v1/states/import", content=content).json()
    again = get(served, f"/v1/states/{arrived['id']}")
    assert (again["before"], again["messages"]) == (detail["before"], detail["messages"])


def test_a_stream_says_how_far_a_long_prompt_is_read(served: Served, client: Any) -> None:
    body = {"prompt": "long " * 1000, "max_tokens": 2, "ignore_eos": True, "stream": True}
    with reading_slowly(0.2), served.client() as raw:
        lines = raw.post("/v1/completions", json=body).text.split("\n")
        told = [line.removeprefix(": progress ") for line in lines if line.startswith(": progress ")]
        assert len(told) >= 2
        shares = [tuple(map(int, line.split("/"))) for line in told]
        assert shares == sorted(shares)
        assert {total for _, total in shares} == {5000}
        assert 0 < shares[0][0] < shares[-1][0] < 5000
        assert lines.index(f": progress {told[-1]}") < next(
            n for n, line in enumerate(lines) if line.startswith("data")
        )
        # OpenAI's client passes over it.
        chunks = client.completions.create(model=NAME, prompt="another " * 600, max_tokens=2, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("length", "stop")


def test_text_is_read_into_a_state_in_pieces(served: Served) -> None:
    """A long file, then questions about it."""
    text = "The quick brown fox. " * 20
    state = post(served, "/v1/states", {"prompt": text[:100], "title": "fox.txt"})
    state = post(served, "/v1/states", {"prompt": text[100:], "state": state["id"], "title": "fox.txt"})
    assert state["tokens"] == len(text)
    assert state["message_count"] is None
    detail = get(served, f"/v1/states/{state['id']}")
    assert (detail["messages"], detail["title"]) == (None, "fox.txt")
    asked = {"max_tokens": 9, "seed": 1, "store": True}
    answer = post(served, "/v1/chat/completions", {"messages": [TALK[1]], "state": state["id"], **asked})
    plain = f"{text}\n\nUser:\nHello, naïve world\n\nAssistant:\n"
    same = post(served, "/v1/completions", {"prompt": plain, **asked, "stop": "\n\nUser:"})
    assert texts(answer) == [same["choices"][0]["text"]]
    kept = get(served, f"/v1/states/{answer['choices'][0]['state']['id']}")
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    more = post(served, "/v1/completions", {"prompt": "x", "state": state["id"], **asked})
    assert get(served, f"/v1/states/{more['choices'][0]['state']['id']}")["messages"] is None


def test_a_session_goes_on_by_its_name(served: Served) -> None:
    talk = []
    for turn in range(3):
        said = {"role": "user", "content": f"Turn {turn}"}
        asked = {"max_tokens": 8, "seed": turn}
        expected = post(served, "/v1/chat/completions", {"messages": [*talk, said], **asked})
        answer = post(served, "/v1/chat/completions", {"messages": [said], "session_id": "mine", **asked})
        assert texts(answer) == texts(expected)
        talk += [said, answer["choices"][0]["message"]]
        listed = get(served, "/v1/states?session=mine")["data"]
        assert [state["message_count"] for state in listed] == [len(talk)]  # the one before is gone
    other = post(served, "/v1/chat/completions", {"messages": [talk[0]], "session_id": "other", **asked})
    assert other["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]
    assert (
        refused(served, "/v1/chat/completions", {"messages": TALK, "session_id": "mine", "n": 2})["param"]
        == "session_id"
    )


def test_states_travel(served: Served, tmp_path: Path) -> None:
    kept = {"messages": TALK[:2], "max_tokens": 9, "seed": 1, "store": True}
    state = post(served, "/v1/chat/completions", kept)["choices"][0]["state"]
    asked = {"messages": TALK[3:], "max_tokens": 9, "seed": 2}
    expected = texts(post(served, "/v1/chat/completions", {**asked, "state": state["id"]}))
    with served.client() as client, serving(tmp_path) as elsewhere, elsewhere.client() as there:
        alone = client.get(f"/v1/states/{state['id']}/export")
        assert alone.headers["content-disposition"].endswith('.safetensors"')
        assert len(alone.content) == state["bytes"]
        bundle = client.get(f"/v1/states/{state['id']}/export?transcript=true")
        assert len(bundle.content) == int(bundle.headers["content-length"])
        for content, messages in ((alone.content, None), (bundle.content, 3)):
            arrived = there.post("/v1/states/import?title=moved", content=content).json()
            assert (arrived["title"], arrived["message_count"]) == ("moved", messages)
            assert (arrived["tokens"], arrived["bytes"]) == (state["tokens"], state["bytes"])
            if messages:
                got = there.post("/v1/chat/completions", json={**asked, "state": arrived["id"]}).json()
                assert texts(got) == expected
                back = there.get(f"/v1/states/{arrived['id']}/export?transcript=true")
                assert there.post("/v1/states/import", content=back.content).json()["message_count"] == messages


def test_states_are_listed_and_deleted(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        ids = [post(served, "/v1/states", {"prompt": f"text {number}"})["id"] for number in range(5)][::-1]
        page = get(served, "/v1/states?limit=2")
        assert ([state["id"] for state in page["data"]], page["has_more"]) == (ids[:2], True)
        rest = get(served, f"/v1/states?limit=3&after={ids[1]}")
        assert ([state["id"] for state in rest["data"]], rest["has_more"]) == (ids[2:], False)
        with served.client() as client:
            assert client.delete(f"/v1/states/{ids[0]}").json() == {"id": ids[0], "object": "state", "deleted": True}
            assert client.delete(f"/v1/states/{ids[0]}").status_code == 404
            assert client.get("/v1/states?limit=0").status_code == 400
            assert client.get("/v1/states?after=nobody").status_code == 400
        assert get(served, f"/v1/states/{ids[0]}", status=404)["error"]["code"] == "state_not_found"
        assert [state["id"] for state in get(served, "/v1/states")["data"]] == ids[1:]


def test_after_a_restart_everything_goes_on(tmp_path: Path) -> None:
    asked = {"messages": [TALK[3]], "max_tokens": 9, "seed": 2}
    with serving(tmp_path) as served:
        first = {"messages": TALK[:2], "max_tokens": 9, "seed": 1}
        state = post(served, "/v1/chat/completions", {**first, "store": True})["choices"][0]["state"]
        expected = texts(post(served, "/v1/chat/completions", {**asked, "state": state["id"]}))
        post(served, "/v1/chat/completions", {**first, "session_id": "mine"})
    with serving(tmp_path) as served:
        again = post(served, "/v1/chat/completions", {**asked, "state": state["id"]})
        assert texts(again) == expected
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= state["tokens"] - 1
        assert texts(post(served, "/v1/chat/completions", {**asked, "session_id": "mine"})) == expected
        usage = post(served, "/v1/chat/completions", {"messages": TALK[:2], "max_tokens": 1})["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0  # the prefix cache came back too


def test_keys_have_states_of_their_own(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True) as served:
        kept = {"messages": TALK[:2], "max_tokens": 9, "seed": 1, "store": True, "session_id": "mine"}
        state = post(served, "/v1/chat/completions", kept, owner="anna")["choices"][0]["state"]
        unknown = f"state_{'0' * 32}"

        def told(id: str, owner: str) -> list[str]:
            """What every door says of an id, but for the id."""
            errors = [
                get(served, f"/v1/states/{id}", owner=owner, status=404),
                get(served, f"/v1/states/{id}/export", owner=owner, status=404),
                post(served, f"/v1/states/{id}/fork", {}, owner=owner, status=404),
                post(served, f"/v1/states/{id}/fork", {"messages": 1}, owner=owner, status=404),
                post(served, "/v1/states", {"prompt": "x", "state": id}, owner=owner, status=404),
                post(served, "/v1/completions", {"prompt": "x", "state": id}, owner=owner, status=404),
                post(served, "/v1/chat/completions", {"messages": TALK, "state": id}, owner=owner, status=404),
            ]
            with served.client(owner) as client:
                errors.append(client.delete(f"/v1/states/{id}").json())
            return [json.dumps(error["error"]).replace(id, "") for error in errors]

        assert told(state["id"], "ben") == told(unknown, "anna") == told(unknown, "ben")
        assert get(served, "/v1/states", owner="ben")["data"] == []
        assert get(served, "/v1/states?session=mine", owner="ben")["data"] == []
        assert len(get(served, "/v1/states", owner="anna")["data"]) == 1
        # Nor can anybody see by the cache what others have read.
        for owner, skipped in (("ben", False), ("anna", True)):
            usage = post(served, "/v1/chat/completions", {"messages": TALK[:2], "max_tokens": 1}, owner=owner)["usage"]
            assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) is skipped
            assert usage["prompt_tokens_details"]["miss"] in (None, "cold")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS["ben"]).models.list().data


def test_a_vocabulary_of_words(tmp_path: Path) -> None:
    """Answers of such a model are seldom spelled as its tokenizer would; they are skipped all the same."""
    bpe = train_bpe(["User:\nthe quick brown fox\n\nAssistant:\nsays hello to the lazy dog\n\n" * 30], 300)
    with serving(tmp_path, tokenizer=bpe) as served:
        talk: list[dict[str, str]] = []
        previous = 0
        for turn in range(4):
            talk = [*talk, {"role": "user", "content": "the fox"}]
            answer = post(served, "/v1/chat/completions", {"messages": talk, "max_tokens": 20, "seed": turn})
            usage = answer["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= previous
            previous = usage["prompt_tokens"] + usage["completion_tokens"] - 2
            if answer["choices"][0]["finish_reason"] == "stop":
                previous = usage["prompt_tokens"]
            talk = [*talk, answer["choices"][0]["message"]]
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["the fox", "dog"]}}}
        answer = post(served, "/v1/chat/completions", {"messages": talk, "response_format": form})
        assert json.loads(texts(answer)[0]) in ("the fox", "dog")
