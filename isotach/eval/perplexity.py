"""Loss against context: the same tokens are scored at every length, only what comes before them grows.

Longer inputs would look better merely because early tokens, which have little context, weigh less; so the scored
tokens are fixed and each is preceded by between `context - scored` and `context` others.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from isotach.data.pack import Batch
from isotach.models.decoder import Decoder
from isotach.train.loss import nats

SCORED = 128  # tokens of a window whose loss counts


@torch.inference_mode()
def by_context(
    decoder: Decoder, ids: NDArray[np.integer], contexts: Sequence[int], *, windows: int, scored: int = SCORED
) -> dict[int, float]:
    """Mean nats per token of the last `scored` tokens of windows of each length.

    ids      one document
    windows  stretches of `scored` tokens, spread evenly over the part that has the longest context before it

    ValueError where the text is too short, or a context no longer than what is scored.
    """
    longest = max(contexts)
    if min(contexts) < scored:
        raise ValueError(
            f"perplexity: a context must hold the {scored} scored tokens; got {min(contexts)}; lengthen it"
        )
    if len(ids) < longest + windows:
        raise ValueError(f"perplexity: expected a text of {longest + windows} tokens, got {len(ids)}; use a longer one")
    ends = np.linspace(longest, len(ids) - 1, windows).astype(np.int64)
    text = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(decoder.device)
    losses = {}
    for context in contexts:
        total = 0.0
        for end in ends.tolist():
            hidden, _ = decoder.hidden(text[None, end - context : end])
            logits = decoder.head(hidden[0, -scored:]).float()
            total += float(F.cross_entropy(logits, text[end - scored + 1 : end + 1], reduction="sum"))
        losses[context] = total / (len(ends) * scored)
    return losses


@torch.inference_mode()
def mean_nats(decoder: Decoder, batches: Sequence[Batch]) -> float:
    """-log p(target) of every target of the batches, on average."""
    total = 0.0
    for batch in batches:
        hidden, _ = decoder.hidden(batch.tokens, span=batch.span)
        total += float(nats(decoder, hidden, batch.targets, dtype=torch.float32))
    return total / sum(batch.targets.numel() for batch in batches)
