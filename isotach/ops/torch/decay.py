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

Lightning Attention-2 (arXiv:2401.04658, algorithms 1 and 2); the gradient of the decay is derived here.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from isotach.ops.backends import register
from isotach.ops.chunks import Block, Step, plan
from isotach.ops.decay import Decay
from isotach.ops.recurrence import state_dtype
from isotach.ops.torch.scores import ChannelScores, HeadScores
from isotach.ops.torch.scratch import Buffer, Scratch

# Measured: docs/log.md.
CHUNK = 64  # tokens
RUN_BYTES = 8 << 20  # of chunks that are one batch but for their states
BLOCK_BYTES = 16 << 20  # states and buffers of the lanes that are processed together
FEW_FLOPS = 2.5e6  # a step with less work is mostly dispatch (one head of 64, say): long documents are then split ...
STEP_FLOPS = 12e6  # ... into lanes enough for this much; their states cost a sweep more
PIECE_CHUNKS = 8  # a split lane has at least this many chunks
STATE_BYTES = 64 << 20  # recomputed states the backward holds at a time


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
    loop = _Loop(cu_seqlens, chunk_size, q=q, k=k, v=v, log_decay=log_decay, o=output)
    after = loop.documents_like(state)
    for block, lanes in loop.states_before(state):
        for run in loop.runs(block):
            loop.forward(run, block, lanes)
        loop.keep(after, block, lanes, loop.plan.closes)
    return output, after


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
    loop = _Loop(
        cu_seqlens, chunk_size, q=q, k=k, v=v, log_decay=log_decay, do=grad_output, dq=dq, dk=dk, dv=dv, dlog=dlog
    )
    before = loop.documents_like(grad_state) if with_state else q.new_empty(0)
    for (block, lanes), (_, after) in zip(loop.states_before(state), loop.grads_after(grad_state), strict=True):
        for run, own in loop.reversed_states(block, lanes):
            loop.backward(run, block, own, after)
        if with_state:
            loop.keep(before, block, after, loop.plan.opens)
    return dq, dk, dv, q.new_empty(0) if dlog is None else dlog.to(log_decay.dtype), before


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


def _refuse(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "decay: the torch backend has no second derivative; got a backward through its backward; "
        "use backend='reference' for gradients of gradients"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


class _Fade(NamedTuple):
    """The decay of one chunk: a (·, H, m, #K), b likewise, the whole chunk's (·, H, #K, 1), its logarithm, D."""

    a: Tensor
    b: Tensor
    total: Tensor
    log_total: Tensor
    scores: HeadScores | ChannelScores


def _collector(log_decay: Tensor) -> Tensor:
    """Room for the gradient of log_decay: every token's is written once, a shared one is summed in float64."""
    if log_decay.shape[1] != 1:
        return torch.empty(log_decay.shape, dtype=log_decay.dtype, device=log_decay.device)
    return torch.zeros(log_decay.shape, dtype=torch.float64, device=log_decay.device)


class _Run(NamedTuple):
    """Chunks i .. i + repeats - 1 of a step. Only the state passes from one to the next; all else is one batch."""

    step: Step
    i: int
    repeats: int

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Per repeat, from a tensor whose first axis holds one repeat after the other."""
        return flat.unflatten(0, (self.repeats, -1)).unbind(0)


class _Loop:
    """One call's tensors by name, plan and buffers. Lane tensors are (lanes, H, K, V)."""

    def __init__(self, cu_seqlens: Tensor | None, chunk_size: int, **tensors: Tensor | None) -> None:
        self.tensors = {name: x.flatten(0, 1) for name, x in tensors.items() if x is not None}
        q, v, log_decay = tensors["q"], tensors["v"], tensors["log_decay"]
        assert q is not None
        assert v is not None
        assert log_decay is not None
        batch, time, self.heads, self.width = q.shape
        self.values = v.shape[-1]
        self.log_decay = log_decay
        self.packed = cu_seqlens is not None
        self.scratch = Scratch(state_dtype(q), q.device)
        self._fades: dict[int, _Fade] = {}
        bounds = tuple(range(0, batch * time + 1, time)) if cu_seqlens is None else tuple(cu_seqlens.tolist())
        chunk = min(chunk_size, max(1, batch * time))
        self.plan = plan(
            bounds,
            chunk,
            piece=self._piece(bounds, chunk),
            lanes_per_block=max(1, BLOCK_BYTES // self._lane_bytes(chunk)),
            device=q.device,
        )

    def runs(self, block: Block) -> list[_Run]:
        """The block's chunks in order, as many at a time as fit in cache."""
        runs = []
        for step in block.steps:
            size = max(1, RUN_BYTES // (step.count * self._lane_bytes(step.length)))
            runs += [_Run(step, i, min(size, step.repeats - i)) for i in range(0, step.repeats, size)]
        return runs

    def _lane_bytes(self, chunk: int) -> int:
        per_head = self.width * self.values + chunk * (2 * self.width + 2 * self.values + chunk)
        return self.scratch.dtype.itemsize * self.heads * per_head

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
        plan, lanes = self.plan, None
        if plan.links:
            lanes = state[plan.document].to(self.scratch.dtype)
            local, log_total = torch.zeros_like(lanes), self._log_totals()
            for block in plan.blocks:
                for run in self.runs(block):
                    fade = self.fade(run, block)
                    k, v = self.load("k", run), self.load("v", run)
                    k.wide.mul_(fade.b)
                    self._carry(run, local[block.lanes], fade, k, v)
                    self._add(run, log_total[block.lanes], fade)
            for lane, following in plan.links:
                lanes[following] = log_total[lane].to(lanes.dtype).exp() * lanes[lane] + local[lane]
        for block in plan.blocks:
            own = state[plan.document[block.lanes]].to(self.scratch.dtype) if lanes is None else lanes[block.lanes]
            yield block, own

    def grads_after(self, grad_state: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Every block with the gradients of the states after its lanes: states_before, mirrored."""
        plan, lanes = self.plan, None
        if plan.links:
            lanes = grad_state[plan.document].to(self.scratch.dtype)
            local, log_total = torch.zeros_like(lanes), self._log_totals()
            for block in plan.blocks:
                for run in reversed(self.runs(block)):
                    fade = self.fade(run, block)
                    q, do = self.load("q", run), self.load("do", run)
                    q.wide.mul_(fade.a)
                    self._carry(run, local[block.lanes], fade, q, do, backwards=True)
                    self._add(run, log_total[block.lanes], fade)
            for lane, following in reversed(plan.links):
                lanes[lane] = log_total[following].to(lanes.dtype).exp() * lanes[following] + local[following]
        for block in plan.blocks:
            document = plan.document[block.lanes]
            yield block, grad_state[document].to(self.scratch.dtype) if lanes is None else lanes[block.lanes]

    def documents_like(self, state: Tensor) -> Tensor:
        """A row per document for `keep` to fill; an empty document's row is copied."""
        documents = torch.empty(state.shape, dtype=self.scratch.dtype, device=state.device)
        documents[self.plan.empty] = state[self.plan.empty].to(documents.dtype)
        return documents

    def keep(self, documents: Tensor, block: Block, lanes: Tensor, which: Tensor) -> None:
        """Write the block's lanes where `which` is set to their documents' rows."""
        chosen = which[block.lanes]
        documents[self.plan.document[block.lanes][chosen]] = lanes[chosen]

    def reversed_states(self, block: Block, lanes: Tensor) -> Iterator[tuple[_Run, Tensor]]:
        """The block's runs from last to first, each with the states before its chunks; `lanes` is overwritten."""
        runs = self.runs(block)
        chunks = sum(run.repeats for run in runs)
        fits = chunks * lanes.numel() * lanes.element_size() <= STATE_BYTES
        size = len(runs) if fits else math.ceil(math.sqrt(len(runs)))
        groups = [runs[i : i + size] for i in range(0, len(runs), size)]
        starts = []
        for group in groups[:-1]:
            starts.append(lanes.clone())
            self._sweep(group, block, lanes)
        for group in reversed(groups):
            states = self._sweep(group, block, lanes, keep=True)
            while states:
                yield group[len(states) - 1], states.pop()
            if starts:
                lanes.copy_(starts.pop())

    def _sweep(self, runs: list[_Run], block: Block, lanes: Tensor, *, keep: bool = False) -> list[Tensor]:
        """Advance the lanes over the runs; the states before their chunks, where they are to be kept."""
        states = []
        for run in runs:
            fade = self.fade(run, block)
            k, v = self.load("k", run), self.load("v", run)
            k.wide.mul_(fade.b)
            before = lanes.new_empty(run.repeats * run.step.count, *lanes.shape[1:]) if keep else None
            self._carry(run, lanes, fade, k, v, passed=before)
            states += [] if before is None else [before]
        return states

    # ---- one run of chunks

    def forward(self, run: _Run, block: Block, lanes: Tensor) -> None:
        fade = self.fade(run, block)
        q, k, v = self.load("q", run), self.load("k", run), self.load("v", run)
        scores, o = self.chunk("scores", run, run.step.length), self.chunk("o", run, self.values)
        fade.scores.forward(q, k, scores)
        torch.bmm(scores.flat, v.flat, out=o.flat)
        q.wide.mul_(fade.a)
        k.wide.mul_(fade.b)
        self._carry(run, lanes, fade, k, v, reads=(q, o))
        self.store("o", run, o)

    def backward(self, run: _Run, block: Block, before: Tensor, lanes: Tensor) -> None:
        """`before`: S of every chunk; `lanes`: G after the run, replaced by G before it."""
        fade, width = self.fade(run, block), self.width
        q, k, v, do = (self.load(name, run) for name in ("q", "k", "v", "do"))
        with_decay = "dlog" in self.tensors

        scores, dscores = self.chunk("scores", run, run.step.length), self.chunk("dscores", run, run.step.length)
        dq_in, dq_out, dk_in, dk_out = (self.chunk(name, run, width) for name in ("dq_in", "dq_out", "dk_in", "dk_out"))
        dv, faded = self.chunk("dv", run, self.values), self.chunk("faded", run, width)
        fade.scores.forward(q, k, scores)
        torch.bmm(scores.turned, do.flat, out=dv.flat)
        torch.bmm(do.flat, v.turned, out=dscores.flat)
        fade.scores.backward(dscores, q, k, dq_in, dk_in, strict=with_decay)

        after = self.scratch.take("after", *before.shape)
        torch.mul(q.wide, fade.a, out=faded.wide)
        self._carry(run, lanes, fade, faded, do, backwards=True, passed=after.wide)
        torch.bmm(do.flat, before.flatten(0, 1).transpose(1, 2), out=dq_out.flat)
        torch.bmm(v.flat, after.turned, out=dk_out.flat)
        torch.mul(k.wide, fade.b, out=faded.wide)
        dv.flat.baddbmm_(faded.flat, after.flat)
        dq_out.wide.mul_(fade.a)
        dk_out.wide.mul_(fade.b)
        if with_decay:
            across = (fade.total * before * after.wide).sum(-1)
            inside = (dq_in.wide, dk_in.wide, dq_out.wide, dk_out.wide)
            dlog = _decay_gradient(across, q.wide, k.wide, *inside, shared=fade.a.shape[-1] == 1)
            self._store_decay(run, block, dlog)
            own = (do.wide * v.wide).sum(-1, keepdim=True)
            dq_in.wide.addcmul_(own, k.wide)
            dk_in.wide.addcmul_(own, q.wide)
        dq_in.wide.add_(dq_out.wide)
        dk_in.wide.add_(dk_out.wide)
        for name, grad in (("dq", dq_in), ("dk", dk_in), ("dv", dv)):
            self.store(name, run, grad)

    def _carry(
        self,
        run: _Run,
        lanes: Tensor,
        fade: _Fade,
        left: Buffer,
        right: Buffer,
        *,
        backwards: bool = False,
        passed: Tensor | None = None,
        reads: tuple[Buffer, Buffer] | None = None,
    ) -> None:
        """Chunk after chunk, S ← e^{L_m} ∘ S + leftᵀ right; backwards, the same for G from the last chunk to the first.

        passed  (repeats * lanes, H, K, V), to receive S before (G after) every chunk
        reads   (a ∘ q, o): o += (a ∘ q) S in every chunk
        """
        state = run.step.pick(lanes)
        flat = state.flatten(0, 1)
        lefts, rights = run.split(left.turned), run.split(right.flat)
        totals = run.split(fade.total) if fade.total.shape[0] > 1 else (fade.total,) * run.repeats
        kept = None if passed is None else run.split(passed)
        queries, outputs = (None, None) if reads is None else (run.split(x.flat) for x in reads)
        for j in reversed(range(run.repeats)) if backwards else range(run.repeats):
            if kept is not None:
                kept[j].copy_(state)
            if queries is not None and outputs is not None:
                outputs[j].baddbmm_(queries[j], flat)
            state.mul_(totals[j])
            flat.baddbmm_(lefts[j], rights[j])
        run.step.put(lanes, state)

    @staticmethod
    def _add(run: _Run, log_total: Tensor, fade: _Fade) -> None:
        """The run's decay on top of what each of its lanes has so far."""
        shared = fade.log_total.shape[0] == 1
        total = fade.log_total * run.repeats if shared else torch.stack(run.split(fade.log_total)).sum(0)
        run.step.put(log_total, run.step.pick(log_total).add_(total))

    def chunk(self, name: str, run: _Run, width: int) -> Buffer:
        return self.scratch.take(name, run.repeats * run.step.count, self.heads, run.step.length, width)

    def load(self, name: str, run: _Run) -> Buffer:
        source = self.tensors[name]
        buffer = self.chunk(name, run, source.shape[-1])
        run.step.load(source, run.i, run.repeats, buffer.wide)
        return buffer

    def store(self, name: str, run: _Run, value: Buffer) -> None:
        run.step.store(self.tensors[name], run.i, run.repeats, value.wide)

    def _store_decay(self, run: _Run, block: Block, dlog: Tensor) -> None:
        if self.log_decay.shape[1] != 1:
            run.step.store(self.tensors["dlog"], run.i, run.repeats, dlog)
        else:
            total = dlog.sum(2).flatten(1).double()
            self.tensors["dlog"].flatten(1).index_add_(0, self._sequences(run, block), total)

    # ---- decay

    def fade(self, run: _Run, block: Block) -> _Fade:
        """The decay of the run's chunks; computed once per length where it is the same for all tokens and sequences."""
        step = run.step
        if self.log_decay.shape[1] != 1:
            flat = self.tensors["log_decay"]
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
        dtype = self.scratch.dtype
        scores = HeadScores if running.shape[-1] == 1 else ChannelScores
        log_total = last.transpose(-1, -2)
        return _Fade(
            running.to(dtype).exp(),
            (last - running).to(dtype).exp_(),
            log_total.to(dtype).exp(),
            log_total,
            scores(running, self.scratch),
        )

    def _sequences(self, run: _Run, block: Block) -> Tensor:
        """The row of the batch that each chunk of the run belongs to."""
        document = run.step.pick(self.plan.document[block.lanes])
        return (torch.zeros_like(document) if self.packed else document).repeat(run.repeats)

    def _log_totals(self) -> Tensor:
        lanes, channels = len(self.plan.document), self.log_decay.shape[-1]
        return torch.zeros(lanes, self.heads, channels, 1, dtype=torch.float64, device=self.scratch.device)


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
    earlier = left.cumsum(2) - left
    return read.flip(2).cumsum(2).flip(2) + earlier + across.unsqueeze(2)
