"""The operations that are measured: inputs of any size, the family that computes them, and what they cost.

Costs are those of the problem, whatever an implementation does. Bytes: every input is read and every output written
once; a backward reads the inputs and the output's gradient and writes a gradient of each input that learns. FLOPs are
those of the closed forms in isotach/ops with chunks of C = 64 tokens and whole C × C scores, a multiply-add counting
twice; per token and head, with K = V = D:

    decay           scores 2CD, times values 2CD, reading the state 2D², writing it 2D²
    delta           two scores 4CD, the triangular system as a product with its inverse 2CD, times values 2CD, reading
                    the state for keys and for queries 4D², writing it 2D²
    second order    decay twice, over (q, k, k) and over (q, y, v)
    Mamba-2         decay, whose scores are one for all heads
    scan            2 per channel
    short filter    2 per tap and channel

The backward of a product is two, and half of the forward's are done once more, as neither scores nor states are kept:
2.5 times the forward, as is usual for softmax. That of the scan is 3 times (states again, and two more), that of the
filter 2 times. Toeplitz products have no such count: theirs depends on how they are computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.ops.decay import Decay
from isotach.ops.delta import Delta
from isotach.ops.elementwise import Elementwise
from isotach.ops.engine import Span
from isotach.ops.higher_order import SecondOrder, Tokens
from isotach.ops.recurrence import Recurrence, Tensors
from isotach.ops.toeplitz import Toeplitz
from isotach.ops.window import Window
from isotach.rng import generator

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward + backward")
CHUNK = 64
TAPS = 4  # of short filters
Leaves = tuple[Tensor, ...]


class Shape(NamedTuple):
    """B, H, T, D, and how many documents the row holds: more than one are packed, and then B is 1."""

    batch: int = 1
    heads: int = 8
    tokens: int = 4096
    width: int = 128
    documents: int = 1

    @property
    def rows(self) -> int:
        """B · T · H: heads of all tokens."""
        return self.batch * self.tokens * self.heads

    def __str__(self) -> str:
        packed = f", {self.documents} documents" if self.documents > 1 else ""
        return f"B{self.batch} H{self.heads} T{self.tokens} D{self.width}{packed}"

    def span(self, device: torch.device) -> Span:
        if self.documents == 1:
            return Span.of(self.batch, self.tokens, device=device)
        return Span.packed(document_bounds(self.tokens, self.documents).to(device))


def _last_head(leaves: Leaves) -> Leaves:
    """Of (B, T, H, ·)."""
    return tuple(leaf[-1:, :, -1:] for leaf in leaves)


class Operation(NamedTuple):
    """rec: the family; draw: tensors in the given dtype, gates in float32, those that learn requiring a gradient.

    inputs     the family's inputs, of what was drawn
    flops      of the forward; None where they depend on the implementation
    backward   FLOPs of the backward over those of the forward
    alone      what was drawn, for the last row and head only
    shared     which of what was drawn more than one row or head reads
    """

    rec: Recurrence
    draw: Callable[[Shape, torch.device, torch.dtype], Leaves]
    inputs: Callable[..., Tensors]
    flops: Callable[[Shape], float] | None
    backward: float = 2.5
    alone: Callable[[Leaves], Leaves] = _last_head
    shared: tuple[int, ...] = ()


def flops(operation: Operation, which: str, shape: Shape) -> float | None:
    """FLOPs of a pass; None where they depend on the implementation."""
    if operation.flops is None:
        return None
    return operation.flops(shape) * {FORWARD: 1.0, BACKWARD: operation.backward, BOTH: 1.0 + operation.backward}[which]


def moved(which: str, leaves: Leaves, output: Tensor) -> int:
    """Bytes that a pass reads and writes at least."""
    forward = sum(leaf.nbytes for leaf in leaves) + output.nbytes
    backward = forward + _learned(leaves)
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]


def least(which: str, leaves: Leaves, output: Tensor) -> int:
    """Bytes that a pass cannot do without: inputs and output, and in a backward the gradients of both."""
    forward = sum(leaf.nbytes for leaf in leaves) + output.nbytes
    return forward if which == FORWARD else forward + output.nbytes + _learned(leaves)


def _learned(leaves: Leaves) -> int:
    return sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)


def document_bounds(tokens: int, documents: int) -> Tensor:
    """cu_seqlens (documents + 1,) of documents of random length, at least one token each."""
    cuts = torch.randperm(tokens - 1, generator=generator(0, "cuts"))[: documents - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])


def slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi's geometric slopes 2^{-8h/H}, h = 1..H, as MiniMax and the first layer of TransNormerLLM use them."""
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device, dtype=torch.float32))


def _drawn(name: str, *size: int, device: torch.device) -> Tensor:
    return torch.randn(size, generator=generator(0, name, device=device), device=device)


def _qkv(shape: Shape, device: torch.device, dtype: torch.dtype, *, unit: str = "") -> Leaves:
    """Queries, keys and values (B, T, H, D) that learn, those named in `unit` of length 1."""
    size = (shape.batch, shape.tokens, shape.heads, shape.width)
    leaves = (_drawn(name, *size, device=device) for name in "qkv")
    scaled = (F.normalize(x, dim=-1) if name in unit else x for name, x in zip("qkv", leaves, strict=True))
    return tuple(x.to(dtype).requires_grad_() for x in scaled)


def _fixed(shape: Shape, device: torch.device) -> Tensor:
    return -slopes(shape.heads, device).view(1, 1, -1, 1).repeat(shape.batch, 1, 1, 1)


def _gate(shape: Shape, width: int, device: torch.device, *, over: float = 16.0) -> Tensor:
    """log_decay (B, T, H, width) as in Gated Linear Attention; a smaller `over` forgets faster."""
    gate = _drawn("gate", shape.batch, shape.tokens, shape.heads, width, device=device)
    return (F.logsigmoid(gate) / over).requires_grad_()


def _decay_of(kind: str) -> Callable[[Shape, torch.device, torch.dtype], Leaves]:
    """One decay per head, fixed or learned; per token; per channel; or so strong that 16 tokens lose e^60."""

    def draw(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
        if kind in ("fixed", "learned"):
            log_decay = _fixed(shape, device).requires_grad_(kind == "learned")
        else:
            wide = 1 if kind == "token" else shape.width
            log_decay = _gate(shape, wide, device, over=0.1 if kind == "strong" else 16.0)
        return (*_qkv(shape, device, dtype, unit="k"), log_decay)

    return draw


def _delta_of(kind: str) -> Callable[[Shape, torch.device, torch.dtype], Leaves]:
    """The delta rule without decay, with one per head and token (gated), or with one per channel (KDA)."""

    def draw(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
        beta = _drawn("beta", shape.batch, shape.tokens, shape.heads, 1, device=device).sigmoid().requires_grad_()
        if kind == "plain":
            log_decay = torch.zeros(shape.batch, 1, shape.heads, 1, device=device)
        else:
            log_decay = _gate(shape, 1 if kind == "gated" else shape.width, device)
        return (*_qkv(shape, device, dtype, unit="k"), beta, log_decay)

    return draw


def _mamba2(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
    """B and C (B, T, 1, D), x (B, T, H, D), dt (B, T, H, 1), and A (1, 1, H, 1), which does not learn."""
    batch, heads, tokens, width, _ = shape
    b, c = (_drawn(name, batch, tokens, 1, width, device=device).to(dtype).requires_grad_() for name in "BC")
    x = _drawn("x", batch, tokens, heads, width, device=device).to(dtype).requires_grad_()
    dt = F.softplus(_drawn("dt", batch, tokens, heads, 1, device=device) - 4).requires_grad_()
    a = -torch.arange(1, heads + 1, device=device, dtype=torch.float32)
    return b, c, x, dt, a.view(1, 1, heads, 1).repeat(batch, 1, 1, 1)


def _mamba2_inputs(b: Tensor, c: Tensor, x: Tensor, dt: Tensor, a: Tensor) -> Decay.Inputs:
    """k = B and q = C for all heads, v = dt x, log_decay = A dt."""
    heads = (-1, -1, x.shape[2], -1)
    return Decay.Inputs(c.expand(heads), b.expand(heads), (x * dt).to(x.dtype), a * dt)


def _second_order(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
    return (*_qkv(shape, device, dtype, unit="qk"), _fixed(shape, device))


def _scan(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
    v = _drawn("v", shape.batch, shape.tokens, shape.heads, shape.width, device=device)
    return v.to(dtype).requires_grad_(), _gate(shape, shape.width, device, over=1.0)


def _filter(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
    """x (B, T, H·D) and taps (W, H·D)."""
    channels = shape.heads * shape.width
    x = _drawn("x", shape.batch, shape.tokens, channels, device=device)
    return tuple(leaf.to(dtype).requires_grad_() for leaf in (x, _drawn("taps", TAPS, channels, device=device)))


def _toeplitz(shape: Shape, device: torch.device, dtype: torch.dtype) -> Leaves:
    """v (B, T, 1, H·D) and a kernel (T, 1, H·D) that fades."""
    channels = shape.heads * shape.width
    v = _drawn("v", shape.batch, shape.tokens, 1, channels, device=device)
    lags = torch.arange(shape.tokens, device=device).flip(0)[:, None, None]
    kernel = _drawn("kernel", shape.tokens, 1, channels, device=device) * 0.99**lags
    return v.to(dtype).requires_grad_(), kernel.to(dtype).requires_grad_()


def _last_channel(leaves: Leaves) -> Leaves:
    """Of a signal (B, T, ..., D) and its filter (·, ..., D)."""
    signal, taps = leaves
    return signal[-1:, ..., -1:], taps[..., -1:]


def _fading(shape: Shape) -> float:
    return shape.rows * (4.0 * CHUNK * shape.width + 4.0 * shape.width**2)


def _erasing(shape: Shape) -> float:
    return shape.rows * (8.0 * CHUNK * shape.width + 6.0 * shape.width**2)


def _shared_scores(shape: Shape) -> float:
    scores = shape.rows * 2.0 * CHUNK * shape.width
    return _fading(shape) - scores + scores / shape.heads


OPERATIONS = {
    "decay": Operation(Decay(), _decay_of("fixed"), Decay.Inputs, _fading),
    "decay, learned": Operation(Decay(), _decay_of("learned"), Decay.Inputs, _fading),
    "decay per token": Operation(Decay(), _decay_of("token"), Decay.Inputs, _fading),
    "GLA": Operation(Decay(), _decay_of("channel"), Decay.Inputs, _fading),
    "GLA, strong": Operation(Decay(), _decay_of("strong"), Decay.Inputs, _fading),
    "Mamba-2": Operation(Decay(), _mamba2, _mamba2_inputs, _shared_scores, shared=(0, 1)),
    "delta": Operation(Delta(), _delta_of("plain"), Delta.Inputs, _erasing),
    "gated delta": Operation(Delta(), _delta_of("gated"), Delta.Inputs, _erasing),
    "KDA": Operation(Delta(), _delta_of("channel"), Delta.Inputs, _erasing),
    "HLA": Operation(SecondOrder(), _second_order, Tokens, lambda shape: 2 * _fading(shape)),
    "HGRN": Operation(
        Elementwise(), _scan, Elementwise.Inputs, lambda shape: 2.0 * shape.rows * shape.width, backward=3.0
    ),
    "short filter": Operation(
        Window(TAPS), _filter, Window.Inputs, lambda shape: 2.0 * TAPS * shape.rows * shape.width, backward=2.0,
        alone=_last_channel, shared=(1,),
    ),
    "TNN": Operation(Toeplitz(), _toeplitz, Toeplitz.Inputs, None, alone=_last_channel, shared=(1,)),
}  # fmt: skip
