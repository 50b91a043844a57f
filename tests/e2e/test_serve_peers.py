"""Programs that know OpenAI's API and nothing of this server: lm-eval, and schemathesis with our own description."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from isotach.data.tokenizer import ByteTokenizer
from isotach.infer.calls import step
from tests.e2e.serving import NAME, Served, model, serving, settled

pytestmark = pytest.mark.slow


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, answer=64, default_answer=16, prompt=4096, body=100_000, upload=100_000) as served:
        yield served


def scored(context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether each of its tokens is the likeliest: read token by token."""
    decoder, tokenizer = model(), ByteTokenizer()
    before, ids = tokenizer.encode(context).tolist(), tokenizer.encode(continuation).tolist()
    state, total, greedy = None, 0.0, True
    for place, token in enumerate([*before, *ids[:-1]]):
        logits, state = step(decoder, [token], state)
        follows = [*before, *ids][place + 1]
        if place + 1 >= len(before):
            total += float(logits[0].log_softmax(-1)[follows])
            greedy = greedy and int(logits[0].argmax()) == follows
    return total, greedy


@pytest.mark.filterwarnings("ignore")  # theirs
def test_lm_eval_scores_what_the_model_scores(served: Served) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    peer = LocalCompletionsAPI(base_url=f"{served.url}/v1/completions", model=NAME, batch_size=2, num_concurrent=1)
    assert peer.tokenizer_backend == "remote"
    assert peer.eot_token_id == 256
    pairs = [("The quick brown", " fox"), ("naïve", " – ä"), ("a", "b"), ("x" * 60, "yz")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)
    ]
    for got, pair in zip(peer.loglikelihood(requests), pairs, strict=True):
        expected = scored(*pair)
        assert got[0] == pytest.approx(expected[0], abs=1e-6)
        assert got[1] == expected[1]
    until = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0.0}
    texts = peer.generate_until([Instance(request_type="generate_until", doc={}, arguments=("The fox", until), idx=0)])
    assert len(texts) == 1
    assert isinstance(texts[0], str)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_nothing_that_the_description_allows_breaks_the_server(served: Served) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=40, phases=[Phase.generate], **unhurried)
        def one(case: "schemathesis.Case") -> None:
            nonlocal count
            count += 1
            case.call_and_validate(checks=checks, timeout=60)

        one()
    assert count > 300
    assert settled(served.engine)
    with served.client() as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
