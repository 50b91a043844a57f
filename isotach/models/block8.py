"""A block of TransNormerLLM in eight bits: matrices that read the same numbers are one, and little lies between them.

    [q k v u] = norm(x) [Wq Wk Wv Wu]      S ← λ S + silu(k)ᵀ v      x ← x + (norm(silu(q) S) ∘ u) Wo
    [g h] = norm(x) [Wg Wh]                                          x ← x + (g ∘ h) Wd

The same numbers as models/decoder.py's Block with mixers/lightning.py and nn/ffn.py's GLU in eight bits. In a step the
products are over so soon that what lies between them counts, down to the look-up of an attribute: `step` does what
`forward` does for one token, with less of that (docs/log.md).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Self, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.mixers.lightning import Lightning
from isotach.nn.ffn import GLU
from isotach.nn.linear8 import FEW, Linear8
from isotach.nn.mixer import MixerState
from isotach.nn.norm import SRMSNorm
from isotach.nn.positions import angles, lrpe
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, advance

if TYPE_CHECKING:
    from isotach.models.decoder import Block


class Parts(NamedTuple):
    """What `step` reads, (weight, scale) of a matrix. eps (1, 1, 1); fade (1, H, 1, 1), of the state."""

    qkvu: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    gate_up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    mixer_eps: Tensor
    eps: Tensor
    ffn_eps: Tensor
    fade: Tensor


class Block8(nn.Module):
    """qkvu (4 D, D), out (D, D), gate_up (2 hidden, D), down (D, hidden); theta (H, K) in layers that turn q and k."""

    log_decay: Tensor

    def __init__(self, block: "Block", *, empty: bool = False) -> None:
        """The block's weights rounded, or `empty` room for those of a file."""
        super().__init__()
        parts = Published.of(block)
        assert parts is not None
        mixer, ffn = parts.mixer, parts.ffn
        self.heads, self.recurrence = mixer.heads, Decay()
        self.silu = ffn.activation == "silu"
        norms = (parts.mixer_norm, parts.norm, parts.ffn_norm)
        self.mixer_norm, self.norm, self.ffn_norm = (SRMSNorm(norm.width, eps=norm.eps) for norm in norms)
        self.qkvu = Linear8.of(mixer.q, mixer.k, mixer.v, parts.gate, empty=empty)
        self.out = Linear8.of(mixer.out, empty=empty)
        self.gate_up = Linear8.of(ffn.gate, ffn.up, empty=empty)
        self.down = Linear8.of(ffn.down, empty=empty)
        self.theta = None if mixer.theta is None else nn.Parameter(mixer.theta.detach().clone(), requires_grad=False)
        self.register_buffer("log_decay", mixer.log_decay.view(1, 1, -1, 1).clone(), persistent=False)
        self._parts: Parts | None = None  # for steps, once there was one

    @staticmethod
    def fits(block: nn.Module, *, least: int) -> TypeGuard["Block"]:
        """Whether it is a block as published whose matrices have at least so many rows and columns."""
        parts = None if isinstance(block, Block8) else Published.of(block)
        return parts is not None and min(*parts.mixer.q.weight.shape, *parts.ffn.up.weight.shape) >= least

    def forward(
        self, x: Float[Tensor, "B T D"], state: MixerState | None, span: Span, shared: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "B T D"], MixerState]:
        """As Block.forward; `shared` is for other blocks."""
        batch, time, width = x.shape
        before = None if state is None else state["main"]
        one = time == 1 and span.cu_seqlens is None and span.group is None and x.device.type == "cpu"
        if before is not None and one and self.theta is None and batch <= FEW and x.dtype == torch.float32:
            x, after = self.step(x, before.state)
            return x, {"main": Decay.State(after)}
        qkvu = self.qkvu.product(self.mixer_norm(x)).to(x.dtype)
        q, k, v, u = qkvu.view(batch, time, 4, self.heads, -1).unbind(2)
        q, k = F.silu(q), F.silu(k)
        if self.theta is not None:
            angle = angles(span.positions, self.theta)
            q, k = lrpe(q, angle), lrpe(k, angle)
        inputs = Decay.Inputs(q, k, v, self.log_decay.expand(batch, -1, -1, -1))
        o, memory = advance(self.recurrence, inputs, before, span)
        o = self.norm(o.view(batch, time, width)) * u.reshape(batch, time, width)
        x = x + self.out.product(o).view(batch, time, width)
        gate, up = self.gate_up.product(self.ffn_norm(x)).chunk(2, -1)
        if self.silu:
            gate = F.silu(gate.to(x.dtype))
        return x + self.down.product(gate * up).view(batch, time, width), {"main": memory}

    def step(
        self, x: Float[Tensor, "B 1 D"], state: Float[Tensor, "B H K V"]
    ) -> tuple[Float[Tensor, "B 1 D"], Float[Tensor, "B H K V"]]:
        """x and the state after a token of each row, of at most FEW rows in float32 on a CPU, where theta is None."""
        qkvu, out, gate_up, down, mixer_eps, eps, ffn_eps, fade = self._parts or self._collect()
        product = torch._weight_int8pack_mm
        batch, _, width = x.shape
        _, heads, keys, values = state.shape
        each = batch * heads

        h = normalized(x, mixer_eps).to(torch.bfloat16)
        q, k, v, u = product(h.view(batch, width), *qkvu).float().view(batch, 4, heads, keys).unbind(1)
        state = state.contiguous() * fade
        matrices = state.view(each, keys, values)
        matrices.baddbmm_(F.silu(k).view(each, keys, 1), v.reshape(each, 1, values))
        o = torch.bmm(F.silu(q).view(each, 1, keys), matrices).view(batch, 1, width)
        o = (normalized(o, eps) * u.reshape(batch, 1, width)).to(torch.bfloat16)
        x = x + product(o.view(batch, width), *out).view(batch, 1, width)

        h = normalized(x, ffn_eps).to(torch.bfloat16)
        gate, up = product(h.view(batch, width), *gate_up).chunk(2, -1)
        if self.silu:
            gate = F.silu(gate.float())
        return x + product((gate * up).to(torch.bfloat16), *down).view(batch, 1, width), state

    def _collect(self) -> Parts:
        def parts(layer: Linear8) -> tuple[Tensor, Tensor]:
            return layer.weight, layer.scale.to(torch.bfloat16)

        def eps(norm: SRMSNorm) -> Tensor:
            return self.log_decay.new_full((1, 1, 1), norm.eps)

        self._parts = Parts(
            *(parts(self.qkvu), parts(self.out), parts(self.gate_up), parts(self.down)),
            *(eps(self.mixer_norm), eps(self.norm), eps(self.ffn_norm)),
            fade=self.log_decay.exp().view(1, -1, 1, 1),
        )
        return self._parts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As Module._apply, behind every move to another device or dtype, after which the parts are others."""
        self._parts = None
        return super()._apply(fn, recurse)

    def stored(self, name: str, context: int) -> tuple[int, int]:
        """As Block.stored; nothing here grows."""
        return 0, self.heads

    def room(self, name: str, context: int) -> int:
        return 0


class Published(NamedTuple):
    """The parts of a block of TransNormerLLM: lightning attention with a plain gate, and a GLU without biases."""

    mixer_norm: SRMSNorm
    mixer: Lightning
    gate: nn.Linear
    norm: SRMSNorm
    ffn_norm: SRMSNorm
    ffn: GLU

    @classmethod
    def of(cls, block: nn.Module) -> Self | None:
        """None where a Block is another."""
        mixer, ffn, before, behind = block.mixer, block.ffn, block.mixer_norm, block.ffn_norm
        if not (isinstance(mixer, Lightning) and isinstance(ffn, GLU) and ffn.down.bias is None):
            return None
        if mixer.gate is None or mixer.activation != "none" or mixer.activate_values:
            return None
        if mixer.energy is not None or mixer.cache is not None or not isinstance(mixer.norm, SRMSNorm):
            return None
        if not (isinstance(before, SRMSNorm) and isinstance(behind, SRMSNorm)):
            return None
        return cls(before, mixer, mixer.gate, mixer.norm, behind, ffn)


def normalized(x: Float[Tensor, "B 1 D"], eps: Float[Tensor, "1 1 1"]) -> Float[Tensor, "B 1 D"]:
    """SimpleRMSNorm in three operations."""
    return x * torch.baddbmm(eps, x, x.mT, alpha=1 / x.shape[-1]).rsqrt_()
