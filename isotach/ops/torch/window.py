"""Short convolution as shifted sums over one stream: each document's state, then its tokens, document after document.

    o = Σ_j w_j ∘ stream[t - W + 1 + j]        dstream = Σ_j w_j ∘ do shifted back        dw_j = Σ_t stream ∘ do

A document's W state rows come before its tokens, so no output reaches into the document before, and the last W rows of
its stretch are its state afterwards, however short it is. The backward builds the stream again instead of keeping it.
Autograd through the same sums takes three times as long, a grouped convolution five times.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.window import Window

BLOCK_BYTES = 1 << 20  # measured


@register(Window, "torch")
def window(
    rec: Window, x: Window.Inputs, s: Window.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Window.State]:
    """chunk_size has no meaning here."""
    taken, weight = rec.wide(x)
    output, state = _forward(taken, weight.contiguous(), s.inputs.to(taken.dtype), cu_seqlens)
    return output.to(x.x.dtype), Window.State(state)


@torch.library.custom_op("isotach::window", mutates_args=())
def _forward(x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    size = len(weight)
    stream, rows = _stream(x, state, cu_seqlens)
    read = stream.shape[1] - size
    output = torch.empty_like(stream[:, :read])
    for a, b in _blocks(stream, read):
        torch.mul(stream[:, a + 1 : b + 1], weight[0], out=output[:, a:b])
        for j in range(1, size):
            output[:, a:b].addcmul_(stream[:, a + 1 + j : b + 1 + j], weight[j])
    if rows is None:
        return output, stream[:, read:].clone()  # a view would keep every token alive
    return output[:, rows.tokens - size], stream[0, rows.after]


@_forward.register_fake
def _(x, weight, state, cu_seqlens):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.custom_op("isotach::window_backward", mutates_args=())
def _backward(
    grad_output: Tensor, grad_state: Tensor, x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and state."""
    size = len(weight)
    stream, rows = _stream(x, state, cu_seqlens)
    read = stream.shape[1] - size
    if rows is None:
        grad = grad_output
    else:
        grad = grad_output.new_zeros(1, read, x.shape[2])
        grad[0].index_copy_(0, rows.tokens - size, grad_output[0])

    dstream, dweight = torch.zeros_like(stream), torch.zeros_like(weight)
    for a, b in _blocks(stream, read):
        for j in range(size):
            dstream[:, a + 1 + j : b + 1 + j].addcmul_(grad[:, a:b], weight[j])
            dweight[j] += (stream[:, a + 1 + j : b + 1 + j] * grad[:, a:b]).sum((0, 1))

    if rows is None:
        dstream[:, read:] += grad_state
        return dstream[:, size:].contiguous(), dweight, dstream[:, :size].clone()
    dstream[0, rows.after] += grad_state
    return dstream[:, rows.tokens], dweight, dstream[0, rows.before]


@_backward.register_fake
def _(grad_output, grad_state, x, weight, state, cu_seqlens):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), state.new_empty(state.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    x, weight, state, cu_seqlens = ctx.saved_tensors
    zero = x.new_zeros(())
    grad_output = zero.expand(x.shape) if grad_output is None else grad_output
    grad_state = zero.expand(state.shape) if grad_state is None else grad_state
    return (*_backward(grad_output, grad_state, x, weight, state, cu_seqlens), None)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("window", "torch"))
sharding.declare("window", Window.Inputs, state=Window.State, output="x", over=("B", "D"))


def _blocks(stream: Tensor, read: int) -> Iterator[tuple[int, int]]:
    """Tokens 0..read in stretches that stay in cache while their sums pass over them."""
    batch, _, width = stream.shape
    step = max(1, BLOCK_BYTES // (batch * width * stream.element_size()))
    return ((a, min(a + step, read)) for a in range(0, read, step))


class _Rows(NamedTuple):
    """Which rows of a pack's stream hold its tokens (T,), and the states before and after each document (N, W)."""

    tokens: Tensor
    before: Tensor
    after: Tensor


def _stream(x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, _Rows | None]:
    """The stream (B, W + T, D); a pack's is (1, N W + T, D) and comes with its rows."""
    if cu_seqlens is None:
        return torch.cat([state, x], 1), None
    documents, size, width = state.shape
    number = torch.arange(documents, device=x.device)
    tokens = torch.arange(x.shape[1], device=x.device)
    tokens += size * (1 + number.repeat_interleave(cu_seqlens.diff(), output_size=x.shape[1]))
    window = size * number[:, None] + torch.arange(size, device=x.device)
    before, after = cu_seqlens[:-1, None] + window, cu_seqlens[1:, None] + window
    stream = x.new_empty(1, x.shape[1] + documents * size, width)
    stream[0].index_copy_(0, tokens, x[0]).index_copy_(0, before.flatten(), state.flatten(0, 1))
    return stream, _Rows(tokens, before, after)
