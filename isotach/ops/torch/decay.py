"""The chunk loop of the decay family: sweeps over cache-resident chunks, everything a batched matrix product.

In a chunk of m tokens with state S before it, L the running sum of log_decay (see ops/decay.py):

    D_rs = e^{L_r - L_s} for r ≥ s, else 0          a_r = e^{L_r}        b_s = e^{L_m - L_s}
    o = ((q kᵀ) ∘ D) v + (a ∘ q) S                  S ← e^{L_m} ∘ S + (b ∘ k)ᵀ v

and backwards, with G the gradient of the state after the chunk, P = (q kᵀ) ∘ D and W = (do vᵀ) ∘ D:

    dq = W k + a ∘ (do Sᵀ)       dk = Wᵀ q + b ∘ (v Gᵀ)       dv = Pᵀ do + (b ∘ k) G
    G ← e^{L_m} ∘ G + (a ∘ q)ᵀ do

log_decay_t fades what tokens s < t left for tokens u ≥ t. With "in" the part of dq, dk from inside the chunk less each
token's product with itself (which does not fade, and would drown the rest where decay is strong), "out" the other part:

    dlog_decay_t = Σ e^{L_m} ∘ S ∘ G + Σ_{s<t} k_s · dk_s^out + Σ_{u≥t} (q_u · dq_u^out + q_u · dq_u^in - k_u · dk_u^in)

The forward keeps no states; the backward recomputes them in one sweep, and again in groups where they would not fit.

Where a chunk decays by less than e^60 in all, no exponent needs care: with q' = e^L ∘ q and k' = e^{-L} ∘ k

    o = tril(q' k'ᵀ) v + q' S        S ← e^{L_m} ∘ (S + k'ᵀ v)

and everything above holds for q', k' with D = 1 (below the diagonal), a = b = 1, G replaced by e^{L_m} ∘ G; at the end
dq = e^L ∘ dq' and dk = e^{-L} ∘ dk'. Otherwise the decay is put on the scores, as scores.py tells.

Lightning Attention-2 (arXiv:2401.04658, algorithms 1 and 2); the gradient of the decay is derived here.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.chunks import Block
from isotach.ops.decay import Decay
from isotach.ops.recurrence import state_dtype
from isotach.ops.torch.loop import Loop, Run, States, document_bounds
from isotach.ops.torch.scores import SAFE, ChannelScores, HeadScores, weight
from isotach.ops.torch.scratch import Buffer

# Measured: docs/log.md.
CHUNK = 64  # tokens
FEW_FLOPS = 2.5e6  # a step with less work is mostly dispatch (one head of 64, say): long documents are then split ...
STEP_FLOPS = 12e6  # ... into lanes enough for this much; their states cost a sweep more
PIECE_CHUNKS = 8  # a split lane has at least this many chunks


@register(Decay, "torch")
def decay(
    rec: Decay, x: Decay.Inputs, s: Decay.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Decay.State]:
    output, state = _forward(*x, s.state, cu_seqlens, chunk_size or CHUNK)
    return output, Decay.State(state)


@torch.library.custom_op("isotach::decay", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, cu_seqlens: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    output = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    call = _Call(cu_seqlens, chunk_size, q=q, k=k, v=v, log_decay=log_decay, o=output)
    loop = call.loop
    after = loop.documents_like((state,))
    for block, lanes in call.states_before(state):
        for run in loop.runs(block):
            call.forward(run, block, lanes)
        loop.keep(after, block, (lanes,), loop.plan.closes)
    return output, after[0]


@_forward.register_fake
def _(q, k, v, log_decay, state, cu_seqlens, chunk_size):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape, dtype=q.dtype), state.new_empty(state.shape, dtype=state_dtype(q))


@torch.library.custom_op("isotach::decay_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_decay: bool,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and state; of shape (0,) where the last two are not wanted."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dlog = _collector(log_decay) if with_decay else None
    call = _Call(
        cu_seqlens, chunk_size, q=q, k=k, v=v, log_decay=log_decay, do=grad_output, dq=dq, dk=dk, dv=dv, dlog=dlog
    )
    loop = call.loop
    before = loop.documents_like((grad_state,)) if with_state else (q.new_empty(0),)
    for (block, lanes), (_, after) in zip(call.states_before(state), call.grads_after(grad_state), strict=True):
        for run, (own,) in loop.reversed_states(block, (lanes,), call.sweep):
            call.backward(run, block, own, after)
        if with_state:
            loop.keep(before, block, (after,), loop.plan.opens)
    return dq, dk, dv, q.new_empty(0) if dlog is None else dlog.to(log_decay.dtype), before[0]


@_backward.register_fake
def _(grad_output, grad_state, q, k, v, log_decay, state, cu_seqlens, chunk_size, with_decay, with_state):  # type: ignore[no-untyped-def]
    dlog = log_decay.new_empty(log_decay.shape) if with_decay else q.new_empty(0)
    before = state.new_empty(state.shape, dtype=state_dtype(q)) if with_state else q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), dlog, before)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, cu_seqlens, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, log_decay, state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
    zero = q.new_zeros(())
    grad_output = zero.expand(v.shape) if grad_output is None else grad_output
    grad_state = zero.to(state_dtype(q)).expand(state.shape) if grad_state is None else grad_state
    wanted = ctx.needs_input_grad[3:5]
    *grads, dlog, before = _backward(
        grad_output, grad_state, q, k, v, log_decay, state, cu_seqlens, ctx.chunk_size, *wanted
    )
    return (*grads, dlog if wanted[0] else None, before.to(state.dtype) if wanted[1] else None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("decay", "torch"))
sharding.declare("decay", Decay.Inputs, state=Decay.State, output="v")


class _Fade(NamedTuple):
    """The decay of one chunk. `scores` None: q and k are loaded times a = e^L and b = e^{-L}, the state fades last.

    a, b (·, H, m, #K);  total, log_total: of the whole chunk (·, H, #K, 1)
    """

    a: Tensor
    b: Tensor
    total: Tensor
    log_total: Tensor
    scores: HeadScores | ChannelScores | None

    @property
    def early(self) -> tuple[Tensor | None, Tensor | None]:
        """What q and k are multiplied by as they are loaded."""
        return (self.a, self.b) if self.scores is None else (None, None)


def _collector(log_decay: Tensor) -> Tensor:
    """Room for the gradient of log_decay: every token's is written once, a shared one is summed in float64."""
    if log_decay.shape[1] != 1:
        return torch.empty(log_decay.shape, dtype=log_decay.dtype, device=log_decay.device)
    return torch.zeros(log_decay.shape, dtype=torch.float64, device=log_decay.device)


class _Call:
    """One call's loop and decay. Lane states are (lanes, H, K, V)."""

    def __init__(self, cu_seqlens: Tensor | None, chunk_size: int, **tensors: Tensor | None) -> None:
        given = {name: x for name, x in tensors.items() if x is not None}
        q, self.log_decay = given["q"], given["log_decay"]
        batch, time, self.heads, self.width = q.shape
        self.values = given["v"].shape[-1]
        self.packed = cu_seqlens is not None
        self.dtype = state_dtype(q)
        self._fades: dict[int, _Fade] = {}
        bounds, chunk = document_bounds(batch, time, cu_seqlens), min(chunk_size, max(1, batch * time))
        size, heads, width, values = self.dtype.itemsize, self.heads, self.width, self.values

        def lane_bytes(chunk: int) -> int:  # no method: the cycle would keep the call's tensors until collected
            return size * heads * (width * values + chunk * (2 * width + 2 * values + chunk))

        self.loop = Loop(
            given,
            bounds,
            chunk=chunk,
            piece=self._piece(bounds, chunk),
            lane_bytes=lane_bytes,
            dtype=self.dtype,
        )

    def _piece(self, bounds: tuple[int, ...], chunk: int) -> int | None:
        """Tokens per lane where whole documents would make steps too small, else None."""
        inside = chunk * (self.width + self.values) + 2 * self.width * self.values
        work = 2 * self.heads * chunk * inside
        wanted = math.ceil(STEP_FLOPS / work)
        if work * (len(bounds) - 1) >= FEW_FLOPS:
            return None
        return chunk * max(PIECE_CHUNKS, math.ceil(bounds[-1] / wanted / chunk))

    # ---- states of lanes

    def states_before(self, state: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Every block with the states before its lanes: the document's, or the one the previous lane leaves."""
        loop, plan, lanes = self.loop, self.loop.plan, None
        if plan.links:
            lanes = state[plan.document].to(self.dtype)
            local, log_total = torch.zeros_like(lanes), self._log_totals()
            for block in plan.blocks:
                for run in loop.runs(block):
                    self._advance(run, block, local[block.lanes])
                    self._add(run, log_total[block.lanes], self.fade(run, block))
            for lane, following in plan.links:
                lanes[following] = log_total[lane].to(lanes.dtype).exp() * lanes[lane] + local[lane]
        for block in plan.blocks:
            yield block, loop.lanes_of((state,), block)[0] if lanes is None else lanes[block.lanes]

    def grads_after(self, grad_state: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Every block with the gradients of the states after its lanes: states_before, mirrored."""
        loop, plan, lanes = self.loop, self.loop.plan, None
        if plan.links:
            lanes = grad_state[plan.document].to(self.dtype)
            local, log_total = torch.zeros_like(lanes), self._log_totals()
            for block in plan.blocks:
                for run in reversed(loop.runs(block)):
                    fade = self.fade(run, block)
                    q, do = loop.load("q", run, scale=fade.a), loop.load("do", run)
                    self._carry_back(run, local[block.lanes], fade, q, do)
                    self._add(run, log_total[block.lanes], fade)
            for lane, following in reversed(plan.links):
                lanes[lane] = log_total[following].to(lanes.dtype).exp() * lanes[following] + local[following]
        for block in plan.blocks:
            yield block, loop.lanes_of((grad_state,), block)[0] if lanes is None else lanes[block.lanes]

    def sweep(self, runs: list[Run], block: Block, lanes: States, keep: bool) -> list[States]:
        """Advance the lanes over the runs; the states before their chunks, where they are to be kept."""
        states: list[States] = []
        (lane,) = lanes
        for run in runs:
            before = lane.new_empty(run.repeats * run.step.count, *lane.shape[1:]) if keep else None
            self._advance(run, block, lane, passed=before)
            states += [] if before is None else [(before,)]
        return states

    def _advance(self, run: Run, block: Block, lanes: Tensor, *, passed: Tensor | None = None) -> None:
        fade = self.fade(run, block)
        k, v = self.loop.load("k", run, scale=fade.b), self.loop.load("v", run)
        self._carry(run, lanes, fade, k, v, passed=passed)

    # ---- one run of chunks

    def forward(self, run: Run, block: Block, lanes: Tensor) -> None:
        loop, fade = self.loop, self.fade(run, block)
        rows, keys = fade.early
        q, k, v = loop.load("q", run, scale=rows), loop.load("k", run, scale=keys), loop.load("v", run)
        scores, o = loop.chunk("scores", run, run.step.length), loop.chunk("o", run, self.values)
        _scores(fade, q, k, scores)
        torch.bmm(scores.flat, v.flat, out=o.flat)
        if fade.scores is not None:
            q.wide.mul_(fade.a)
            k.wide.mul_(fade.b)
        self._carry(run, lanes, fade, k, v, reads=(q, o))
        loop.store("o", run, o)

    def backward(self, run: Run, block: Block, before: Tensor, lanes: Tensor) -> None:
        """`before`: S of every chunk; `lanes`: G after the run, replaced by G before it."""
        loop, fade, width = self.loop, self.fade(run, block), self.width
        rows, keys = fade.early
        q, k = loop.load("q", run, scale=rows), loop.load("k", run, scale=keys)
        v, do = loop.load("v", run), loop.load("do", run)
        with_decay = "dlog" in loop.tensors

        scores, dscores = loop.chunk("scores", run, run.step.length), loop.chunk("dscores", run, run.step.length)
        dq, dk, dv = loop.chunk("dq", run, width), loop.chunk("dk", run, width), loop.chunk("dv", run, self.values)
        _scores(fade, q, k, scores)
        torch.bmm(scores.turned, do.flat, out=dv.flat)
        torch.bmm(do.flat, v.turned, out=dscores.flat)
        _scores_backward(fade, dscores, q, k, dq, dk, strict=with_decay)

        faded_q, faded_k = q, k
        if fade.scores is not None:
            faded_q, faded_k = loop.chunk("faded q", run, width), loop.chunk("faded k", run, width)
            torch.mul(q.wide, fade.a, out=faded_q.wide)
            torch.mul(k.wide, fade.b, out=faded_k.wide)
        after = loop.scratch.take("after", *before.shape)
        self._carry_back(run, lanes, fade, faded_q, do, passed=after.wide)
        dv.flat.baddbmm_(faded_k.flat, after.flat)
        if with_decay or fade.scores is not None:
            dq_out, dk_out = loop.chunk("dq_out", run, width), loop.chunk("dk_out", run, width)
            torch.bmm(do.flat, before.flatten(0, 1).transpose(1, 2), out=dq_out.flat)
            torch.bmm(v.flat, after.turned, out=dk_out.flat)
            if fade.scores is not None:
                dq_out.wide.mul_(fade.a)
                dk_out.wide.mul_(fade.b)
            if with_decay:
                total = fade.total if fade.scores is not None else 1.0
                across = (total * before * after.wide).sum(-1)
                inside = (dq.wide, dk.wide, dq_out.wide, dk_out.wide)
                dlog = _decay_gradient(across, q.wide, k.wide, *inside, shared=fade.a.shape[-1] == 1)
                self._store_decay(run, block, dlog)
                own = (do.wide * v.wide).sum(-1, keepdim=True)
                dq.wide.addcmul_(own, k.wide)
                dk.wide.addcmul_(own, q.wide)
            dq.wide.add_(dq_out.wide)
            dk.wide.add_(dk_out.wide)
        else:
            dq.flat.baddbmm_(do.flat, before.flatten(0, 1).transpose(1, 2))
            dk.flat.baddbmm_(v.flat, after.turned)
        for name, grad, scale in (("dq", dq, rows), ("dk", dk, keys), ("dv", dv, None)):
            loop.store(name, run, grad, scale=scale)

    def _carry(
        self,
        run: Run,
        lanes: Tensor,
        fade: _Fade,
        k: Buffer,
        v: Buffer,
        *,
        passed: Tensor | None = None,
        reads: tuple[Buffer, Buffer] | None = None,
    ) -> None:
        """Chunk after chunk, S ← e^{L_m} ∘ S + kᵀ v for faded k.

        passed  (repeats * lanes, H, K, V), to receive S before every chunk
        reads   (a ∘ q, o): o += (a ∘ q) S in every chunk
        """
        state = run.step.pick(lanes)
        flat = state.flatten(0, 1)
        lefts, rights, totals = run.split(k.turned), run.split(v.flat), self._totals(run, fade)
        kept = None if passed is None else run.split(passed)
        queries, outputs = (None, None) if reads is None else (run.split(x.flat) for x in reads)
        for j in range(run.repeats):
            if kept is not None:
                kept[j].copy_(state)
            if queries is not None and outputs is not None:
                outputs[j].baddbmm_(queries[j], flat)
            if fade.scores is not None:
                state.mul_(totals[j])
            flat.baddbmm_(lefts[j], rights[j])
            if fade.scores is None:
                state.mul_(totals[j])
        run.step.put(lanes, state)

    def _carry_back(
        self, run: Run, lanes: Tensor, fade: _Fade, q: Buffer, do: Buffer, *, passed: Tensor | None = None
    ) -> None:
        """From the last chunk to the first, G ← e^{L_m} ∘ G + qᵀ do for faded q.

        passed  (repeats * lanes, H, K, V), to receive G after every chunk: faded already where q and k are loaded faded
        """
        grad = run.step.pick(lanes)
        flat = grad.flatten(0, 1)
        lefts, rights, totals = run.split(q.turned), run.split(do.flat), self._totals(run, fade)
        kept = None if passed is None else run.split(passed)
        for j in reversed(range(run.repeats)):
            if fade.scores is None:
                grad.mul_(totals[j])
            if kept is not None:
                kept[j].copy_(grad)
            if fade.scores is not None:
                grad.mul_(totals[j])
            flat.baddbmm_(lefts[j], rights[j])
        run.step.put(lanes, grad)

    @staticmethod
    def _totals(run: Run, fade: _Fade) -> tuple[Tensor, ...]:
        return run.split(fade.total) if fade.total.shape[0] > 1 else (fade.total,) * run.repeats

    @staticmethod
    def _add(run: Run, log_total: Tensor, fade: _Fade) -> None:
        """The run's decay on top of what each of its lanes has so far."""
        shared = fade.log_total.shape[0] == 1
        total = fade.log_total * run.repeats if shared else torch.stack(run.split(fade.log_total)).sum(0)
        run.step.put(log_total, run.step.pick(log_total).add_(total))

    def _store_decay(self, run: Run, block: Block, dlog: Tensor) -> None:
        out = self.loop.tensors["dlog"]
        if self.log_decay.shape[1] != 1:
            run.step.store(out, run.i, run.repeats, dlog)
        else:
            total = dlog.sum(2).flatten(1).double()
            out.flatten(1).index_add_(0, self._sequences(run, block), total)

    # ---- decay

    def fade(self, run: Run, block: Block) -> _Fade:
        """The decay of the run's chunks; computed once per length where it is the same for all tokens and sequences."""
        step = run.step
        if self.log_decay.shape[1] != 1:
            flat = self.loop.tensors["log_decay"]
            shape = (run.repeats * step.count, self.heads, step.length, flat.shape[2])
            out = torch.empty(shape, dtype=torch.float64, device=flat.device)
            return self._fade(step.load(flat, run.i, run.repeats, out).cumsum(2))
        one = self.log_decay.shape[0] == 1 or self.log_decay.stride(0) == 0
        if one and step.length in self._fades:
            return self._fades[step.length]
        rate = self.log_decay[:1, 0] if one else self.log_decay[self._sequences(run, block), 0]
        count = torch.arange(1, step.length + 1, dtype=torch.float64, device=rate.device)
        fade = self._fade(rate.double().unsqueeze(2) * count[:, None])
        if one:
            self._fades[step.length] = fade
        return fade

    def _fade(self, running: Tensor) -> _Fade:
        last = running[..., -1:, :]
        log_total = last.transpose(-1, -2)
        if float(last.min()) > -SAFE:
            total = log_total.to(self.dtype).exp()
            return _Fade(running.to(self.dtype).exp(), running.neg().to(self.dtype).exp_(), total, log_total, None)
        kind = HeadScores if running.shape[-1] == 1 else ChannelScores
        scores, total = kind(running, self.loop.scratch), weight(log_total, self.dtype)
        return _Fade(weight(running, self.dtype), weight(last - running, self.dtype), total, log_total, scores)

    def _sequences(self, run: Run, block: Block) -> Tensor:
        """The row of the batch that each chunk of the run belongs to."""
        document = run.step.pick(self.loop.plan.document[block.lanes])
        return (torch.zeros_like(document) if self.packed else document).repeat(run.repeats)

    def _log_totals(self) -> Tensor:
        lanes, channels = len(self.loop.plan.document), self.log_decay.shape[-1]
        return torch.zeros(lanes, self.heads, channels, 1, dtype=torch.float64, device=self.log_decay.device)


def _scores(fade: _Fade, q: Buffer, k: Buffer, scores: Buffer) -> None:
    """P (N, H, m, m) into `scores`."""
    if fade.scores is not None:
        fade.scores.forward(q, k, scores)
    else:
        torch.bmm(q.flat, k.turned, out=scores.flat)
        scores.wide.tril_()


def _scores_backward(fade: _Fade, grad: Buffer, q: Buffer, k: Buffer, dq: Buffer, dk: Buffer, *, strict: bool) -> None:
    """dq, dk from grad = do vᵀ, which is overwritten; `strict` leaves out each token's product with itself."""
    if fade.scores is not None:
        fade.scores.backward(grad, q, k, dq, dk, strict=strict)
    else:
        grad.wide.tril_(-1 if strict else 0)
        torch.bmm(grad.flat, k.flat, out=dq.flat)
        torch.bmm(grad.turned, q.flat, out=dk.flat)


def _decay_gradient(
    across: Tensor,
    q: Tensor,
    k: Tensor,
    dq_in: Tensor,
    dk_in: Tensor,
    dq_out: Tensor,
    dk_out: Tensor,
    *,
    shared: bool,
) -> Tensor:
    """dlog_decay (N, H, m, 1 or K) of a chunk; `across` (N, H, K) is Σ_v e^{L_m} ∘ S ∘ G."""
    left = k * dk_out
    read = q * (dq_in + dq_out) - k * dk_in
    if shared:
        left, read, across = left.sum(-1, True), read.sum(-1, True), across.sum(-1, True)
    earlier = F.pad(left[:, :, :-1].cumsum(2), (0, 0, 1, 0))  # an inclusive sum less its own term would cancel
    return read.flip(2).cumsum(2).flip(2) + earlier + across.unsqueeze(2)
