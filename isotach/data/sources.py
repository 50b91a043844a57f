"""Where text comes from: every kind of source is a `Reader` that yields documents in a fixed order.

Nothing is read whole: a document arrives in pieces of about a million characters.
"""

import atexit
import codecs
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

from isotach.errors import UserError

PIECE = 1 << 20
BATCH_ROWS = 1024
Side = Literal["train", "valid"]

# Not the library's own writing, or tables that a program wrote.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
STDLIB_LEFT_OUT |= {"encodings", "pydoc_data", "lib-dynload"}


class Piece(NamedTuple):
    """Some text of a document; `last` closes the document."""

    text: str
    last: bool


class Reader(ABC):
    """A sequence of documents.

    - `side`: the split the source itself assigns these documents to; None leaves it to the caller.
    - `group`: documents of one group are never divided between training and validation; None: each is its own.
    """

    side: Side | None = None
    group: str | None = None

    @abstractmethod
    def digest(self) -> str:
        """A hash that changes when the documents do."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The documents, in order. Raises UserError naming the place where the text is bad."""


@final
@dataclass(frozen=True)
class TextFile(Reader):
    """UTF-8 text: one document, or several divided by `separator`. `name` is what messages call the file."""

    path: Path
    separator: str | None
    name: str
    group: str | None = None

    def digest(self) -> str:
        return _file_digest(self.path, self.name)

    def pieces(self) -> Iterator[Piece]:
        hold = max(len(self.separator or "") - 1, 1)
        text = ""
        for block in self._blocks():
            text += block
            if self.separator:
                *whole, text = text.split(self.separator)
                yield from (Piece(document, True) for document in whole)
            while len(text) > PIECE:
                # A line end inside a piece is where a tokenizer minds a cut least; half a separator is held back.
                cut = text.rfind("\n", 0, PIECE - hold) + 1 or PIECE - hold
                yield Piece(text[:cut], False)
                text = text[cut:]
        yield Piece(text, True)

    def _blocks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        read = 0
        with _opened(self.path, self.name) as file:
            while True:
                block = file.read(PIECE)
                if (zero := block.find(0)) >= 0:
                    raise _binary(self.name, "a zero byte", read + zero)
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _binary(self.name, "bytes that are not UTF-8", read - pending + error.start) from None
                yield text.removeprefix("\ufeff") if read == 0 else text
                read += len(block)
                if not block:
                    return


@final
@dataclass(frozen=True)
class JsonLines(Reader):
    """One JSON object a line, one document an object: the string in `field`."""

    path: Path
    field: str

    def digest(self) -> str:
        return _file_digest(self.path, str(self.path))

    def pieces(self) -> Iterator[Piece]:
        with _opened(self.path, str(self.path)) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Piece(self._text(line, f"{self.path}, line {number}"), True)

    def _text(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: expected a JSON object, got something else ({error}); mend that line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}; mend that line")
        if self.field not in row:
            raise _no_field(where, self.field, row)
        return _string(row[self.field], f"{where}, field {self.field}")


@final
@dataclass(frozen=True)
class Parquet(Reader):
    """One document a row: the string in column `field`."""

    path: Path
    field: str

    def digest(self) -> str:
        return _file_digest(self.path, str(self.path))

    def pieces(self) -> Iterator[Piece]:
        parquet = _extra("pyarrow.parquet", "Parquet files")
        import pyarrow

        with _opened(self.path, str(self.path)) as file:
            try:
                table = parquet.ParquetFile(file)
                if self.field not in table.schema_arrow.names:
                    raise _no_field(str(self.path), self.field, table.schema_arrow.names)
                batches = table.iter_batches(batch_size=BATCH_ROWS, columns=[self.field])
                yield from _rows((batch.column(0).to_pylist() for batch in batches), str(self.path), self.field)
            except pyarrow.ArrowException as error:
                raise UserError(f"{self.path}: expected Parquet, got something else ({error}); mend the file") from None


@final
@dataclass(frozen=True)
class HuggingFace(Reader):
    """A split of a dataset: one document a row. The dataset's own fingerprint stands for its content."""

    rows: Any
    name: str
    field: str
    side: Side | None

    def digest(self) -> str:
        return f"{self.rows._fingerprint}-{len(self.rows)}"

    def pieces(self) -> Iterator[Piece]:
        if self.field not in self.rows.column_names:
            raise _no_field(self.name, self.field, self.rows.column_names)
        batches = self.rows.select_columns([self.field]).iter(batch_size=BATCH_ROWS)
        yield from _rows((batch[self.field] for batch in batches), self.name, self.field)


class Sources(NamedTuple):
    """The readers of a source, and how many files were left out because they are not UTF-8 (standard library only)."""

    readers: list[Reader]
    skipped: int = 0


def open_source(spec: str, *, field: str, separator: str | None) -> Sources:
    """Readers of "stdlib", "-", "hf:NAME[:CONFIG]", a file or a folder, in an order that never varies.

    Raises UserError for a source that is missing, unreadable or empty.
    """
    if spec == "stdlib":
        return _stdlib()
    if spec == "-":
        return Sources([TextFile(_standard_input(), separator, "standard input")])
    if spec.startswith("hf:"):
        return Sources(_hugging_face(spec.removeprefix("hf:"), field))
    path = Path(spec).expanduser()
    if path.is_dir():
        readers = [_file_reader(file, field, separator) for file in _walk(path, {"__pycache__"})]
        if not readers:
            raise UserError(f"{path}: expected a folder of text files, got none; put text into it")
        return Sources(readers)
    if not path.exists():
        raise UserError(f'{path}: expected text, found no such file or folder; check the path, or use "stdlib"')
    if not path.is_file():
        raise UserError(f'{path}: expected a file, got a pipe or device; pipe it into standard input and use "-"')
    return Sources([_file_reader(path, field, separator)])


def documents(readers: Iterable[Reader]) -> Iterator[Piece]:
    """The pieces of all readers: none is empty, and every document that has text is closed exactly once."""
    return close_documents(piece for reader in readers for piece in reader.pieces())


def close_documents(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Drop empty pieces and documents without text; the last piece with text closes its document."""
    held = ""
    for text, last in pieces:
        if text:
            if held:
                yield Piece(held, False)
            held = text
        if last and held:
            yield Piece(held, True)
            held = ""


def _file_reader(path: Path, field: str, separator: str | None) -> Reader:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLines(path, field)
        case ".parquet":
            return Parquet(path, field)
        case _:
            return TextFile(path, separator, str(path))


def _walk(folder: Path, left_out: set[str]) -> list[Path]:
    """Files under `folder`, sorted; hidden ones and folders named in `left_out` are not visited."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: expected a readable folder, got {error.strerror}; mend its permissions")

    found: list[Path] = []
    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found.extend(Path(here, name) for name in files if not name.startswith("."))
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _stdlib() -> Sources:
    """The standard library's modules; a top-level module or package is one group."""
    root = Path(sysconfig.get_path("stdlib"))
    readers: list[Reader] = []
    skipped = 0
    for path in _walk(root, STDLIB_LEFT_OUT):
        if path.suffix == ".py":
            try:
                with _opened(path, str(path)) as file:
                    file.read().decode()
            except UnicodeDecodeError:
                skipped += 1
                continue
            readers.append(TextFile(path, None, str(path), group=path.relative_to(root).parts[0].removesuffix(".py")))
    if not readers:
        raise UserError(f"stdlib: expected Python modules in {root}, got none; name a text of your own")
    return Sources(readers, skipped)


@functools.cache
def _standard_input() -> Path:
    """A copy of standard input, which can be read only once and is needed several times; removed at exit."""
    if sys.stdin is None:
        raise UserError("standard input: expected text, found it closed; pipe a text into it")
    handle, name = tempfile.mkstemp(prefix="isotach-stdin-")
    atexit.register(Path(name).unlink, missing_ok=True)
    try:
        with os.fdopen(handle, "wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy, PIECE)
    except OSError as error:
        raise UserError(
            f"standard input: expected room for a copy at {name}, got {error.strerror}; set TMPDIR"
        ) from None
    return Path(name)


def _hugging_face(name: str, field: str) -> list[Reader]:
    datasets = _extra("datasets", "Hugging Face datasets")
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path))
        else:
            name_only, _, config = name.partition(":")
            loaded = datasets.load_dataset(name_only, config or None)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"hf:{name}: expected a Hugging Face dataset, got none ({reason}); check the name, or give a folder"
        ) from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    validation = next((split for split in ("validation", "valid", "dev") if split in splits), None)
    train = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    if train is None:
        raise UserError(f"hf:{name}: expected a split called train, got {', '.join(splits)}; use another dataset")
    if validation in (None, train):
        return [HuggingFace(splits[train], f"hf:{name}", field, None)]
    return [
        HuggingFace(splits[train], f"hf:{name}", field, "train"),
        HuggingFace(splits[validation], f"hf:{name}", field, "valid"),
    ]


def _extra(module: str, what: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"{what} need the package {package}, which is not installed; run pip install 'isotach[data]'"
        ) from None


def _file_digest(path: Path, name: str) -> str:
    with _opened(path, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path, name: str) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"{name}: expected a readable file, got {error.strerror}; check it and its permissions"
        ) from None


def _rows(batches: Iterable[list[Any]], name: str, field: str) -> Iterator[Piece]:
    for number, value in enumerate(itertools.chain.from_iterable(batches), 1):
        yield Piece(_string(value, f"{name}, row {number}, column {field}"), True)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a string, got {type(value).__name__}; mend or drop it")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: expected valid Unicode, got a lone surrogate; mend or drop it") from None
    return value


def _no_field(where: str, field: str, fields: Iterable[str]) -> UserError:
    got = ", ".join(sorted(fields)) or "none"
    return UserError(f"{where}: expected a field {field!r}, got {got}; set data.text_field")


def _binary(name: str, what: str, offset: int) -> UserError:
    return UserError(f"{name}: expected UTF-8 text, got {what} at byte {offset}; convert the file or leave it out")
