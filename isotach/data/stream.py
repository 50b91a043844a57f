"""From sources of text to token files: which documents train, which validate, and a cache keyed by their content."""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from isotach.config import Config
from isotach.data import cache
from isotach.data.cache import Run, Tokens
from isotach.data.sources import Piece, Reader, Side, close_documents, documents, open_source
from isotach.data.tokenizer import Tokenizer
from isotach.errors import UserError

__all__ = ["DataConfig", "Side", "Tokens", "open_tokens", "read_text"]

FORMAT = 1  # part of every cache key; raise it when the same text would become other tokens
BATCH_CHARACTERS = 4 << 20

Source = Annotated[str, Field(min_length=1)]


class DataConfig(Config):
    """Where text comes from.

    - `train`: a source or several: "stdlib" (the Python standard library of this machine), a text, .jsonl or .parquet
      file, a folder of them, "-" for standard input, "hf:NAME[:CONFIG]" or "hf:FOLDER" for a Hugging Face dataset.
    - `valid`: the same for validation. Unset: a dataset's own validation split if it has one, else text held out.
    - `valid_fraction`: how much is held out. With at least 1/valid_fraction different documents, whole ones, chosen by
      a hash of their text (of the module's name for "stdlib"), so that equal documents stay together and further ones
      move none; with fewer, the end of each.
    - `tokenizer`: "bytes", a tokenizer.json or a folder that holds one.
    - `text_field`: the field of JSON lines, Parquet and datasets that holds the text.
    - `document_separator`: what divides a text file into documents; unset, a file is one.
    - `cache`: folder of the token files; unset, the user's cache folder.
    - `workers`: threads that prepare batches ahead; the batches are the same for any number.
    """

    train: Source | Annotated[tuple[Source, ...], Field(min_length=1)] = "stdlib"
    valid: Source | Annotated[tuple[Source, ...], Field(min_length=1)] | None = None
    valid_fraction: float = Field(default=0.05, ge=0, lt=1)
    tokenizer: Source = "bytes"
    text_field: str = "text"
    document_separator: str | None = Field(default=None, min_length=1)
    cache: Source | None = None
    workers: int = Field(default=1, ge=0)


def open_tokens(config: DataConfig, split: Side, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a split, from the cache or newly made and cached.

    The text is read once to find its hash; a change in it, the tokenizer or the way it is split makes a new cache file.
    Memory does not grow with the text, but for some tens of bytes a document; one longer than a million characters is
    encoded in parts that end at line ends. Raises UserError for bad text, a damaged cache, a full disk, or a split
    without text.
    """
    readers, skipped = _readers(config, split)
    key = _key(config, split, readers, tokenizer)
    path = _cache_folder(config) / f"{key[:32]}.tokens"
    if not path.exists():
        pieces = _selected(config, split, readers)
        first = next(pieces, None)
        if first is None:
            raise UserError(_no_text(config, split))
        cache.write(path, _tokenized(itertools.chain([first], pieces), tokenizer), tokenizer, key)
    return dataclasses.replace(cache.read(path, tokenizer, key), skipped=skipped)


def read_text(config: DataConfig, split: Side) -> Iterator[str]:
    """The text of a split, in pieces of about a million characters; config.tokenizer and config.cache play no part."""
    readers, _ = _readers(config, split)
    return (piece.text for piece in _selected(config, split, readers))


def _readers(config: DataConfig, split: Side) -> tuple[list[Reader], int]:
    """The readers that may hold documents of `split`, and the number of files left out."""
    named = config.valid if split == "valid" and config.valid is not None else config.train
    readers: list[Reader] = []
    skipped = 0
    for spec in (named,) if isinstance(named, str) else named:
        source = open_source(spec, field=config.text_field, separator=config.document_separator)
        skipped += source.skipped
        if split == "valid" and config.valid is not None:
            # Named for validation: its validation split if it has one, else all of it.
            own = [reader for reader in source.readers if reader.side == "valid"]
            readers += own or source.readers
        else:
            readers += [
                reader
                for reader in source.readers
                if reader.side == split or _divides(config, reader) or (reader.side is None and split == "train")
            ]
    return readers, skipped


def _divides(config: DataConfig, reader: Reader) -> bool:
    """Whether the documents of `reader` are divided between training and validation."""
    return config.valid is None and config.valid_fraction > 0 and reader.side is None


def _selected(config: DataConfig, split: Side, readers: list[Reader]) -> Iterator[Piece]:
    """The documents, or parts of documents, of `split`."""
    divided = [reader for reader in readers if _divides(config, reader)]
    yield from documents(reader for reader in readers if not _divides(config, reader))
    if divided:
        begin, end = _ranges(divided, config.valid_fraction, split)
        yield from close_documents(_clipped(documents(divided), begin, end))


def _ranges(readers: list[Reader], fraction: float, split: Side) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The characters [begin, end) of each document that belong to `split`; reads every document once."""
    hashes, lengths = array("Q"), array("q")
    for reader in readers:
        digest, length = hashlib.sha256(), 0
        for piece in documents([reader]):
            digest.update(piece.text.encode())
            length += len(piece.text)
            if piece.last:
                if reader.group is not None:
                    digest = hashlib.sha256(reader.group.encode())
                hashes.append(int.from_bytes(digest.digest()[:8], "little"))
                lengths.append(length)
                digest, length = hashlib.sha256(), 0
    end = np.array(lengths, dtype=np.int64)
    begin = np.zeros_like(end)
    place = np.array(hashes, dtype=np.uint64)
    if len(np.unique(place)) * fraction < 1:
        # Too few to spare a whole one.
        cut = (end * (1 - fraction)).astype(np.int64)
        return (begin, cut) if split == "train" else (cut, end)
    held_out = place < np.uint64(int(fraction * 2**64))
    if not held_out.any():
        held_out = place == place.min()
    end[held_out == (split == "train")] = 0
    return begin, end


def _clipped(pieces: Iterable[Piece], begin: NDArray[np.int64], end: NDArray[np.int64]) -> Iterator[Piece]:
    """Each document reduced to its characters [begin, end); what falls outside leaves empty pieces."""
    document, place = 0, 0
    for text, last in pieces:
        first, stop = max(int(begin[document]) - place, 0), max(int(end[document]) - place, 0)
        yield Piece(text[first:stop], last)
        document, place = (document + 1, 0) if last else (document, place + len(text))


def _tokenized(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Run]:
    """Token runs in the order of the pieces; the tokenizer gets many texts at once."""
    batch: list[Piece] = []
    size = 0

    def runs() -> Iterator[Run]:
        encoded = tokenizer.encode_batch([piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            yield Run(ids, len(piece.text.encode()), piece.last)

    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield from runs()
            batch, size = [], 0
    yield from runs()


def _key(config: DataConfig, split: Side, readers: list[Reader], tokenizer: Tokenizer) -> str:
    """sha256 of everything the token file depends on."""
    parts = {
        "format": FORMAT,
        "documents": [(reader.digest(), type(reader).__name__, reader.side, reader.group) for reader in readers],
        "tokenizer": tokenizer.fingerprint,
        "held_out": [split, config.valid_fraction] if any(_divides(config, reader) for reader in readers) else None,
        "text_field": config.text_field,
        "document_separator": config.document_separator,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _cache_folder(config: DataConfig) -> Path:
    if config.cache is not None:
        return Path(config.cache).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "isotach" / "tokens"


def _no_text(config: DataConfig, split: Side) -> str:
    if split == "valid" and config.valid is None:
        return (
            f"data.valid: expected some text to validate on, got none with valid_fraction = {config.valid_fraction}; "
            "raise it, or name a source of its own"
        )
    return f"data.{split}: expected some text, got none in {getattr(config, split)}; name a source that has some"
