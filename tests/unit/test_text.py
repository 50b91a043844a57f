"""Stop strings against a brute-force reading of the whole text; the chain hash against its equation."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotach.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from isotach.infer.chain import TokenChain
from isotach.infer.text import StoppedText

TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": train_bpe(["aba é\nabab €é aa bb\naé€ ba abba\n" * 40], 280)}
LETTERS = "ab é€\n"  # one, two and three bytes
TEXT = st.text(LETTERS, min_size=1, max_size=24)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)


def complete(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The characters that `tokens` complete."""
    return tokenizer.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, stops=STOPS)
def test_text_ends_before_the_first_stop_string(name: str, text: str, stops: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text).tolist()
    out, given_out = StoppedText(tokenizer, stops, before=None), ""
    for n in range(1, len(tokens) + 1):
        given_out += out.push(tokens[n - 1])
        so_far = complete(tokenizer, tokens[:n])
        starts = [so_far.find(stop) for stop in stops if stop in so_far]
        assert out.stopped == bool(starts)
        if starts:
            expected = so_far[: min(starts)]
        else:  # all but the longest end that a stop string begins with
            ends = range(len(so_far) + 1)
            held = max(k for k in ends if not k or any(stop.startswith(so_far[-k:]) for stop in stops))
            expected = so_far[: len(so_far) - held]
        assert given_out == expected
        begins = [len(complete(tokenizer, tokens[:i])) for i in range(n)]
        assert out.hidden == sum(begin >= len(given_out) for begin in begins)
        if out.stopped:
            assert out.finish() == ""
            return
    assert given_out + out.finish() == text
    assert out.hidden == 0


def test_a_cut_character_is_shown_when_nothing_more_comes() -> None:
    out = StoppedText(ByteTokenizer(), (), before=None)
    assert [out.push(byte) for byte in "é€".encode()[:4]] == ["", "é", "", ""]
    assert out.hidden == 2
    assert out.finish() == "\N{REPLACEMENT CHARACTER}"
    assert out.hidden == 0


@given(st.lists(st.integers(0, 299), max_size=20), st.integers(0, 20))
def test_chain_is_the_same_however_it_is_cut(ids: list[int], cut: int) -> None:
    digest = hashlib.sha256(b"").digest()
    for token in ids:
        digest = hashlib.sha256(digest + token.to_bytes(8, "little")).digest()
    empty = TokenChain.empty(300)
    chain = empty.extended(ids[:cut]).extended(ids[cut:])
    assert (chain.digest, chain.length) == (digest, len(ids))
    assert set(chain.seen.nonzero().flatten().tolist()) == set(ids)
    assert empty.length == 0
    assert not torch.any(empty.seen)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_different_tokens_have_different_chains(first: list[int], second: list[int]) -> None:
    empty = TokenChain.empty(4)
    assert (empty.extended(first).digest == empty.extended(second).digest) == (first == second)
