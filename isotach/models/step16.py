"""One token of a TransNormerLLM block in bfloat16 on a GPU: five kernels, where there are some twenty operations.

    [q k v u] = s(x) x [Wq Wk Wv Wu]      S ← λ S + silu(k)ᵀ v      x ← x + s(o) (o ∘ u) Wo,  o = silu(q) S
    [g h] = s(x) x [Wg Wh]                                          x ← x + (act(g) ∘ h) Wd

s(x) = 1 / √(mean(x²) + eps). The same numbers as models/decoder.py's Block with mixers/lightning.py and nn/ffn.py's
GLU, rounded at the same places but one: x is rounded to bfloat16 before the norm's factor instead of behind it. A step
of a row reads little more than the weights, and launching a kernel takes as long as reading one of its matrices.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from isotach.models.block8 import Published
from isotach.nn.mixer import MixerState
from isotach.nn.positions import angles, lrpe
from isotach.ops.backends import has_kernels
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, advance

if TYPE_CHECKING:
    from isotach.models.decoder import Block


def serves(block: "Block", x: Tensor, span: Span) -> bool:
    """Whether `step` takes this call: a token of every row, without gradients, of a published block in bfloat16."""
    if x.shape[1] != 1 or not _kernels(x.device) or torch.is_grad_enabled() or x.dtype != torch.float32:
        return False
    if span.cu_seqlens is not None or span.group is not None:
        return False
    parts = Published.of(block)
    return parts is not None and parts.gate.weight.dtype == torch.bfloat16


def step(
    block: "Block", x: Float[Tensor, "B 1 D"], state: MixerState, span: Span
) -> tuple[Float[Tensor, "B 1 D"], MixerState]:
    """As Block.forward."""
    from isotach.ops.triton.linear import linear

    parts = Published.of(block)
    assert parts is not None
    mixer_norm, mixer, gate, norm, ffn_norm, ffn = parts
    rows = x.flatten(0, 1)
    batch, width = rows.shape
    weights = [layer.weight for layer in (mixer.q, mixer.k, mixer.v, gate)]
    qkvu = linear(rows, None, weights, None, mixer_norm.eps, 2, False)
    q, k, v, u = qkvu.view(batch, 1, 4, mixer.heads, -1).unbind(2)
    if mixer.theta is not None:
        angle = angles(span.positions, mixer.theta)
        q, k = lrpe(q, angle), lrpe(k, angle)
    inputs = Decay.Inputs(q, k, v, mixer.log_decay.view(1, 1, -1, 1).expand(batch, -1, -1, -1))
    o, memory = advance(mixer.recurrence, inputs, state["main"], span)
    rows = linear(o.reshape(batch, width), u.reshape(batch, width), [mixer.out.weight], rows, norm.eps, 0, False)
    silu = int(ffn.activation == "silu")
    hidden = linear(rows, None, [ffn.gate.weight, ffn.up.weight], None, ffn_norm.eps, silu, True)
    rows = linear(hidden, None, [ffn.down.weight], rows, -1.0, 0, False)
    return rows.view(batch, 1, width), {"main": memory}


def _kernels(device: torch.device) -> bool:
    if not has_kernels("linear", device.type):
        return False
    from isotach.ops.triton.linear import refusal

    return refusal(device) is None
