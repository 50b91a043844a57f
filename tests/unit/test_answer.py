"""What may come next and what ends a text, against the documented rules, one token at a time."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotach.errors import UserError
from isotach.infer.answer import Answer, Event, check_sampling
from isotach.infer.sample import Drawn, Sampling, draw
from tests.unit.serving import BYTES

EOS = BYTES.eos


def told(answer: Answer, *tokens: int) -> list[Event]:
    """The events of these tokens, as if they were drawn."""
    return [answer.event(Drawn(token, None, ())) for token in tokens]


@given(
    written=st.lists(st.integers(97, 100), max_size=8),
    presence=st.sampled_from([0.0, 0.7, -1.5]),
    frequency=st.sampled_from([0.0, 0.3, -2.0]),
    bias=st.dictionaries(st.integers(96, 101), st.sampled_from([-100.0, 2.5, 100.0]), max_size=3),
)
def test_penalties_count_what_was_written_and_biases_add_up(
    written: list[int], presence: float, frequency: float, bias: dict[int, float]
) -> None:
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias, max_tokens=99)
    answer = Answer(BYTES, sampling, 97)  # the prompt's last token does not count
    told(answer, *written)
    got, counts = answer.bias(), Counter(written)
    for token in range(BYTES.vocab_size):
        expected = bias.get(token, 0.0) - (presence if counts[token] else 0.0) - frequency * counts[token]
        assert (0.0 if got is None else float(got[token])) == pytest.approx(expected)


def test_a_bias_comes_before_all_filters_and_can_forbid() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(3, 3)
    seen = torch.zeros(3, 3, dtype=torch.bool)
    greedy = [Sampling(temperature=0, seed=0, logprobs=1)] * 3
    bias = [None, torch.tensor([0.0, 2.0, 0.0]), torch.tensor([-math.inf, -math.inf, 0.0])]
    drawn = draw(logits, greedy, positions=[0, 0, 0], seen=seen, bias=bias)
    assert [one.token for one in drawn] == [0, 1, 2]
    assert [one.top[0][0] for one in drawn] == [0, 0, 0]  # what is reported is the model's own
    with pytest.raises(UserError, match="every token is forbidden"):
        draw(logits[:1], greedy[:1], positions=[0], seen=seen[:1], bias=[torch.full((3,), -math.inf)])


def test_the_end_of_text_token_and_stop_tokens_end_the_text_and_are_no_part_of_it() -> None:
    sampling = Sampling(stop_token_ids=(98,))
    for token, finish in ((EOS, "eos"), (98, "stop")):
        answer = Answer(BYTES, sampling, 97)
        events = told(answer, 99, 0xC3, token)
        assert [event.finish for event in events] == [None, None, finish]
        assert "".join(event.text for event in events) == "c\N{REPLACEMENT CHARACTER}"
        assert answer.ended
    answer = Answer(BYTES, Sampling(ignore_eos=True, max_tokens=3), 97)
    assert [event.finish for event in told(answer, EOS, EOS, 99)] == [None, None, "length"]
    assert not answer.ended


def test_nothing_ends_a_text_before_it_has_min_tokens() -> None:
    answer = Answer(BYTES, Sampling(min_tokens=3, stop=("ab",), stop_token_ids=(100,), max_tokens=9), 97)
    for token in (97, 98, 97):
        bias = answer.bias()
        assert bias is not None
        assert bias[[EOS, 100]].tolist() == [-math.inf] * 2
        assert bias.isinf().sum() == 2
        assert told(answer, token)[0].text == chr(token)
    assert answer.bias() is None
    assert [(event.text, event.finish) for event in told(answer, 97, 98)] == [("", None), ("", "stop")]


class Odd:
    """Only odd ids."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self) -> torch.Tensor:
        return torch.arange(BYTES.vocab_size) % 2 == 1

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_a_constraint_forbids_and_hears_what_does_not_end_the_text() -> None:
    odd = Odd()
    answer = Answer(BYTES, Sampling(stop_token_ids=(101,), logit_bias={97: 3.0}), 97, constraint=odd)
    bias = answer.bias()
    assert bias is not None
    assert bias[97] == 3.0
    assert bias[::2].tolist() == [-math.inf] * 129
    told(answer, 99, 101)
    assert odd.accepted == [99]


def test_ids_that_the_tokenizer_lacks_are_refused() -> None:
    for sampling in (Sampling(logit_bias={257: 1.0}), Sampling(stop_token_ids=(257,)), Sampling(logprobs=258)):
        with pytest.raises(UserError, match=r"257|256"):
            check_sampling(sampling, BYTES)
