"""Softmax attention over factors: queries, keys and values are short sums of (head vector) x (feature vector).

    Q_t = 1/P Σ_p a_q[t,p]ᵀ b_q[t,p]      K_t = 1/R Σ_r a_k[t,r]ᵀ b_k[t,r]      V_t = 1/U Σ_u a_v[t,u]ᵀ b_v[t,u]
    o_t = softmax(Q_t K_sᵀ / √K) V_s per head, over all s ≤ t

Only the factors of keys and values are kept, R (H + K) + U (H + V) numbers a token. Positions turn the features b_q and
b_k alone, before they come here. Several tokens at once are read through whole keys and values. One token is read
through the factors, which never forms them:

    P_psr = b_q[p] · b_k[s,r]        score_hs = Σ_r a_k[s,r,h] Σ_p a_q[p,h] P_psr / (P R √K)
    o_h = Σ_su (w_hs a_v[s,u,h] / U) b_v[s,u]

in P R (K + H) + U H V multiplications a kept token, where that is fewer than whole ones take.

Tensor Product Attention (arXiv:2501.06425), FlashTPA decoding for any ranks.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotach.ops import growing
from isotach.ops.attention import attention
from isotach.ops.recurrence import Recurrence, Tensors, length, state_dtype


class Factored(Recurrence):
    class Inputs(NamedTuple):
        """P, R, U: the ranks of queries, keys and values."""

        a_q: Float[Tensor, "B T P H"]
        b_q: Float[Tensor, "B T P K"]
        a_k: Float[Tensor, "B T R H"]
        b_k: Float[Tensor, "B T R K"]
        a_v: Float[Tensor, "B T U H"]
        b_v: Float[Tensor, "B T U V"]

    class Summary(NamedTuple):
        """Row b holds length[b] tokens; the rest of S is zero."""

        a_k: Float[Tensor, "B S R H"]
        b_k: Float[Tensor, "B S R K"]
        a_v: Float[Tensor, "B S U H"]
        b_v: Float[Tensor, "B S U V"]
        length: Int[Tensor, "B"]

    class State(NamedTuple):
        """As Summary, with spare room behind length[b]; `filled` is how much of the buffer any state has written."""

        a_k: Float[Tensor, "B S R H"]
        b_k: Float[Tensor, "B S R K"]
        a_v: Float[Tensor, "B S U H"]
        b_v: Float[Tensor, "B S U V"]
        length: Int[Tensor, "B"]
        filled: Int[Tensor, "B"]

    lift, summarize, compose, apply, emit, read = (
        growing.lift, growing.summarize, growing.compose, growing.apply, growing.emit, growing.read,
    )  # fmt: skip
    neutral, initial = growing.neutral, growing.initial
    compact, concatenate = staticmethod(growing.compact), staticmethod(growing.concatenate)
    reserve = staticmethod(growing.reserve)

    def attend(self, x: Tensors, kept: Tensors, first: int) -> Tensor:
        stop = first + length(x)
        a_k, b_k, a_v, b_v = (leaf[:, :stop] for leaf in kept[:4])
        (queries, heads), (rank, width), values = x.a_q.shape[2:], b_k.shape[2:], b_v.shape[-1]
        if length(x) == 1 and queries * rank * (width + heads) < heads * ((rank + 1) * width + values):
            return read_factors(x.a_q, x.b_q, a_k, b_k, a_v, b_v)
        return attention(whole(x.a_q, x.b_q), whole(a_k, b_k), whole(a_v, b_v), first=first)


def whole(a: Float[Tensor, "B T R H"], b: Float[Tensor, "B T R K"]) -> Float[Tensor, "B T H K"]:
    """1/R Σ_r a[r]ᵀ b[r]."""
    return torch.matmul(a.mT / a.shape[2], b)


def read_factors(
    a_q: Float[Tensor, "B 1 P H"],
    b_q: Float[Tensor, "B 1 P K"],
    a_k: Float[Tensor, "B S R H"],
    b_k: Float[Tensor, "B S R K"],
    a_v: Float[Tensor, "B S U H"],
    b_v: Float[Tensor, "B S U V"],
) -> Float[Tensor, "B 1 H V"]:
    """One token's attention over all S; heads stay innermost, as the factors lie, and scores are float32 at least."""
    dtype, wide = a_q.dtype, state_dtype(a_q)
    a_q, b_q, a_k, b_k, a_v, b_v = (leaf.to(wide) for leaf in (a_q, b_q, a_k, b_k, a_v, b_v))
    a_q = a_q[:, 0] / (a_q.shape[2] * a_k.shape[2] * b_k.shape[-1] ** 0.5)
    products = b_k.flatten(1, 2) @ b_q[:, 0].mT  # (B, S R, P)
    scores = ((products @ a_q).unflatten(1, a_k.shape[1:3]) * a_k).sum(2)
    weights = scores.softmax(1)[:, :, None] * (a_v / a_v.shape[2])
    return (weights.flatten(1, 2).mT @ b_v.flatten(1, 2))[:, None].to(dtype)
