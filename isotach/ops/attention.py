"""Softmax attention of a row's last T tokens over all that it holds, through PyTorch's scaled_dot_product_attention.

    o_t = Σ_s softmax_s(q_t · k_s / √K + bias(t, s)) v_s        over the keys s ≤ t

Scores and biases are never held whole: queries are taken a tile at a time, and a tile reads only the keys up to its
end. A bias that depends on the distance alone is a view of a table. Any other is written for one tile at a time, and
again in the backward where there are several. PyTorch's fast kernels give no gradient to a bias, so it travels beside:
`with_channels` adds channels to q and k whose product is zero and whose gradient is the bias's.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TILE = 1 << 25  # scores whose mask or bias is held at a time: on CPU, queries by the thousand run several times faster
ROWS = 64  # queries whose bias is written at once

# fill(first, stop, out): writes to out (B, H, stop - first, stop) what queries first..stop-1 add for keys 0..stop-1.
Fill = Callable[[int, int, Tensor], None]


def common(lengths: Int[Tensor, "B"]) -> int | None:
    """The one length of all rows; None where they differ, and where no value is known because a graph is traced."""
    if torch.compiler.is_compiling():
        return None
    values = set(lengths.tolist())
    return values.pop() if len(values) == 1 else None


def attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    *,
    first: int,
    fill: Fill | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B T H V"]:
    """Causal attention of the tokens first..first+T-1 of every row; keys behind the last of them are not read.

    fill    writes the bias, for a few queries at a time; what it writes above the diagonal has no effect
    scale   of q·k; None for 1/√K
    """
    time, stop = q.shape[1], first + q.shape[1]
    if fill is None and (time == 1 or first == 0):
        return sdpa(q, k[:, :stop], v[:, :stop], causal=time > 1, scale=scale)
    heads = 1 if fill is None else q.shape[0] * q.shape[2]
    step = min(time, max(1, TILE // (heads * stop)))
    recompute = fill is not None and step < time and torch.is_grad_enabled()
    # One piece of memory serves all tiles: fresh pages cost more than the bias that is written to them.
    shared = None if fill is None or torch.is_grad_enabled() else q.new_empty(heads * step * stop)
    outputs = []
    for start in range(first, stop, step):
        end = min(start + step, stop)
        part = (q[:, start - first : end - first], k[:, :end], v[:, :end], start, fill, scale, shared)
        if recompute:
            outputs.append(checkpoint(_tile, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_tile(*part))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def _tile(
    q: Tensor, k: Tensor, v: Tensor, first: int, fill: Fill | None, scale: float | None, shared: Tensor | None
) -> Tensor:
    (batch, time, heads), stop = q.shape[:3], k.shape[1]
    if fill is None:
        mask = torch.ones(time, stop, dtype=torch.bool, device=q.device).tril(first)
        return sdpa(q, k, v, mask, scale=scale)
    with torch.no_grad():
        bias = q.new_empty(batch * heads * time * stop) if shared is None else shared[: batch * heads * time * stop]
        bias = bias.view(batch, heads, time, stop)
        for start in range(first, stop, ROWS):
            end = min(start + ROWS, stop)
            fill(start, end, bias[:, :, start - first : end - first, :end])
        future = torch.ones(time, time, dtype=torch.bool, device=q.device).triu(1)
        bias[..., first:].masked_fill_(future, -torch.inf)
    return sdpa(q, k, v, bias, scale=scale)


def attention_by_distance(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    bias: Float[Tensor, "H S"],
    *,
    first: int,
) -> Float[Tensor, "B T H V"]:
    """As attention, with bias[:, j] for a key j tokens back.

    A tile takes its queries backwards, for then every row of its bias is the row before moved by one: a view.
    """
    time, stop = q.shape[1], first + q.shape[1]
    table = F.pad(bias[:, :stop].to(q.dtype).flip(1), (0, time - 1), value=-torch.inf)  # distances stop-1 .. 1-time
    step = min(time, max(1, TILE // (q.shape[2] * stop)))
    outputs = []
    for start in range(first, stop, step):
        end = min(start + step, stop)
        mask = table[:, stop - end : stop + end - start - 1].unfold(-1, end, 1)[None]
        if q.device.type != "cpu":  # other devices' kernels want rows that are aligned
            mask = mask.contiguous()
        outputs.append(sdpa(q[:, start - first : end - first].flip(1), k[:, :end], v[:, :end], mask).flip(1))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Time-major scaled_dot_product_attention; k and v may have fewer heads. Without a mask every key counts."""
    q, k, v = (leaf.to(q.dtype).transpose(1, 2) for leaf in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


def with_channels(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    channels: Sequence[tuple[Float[Tensor, "B T H"], Float[Tensor, "B S H"]]],
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with further channels, (query's, key's) each, which add their product to q·k / √K of the plain q and k.

    v grows by as many zeros, since the fast kernels take one width for all; the outputs' last channels are theirs.
    """
    per_head = q.shape[2] // k.shape[2]
    k, v = (leaf.repeat_interleave(per_head, 2) if per_head > 1 else leaf for leaf in (k, v))
    ours, theirs = (torch.stack(side, -1).to(q.dtype) for side in zip(*channels, strict=True))
    q_wide = torch.cat([q, ours * q.shape[-1] ** 0.5], -1)
    return q_wide, torch.cat([k, theirs], -1), F.pad(v, (0, len(channels)))


def unvalued(x: Tensor) -> Tensor:
    """Zero, with the gradient of x."""
    return x - x.detach()
