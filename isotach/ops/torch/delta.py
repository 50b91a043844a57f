"""The chunk loop of the delta family: one triangular inverse per chunk, everything else batched matrix products.

In the general form (ops/delta.py) S is the state before a chunk, R and E are the keys that read and erase, K and V what
is written. x_i is what e_i writes, the correction: -u_i for SplitDelta. Delta has E = K and writes Kᵀ (V - U) in all,
so there x = v - u:

    (1 + A) X = Y - (a ∘ R) S          A = tril(R Eᵀ ∘ D, -1)
    Delta          Y = V                           W = E         Z = X
    SplitDelta     Y = -tril(R Kᵀ ∘ D, -1) V       W = [E; K]    Z = [X; V]
    O = tril(Q Wᵀ ∘ D) Z + (a ∘ Q) S               S ← e^{L_m} ∘ S + (b ∘ W)ᵀ Z

With T = (1 + A)⁻¹, X = T Y - T (a ∘ R) S: both products are formed for many chunks at once, and three per chunk remain.
Backwards, with G the gradient of the state after the chunk and F of the corrections once they are solved for:

    dX = tril(Q Eᵀ ∘ D)ᵀ dO + (b ∘ E) G          F = Tᵀ dX
    G ← e^{L_m} ∘ G + (a ∘ Q)ᵀ dO - (T (a ∘ R))ᵀ dX

Readers Q over R with gradients dO over -F then make everything look like linear attention of 2m rows: what comes in
through the state is dS = [dO; -F] Sᵀ for rows, Z Gᵀ for columns, and the scores get [dO; -F] Zᵀ. For Delta dV = F.

log_decay_t fades what tokens s < t left for readers u ≥ t. With "in" the parts of the gradients from inside the chunk
less each token's product with itself (which does not fade, and would drown the rest where decay is strong), "out" the
others, over all rows x and columns w:

    dlog_decay_t = Σ e^{L_m} ∘ S ∘ G + Σ_{s<t} w_s · dw_s^out + Σ_{u≥t} (x_u · dx_u^out + x_u · dx_u^in - w_u · dw_u^in)

The forward keeps no states; the backward recomputes them, the corrections and T in one sweep, and again in groups where
they would not fit. Documents are not split: summaries of delta rules cost a K × K matrix each.

DeltaNet (arXiv:2406.06484, the WY form); the separate keys and the gradients are derived here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.chunks import Block
from isotach.ops.delta import Delta, SplitDelta
from isotach.ops.recurrence import state_dtype
from isotach.ops.torch.fade import Fade, Fades
from isotach.ops.torch.loop import Loop, Run, States, document_bounds
from isotach.ops.torch.scores import flushed
from isotach.ops.torch.scratch import Buffer

CHUNK = 64  # tokens; measured: docs/log.md


@register(Delta, "torch")
def delta(
    rec: Delta, x: Delta.Inputs, s: SplitDelta.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, SplitDelta.State]:
    keys = (x.beta, None, None)
    output, state = _forward(x.q, x.k, x.v, x.log_decay, *keys, s.state, cu_seqlens, chunk_size or CHUNK)
    return output, SplitDelta.State(state)


@register(SplitDelta, "torch")
def split_delta(
    rec: SplitDelta, x: SplitDelta.Inputs, s: SplitDelta.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, SplitDelta.State]:
    keys = (None, x.read, x.erase)
    output, state = _forward(x.q, x.k, x.v, x.log_decay, *keys, s.state, cu_seqlens, chunk_size or CHUNK)
    return output, SplitDelta.State(state)


@torch.library.custom_op("isotach::delta", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    read: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Delta with `beta`, SplitDelta with `read` and `erase`."""
    output = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    given = {"q": q, "k": k, "v": v, "beta": beta, "read": read, "erase": erase, "o": output}
    call = _Call(log_decay, cu_seqlens, chunk_size, given)
    loop = call.loop
    after = loop.documents_like((state,))
    for block in loop.plan.blocks:
        lanes = loop.lanes_of((state,), block)
        for run in loop.runs(block):
            call.forward(run, block, *lanes)
        loop.keep(after, block, lanes, loop.plan.closes)
    return output, after[0]


@_forward.register_fake
def _(q, k, v, log_decay, beta, read, erase, state, cu_seqlens, chunk_size):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape, dtype=q.dtype), state.new_empty(state.shape, dtype=state_dtype(q))


@torch.library.custom_op("isotach::delta_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    read: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_decay: bool,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta, read, erase and state; of shape (0,) where not given or not wanted."""
    given = {"q": q, "k": k, "v": v, "beta": beta, "read": read, "erase": erase}
    grads = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in given.items() if x is not None}
    call = _Call(
        log_decay, cu_seqlens, chunk_size, given | {"do": grad_output} | {f"d{name}": x for name, x in grads.items()}
    )
    loop = call.loop
    dlog = call.fades.collector() if with_decay else None
    before = loop.documents_like((grad_state,)) if with_state else (q.new_empty(0),)
    for block in loop.plan.blocks:
        lanes, after = loop.lanes_of((state,), block), loop.lanes_of((grad_state,), block)
        for run, kept in loop.reversed_states(block, lanes, call.sweep):
            call.backward(run, block, _Kept(*kept), after[0], dlog)
        if with_state:
            loop.keep(before, block, after, loop.plan.opens)
    decay = q.new_empty(0) if dlog is None else dlog.to(log_decay.dtype)
    beta_grad, read_grad, erase_grad = (grads.get(name, q.new_empty(0)) for name in ("beta", "read", "erase"))
    return grads["q"], grads["k"], grads["v"], decay, beta_grad, read_grad, erase_grad, before[0]


@_backward.register_fake
def _(grad_output, grad_state, q, k, v, log_decay, beta, read, erase, state, cu_seqlens, chunk_size, *wanted):  # type: ignore[no-untyped-def]
    with_decay, with_state = wanted
    decay = log_decay.new_empty(log_decay.shape if with_decay else 0, dtype=log_decay.dtype if with_decay else q.dtype)
    keys = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (beta, read, erase)]
    before = state.new_empty(state.shape, dtype=state_dtype(q)) if with_state else q.new_empty(0)
    return *(x.new_empty(x.shape) for x in (q, k, v)), decay, *keys, before


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    q, v, state = tensors[0], tensors[2], tensors[7]
    zero = q.new_zeros(())
    grad_output = zero.expand(v.shape) if grad_output is None else grad_output
    grad_state = zero.to(state_dtype(q)).expand(state.shape) if grad_state is None else grad_state
    wanted = ctx.needs_input_grad[:8]
    grads = _backward(grad_output, grad_state, *tensors, ctx.chunk_size, wanted[3], wanted[7])
    return *(grad.to(x.dtype) if w else None for grad, x, w in zip(grads, tensors, wanted, strict=False)), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("delta", "torch"))
sharding.declare("delta", Delta.Inputs, SplitDelta.Inputs, state=SplitDelta.State, output="v")


class _Opened(NamedTuple):
    """A run's chunks ready for use. Sets of m rows lie one below the other."""

    fade: Fade
    rows: Buffer  # Q over R, or R alone; for products inside the chunk
    columns: Buffer  # W
    far_rows: Buffer  # the same for products with the state
    far_columns: Buffer
    scores: Buffer  # rows against columns


class _Solved(NamedTuple):
    inverse: Tensor  # (N H, m, m): T
    pulled: Buffer  # T (a ∘ R)
    x: Buffer  # T Y, and X once the state is known
    values: Buffer  # Z, which is x itself for Delta


class _Kept(NamedTuple):
    """What a sweep leaves for the backward of a run."""

    before: Tensor  # (N, H, K, V): S before every chunk
    values: Tensor  # (N, H, m or 2 m, V): Z
    inverse: Tensor  # (N H, m, m): T


class _Call:
    """One call's loop and decay. Lane states are (lanes, H, K, V)."""

    def __init__(
        self, log_decay: Tensor, cu_seqlens: Tensor | None, chunk_size: int, tensors: dict[str, Tensor | None]
    ) -> None:
        given = {name: x for name, x in tensors.items() if x is not None}
        batch, time, self.heads, self.width = given["q"].shape
        self.values, self.split = given["v"].shape[-1], "erase" in given
        self.readers = ("q", "read") if self.split else ("q", "k")
        self.writers = ("erase", "k") if self.split else ("k",)
        self.dtype = state_dtype(given["q"])
        size, heads, width, values, sets = self.dtype.itemsize, self.heads, self.width, self.values, len(self.writers)

        def lane_bytes(chunk: int) -> int:  # no method: the cycle would keep the call's tensors until collected
            vectors = (3 + sets) * width + (1 + sets) * values + (1 + 2 * sets) * chunk
            return size * heads * (width * values + chunk * vectors)

        self.loop = Loop(
            given,
            document_bounds(batch, time, cu_seqlens),
            chunk=min(chunk_size, max(1, batch * time)),
            piece=None,
            lane_bytes=lane_bytes,
            dtype=self.dtype,
        )
        self.fades = Fades(log_decay, self.loop, packed=cu_seqlens is not None)

    # ---- one run of chunks

    def forward(self, run: Run, block: Block, lanes: Tensor) -> None:
        loop, m = self.loop, run.step.length
        opened = self._open(run, block, self.readers)
        solved, o = self._solve(run, opened), loop.chunk("o", run, self.values)
        self._carry(run, lanes, opened, solved, reads=o)
        o.flat.baddbmm_(opened.scores.flat[:, :m], solved.values.flat)
        loop.store("o", run, o)

    def sweep(self, runs: list[Run], block: Block, lanes: States, keep: bool) -> list[States]:
        """Advance the lanes over the runs; what _Kept says of each, where it is to be kept."""
        kept: list[States] = []
        (lane,) = lanes
        for run in runs:
            opened = self._open(run, block, self.readers[1:])
            solved = self._solve(run, opened)
            before = lane.new_empty(run.repeats * run.step.count, *lane.shape[1:]) if keep else None
            self._carry(run, lane, opened, solved, passed=before)
            if before is not None:
                kept.append(_Kept(before, solved.values.wide.clone(), solved.inverse))
        return kept

    def backward(self, run: Run, block: Block, kept: _Kept, lanes: Tensor, dlog: Tensor | None) -> None:
        """`lanes`: G after the run, replaced by G before it."""
        loop, m = self.loop, run.step.length
        opened, values = self._open(run, block, self.readers), kept.values.flatten(0, 1)
        scores, left = opened.scores, self._stack("left", run, ["do"], sets=2)
        after = loop.scratch.take("after", *kept.before.shape)
        dx, f = loop.chunk("dx", run, self.values), loop.chunk("f", run, self.values)
        pulled = loop.chunk("pulled", run, self.width)
        torch.bmm(kept.inverse, opened.far_rows.flat[:, m:], out=pulled.flat)
        torch.bmm(scores.flat[:, :m, :m].mT, left.flat[:, :m], out=dx.flat)
        self._carry_back(run, lanes, opened, pulled, dx, left, passed=after.wide)
        torch.bmm(kept.inverse.mT, dx.flat, out=f.flat)
        torch.neg(f.wide, out=left.wide[:, :, m:])

        dscores = self._scratch("dscores", run, 2, len(self.writers) * m)
        drows, dcolumns = self._like("drows", opened.rows), self._like("dcolumns", opened.columns)
        torch.bmm(left.flat, values.mT, out=dscores.flat)
        opened.fade.scores.backward(dscores, opened.rows, opened.columns, drows, dcolumns, strict=True)
        row_factor, column_factor = opened.fade.across
        if row_factor is None:
            drows.flat.baddbmm_(left.flat, kept.before.flatten(0, 1).mT)
        else:
            far = left.flat @ kept.before.flatten(0, 1).mT
            _sets(drows.wide, m).addcmul_(_sets(far.view_as(drows.wide), m), row_factor.unsqueeze(2))
        dcolumns_far = self._like("dcolumns far", dcolumns)
        torch.bmm(values, after.turned, out=dcolumns_far.flat)
        if column_factor is not None:
            _sets(dcolumns_far.wide, m).mul_(column_factor.unsqueeze(2))
        if dlog is not None:
            faded = kept.before * after.wide
            if (between := opened.fade.state[0]) is not None:
                faded.mul_(between)
            grads = (drows.wide, dcolumns.wide, dcolumns_far.wide)
            gradient = _decay_gradient(opened, m, *grads, faded.sum(-1), shared=self.fades.shared)
            self.fades.store(dlog, run, block, gradient)
        dcolumns.wide.add_(dcolumns_far.wide)
        self._add_own(opened, left, kept.values, drows, dcolumns)
        self._store(run, opened, drows, dcolumns)
        if self.split:
            dv = loop.chunk("dv", run, self.values)
            torch.bmm(scores.flat[:, :, m:].mT, left.flat, out=dv.flat)
            dv.flat.baddbmm_(opened.far_columns.flat[:, m:], after.flat)
            loop.store("dv", run, dv)
        else:
            loop.store("dv", run, f)

    # ---- parts of it

    def _open(self, run: Run, block: Block, readers: Sequence[str]) -> _Opened:
        fade, m = self.fades.of(run, block), run.step.length
        row_factor, column_factor = fade.inside
        if not self.split:
            beta = self.loop.load("beta", run).wide
            column_factor = beta if column_factor is None else beta * column_factor
        rows = self._stack("rows", run, readers, scale=row_factor)
        columns = self._stack("columns", run, self.writers, scale=column_factor)
        scores = self._scratch("scores", run, len(readers), len(self.writers) * m)
        fade.scores.forward(rows, columns, scores)
        if self.split:  # r reads before its own token is written
            scores.wide[:, :, -m:].unflatten(3, (-1, m)).diagonal(dim1=2, dim2=4).zero_()
        far_rows = self._far("far rows", rows, fade.across[0], m)
        far_columns = self._far("far columns", columns, fade.across[1], m)
        return _Opened(fade, rows, columns, far_rows, far_columns, scores)

    def _far(self, name: str, near: Buffer, factor: Tensor | None, m: int) -> Buffer:
        if factor is None:
            return near
        far = self._like(name, near)
        torch.mul(_sets(near.wide, m), factor.unsqueeze(2), out=_sets(far.wide, m))
        return far

    def _solve(self, run: Run, opened: _Opened) -> _Solved:
        loop, m = self.loop, run.step.length
        inverse = self._inverse(run, opened)
        pulled, x = loop.chunk("pulled", run, self.width), loop.chunk("x", run, self.values)
        torch.bmm(inverse, opened.far_rows.flat[:, -m:], out=pulled.flat)
        if opened.fade.strong:
            pulled.flat.copy_(flushed(pulled.flat))
        v = loop.load("v", run)
        if not self.split:
            torch.bmm(inverse, v.flat, out=x.flat)
            return _Solved(inverse, pulled, x, x)
        values = self._scratch("values", run, 2, self.values)
        values.wide[:, :, m:] = v.wide
        torch.bmm(inverse, (opened.scores.flat[:, -m:, m:] @ v.flat).neg_(), out=x.flat)
        return _Solved(inverse, pulled, x, values)

    def _inverse(self, run: Run, opened: _Opened) -> Tensor:
        """T (N H, m, m), solved in place from contiguous operands: with copies it takes twice as long."""
        m = run.step.length
        matrix = opened.scores.flat[:, -m:, :m].contiguous()
        inverse = torch.eye(m, dtype=self.dtype, device=matrix.device).repeat(len(matrix), 1, 1)
        torch.linalg.solve_triangular(matrix, inverse, upper=False, unitriangular=True, out=inverse)
        return flushed(inverse) if opened.fade.strong else inverse

    def _carry(
        self,
        run: Run,
        lanes: Tensor,
        opened: _Opened,
        solved: _Solved,
        *,
        reads: Buffer | None = None,
        passed: Tensor | None = None,
    ) -> None:
        """Chunk after chunk, X = T Y - T (a ∘ R) S and S ← e^{L_m} ∘ S + (b ∘ W)ᵀ Z.

        reads   to receive (a ∘ Q) S of every chunk
        passed  (repeats * lanes, H, K, V), to receive S before every chunk
        """
        m, state = run.step.length, run.step.pick(lanes)
        flat = state.flatten(0, 1)
        pulled, x, values = (run.split(buffer.flat) for buffer in (solved.pulled, solved.x, solved.values))
        queries, columns = run.split(opened.far_rows.flat[:, :m]), run.split(opened.far_columns.turned)
        outputs = None if reads is None else run.split(reads.flat)
        kept = None if passed is None else run.split(passed)
        factors = opened.fade.state_by_chunk(run)
        for j in range(run.repeats):
            between, last = factors[j]
            if kept is not None:
                kept[j].copy_(state)
            if outputs is not None:
                torch.bmm(queries[j], flat, out=outputs[j])
            x[j].baddbmm_(pulled[j], flat, alpha=-1)
            if self.split:
                values[j][:, :m] = x[j]
            if between is not None:
                state.mul_(between)
            flat.baddbmm_(columns[j], values[j])
            if last is not None:
                state.mul_(last)
        run.step.put(lanes, state)

    def _carry_back(
        self, run: Run, lanes: Tensor, opened: _Opened, pulled: Buffer, dx: Buffer, left: Buffer, *, passed: Tensor
    ) -> None:
        """From the last chunk to the first, dX += (b ∘ E) G and G ← e^{L_m} ∘ G + (a ∘ Q)ᵀ dO - (T (a ∘ R))ᵀ dX.

        passed  (repeats * lanes, H, K, V), to receive G after every chunk
        """
        m, grad = run.step.length, run.step.pick(lanes)
        flat = grad.flatten(0, 1)
        queries, erased = run.split(opened.far_rows.turned[:, :, :m]), run.split(opened.far_columns.flat[:, :m])
        outputs, corrections = run.split(left.flat[:, :m]), run.split(dx.flat)
        pulls, kept, factors = run.split(pulled.turned), run.split(passed), opened.fade.state_by_chunk(run)
        for j in reversed(range(run.repeats)):
            between, last = factors[j]
            if last is not None:
                grad.mul_(last)
            kept[j].copy_(grad)
            corrections[j].baddbmm_(erased[j], flat)
            if between is not None:
                grad.mul_(between)
            flat.baddbmm_(queries[j], outputs[j])
            flat.baddbmm_(pulls[j], corrections[j], alpha=-1)
        run.step.put(lanes, grad)

    def _add_own(self, opened: _Opened, left: Buffer, values: Tensor, drows: Buffer, dcolumns: Buffer) -> None:
        """What each query reads of its own token, left out inside the chunk."""
        m = values.shape[2] // len(self.writers)
        own = (_sets(values, m) * left.wide[:, :, None, :m]).sum(-1, keepdim=True)
        drows.wide[:, :, :m].add_((own * _sets(opened.columns.wide, m)).sum(2))
        _sets(dcolumns.wide, m).addcmul_(own, opened.rows.wide[:, :, None, :m])

    def _store(self, run: Run, opened: _Opened, drows: Buffer, dcolumns: Buffer) -> None:
        """Undo what loading did, and write the gradients of q, k and of beta or the keys."""
        loop, m = self.loop, run.step.length
        row_factor, column_factor = opened.fade.inside
        dq, dr = _sets(drows.wide, m).unbind(2)
        if self.split:
            de, dk = _sets(dcolumns.wide, m).unbind(2)
            grads = {
                "dq": (dq, row_factor),
                "dread": (dr, row_factor),
                "derase": (de, column_factor),
                "dk": (dk, column_factor),
            }
        else:
            k, beta = loop.load("k", run).wide, loop.load("beta", run).wide
            if row_factor is not None and column_factor is not None:
                dr.mul_(row_factor)
                dcolumns.wide.mul_(column_factor)
            dbeta = (k * dcolumns.wide).sum(-1, keepdim=True)
            grads = {"dq": (dq, row_factor), "dk": (dr.addcmul_(beta, dcolumns.wide), None), "dbeta": (dbeta, None)}
        for name, (grad, factor) in grads.items():
            run.step.store(loop.tensors[name], run.i, run.repeats, grad, factor)

    # ---- buffers of several sets

    def _scratch(self, name: str, run: Run, sets: int, width: int) -> Buffer:
        shape = (run.repeats * run.step.count, self.heads, sets * run.step.length, width)
        return self.loop.scratch.take(name, *shape)

    def _like(self, name: str, other: Buffer) -> Buffer:
        return self.loop.scratch.take(name, *other.wide.shape)

    def _stack(
        self, name: str, run: Run, sources: Sequence[str], *, sets: int | None = None, scale: Tensor | None = None
    ) -> Buffer:
        """The tensors called `sources`, times `scale`, one below the other; further sets are left unwritten."""
        width = self.loop.tensors[sources[0]].shape[-1]
        buffer = self._scratch(name, run, sets or len(sources), width)
        for source, part in zip(sources, _sets(buffer.wide, run.step.length).unbind(2), strict=False):
            run.step.load(self.loop.tensors[source], run.i, run.repeats, part, scale)
        return buffer


def _sets(x: Tensor, m: int) -> Tensor:
    """(N, H, s m, X) as (N, H, s, m, X)."""
    return x.unflatten(2, (-1, m))


def _decay_gradient(
    opened: _Opened, m: int, drows: Tensor, dcolumns: Tensor, dcolumns_far: Tensor, faded: Tensor, *, shared: bool
) -> Tensor:
    """dlog_decay (N, H, m, #K) of every chunk; `faded` (N, H, K) is Σ_v e^{L_m} ∘ S ∘ G."""

    def product(x: Tensor, gradient: Tensor) -> Tensor:
        """Σ over sets, and over channels where they share one decay: (N, H, m, #K)."""
        each = x * gradient
        return _sets(each.sum(-1, keepdim=True) if shared else each, m).sum(2)

    left = product(opened.columns.wide, dcolumns_far)
    read = product(opened.rows.wide, drows) - product(opened.columns.wide, dcolumns)
    faded = faded.sum(-1, keepdim=True) if shared else faded
    one = torch.ones(m, m, dtype=left.dtype, device=left.device)
    return one.triu() @ read + one.tril(-1) @ left + faded.unsqueeze(2)
