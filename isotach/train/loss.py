"""-log p(target), summed over tokens, without the logits of all of them in memory at once.

    nats = Σ_t (log Σ_v e^{h_t · w_v} - h_t · w_{target_t})

PyTorch 2.13 has this as one operator, which goes through the tokens in chunks and keeps gradients instead of logits.
It pays where the logits are many: on two cores, 4,096 tokens of 8,192 take 219 ms with it and 370 without, 2,048 of
49,152 take 1.46 s and 1.71 and half the memory. Older versions form the logits, and so do products in bfloat16, where
the operator would round the sum to bfloat16.

On a GPU it is Liger's kernels that go through the tokens, where they are installed (arXiv:2410.10989; not measured).
Going back they overwrite what they have kept, so it can be done once.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from isotach.models.decoder import Decoder

FUSED = hasattr(torch.nn, "LinearCrossEntropyOptions")
LIGER = find_spec("liger_kernel") is not None and find_spec("triton") is not None
MANY = 1 << 22  # logits, 16 MiB of them
CHUNK = 256  # tokens


def nats(
    decoder: Decoder, hidden: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"], *, dtype: torch.dtype
) -> Float[Tensor, ""]:
    """The sum over all targets, float32 at least.

    hidden  what the decoder's head reads; dtype: of the products, float32 or bfloat16
    """
    rows, classes = hidden.flatten(0, 1), targets.flatten()
    head = decoder.embed if decoder.unembed is None else decoder.unembed
    by = _fused(rows, head.weight, dtype) if len(rows) * len(head.weight) >= MANY else None
    if by == "torch":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        return F.linear_cross_entropy(rows, head.weight, classes, reduction="sum", options=options)
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        if by == "liger":
            from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

            total: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(
                head.weight, rows, classes
            )
            return total
        logits = decoder.head(rows)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), classes, reduction="sum")


def _fused(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Literal["torch", "liger"] | None:
    """What goes through the tokens in chunks for such rows and weights, if anything does."""
    if rows.is_cuda and LIGER and torch.float64 not in (rows.dtype, weight.dtype):
        return "liger"
    return "torch" if FUSED and rows.dtype == weight.dtype == dtype == torch.float32 else None
