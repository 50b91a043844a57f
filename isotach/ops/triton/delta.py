"""GPU kernels of the delta family: without decay, with one per head or per channel; one key, or three.

Checked in Triton's interpreter and compiled for Hopper; not yet run or measured on a GPU (docs/numerics.md).

In a chunk of m tokens, S is the state before it and G the gradient of the state after it; the other letters are those
of ops/delta.py, and T = (1 + tril(R Eᵀ ∘ D, -1))⁻¹:

    U = T (tril(R Kᵀ ∘ D, -1) V + (a ∘ R) S)       S ← e^{L_m} ∘ S + (b ∘ K)ᵀ V - (b ∘ E)ᵀ U
    F = Tᵀ (tril(Q Eᵀ ∘ D)ᵀ dO + (b ∘ E) G)        G ← e^{L_m} ∘ G + (a ∘ Q)ᵀ dO - (a ∘ R)ᵀ F

The second line is the first backwards: what reads erases, what erases reads, and Q writes dO. So is dV what O is.
Delta, which erases where it writes, has Z = V - U = T (V - (a ∘ R) S) instead of both, and F for dV.

Once U and F are known all is linear attention, and so are the other gradients, dO and F reading, V and U read:

    dQ =   tril(dO Vᵀ ∘ D) K     - tril(dO Uᵀ ∘ D) E     + a ∘ (dO Sᵀ)
    dR = - tril(F Vᵀ ∘ D, -1) K  + tril(F Uᵀ ∘ D, -1) E  - a ∘ (F Sᵀ)

and dK and dE backwards, V and U reading. Four kernels (delta_kernels.py) do this:

    invert           T of every chunk at once, by blocks of 16 in float32; with one decay per channel the scores too
    solve            forwards O, in a backward U or Z; backwards F and dV; shares value columns out
    differentiate    forwards dQ and dR, backwards dK, dE and what log_decay gets; shares key columns out
    chain            the states between pieces (pieces.py)

Both sweeps keep the state on chip and compute it anew; nothing that a product returned is transposed. What a piece
makes of a state takes a K × K matrix, which is what it makes of the unit matrix where nothing is written: more columns
for `solve`. U and F are float32 in memory: their rounding would add up where nothing fades.

The gradient of log_decay, with all gradients less each token's product with itself, which does not fade,

    dlog_decay_t = S_t' · G_t' + Σ_{t ≤ u < t'} (q_u · dq_u + r_u · dr_u - k_u · dk_u - e_u · de_u)

for any later t', S_t' the state before token t' and G_t' its gradient; channel by channel where each has its decay. The
last sweep adds it up as it comes, from the nearest *anchor* on, a token where the sweep for dQ kept S. Its error is
that of S · G: of a head that forgets at once little is left but that.

DeltaNet (arXiv:2406.06484) for the chunks; the symmetry and the gradients are derived here.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotach.ops import sharding
from isotach.ops.backends import no_second_derivative, register
from isotach.ops.delta import Delta, SplitDelta
from isotach.ops.triton import delta_kernels as kernels
from isotach.ops.triton import device
from isotach.ops.triton.arithmetic import OPERANDS, Operands
from isotach.ops.triton.layout import flat, padded, sides
from isotach.ops.triton.pieces import cut, divide
from isotach.ops.triton.step import free, one_token

REGISTERS = 255  # of a thread, all there are: left to itself the assembler once took 32 and spilled thousands of bytes
CHUNKS = (16, 32, 64)
SLICE = 32  # channels that `invert` takes at a time
CHAINED = 16  # columns of a state that one program chains
# Of bfloat16 inputs whose factors are not bfloat16: keys times decays, or a key that is float32. Where many roundings
# add up, factors are taken as two bfloat16 each, which is 16 bits of them.
WIDE = Operands(tl.float32, "tf32", "bf16x3", False)


Inputs = Delta.Inputs | SplitDelta.Inputs
Pair = tuple[Tensor, Tensor]  # values (B, T, H, V) and keys (B, T, H, K)
Pairs = tuple[Pair, Pair | None]  # the second counts negatively


class Config(NamedTuple):
    """chunk: tokens that are solved for at a time; finer: of a chunk where keys' gradients are found, which takes more
    room; block: columns of the state per program; warps, stages: Triton's num_warps and num_stages; anchor: tokens
    between anchors; shared: bytes of fast memory that any kernel takes, as compiled for Hopper.
    """

    chunk: int
    finer: int
    block: int
    warps: int
    stages: int
    anchor: int
    shared: int


# By dtype of the queries and the wider of K and V, at most; one decay per head, and one per channel. Chosen by what the
# compiler reports: few spilled registers. Not measured.
HEADS = {
    (torch.bfloat16, 64): Config(64, 16, 64, 4, 2, 256, 144 << 10),
    (torch.bfloat16, 128): Config(64, 16, 64, 8, 2, 256, 216 << 10),
    (torch.bfloat16, 256): Config(32, 16, 32, 8, 2, 256, 170 << 10),
    (torch.float16, 64): Config(32, 16, 32, 4, 2, 256, 99 << 10),
    (torch.float16, 128): Config(32, 16, 32, 8, 2, 256, 99 << 10),
    (torch.float16, 256): Config(16, 16, 16, 8, 1, 256, 99 << 10),
    (torch.float32, 64): Config(16, 16, 32, 8, 1, 64, 48 << 10),
    (torch.float32, 128): Config(16, 16, 16, 8, 1, 64, 48 << 10),
    (torch.float32, 256): Config(16, 16, 16, 8, 1, 64, 99 << 10),
}
CHANNELS = {
    (torch.bfloat16, 64): Config(32, 16, 64, 8, 2, 256, 99 << 10),
    (torch.bfloat16, 128): Config(32, 16, 32, 8, 2, 256, 144 << 10),
    (torch.bfloat16, 256): Config(16, 16, 32, 8, 2, 256, 170 << 10),
    (torch.float16, 64): Config(32, 16, 32, 4, 1, 256, 99 << 10),
    (torch.float16, 128): Config(32, 16, 32, 8, 1, 256, 99 << 10),
    (torch.float16, 256): Config(16, 16, 16, 8, 1, 256, 99 << 10),
    (torch.float32, 64): Config(16, 16, 32, 8, 1, 64, 48 << 10),
    (torch.float32, 128): Config(16, 16, 16, 8, 1, 64, 48 << 10),
    (torch.float32, 256): Config(16, 16, 16, 8, 1, 64, 99 << 10),
}


def _config(q: Tensor, v: Tensor, log_decay: Tensor, chunk_size: int | None) -> Config | str:
    """The configuration for inputs like these, or what cannot be taken."""
    if chunk_size not in (None, *CHUNKS):
        return f"takes chunks of {CHUNKS} tokens; got chunk_size = {chunk_size}"
    width = max(q.shape[-1], v.shape[-1])
    for (dtype, widest), config in (HEADS if log_decay.shape[-1] == 1 else CHANNELS).items():
        if dtype == q.dtype and width <= widest:
            if chunk_size is None:
                return config
            return config._replace(chunk=chunk_size, finer=chunk_size, anchor=max(chunk_size, config.anchor))
    return f"takes heads of at most 256 channels in bfloat16, float16 or float32; got {width} in {q.dtype}"


def _refusal(x: Inputs, chunk_size: int | None) -> str | None:
    config = _config(x.q, x.v, x.log_decay, chunk_size)
    return config if isinstance(config, str) else device.refusal(x.q.device, config.shared)


def _keys(x: Inputs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """beta, read and erase, of which Delta has the first and SplitDelta the others."""
    return (x.beta, None, None) if isinstance(x, Delta.Inputs) else (None, x.read, x.erase)


def _step(
    rec: Delta | SplitDelta, x: Inputs, s: SplitDelta.State, into: SplitDelta.State | None
) -> tuple[Tensor, SplitDelta.State]:
    after = free(s.state) if into is None else into.state
    return one_token(x.q, x.k, x.v, x.log_decay, s.state, after, *_keys(x)), SplitDelta.State(after)


@register(Delta, "triton", device="cuda", refusal=_refusal, step=_step)
@register(SplitDelta, "triton", device="cuda", refusal=_refusal, step=_step)
def delta(
    rec: Delta | SplitDelta, x: Inputs, s: SplitDelta.State, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, SplitDelta.State]:
    output, state = _forward(x.q, x.k, x.v, x.log_decay, *_keys(x), s.state, cu_seqlens, chunk_size)
    return output, SplitDelta.State(state)


@torch.library.custom_op("isotach::delta_triton", mutates_args=())
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
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Delta with `beta`, SplitDelta with `read` and `erase`."""
    call = _Call(q, k, v, log_decay, beta, read, erase, cu_seqlens, chunk_size)
    output, after = q.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)
    call.solve(v, y=output, before=state, between=call.between(v, state), after=after)
    return output, after


@_forward.register_fake
def _(q, k, v, log_decay, beta, read, erase, state, cu_seqlens, chunk_size):  # type: ignore[no-untyped-def]
    return q.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("isotach::delta_triton_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    read: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    with_decay: bool,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta, read, erase and state; of shape (0,) where not given or not wanted."""
    call = _Call(q, k, v, log_decay, beta, read, erase, cu_seqlens, chunk_size)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dread, derase = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (read, erase))
    final, first = (state.new_empty(state.shape, dtype=torch.float32) for _ in range(2))
    u, f = (v.new_empty(v.shape, dtype=torch.float32) for _ in range(2))

    between = call.between(v, state)
    call.solve(v, solved=u, before=state, between=between, after=final)
    grad_between = call.between(grad_output, grad_state, reverse=True)
    call.solve(grad_output, y=dv, solved=f, before=grad_state, between=grad_between, after=first, reverse=True)

    readers: Pairs = (grad_output, q), (f, call.read)
    writers: Pairs = ((u, k), None) if erase is None else ((v, k), (u, erase))
    ledger = call.ledger() if with_decay else None
    partial = dbeta = None
    if beta is not None:
        partial = k.new_empty(k.shape, dtype=torch.float32)
        dbeta = beta.new_empty((call.key_blocks, *beta.shape), dtype=torch.float32)
    call.differentiate(
        readers, writers, (dq, dread if partial is None else partial), before=state, between=between, ledger=ledger
    )
    call.differentiate(
        writers, readers, (dk, derase), before=grad_state, between=grad_between, ledger=ledger, reverse=True,
        met=final, met_between=between, partial=partial, dbeta=dbeta,
    )  # fmt: skip
    dlog = None if ledger is None else call.decay_gradient(ledger).to(log_decay.dtype)
    total = None if dbeta is None else dbeta.sum(0).to(dbeta.dtype if beta is None else beta.dtype)
    nothing = q.new_empty(0)
    dlog, total = nothing if dlog is None else dlog, nothing.clone() if total is None else total
    return dq, dk, dv, dlog, total, dread, derase, first if with_state else nothing.clone()


@_backward.register_fake
def _(grad_output, grad_state, q, k, v, log_decay, beta, read, erase, state, cu_seqlens, chunk_size, *wanted):  # type: ignore[no-untyped-def]
    with_decay, with_state = wanted
    decay = log_decay.new_empty(log_decay.shape) if with_decay else q.new_empty(0)
    keys = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (beta, read, erase)]
    before = state.new_empty(state.shape, dtype=torch.float32) if with_state else q.new_empty(0)
    return *(x.new_empty(x.shape) for x in (q, k, v)), decay, *keys, before


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_state):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    if grad_output is None:
        grad_output = tensors[0].new_zeros(()).expand(tensors[2].shape)
    wanted = ctx.needs_input_grad[:8]
    grads = _backward(grad_output, grad_state, *tensors, ctx.chunk_size, wanted[3], wanted[7])
    return *(grad.to(x.dtype) if w else None for grad, x, w in zip(grads, tensors, wanted, strict=False)), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative("delta", "triton"))
sharding.declare("delta_triton", Delta.Inputs, SplitDelta.Inputs, state=SplitDelta.State, output="v")


class _Call:
    """One call's cut, arithmetic and chunk matrices. States are (documents, H, K, V)."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor | None,
        read: Tensor | None,
        erase: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_size: int | None,
    ) -> None:
        config = _config(q, v, log_decay, chunk_size)
        assert isinstance(config, Config), config  # run has refused already
        self.config, self.q, self.beta = config, q, beta
        self.read, self.erase = (k, k) if read is None or erase is None else (read, erase)
        self.write = None if erase is None else k  # Delta writes where it erases
        self.batch, time, self.heads, self.width = q.shape
        self.values = v.shape[-1]
        self.per_token, self.per_channel = log_decay.shape[1] != 1, log_decay.shape[-1] != 1
        rates = log_decay.flatten(0, 1) if self.per_token else log_decay[:, 0]
        self.log_decay = rates if rates.stride(-1) == 1 or not self.per_channel else rates.contiguous()
        alike = all(x.dtype == q.dtype for x in (k, v, self.read, self.erase))
        self.operands = OPERANDS[q.dtype]
        if q.dtype == torch.bfloat16 and (self.per_channel or not alike):
            self.operands = WIDE
        programs = self.heads * self.blocks(self.values)
        self.pieces = cut(
            self.batch, time, cu_seqlens, programs=programs, chunk=config.chunk, device=q.device
        )  # fmt: skip
        self.matrices = self._matrices(cu_seqlens)

    @property
    def tokens(self) -> int:
        return self.batch * self.pieces.time

    @property
    def key_blocks(self) -> int:
        return self.blocks(self.width)

    def blocks(self, width: int) -> int:
        """Programs that share so many columns of a state."""
        return triton.cdiv(width, min(self.config.block, padded(width)))

    def _matrices(self, cu_seqlens: Tensor | None) -> Tensor:
        """(·, tokens, H, chunk): every chunk's inverse and, with one decay per channel, its scores."""
        config, heads, operands = self.config, self.heads, self.operands
        chunk, count = config.chunk, 1 if not self.per_channel else 2 if self.write is None else 4
        matrices = self.q.new_empty((count, self.tokens, heads, chunk), dtype=torch.float32)
        pieces = divide(self.batch, self.pieces.time, cu_seqlens, tokens=chunk, device=self.q.device)
        if pieces.limit * heads == 0:
            return matrices
        rows = [flat(x) for x in (self.q, self.read, self.erase, self.write, self.beta)]
        with torch.cuda.device_of(self.q):
            kernels.invert[(pieces.limit * heads,)](
                *(row for row, _, _ in rows), self.log_decay, matrices,
                pieces.cu_seqlens, pieces.ends, pieces.document, pieces.documents, pieces.time, self.tokens,
                *(stride for _, *strides in rows for stride in strides), *self.log_decay.stride()[:2],
                HEADS=heads, X=self.width, WIDTH=padded(self.width), SLICE=min(SLICE, padded(self.width)),
                CHUNK=chunk, LEVELS=chunk.bit_length() - 1, PER_TOKEN=self.per_token, PER_CHANNEL=self.per_channel,
                OPERAND=operands.dtype, PRECISION=operands.precision, EXACT=operands.exact,
                num_warps=config.warps, num_stages=config.stages, maxnreg=REGISTERS,
            )  # fmt: skip
        return matrices

    def solve(
        self,
        values: Tensor,
        *,
        y: Tensor | None = None,
        solved: Tensor | None = None,
        before: Tensor | None = None,
        between: Tensor | None = None,
        transitions: Tensor | None = None,
        after: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Fill y, solved and after, or between and transitions; all as the kernel has it."""
        pieces, config, heads, operands = self.pieces, self.config, self.heads, self.operands
        block = min(config.block, padded(self.values))
        blocks = triton.cdiv(self.values, block)
        if transitions is not None:
            blocks += triton.cdiv(self.width, block)
        programs = pieces.limit * heads * blocks
        if programs == 0:
            return
        read, erase, write, reader = self.read, self.erase, self.write, self.q
        if reverse:
            read, erase, write, reader = erase, read, reader, write
        rows = [flat(x) for x in (read, erase, write, values, None if y is None else reader, self.beta)]
        with torch.cuda.device_of(values):
            kernels.solve[(programs,)](
                *(row for row, _, _ in rows), self.log_decay, self.matrices, solved, y,
                before, between, transitions, after, pieces.cu_seqlens, pieces.ends, pieces.document,
                pieces.documents, pieces.time, pieces.tokens, self.tokens,
                *(stride for _, *strides in rows for stride in strides), *self.log_decay.stride()[:2], *sides(before),
                HEADS=heads, K=self.width, V=self.values, WIDTH=padded(self.width), BLOCK=block,
                CHUNK=config.chunk, REVERSE=reverse, PER_TOKEN=self.per_token, PER_CHANNEL=self.per_channel,
                OPERAND=operands.dtype, PRECISION=operands.precision, EXACT=operands.exact, SPLIT=operands.split,
                num_warps=config.warps, num_stages=config.stages, maxnreg=REGISTERS,
            )  # fmt: skip

    def between(self, values: Tensor, before: Tensor | None, *, reverse: bool = False) -> Tensor | None:
        """The states (·, H, K, V) after pieces that others follow; None where documents are whole."""
        pieces, heads, width = self.pieces, self.heads, self.width
        if pieces.between == 0 or heads == 0:
            return None
        between = values.new_empty((pieces.between, heads, width, self.values), dtype=torch.float32)
        transitions = values.new_empty((pieces.between, heads, width, width), dtype=torch.float32)
        self.solve(values, between=between, transitions=transitions, reverse=reverse)
        with torch.cuda.device_of(values):
            kernels.chain[(pieces.documents * heads * triton.cdiv(self.values, CHAINED),)](
                before, between, transitions, pieces.cu_seqlens, pieces.ends, pieces.time, pieces.tokens,
                *sides(before), HEADS=heads, K=width, V=self.values, WIDTH=padded(width), SLICE=16, BLOCK=CHAINED,
                EXACT=self.operands.exact, num_warps=8, maxnreg=REGISTERS,
            )  # fmt: skip
        return between

    def differentiate(
        self,
        readers: Pairs,
        writers: Pairs,
        grads: tuple[Tensor, Tensor],
        *,
        before: Tensor | None,
        between: Tensor | None,
        ledger: "_Ledger | None",
        reverse: bool = False,
        met: Tensor | None = None,
        met_between: Tensor | None = None,
        partial: Tensor | None = None,
        dbeta: Tensor | None = None,
    ) -> None:
        """Fill the gradients of the readers' keys, or backwards of what then reads, the writers'; and the ledger."""
        pieces, config, heads = self.pieces, self.config, self.heads
        programs = pieces.limit * heads * self.key_blocks
        if programs == 0:
            return
        (x1, p1), (x2, p2) = readers[0], readers[1] or (None, None)
        (w1, z1), (w2, z2) = writers[0], writers[1] or (None, None)
        rows = [flat(x) for x in (x1, x2, w1, w2, z1, z2, p1, p2)]
        betas, *betas_at = flat(self.beta)
        noted = (None, None, None) if ledger is None else ledger
        operands = WIDE if self.q.dtype == torch.bfloat16 else OPERANDS[self.q.dtype]
        with torch.cuda.device_of(self.q):
            kernels.differentiate[(programs,)](
                *(row for row, _, _ in rows), *grads, betas, dbeta, partial, *noted, self.log_decay,
                before, between, met if ledger is not None and before is not None else None,
                met_between if ledger is not None else None,
                pieces.cu_seqlens, pieces.ends, pieces.document,
                pieces.documents, pieces.time, pieces.tokens, self.tokens,
                *(stride for _, *strides in rows for stride in strides), *betas_at, *self.log_decay.stride()[:2],
                *sides(before),
                HEADS=heads, V=self.values, K=self.width, WIDTH=padded(self.values),
                BLOCK=min(config.block, padded(self.width)), CHUNK=config.finer, ANCHOR=config.anchor,
                LEVELS=config.finer.bit_length() - 1, REVERSE=reverse, PER_TOKEN=self.per_token,
                PER_CHANNEL=self.per_channel, EXACT=operands.exact,
                PRECISION=operands.precision if ledger is None else operands.exact,
                num_warps=config.warps, num_stages=config.stages, maxnreg=REGISTERS,
            )  # fmt: skip

    def ledger(self) -> "_Ledger":
        entries = self.width if self.per_channel else self.key_blocks
        terms = self.tokens, self.heads, entries
        anchors = self.tokens // self.config.anchor + 1, self.heads, self.width, self.values
        return _Ledger(*(self.q.new_empty(size, dtype=torch.float32) for size in (terms, anchors, terms)))

    def decay_gradient(self, ledger: "_Ledger") -> Tensor:
        """As log_decay is, which may be the same for all tokens."""
        dlog = ledger.dlog.unflatten(0, (self.batch, -1))
        if not self.per_channel:
            dlog = dlog.sum(-1, keepdim=True, dtype=torch.float64)
        return dlog if self.per_token else dlog.sum(1, keepdim=True, dtype=torch.float64)


class _Ledger(NamedTuple):
    """What the two sweeps note for the gradient of log_decay, in float32.

    terms    q · dq + read · dread, without each token's product with itself
    anchors  S (·, H, K, V) at anchors: that before token t, if t is one, is number t // anchor
    dlog     as terms: (tokens, H, ·), by channel or by block of channels
    """

    terms: Tensor
    anchors: Tensor
    dlog: Tensor
