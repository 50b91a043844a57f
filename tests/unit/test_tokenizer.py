"""Tokenizers: round trips, streams of text, files, and what is refused."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from isotach.cli.tokenize import tokenize
from isotach.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    TextStream,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from isotach.errors import UserError

CORPUS = [
    "the cat sat on the mat, and the dog — naïve — sat on the cat. 日本語 日本 🙂🙂 def f(x):\n    return x\n"
] * 4
# Spaces as a tokenizer of words can give them back: one between words, none at the ends.
PROSE = "the cat sat on the mat and the dog sat on the cat"


def definition(inner: Library) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(inner.to_str())
    return loaded


def metaspace() -> JsonTokenizer:
    inner = Library(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator([PROSE] * 3, trainer)
    return JsonTokenizer(definition(inner))


def byte_fallback() -> JsonTokenizer:
    """A vocabulary as LLaMA's: spaces are letters, and characters it does not know are spelled byte by byte."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
    ]
    inner = Library(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            [("▁", "t")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return JsonTokenizer(definition(inner))


def word_pieces() -> JsonTokenizer:
    words = ["[UNK]", "[SEP]", *sorted(set(PROSE.split())), "##s", "##ting"]
    inner = Library(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    return JsonTokenizer(definition(inner))


BYTES = ByteTokenizer()
BPE = train_bpe(CORPUS, 400)
FALLBACK = byte_fallback()
ALL = {"bytes": BYTES, "bpe": BPE, "byte_fallback": FALLBACK, "metaspace": metaspace(), "word_pieces": word_pieces()}
LOSSLESS = {"bytes": BYTES, "bpe": BPE}
TEXT = st.text() | st.text("aé日🙂 \n\u0301<|endoftext|>").map(lambda text: text + "<|endoftext|>")


def streamed(tokenizer: Tokenizer, ids: Any, before: int | None = None) -> list[str]:
    stream = TextStream(tokenizer, before)
    return [*(stream.push(int(i)) for i in ids), stream.finish()]


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=TEXT)
def test_decoding_an_encoded_text_gives_it_back(name: str, text: str) -> None:
    ids = LOSSLESS[name].encode(text)
    assert ids.dtype == np.int32
    assert LOSSLESS[name].eos not in ids
    assert LOSSLESS[name].decode(ids) == text


@given(texts=st.lists(TEXT, max_size=5))
def test_a_batch_is_encoded_as_its_texts_are(texts: list[str]) -> None:
    for tokenizer in LOSSLESS.values():
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert np.array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("name", ["bytes", "bpe", "byte_fallback"])
@given(text=st.text("abt é日🙂👩‍👩‍👧", max_size=30))
def test_a_stream_gives_the_text_in_complete_characters(name: str, text: str) -> None:
    tokenizer = ALL[name]
    ids = tokenizer.encode(text)
    parts = streamed(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert "".join(parts) == whole
    assert "\ufffd" not in whole
    assert parts[-1] == "", "nothing is left when the last character was complete"


@pytest.mark.parametrize("name", LOSSLESS)
@given(data=st.data())
def test_a_stream_of_any_ids_equals_decode(name: str, data: st.DataObject) -> None:
    tokenizer = LOSSLESS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cut", range(0, 11, 2))
def test_a_stream_continues_a_prompt(name: str, cut: int) -> None:
    tokenizer = ALL[name]
    ids = tokenizer.encode(PROSE)
    prompt, rest = ids[:cut], ids[cut:]
    parts = streamed(tokenizer, rest, int(prompt[-1]) if cut else None)
    assert tokenizer.decode(prompt) + "".join(parts) == tokenizer.decode(ids) == PROSE


def test_a_stream_never_waits_for_more_than_a_character() -> None:
    euro = "€".encode()
    assert streamed(BYTES, euro) == ["", "", "€", ""]
    assert streamed(BYTES, [*euro[:2], ord("a")]) == ["", "", "\ufffda", ""]
    assert streamed(BYTES, euro[:2]) == ["", "", "\ufffd"]


def test_a_stream_never_decodes_more_than_two_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_fallback()
    sizes: list[int] = []
    plain = tokenizer._text

    def spy(ids: list[int]) -> str:
        sizes.append(len(ids))
        return plain(ids)

    monkeypatch.setattr(tokenizer, "_text", spy)
    streamed(tokenizer, tokenizer.encode("the tea 日本 " * 50))
    assert max(sizes) == 2


def test_special_tokens_have_no_text() -> None:
    for tokenizer in ALL.values():
        ids = tokenizer.encode(PROSE)
        between = np.insert(ids, [0, 3, len(ids)], tokenizer.eos)
        assert tokenizer.decode(between) == PROSE
        assert "".join(streamed(tokenizer, between)) == PROSE


@given(text=TEXT)
def test_byte_lengths_add_up_to_the_text(text: str) -> None:
    for tokenizer in LOSSLESS.values():
        assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
        assert tokenizer.byte_lengths[tokenizer.eos] == 0
        assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_byte_lengths_count_the_space_before_the_first_word(name: str) -> None:
    tokenizer = ALL[name]
    assert tokenizer.byte_lengths[tokenizer.encode(PROSE)].sum() == len(PROSE) + 1


@pytest.mark.parametrize("name", ALL)
def test_a_saved_tokenizer_is_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = ALL[name]
    tokenizer.save(tmp_path)
    for spec in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = load_tokenizer(spec)
        assert (loaded.fingerprint, loaded.eos, loaded.vocab_size) == (
            tokenizer.fingerprint,
            tokenizer.eos,
            tokenizer.vocab_size,
        )
        assert np.array_equal(loaded.encode(PROSE), tokenizer.encode(PROSE))
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_the_fingerprint_depends_on_what_the_vocabulary_does_and_nothing_else() -> None:
    shuffled = dict(reversed(list(BPE.definition.items())))
    cut_short = {
        **BPE.definition,
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    }
    assert JsonTokenizer(shuffled).fingerprint == BPE.fingerprint
    assert JsonTokenizer(cut_short).fingerprint == BPE.fingerprint
    assert len(JsonTokenizer(cut_short).encode("the cat sat on the mat")) > 3
    assert len({tokenizer.fingerprint for tokenizer in ALL.values()}) == len(ALL)
    assert train_bpe(CORPUS, 300).fingerprint != BPE.fingerprint


def test_training_is_deterministic_and_keeps_to_its_size() -> None:
    again = train_bpe(iter(CORPUS), 400)
    assert again.file_bytes() == BPE.file_bytes()
    assert 257 < BPE.vocab_size <= 400
    assert BPE.eos == 0
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0].encode()) / 3
    assert train_bpe(CORPUS, 257).vocab_size == 257


@pytest.mark.parametrize(
    ("texts", "vocab", "says"), [(CORPUS, 256, "257 or more"), ([], 300, "some text"), ([""], 300, "some text")]
)
def test_training_refuses(texts: list[str], vocab: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        train_bpe(texts, vocab)


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lone_surrogate_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="surrogate at character 2"):
        LOSSLESS[name].encode("ab\ud800")


@pytest.mark.parametrize("bad", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"0 to 256, got {bad}"):
        BYTES.decode([1, bad])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "found none"),
        (b"{", "expected JSON"),
        (b"\xff\x00", "expected JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"model": 3}', "tokenizers library"),
        (b'{"isotach": "chars"}', "tokenizers library"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_vocabulary_without_an_end_of_document_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    inner = Library(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.save(str(path))
    with pytest.raises(UserError, match="add_special_tokens"):
        load_tokenizer(path)
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(path))
    assert load_tokenizer(path).eos == 2


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BPE.save(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        BYTES.save(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert load_tokenizer(tmp_path).fingerprint == BPE.fingerprint


@settings(max_examples=20)
@given(text=st.text("ab \n<|>", max_size=40))
def test_text_that_spells_a_special_token_stays_text(text: str) -> None:
    text = text + "</s><s>"
    assert FALLBACK.eos not in FALLBACK.encode(text)


def test_the_command_trains_measures_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "text.txt", tmp_path / "out" / "mine.json"
    source.write_text("\n".join(f"line {i} of the text that the cat sat on" for i in range(500)))
    tokenize([str(source)], vocab=300, out=out)
    assert "300 tokens" in (printed := capsys.readouterr().out)
    assert 2 < float(printed.split("tokens, ")[1].split()[0]) < 12
    first = out.read_bytes()
    with pytest.raises(UserError, match="--force"):
        tokenize([str(source)], vocab=280, out=out)
    assert out.read_bytes() == first
    tokenize([str(source)], vocab=280, out=out, force=True)
    assert load_tokenizer(out).vocab_size == 280
