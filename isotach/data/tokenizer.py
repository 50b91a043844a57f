"""Text to token ids and back: bytes, or any file of the `tokenizers` library.

Text is only ever text: `encode` never yields a special token, whatever the text spells, and `decode` gives special
tokens no text. So decode(encode(text)) == text for bytes and for byte-level vocabularies.
"""

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from isotach.errors import UserError
from isotach.files import replacing

FILE_NAME = "tokenizer.json"
BYTES: Mapping[str, Any] = {"isotach": "bytes"}
END_OF_TEXT = "<|endoftext|>"
MOST_TOKENS = 1 << 20  # the library allocates them all before it reads; published vocabularies end at a quarter
# What published vocabularies call the end of a document; where a file has several, documents end with the first.
EOS_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "[SEP]",
)

Ids = Sequence[int] | NDArray[np.integer[Any]]


class Tokenizer(ABC):
    """A vocabulary.

    - `vocab_size`: one more than the largest id.
    - `eos`: the id that closes every document.
    - `special`: the ids that have no text, `eos` among them.
    - `definition`: the JSON value that `save` writes and `load_tokenizer` reads.
    """

    vocab_size: int
    eos: int
    special: frozenset[int]
    definition: Mapping[str, Any]

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids (tokens,) of `text`, without an end-of-document. Raises UserError if `text` is not valid Unicode."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode` of each text; may use several threads."""

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id out of range."""

    @abstractmethod
    def piece(self, token: int, before: int | None) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that `token` adds after `before` (None: it opens the text);
        none for a special token."""

    @property
    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int32]:
        """Bytes of text each token stands for, (vocab_size,); 0 for special tokens.

        Exact for bytes and byte-level vocabularies; for others what the token adds in the middle of a text.
        """

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the definition, whatever the order of its keys."""
        text = json.dumps(self.definition, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into `folder`."""
        with replacing(folder / FILE_NAME) as file:
            file.write(self.file_bytes())

    def file_bytes(self) -> bytes:
        """The content of tokenizer.json."""
        return (json.dumps(self.definition, ensure_ascii=False, indent=2) + "\n").encode()

    def _valid(self, ids: Ids) -> NDArray[np.int64]:
        checked: NDArray[np.int64] = np.asarray(ids, dtype=np.int64)
        bad = checked[(checked < 0) | (checked >= self.vocab_size)]
        if bad.size:
            raise ValueError(f"tokenizer: expected ids from 0 to {self.vocab_size - 1}, got {bad[0]}; check the model")
        return checked


@final
class ByteTokenizer(Tokenizer):
    """256 bytes and an end-of-document, id 256."""

    vocab_size = 257
    eos = 256
    special = frozenset({256})
    definition = BYTES

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Ids) -> str:
        valid = self._valid(ids)
        return valid[valid != self.eos].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def piece(self, token: int, before: int | None) -> bytes:
        return b"" if token == self.eos else bytes([token])

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        return (np.arange(self.vocab_size) != self.eos).astype(np.int32)


@final
class JsonTokenizer(Tokenizer):
    """A vocabulary defined by a file of the `tokenizers` library.

    Raises UserError if `definition` is not one, or has no end-of-document token (one of EOS_NAMES).
    """

    def __init__(self, definition: Mapping[str, Any], *, who: str = "tokenizer") -> None:
        import tokenizers  # costs 30 ms that the byte tokenizer need not pay

        self.definition = {**definition, "truncation": None, "padding": None}
        try:
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        except Exception as error:  # noqa: BLE001  the library raises nothing narrower
            raise UserError(
                f"{who}: expected a file of the tokenizers library, got something else ({error}); "
                "make one with isotach tokenize"
            ) from None
        # Text that spells a special token stays text.
        self._inner.encode_special_tokens = True
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        found = (self._inner.token_to_id(name) for name in EOS_NAMES)
        eos = next((i for i in found if i is not None), None)
        if eos is None:
            raise UserError(
                f"{who}: expected an end-of-document token such as {END_OF_TEXT} or </s>, got none; add one with "
                f'tokenizers.Tokenizer.add_special_tokens(["{END_OF_TEXT}"]) and save the file'
            )
        self.eos = eos
        added = self._inner.get_added_tokens_decoder()
        self.special = frozenset({eos, *(i for i, token in added.items() if token.special)})
        self._decoders = set(_decoder_types(self.definition.get("decoder")))

    def encode(self, text: str) -> NDArray[np.int32]:
        _utf8(text)
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        for text in texts:
            _utf8(text)
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        return self._text([i for i in self._valid(ids).tolist() if i not in self.special])

    def piece(self, token: int, before: int | None) -> bytes:
        if self._byte_pieces is not None:
            return self._byte_pieces[token]
        if token in self.special:
            return b""
        if (byte := self._fallback_byte(token)) is not None:
            return byte
        if before is None:
            return self._text([token]).encode()
        # What comes before a special token, such as a turn of a chat, is not known here; a word stands for it.
        context = self._word if before in self.special else before
        return self._text([context, token])[len(self._text([context])) :].encode()

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        if self._byte_pieces is not None:
            lengths = [len(piece) for piece in self._byte_pieces]
        else:
            lengths = [len(self.piece(token, self._word)) for token in range(self.vocab_size)]
        return np.array(lengths, dtype=np.int32)

    @cached_property
    def _byte_pieces(self) -> list[bytes] | None:
        """The bytes of every token of a byte-level vocabulary, which no neighbour changes; None for other kinds."""
        if "ByteLevel" not in self._decoders:
            return None
        pieces = []
        for token in range(self.vocab_size):
            name = self._inner.id_to_token(token)
            if name is None or token in self.special:
                pieces.append(b"")
            elif all(letter in _BYTE_OF_LETTER for letter in name):
                pieces.append(bytes(_BYTE_OF_LETTER[letter] for letter in name))
            else:
                pieces.append(name.encode())
        return pieces

    @cached_property
    def _word(self) -> int:
        """An ordinary token, if possible one of letters, to stand before another one."""
        ordinary = [i for i in range(self.vocab_size) if i not in self.special]
        return next((i for i in ordinary if self._text([i]).isalpha()), ordinary[0])

    def _fallback_byte(self, token: int) -> bytes | None:
        if "ByteFallback" not in self._decoders:
            return None
        match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", self._inner.id_to_token(token) or "")
        return bytes([int(match[1], 16)]) if match else None

    def _text(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=False)


@final
class TextStream:
    """The text of a stream of tokens, a token at a time: `push` returns the characters that are complete so far.

    The cost of a token does not depend on how many came before. What is returned, joined, is what decode gives.

    - `before`: the token that the stream follows, such as the last one of a prompt; None when it opens the text. Some
      vocabularies write a space before every word and drop it from the first.
    """

    def __init__(self, tokenizer: Tokenizer, before: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._before = before
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes; often none in the middle of a multi-byte character."""
        if token in self._tokenizer.special:
            return ""
        piece = self._tokenizer.piece(token, self._before)
        self._before = token
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left of a character that never became complete: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer called `spec`: "bytes", a tokenizer.json, or a folder that holds one, such as a checkpoint.

    Raises UserError for a missing, unreadable or malformed file.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f'{path}: expected a tokenizer file, found none; give its path, or "bytes"') from None
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got {error.strerror}; mend its permissions") from None
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got something else ({error}); make it with isotach tokenize") from None
    if definition == BYTES:
        return ByteTokenizer()
    if not isinstance(definition, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(definition).__name__}; use a tokenizer.json")
    return JsonTokenizer(definition, who=str(path))


def train_bpe(texts: Iterable[str], vocab: int) -> JsonTokenizer:
    """Train a byte-level BPE of at most `vocab` tokens, 256 bytes and <|endoftext|> among them.

    The same texts in the same order give the same file. Raises UserError when `vocab` is not from 257 to MOST_TOKENS,
    or there is no text.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if not 257 <= vocab <= MOST_TOKENS:
        raise UserError(
            f"tokenize: vocab must hold 256 bytes and {END_OF_TEXT}, got {vocab}; "
            f"ask for 257 or more, {MOST_TOKENS} at most"
        )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("tokenize: expected some text to learn from, got none; name a source that has some")
    return JsonTokenizer(json.loads(inner.to_str()))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"tokenizer: expected valid Unicode, got a lone surrogate at character {error.start}, "
            "as bytes that are not UTF-8 become; give UTF-8 text"
        ) from None


def _decoder_types(decoder: Any) -> Iterator[str]:
    """Names of the decoders in a definition, those inside a Sequence too."""
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _decoder_types(part)


def _letters_of_bytes() -> dict[str, int]:
    """Byte-level vocabularies spell byte b as a printable letter: itself if it has one, else 256 and up, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()
