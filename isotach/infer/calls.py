"""The three ways a decoder is called without gradients: read a row, read a pack, step a batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from isotach.models.decoder import Decoder
from isotach.models.state import DecoderState
from isotach.ops.engine import Span


@torch.inference_mode()
def read(decoder: Decoder, ids: Sequence[int], state: DecoderState | None) -> tuple[Float[Tensor, "T D"], DecoderState]:
    """Read one row of tokens. No logits: for a chunk they would take vocabulary times chunk in memory; see `head`."""
    hidden, state = decoder.hidden(torch.tensor([ids], device=decoder.device), state)
    return hidden[0], state


@torch.inference_mode()
def read_packed(
    decoder: Decoder, parts: Sequence[tuple[Sequence[int], DecoderState]]
) -> list[tuple[Float[Tensor, "T D"], DecoderState]]:
    """Read tokens behind each of several states of one row, in one call; one token at least in every part."""
    if len(parts) == 1:
        return [read(decoder, *parts[0])]
    lengths = torch.tensor([len(ids) for ids, _ in parts], device=decoder.device)
    state = DecoderState.cat([state for _, state in parts])
    span = Span.packed(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), start=state.positions)
    packed = torch.tensor([[token for ids, _ in parts for token in ids]], device=decoder.device)
    hidden, state = decoder.hidden(packed, state, span=span)
    rows = torch.arange(len(parts), device=decoder.device)[:, None]
    return [(own, state.select(row)) for own, row in zip(hidden[0].split(lengths.tolist()), rows, strict=True)]


@torch.inference_mode()
def head(decoder: Decoder, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T vocab"]:
    """Logits of what follows each token."""
    return decoder.head(hidden)


@torch.inference_mode()
def step(
    decoder: Decoder, tokens: Sequence[int], state: DecoderState | None
) -> tuple[Float[Tensor, "R vocab"], DecoderState]:
    """One token for every row."""
    logits, state = decoder(torch.tensor(tokens, device=decoder.device)[:, None], state)
    return logits[:, -1], state
