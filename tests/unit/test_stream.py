"""Sources, the split between training and validation, and the token cache."""

import dataclasses
import errno
import io
import json
import os
import random
import sys
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotach.config import parse
from isotach.data import cache, sources, stream
from isotach.data.sources import PIECE, Piece, TextFile, close_documents
from isotach.data.stream import DataConfig, Side, Tokens, open_tokens, read_text
from isotach.data.tokenizer import ByteTokenizer, train_bpe
from isotach.errors import UserError

BYTES = ByteTokenizer()
BPE = train_bpe(["one two three four five six seven eight nine ten\n"] * 3, 300)


def texts(tokens: Tokens, tokenizer: Any = BYTES) -> list[str]:
    """The documents, after checking that each is closed by one end-of-document."""
    documents = [tokens.ids[a:b] for a, b in zip(tokens.bounds[:-1], tokens.bounds[1:], strict=True)]
    for ids in documents:
        assert ids[-1] == tokenizer.eos
        assert tokenizer.eos not in ids[:-1]
    return [tokenizer.decode(ids) for ids in documents]


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """A function from (train source, options) to a configuration whose cache is in tmp_path."""

    def make(train: Any, **options: Any) -> DataConfig:
        train = str(train) if isinstance(train, Path) else train
        return parse(DataConfig, {"train": train, "cache": str(tmp_path / "cache"), **options}, who="test")

    return make


def opened(config: DataConfig, split: Side = "train") -> list[str]:
    tokens = open_tokens(config, split, BYTES)
    assert tokens.bytes == tokens.byte_lengths[tokens.ids].sum()
    return texts(tokens)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    return write(path, "\n".join(json.dumps(row) for row in rows))


# Sources


def test_a_text_file_is_one_document(data: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffnaïve\r\n日本 🙂\n")
    assert opened(data(path, valid_fraction=0)) == ["naïve\r\n日本 🙂\n"]


def test_a_separator_divides_a_text_file(data: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "<|endoftext|>one<|endoftext|><|endoftext|>two<|endof<|endoftext|>")
    assert opened(data(path, valid_fraction=0, document_separator="<|endoftext|>")) == ["one", "two<|endof"]


def test_a_folder_is_read_in_sorted_order_without_hidden_files(data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name in ("b/2.md", "a.txt", "b/10.txt", "c.py"):
        write(folder / name, name)
    write(folder / "d.jsonl", '{"text": "d1"}\n\n{"text": "d2"}\n')
    write(folder / "empty.txt", "")
    for name in (".git/config", ".hidden", "__pycache__/c.pyc"):
        write(folder / name, b"\0")
    assert opened(data(folder, valid_fraction=0)) == ["a.txt", "b/10.txt", "b/2.md", "c.py", "d1", "d2"]


def test_several_sources_follow_one_another(data: Any, tmp_path: Path) -> None:
    names = [str(write(tmp_path / name, name)) for name in ("z.txt", "a.txt")]
    assert opened(data(names, valid_fraction=0)) == ["z.txt", "a.txt"]


def test_json_lines_and_parquet_rows_are_documents(data: Any, tmp_path: Path) -> None:
    rows = [f"row {i} é" for i in range(3000)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": row, "n": 1} for row in rows])
    assert opened(data(path, valid_fraction=0, text_field="body")) == rows
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"n": list(range(3000)), "body": rows}), tmp_path / "a.parquet")
    config = data(tmp_path / "a.parquet", text_field="body")
    train, valid = opened(config), opened(config, "valid")
    assert sorted(train + valid) == sorted(rows)
    assert train == [row for row in rows if row not in set(valid)]


def test_standard_input_can_be_read_for_both_splits(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{i} " for i in range(2000))
    sources._standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    try:
        assert "".join(opened(data("-")) + opened(data("-"), "valid")) == text
    finally:
        sources._standard_input.cache_clear()


def test_the_standard_library_is_divided_by_module(data: Any) -> None:
    config = data("stdlib")
    train, valid = (open_tokens(config, split, BYTES) for split in ("train", "valid"))
    assert train.bytes > 10 * valid.bytes > 10**5
    groups = {reader.group: "".join(piece.text for piece in reader.pieces()) for reader in sources._stdlib().readers}
    held_out = "".join(texts(valid))
    assert groups["dataclasses"] in "".join(texts(train)) + held_out
    sides = {name: text in held_out for name, text in groups.items() if len(text) > 1000}
    assert 0 < sum(sides.values()) < len(sides) / 4
    assert not {"site-packages", "test", "encodings"} & set(groups)


def test_undecodable_modules_are_left_out_and_counted(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.py", "b.py", "pkg/c.py", "pkg/tests/d.py", "site-packages/e.py", "f.txt"):
        write(tmp_path / "lib" / name, f"# {name}")
    write(tmp_path / "lib" / "latin.py", b"# \xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "lib"))
    tokens = open_tokens(data("stdlib", valid_fraction=0), "train", BYTES)
    assert texts(tokens) == ["# a.py", "# b.py", "# pkg/c.py"]
    assert tokens.skipped == 1


def test_hugging_face_folders(data: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {split: [f"{split} {i}" for i in range(30)] for split in ("train", "validation")}
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": text}) for name, text in rows.items()})
    splits.save_to_disk(str(tmp_path / "both"))
    splits["train"].save_to_disk(str(tmp_path / "one"))

    both = f"hf:{tmp_path / 'both'}"
    assert opened(data(both)) == rows["train"]
    assert opened(data(both), "valid") == rows["validation"]
    assert opened(data("stdlib", valid=both), "valid") == rows["validation"], "named for validation"

    one = data(f"hf:{tmp_path / 'one'}", valid_fraction=0.2)
    train, valid = opened(one), opened(one, "valid")
    assert valid
    assert sorted(train + valid) == sorted(rows["train"])
    assert opened(data("stdlib", valid=f"hf:{tmp_path / 'one'}"), "valid") == rows["train"]

    with pytest.raises(UserError, match="expected a field 'body', got text; set data"):
        opened(data(both, text_field="body"))
    datasets.DatasetDict({"a": splits["train"], "b": splits["train"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="a split called train, got a, b"):
        opened(data(f"hf:{tmp_path / 'other'}"))


def test_a_hugging_face_folder_of_files(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    write_jsonl(tmp_path / "files" / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    write_jsonl(tmp_path / "files" / "validation.jsonl", [{"text": "three"}])
    config = data(f"hf:{tmp_path / 'files'}")
    assert opened(config) == ["one", "two"]
    assert opened(config, "valid") == ["three"]


@pytest.mark.parametrize(("module", "source"), [("pyarrow.parquet", "a.parquet"), ("datasets", "hf:someone/texts")])
def test_a_missing_extra_is_named(
    module: str, source: str, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"isotach\[data\]"):
        opened(data(source))


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.text("a<|>é🙂\n"), max_size=12),
    separator=st.sampled_from([None, "<|>", "\n<|>\n", "a"]),
    piece=st.integers(6, 16),
)
def test_reading_in_pieces_changes_no_document(parts: list[str], separator: str | None, piece: int) -> None:
    text = (separator or "").join(parts)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", piece)
        path = write(Path(folder) / "a.txt", text)
        pieces = list(close_documents(TextFile(path, separator, "a").pieces()))
    expected = text.split(separator) if separator else [text]
    found, held = [], ""
    for part, last in pieces:
        assert part
        held += part
        if last:
            found.append(held)
            held = ""
    assert not held
    assert found == [document for document in expected if document]


def test_memory_does_not_grow_with_the_text(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 1 << 14)
    monkeypatch.setattr(stream, "BATCH_CHARACTERS", 1 << 16)
    path = tmp_path / "large.txt"
    size = path.write_bytes(b"a line of text\n" * (1 << 19))
    config = data(path)
    tracemalloc.start()
    tokens = open_tokens(config, "train", BYTES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tokens.ids) > 0.9 * size
    assert peak < size / 3
    assert tokens.bounds.tolist() == [0, len(tokens.ids)], "one document, however many pieces"
    assert np.flatnonzero(tokens.ids == BYTES.eos).tolist() == [len(tokens.ids) - 1]


# The split


def test_many_documents_are_divided_by_a_hash_of_their_text(data: Any, tmp_path: Path) -> None:
    rows = [f"document {i}" for i in range(400)]
    path = tmp_path / "a.jsonl"

    def held_out(rows: list[str]) -> set[str]:
        write_jsonl(path, [{"text": row} for row in rows])
        config = data(path, valid_fraction=0.1)
        train, valid = opened(config), opened(config, "valid")
        assert sorted(train + valid) == sorted(rows)
        assert not set(train) & set(valid), "equal documents stay together"
        return set(valid)

    valid = held_out(rows)
    assert 20 < len(valid) < 60
    shuffled = random.Random(0).sample(rows, len(rows))
    assert held_out(shuffled + rows[:50]) == valid
    assert held_out([*rows, *(f"another {i}" for i in range(100))]) >= valid


def test_some_document_is_always_held_out(data: Any, tmp_path: Path) -> None:
    for seed in range(5):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{seed} {i}"} for i in range(20)])
        config = data(path)
        assert len(opened(config)) + len(opened(config, "valid")) == 20


@pytest.mark.parametrize("fraction", [0.05, 0.25])
def test_a_single_document_is_held_out_at_its_end(fraction: float, data: Any, tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices("abé🙂\n", k=4000))
    config = data(write(tmp_path / "a.txt", text), valid_fraction=fraction)
    (train,), (valid,) = opened(config), opened(config, "valid")
    assert train + valid == text
    assert len(valid) == pytest.approx(fraction * 4000, abs=1)
    assert "".join(read_text(config, "train")) == train


def test_equal_documents_cannot_be_told_apart_and_are_held_out_at_their_ends(data: Any, tmp_path: Path) -> None:
    config = data(write_jsonl(tmp_path / "a.jsonl", [{"text": "0123456789"}] * 50), valid_fraction=0.1)
    assert opened(config) == ["012345678"] * 50
    assert opened(config, "valid") == ["9"] * 50


def test_a_named_validation_source_is_read_whole_and_nothing_is_held_out(data: Any, tmp_path: Path) -> None:
    train, valid = write(tmp_path / "a.txt", "train " * 100), write(tmp_path / "b.txt", "valid")
    config = data(train, valid=str(valid))
    assert opened(config) == ["train " * 100]
    assert opened(config, "valid") == ["valid"]


# Bad data


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("zero.txt", b"abc\0def", "a zero byte at byte 3"),
        ("latin.txt", "abcé".encode("latin-1"), "not UTF-8 at byte 3"),
        ("cut.txt", "abc🙂".encode()[:-1], "not UTF-8 at byte 3"),
        ("far.txt", b"a" * (PIECE - 1) + b"\xc3(" + b"a" * 10, f"not UTF-8 at byte {PIECE - 1}"),
        ("far-zero.txt", b"a" * (3 * PIECE + 5) + b"\0", f"a zero byte at byte {3 * PIECE + 5}"),
        ("empty.txt", b"", "expected some text, got none"),
        ("blank.jsonl", b"\n\n", "expected some text, got none"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2: expected a JSON object"),
        ("bytes.jsonl", b'{"text": "\xff"}', "line 1: expected a JSON object"),
        ("list.jsonl", b'\n["text"]', "line 2: expected a JSON object, got list"),
        ("field.jsonl", b'{"text": "a"}\n{"body": "a", "id": 1}', "line 2: expected a field 'text', got body, id; set"),
        ("null.jsonl", b'{"text": null}', "line 1, field text: expected a string, got NoneType"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}', "line 1, field text: expected valid Unicode"),
        ("a.parquet", b"not parquet", "expected Parquet"),
    ],
)
def test_bad_text_is_refused_by_name_and_place(name: str, content: bytes, says: str, data: Any, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=says) as caught:
        opened(data(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*")), "nothing is left behind"


def test_bad_parquet_columns_are_refused(data: Any, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="expected a field 'text', got body"):
        opened(data(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="row 2, column body: expected a string, got NoneType"):
        opened(data(tmp_path / "a.parquet", text_field="body"))


def test_missing_and_empty_sources_are_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        opened(data(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="folder of text files, got none"):
        opened(data(tmp_path / "empty"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="standard input"):
        opened(data(tmp_path / "pipe"))
    config = data(write(tmp_path / "a.txt", "text"), valid_fraction=0)
    assert opened(config) == ["text"]
    with pytest.raises(UserError, match="got none with valid_fraction"):
        opened(config, "valid")
    with pytest.raises(UserError, match=r"test: train"):
        data([])


def test_an_unreadable_file_is_refused(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "text")
    plain = Path.open

    def denied(self: Path, *args: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self, *args)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=r"a\.txt: expected a readable file, got Permission denied"):
        opened(data(path))


# The cache


def files(config: DataConfig) -> list[Path]:
    assert config.cache
    return sorted(Path(config.cache).iterdir())


def test_the_cache_is_used_again_and_keyed_by_content_and_tokenizer(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "one two three " * 50)
    config = data(path, valid_fraction=0)
    first = open_tokens(config, "train", BYTES)
    assert isinstance(first.ids.base, np.ndarray)
    assert first.ids.dtype == np.uint16

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write", lambda *_: pytest.fail("the cache was not used"))
        moved = data(path.rename(tmp_path / "b.txt"), valid_fraction=0)
        again = open_tokens(moved, "train", BYTES)
    assert np.array_equal(again.ids, first.ids)
    assert again.fingerprint == first.fingerprint

    assert texts(open_tokens(moved, "train", BPE), BPE) == texts(first)
    write(tmp_path / "b.txt", "one two three " * 49 + "one two four")
    assert texts(open_tokens(moved, "train", BYTES)) != texts(first)
    assert len(files(config)) == 3


def test_ids_beyond_sixteen_bits(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ByteTokenizer()
    monkeypatch.setattr(large, "vocab_size", 70_000)
    monkeypatch.setattr(large, "eos", 69_999)
    tokens = open_tokens(data(write(tmp_path / "a.txt", "abc"), valid_fraction=0), "train", large)
    assert tokens.ids.tolist() == [97, 98, 99, 69_999]
    assert tokens.ids.dtype == np.uint32


@pytest.mark.parametrize("damage", ["truncate", "extend", "header only", "magic", "empty", "other key", "any byte"])
def test_a_damaged_cache_is_refused_with_the_reason(damage: str, data: Any, tmp_path: Path) -> None:
    config = data(write(tmp_path / "a.txt", "one two three"), valid_fraction=0)
    tokens = open_tokens(config, "train", BYTES)
    (path,) = files(config)
    whole = path.read_bytes()
    del tokens

    def refused(content: bytes, says: str) -> None:
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(UserError, match=says) as caught:
            open_tokens(config, "train", BYTES)
        assert "delete it" in str(caught.value)
        assert str(path) in str(caught.value)

    match damage:
        case "truncate":
            refused(whole[:-1], f"should have {len(whole)} bytes and has {len(whole) - 1}")
        case "extend":
            refused(whole + b"\0", f"should have {len(whole)} bytes and has {len(whole) + 1}")
        case "header only":
            refused(whole[:100], "should have at least")
        case "magic":
            refused(b"GGUF" + whole[4:], "not a token cache")
        case "empty":
            refused(b"", "not a token cache")
        case "other key":
            other = data(write(tmp_path / "b.txt", "another text"), valid_fraction=0)
            open_tokens(other, "train", BYTES)
            (other_path,) = set(files(config)) - {path}
            refused(other_path.read_bytes(), "another text or tokenizer")
        case "any byte":
            header_end = whole.index(b"}") + 1
            for place in [*range(0, header_end, 7), *range(cache.HEADER_BYTES, len(whole), 5)]:
                refused(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "refused")


def test_a_full_disk_leaves_nothing(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = data(write(tmp_path / "a.txt", "one two three"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            open_tokens(config, "train", BYTES)
    assert files(config) == []
    assert opened(config)


def test_a_cache_folder_that_cannot_be_made_is_refused(data: Any, tmp_path: Path) -> None:
    write(tmp_path / "cache", "a file")
    with pytest.raises(UserError, match="expected a writable place"):
        opened(data(write(tmp_path / "a.txt", "text"), valid_fraction=0))


def test_the_default_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = DataConfig(train=str(write(tmp_path / "a.txt", "text")), valid_fraction=0)
    open_tokens(config, "train", BYTES)
    assert len(list((tmp_path / "isotach" / "tokens").iterdir())) == 1


@given(documents=st.lists(st.lists(st.text(max_size=5), min_size=1, max_size=4), max_size=8))
def test_documents_are_closed_once_and_never_empty(documents: list[list[str]]) -> None:
    pieces = [Piece(text, i == len(parts) - 1) for parts in documents for i, text in enumerate(parts)]
    closed = list(close_documents(pieces))
    assert all(piece.text for piece in closed)
    found = "".join(piece.text + ("\0" if piece.last else "") for piece in closed)
    assert found == "".join("".join(parts) + "\0" for parts in documents if "".join(parts))


def test_tokens_are_frozen(data: Any, tmp_path: Path) -> None:
    tokens = open_tokens(data(write(tmp_path / "a.txt", "text"), valid_fraction=0), "train", BYTES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.bytes = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        tokens.ids[0] = 1
