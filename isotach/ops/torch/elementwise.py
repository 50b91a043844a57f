"""The scan of the elementwise family: the first tokens of all chunks in one operation, then their second tokens, ...

    in all chunks    c ← e^{log_decay_t} ∘ c + v_t from zero, and d ← e^{log_decay_t} ∘ d from one
    over the chunks  c_i ← d_i ∘ c_{i-1} + c_i, which is the memory at the end of each
    in all chunks    h_t = e^{log_decay_t} ∘ h_{t-1} + v_t, now from the end of the chunk before

Rows and documents are one stream of tokens, cut into chunks wherever that falls: what a document starts from is added
to its first token, whose decay is then zero, so the scan need not know of documents (and a value that is not finite
would reach the next one).

What this takes is the time to read and write memory. So decays are formed when the first sweep comes to them, and where
chunks come out even, v is read where it lies.

Products of decays are formed, never quotients, so nothing overflows whatever the decay. Backwards, with do the gradient
of o, the same scan runs from the last token to the first:

    r_t = do_t + e^{log_decay_{t+1}} ∘ r_{t+1}        dv_t = r_t        dlog_decay_t = e^{log_decay_t} ∘ h_{t-1} ∘ r_t
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.elementwise import Elementwise


@register(Elementwise, "torch")
def elementwise(
    rec: Elementwise, x: Elementwise.Inputs, s: Elementwise.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Elementwise.State]:
    v, log_decay = rec.wide(x)
    output, state = _forward(v, log_decay, s.state.to(v.dtype), cu_seqlens, chunk_size)
    return output.to(x.v.dtype), Elementwise.State(state)


@torch.library.custom_op("isotach::elementwise", mutates_args=())
def _forward(
    v: Tensor, log_decay: Tensor, state: Tensor, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    documents, chunk = _documents(v, cu_seqlens), _chunk(v, chunk_size)
    values, rates = _stream(v, chunk), _stream(log_decay, chunk)
    h, decay = values.new_empty(values.shape), rates.new_empty(rates.shape)
    first = documents.first
    start = torch.exp(rates[first]) * state[documents.row]
    _scan(
        *(x.unflatten(0, (-1, chunk)) for x in (values, h, decay)),
        rates=rates.unflatten(0, (-1, chunk)), joins=_joins(first, start, chunk),
    )  # fmt: skip
    after = state.clone(memory_format=torch.contiguous_format)
    after[documents.row] = h[documents.last]
    return h[: v.shape[0] * v.shape[1]].view(v.shape), after


@_forward.register_fake
def _(v, log_decay, state, cu_seqlens, chunk_size):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("isotach::elementwise_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_state: Tensor,
    output: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, log_decay and state."""
    documents, chunk = _documents(output, cu_seqlens), _chunk(output, chunk_size)
    given, decay = _stream(grad_output, chunk), _stream(log_decay, chunk, exp=True, spare=1)
    r = given.new_empty(given.shape)
    fade = decay[documents.first]
    decay[documents.first] = 0
    _scan(
        *(x.unflatten(0, (-1, chunk)) for x in (given, r, decay[1:])),
        joins=_joins(documents.last, grad_state[documents.row], chunk), backwards=True,
    )  # fmt: skip
    decay[documents.first] = fade

    h = output.flatten(0, 1)
    r, decay = r[: len(h)], decay[: len(h)]
    dlog = torch.empty_like(h)
    torch.mul(r[1:], h[:-1], out=dlog[1:])
    dlog[documents.first] = r[documents.first] * state[documents.row]
    if decay.shape[1] != h.shape[1]:
        dlog = dlog.sum(1, keepdim=True)
    before = grad_state.clone(memory_format=torch.contiguous_format)
    before[documents.row] = fade * r[documents.first]
    return r.view(output.shape), dlog.mul_(decay).view(log_decay.shape), before


@_backward.register_fake
def _(grad_output, grad_state, output, log_decay, state, cu_seqlens, chunk_size):  # type: ignore[no-untyped-def]
    return output.new_empty(output.shape), log_decay.new_empty(log_decay.shape), state.new_empty(state.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, log_decay, state, cu_seqlens, ctx.chunk_size = inputs
    ctx.save_for_backward(output[0], log_decay, state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    output, log_decay, state, cu_seqlens = ctx.saved_tensors
    zero = output.new_zeros(())
    grad_output = zero.expand(output.shape) if grad_output is None else grad_output
    grad_state = zero.expand(state.shape) if grad_state is None else grad_state
    return (*_backward(grad_output, grad_state, output, log_decay, state, cu_seqlens, ctx.chunk_size), None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("elementwise", "torch"))
sharding.declare("elementwise", Elementwise.Inputs, state=Elementwise.State, output="v", over=("B", "H", "V"))


class _Documents(NamedTuple):
    """Those that have tokens: their rows of the state, their first and last tokens in the stream."""

    row: Tensor
    first: Tensor
    last: Tensor


def _documents(x: Tensor, cu_seqlens: Tensor | None) -> _Documents:
    batch, time = x.shape[:2]
    bounds = torch.arange(batch + 1, device=x.device) * time if cu_seqlens is None else cu_seqlens
    row = bounds.diff().nonzero()[:, 0]
    return _Documents(row, bounds[row], bounds[row + 1] - 1)


def _chunk(x: Tensor, size: int | None) -> int:
    """Tokens per chunk: m tokens take 2m operations in the chunks and T / m between them, fewest for m = √(T/2). If
    there is a divisor of T nearby, it is taken.
    """
    tokens = x.shape[0] * x.shape[1]
    if size is not None:
        return max(1, min(size, tokens))
    best = max(1, math.isqrt(tokens // 2))
    even = [m for m in range(best // 2 + 1, 2 * best) if tokens % m == 0]
    return min(even, key=lambda m: abs(m - best), default=best)


def _stream(x: Tensor, chunk: int, *, exp: bool = False, spare: int = 0) -> Tensor:
    """x (B, T, H, V), or e^x, as (tokens, H, V), filled up with zeros to whole chunks and `spare` tokens more."""
    tokens = x.shape[0] * x.shape[1]
    if tokens % chunk == 0 and not exp and not spare:
        return x.flatten(0, 1)
    stream = x.new_empty(-(-tokens // chunk) * chunk + spare, *x.shape[2:])
    own = stream[:tokens].view(x.shape)
    torch.exp(x, out=own) if exp else own.copy_(x)
    stream[tokens:] = 0
    return stream


_Joins = dict[int, tuple[Tensor, Tensor]]


def _joins(tokens: Tensor, values: Tensor, chunk: int) -> _Joins:
    """What is added to some tokens of the stream, by place in the chunk: the chunks, and the values."""
    places, found = tokens % chunk, {}
    for place in places.unique().tolist():
        own = places == place
        found[place] = (tokens[own] // chunk, values[own])
    return found


def _scan(
    x: Tensor, h: Tensor, decay: Tensor, *, joins: _Joins, rates: Tensor | None = None, backwards: bool = False
) -> None:
    """h_t ← x_t + decay_t ∘ h_{t-1} over the stream; backwards x_t + decay_t ∘ h_{t+1}.

    x, h (chunks, m, H, V); decay likewise, or with one head for all. joins: what else is added. With `rates` decay is
    still to be formed of them, and is zero where something joins.
    """
    order = -1 if backwards else 1
    places = range(x.shape[1])[::order]
    values, memories, decays = x.unbind(1), h.unbind(1), decay.unbind(1)
    logs = None if rates is None else rates.unbind(1)
    added, faded = torch.zeros_like(values[0]), torch.ones_like(decays[0])
    for t in places:
        if logs is not None:
            torch.exp(logs[t], out=decays[t])
            if t in joins:
                decays[t][joins[t][0]] = 0
        torch.addcmul(values[t], decays[t], added, out=added)
        if t in joins:
            added.index_add_(0, *joins[t])
        faded.mul_(decays[t])
    ends, fades = added.unbind(0)[::order], faded.unbind(0)[::order]
    for last, end, fade in zip(ends[:-1], ends[1:], fades[1:], strict=True):
        end.addcmul_(fade, last)

    before = torch.zeros_like(added)  # the memory at the end of the chunk before
    if backwards:
        before[:-1] = added[1:]
    else:
        before[1:] = added[:-1]
    for t in places:
        torch.addcmul(values[t], decays[t], before, out=memories[t])
        if t in joins:
            memories[t].index_add_(0, *joins[t])
        before = memories[t]
