"""One token of the decay and delta families on a GPU: every number of a state is read once and written once.

    S ← e^{log_decay} ∘ S          S ← S - e (rᵀ S) + k vᵀ          o = q S

decay has neither e nor r; Delta has r = k, and β k for e and for k. Without a kernel of their own these are five to
eight passes over the state, which is all that a step of many rows takes time for.

There is no gradient. Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU
(docs/numerics.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops.triton.layout import padded, sides

BLOCK = 32  # columns of a state per program: rows of 128 bytes


# fmt: off
@triton.jit
def _step(  # type: ignore[no-untyped-def]
    q, read, erase, k, v, beta, log_decay, before, output, after,
    q_row, q_head, read_row, read_head, erase_row, erase_head, k_row, k_head, v_row, v_head, beta_row, beta_head,
    decay_row, decay_head, decay_channel, before_row, before_head, before_k, before_v,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """One row, head and block of the state's columns."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, row = program % BLOCKS, (program // BLOCKS) % HEADS, (program // (BLOCKS * HEADS)).to(tl.int64)
    wide, columns = tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    keys, values = wide < K, columns < V
    inside = keys[:, None] & values[None, :]
    places = before + row * before_row + head * before_head + wide[:, None] * before_k + columns[None, :] * before_v
    state = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    rates = tl.load(log_decay + row * decay_row + head * decay_head + wide * decay_channel, mask=keys, other=0.0)
    state *= tl.exp(rates.to(tl.float32))[:, None]
    written = tl.load(k + row * k_row + head * k_head + wide, mask=keys, other=0.0).to(tl.float32)
    value = tl.load(v + row * v_row + head * v_head + columns, mask=values, other=0.0).to(tl.float32)
    if beta is not None:
        value -= tl.sum(written[:, None] * state, 0)
        written *= tl.load(beta + row * beta_row + head * beta_head).to(tl.float32)
    if read is not None:
        reading = tl.load(read + row * read_row + head * read_head + wide, mask=keys, other=0.0).to(tl.float32)
        erasing = tl.load(erase + row * erase_row + head * erase_head + wide, mask=keys, other=0.0).to(tl.float32)
        state -= erasing[:, None] * tl.sum(reading[:, None] * state, 0)[None, :]
    state += written[:, None] * value[None, :]
    asking = tl.load(q + row * q_row + head * q_head + wide, mask=keys, other=0.0).to(tl.float32)
    found = tl.sum(asking[:, None] * state, 0)
    at = row * HEADS + head
    tl.store(output + at * V + columns, found.to(output.dtype.element_ty), mask=values)
    tl.store(after + at * (K * V) + wide[:, None] * V + columns[None, :], state, mask=inside)


@torch.library.custom_op("isotach::step_triton", mutates_args=("after",))
def one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    after: Tensor,
    beta: Tensor | None = None,
    read: Tensor | None = None,
    erase: Tensor | None = None,
) -> Tensor:
    """Outputs (B, 1, H, V) in q's dtype; the state after the token is written into `after`, which is not `state`.

    q, k, read, erase (B, 1, H, K); v (B, 1, H, V); log_decay (B, 1, H, #K); beta (B, 1, H, 1); states (B, H, K, V)
    """
    check_free(after)
    rows, _, heads, width = q.shape
    values = v.shape[-1]
    output = q.new_empty(v.shape)
    tokens = [_rows(x) for x in (q, read, erase, k, v, beta)]
    rates = log_decay[:, 0]
    channel = rates.stride(-1) if rates.shape[-1] != 1 else 0
    programs = rows * heads * triton.cdiv(values, BLOCK)
    if programs:
        with torch.cuda.device_of(q):
            _step[(programs,)](
                *(x for x, _, _ in tokens), rates, state, output, after,
                *(stride for _, *strides in tokens for stride in strides), *rates.stride()[:2], channel,
                *sides(state), HEADS=heads, K=width, V=values, WIDTH=padded(width), BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return output


@one_token.register_fake
def _(q, k, v, log_decay, state, after, beta=None, read=None, erase=None):  # type: ignore[no-untyped-def]
    return q.new_empty(v.shape)


def free(state: Tensor) -> Tensor:
    """Memory for the state after this one."""
    return state.new_empty(state.shape, dtype=torch.float32)


def check_free(after: Tensor) -> None:
    """ValueError where kernels cannot write a state into this memory."""
    if not after.is_contiguous() or after.dtype != torch.float32:
        raise ValueError(
            f"step: expected float32 rows side by side to write the state into, got {after.dtype} with strides "
            f"{after.stride()}; allocate it with torch.empty"
        )


def _rows(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """(B, 1, H, X) with adjacent channels; how far rows and heads are apart."""
    if x is None:
        return None, 0, 0
    x = x[:, 0] if x.stride(-1) == 1 else x[:, 0].contiguous()
    return x, x.stride(0), x.stride(1)
