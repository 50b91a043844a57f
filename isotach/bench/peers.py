"""Other implementations of the operations in families.py, called as their authors call them.

A peer gets contiguous inputs in the layout it asks for. It is compared with the definition through that layout, values
and gradients, before it is timed without it. Nothing here is needed to import or to measure Isotach: whoever is not
installed, or cannot run on the device, is named.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.bench.families import Leaves
from isotach.config import nearest
from isotach.errors import UserError

QUERIES = 64  # that softmax attention is compared for, where the scores of all would not fit


class Call(NamedTuple):
    """One way to compute an operation.

    inputs   what was drawn, in the layout that `forward` takes; gradients flow back through it
    restore  the output of `forward`, as the operation's
    exact    what it computes instead of the operation, of what was drawn, the last tokens' outputs at least
    """

    inputs: Leaves
    forward: Callable[..., Tensor]
    restore: Callable[[Tensor], Tensor] = lambda output: output
    exact: Callable[..., Tensor] | None = None


class Adapter(NamedTuple):
    """module: what must be installed; call: the operation's leaves, as drawn, turned into a Call."""

    module: str
    call: Callable[..., Call]


class Peer(NamedTuple):
    """device: the only kind it is compared on, None for all; operations: what it can compute, by name."""

    device: str | None
    operations: Mapping[str, Adapter]


def chosen(names: str) -> tuple[str, ...]:
    """The peers of a comma-separated list; UserError names the known ones where one is not."""
    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in wanted:
        if name not in PEERS:
            known = ", ".join(PEERS)
            raise UserError(f"bench: expected --against to name {known}; got {name!r}; {nearest(name, PEERS)}")
    return wanted


def absent(names: Sequence[str], device: torch.device) -> Iterator[str]:
    """A sentence for everybody, or every part of one, that cannot be compared on `device`."""
    for name in names:
        modules = sorted({adapter.module for adapter in PEERS[name].operations.values()})
        yield from filter(None, dict.fromkeys(_obstacle(name, module, device) for module in modules))


def find(name: str, operation: str, device: torch.device) -> Callable[..., Call] | None:
    """How the peer computes the operation on `device`; None where it does not or cannot."""
    adapter = PEERS[name].operations.get(operation)
    return None if adapter is None or _obstacle(name, adapter.module, device) else adapter.call


def _obstacle(name: str, module: str, device: torch.device) -> str | None:
    only = PEERS[name].device
    if only not in (None, device.type):
        return f"{name}: needs a GPU"
    if find_spec(module) is None:
        return f"{name}: not installed" if module == name else f"{name}: {module} is not installed"
    return None


# ---- flash-linear-attention: (B, T, H, D) as ours, gates of one number per head without their last axis


def _fla_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Call:
    from fla.ops.simple_gla import chunk_simple_gla

    slope = log_decay[0, 0, :, 0].detach().contiguous()
    return Call((q, k, v), lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=slope, scale=1.0)[0])


def _fla_decay_per_token(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Call:
    from fla.ops.simple_gla import chunk_simple_gla

    return Call((q, k, v, log_decay[..., 0]), lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g, scale=1.0)[0])


def _fla_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Call:
    from fla.ops.gla import chunk_gla

    return Call((q, k, v, log_decay), lambda q, k, v, g: chunk_gla(q, k, v, g, scale=1.0)[0])


def _fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Call:
    from fla.ops.delta_rule import chunk_delta_rule

    inputs = (q, k, v, beta[..., 0].to(q.dtype))
    return Call(inputs, lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta, scale=1.0)[0])


def _fla_gated_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Call:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        output: Tensor = chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]
        return output

    return Call((q, k, v, beta[..., 0], log_decay[..., 0]), forward)


def _fla_kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Call:
    from fla.ops.kda import chunk_kda

    return Call((q, k, v, beta[..., 0], log_decay), lambda q, k, v, beta, g: chunk_kda(q, k, v, g, beta, scale=1.0)[0])


def _fla_scan(v: Tensor, log_decay: Tensor) -> Call:
    from fla.ops.hgrn import chunk_hgrn

    return Call((v.flatten(2), log_decay.flatten(2)), lambda x, g: chunk_hgrn(x, g)[0], lambda o: o.view(v.shape))


def _fla_filter(x: Tensor, taps: Tensor) -> Call:
    from fla.modules.causal_conv1d import causal_conv1d

    return Call((x, taps.mT), lambda x, weight: causal_conv1d(x, weight)[0])


# ---- mamba-ssm and causal-conv1d


def _mamba_scan(b: Tensor, c: Tensor, x: Tensor, dt: Tensor, a: Tensor) -> Call:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    rate = a[0, 0, :, 0].detach().contiguous()

    def forward(b: Tensor, c: Tensor, x: Tensor, dt: Tensor) -> Tensor:
        output: Tensor = mamba_chunk_scan_combined(x, dt, rate, b, c, chunk_size=256)
        return output

    return Call((b, c, x, dt[..., 0]), forward)


def _mamba_filter(x: Tensor, taps: Tensor) -> Call:
    """Channels before time, which its kernels read; contiguous so."""
    from causal_conv1d import causal_conv1d_fn

    return Call((x.mT, taps.mT), lambda x, weight: causal_conv1d_fn(x, weight), lambda o: o.mT)


# ---- transformers: the PyTorch code of its models, unwrapped from what would replace it by GPU kernels


class Minimax:
    """The block algorithm of transformers' MiniMaxLightningAttention, (B, H, T, D) in and out.

    Restated from transformers/models/minimax/modeling_minimax.py (Apache-2.0): the same products in the same order,
    with the decay factors prepared once, as the module does. slope (H, 1, 1) is -log_decay.
    """

    def __init__(self, slope: Tensor, *, block: int = 256) -> None:
        row = torch.arange(1, block + 1, device=slope.device)
        self.slope, self.block = slope, block
        self.query_decay = torch.exp(-slope * row[:, None])
        self.key_decay = torch.exp(-slope * (block - row[:, None]))
        distance = slope * (row[:, None] - row[None, :])
        self.diagonal_decay = torch.exp(torch.where(distance >= 0, -distance, -torch.inf))[None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.zeros(*q.shape[:2], k.shape[-1], v.shape[-1], device=v.device, dtype=v.dtype)
        outputs = []
        for start in range(0, q.shape[2], self.block):
            q_block, k_block, v_block = (x[:, :, start : start + self.block] for x in (q, k, v))
            length = q_block.shape[2]
            scores = q_block @ k_block.transpose(-1, -2)
            within = (scores * self.diagonal_decay[:, :, :length, :length]) @ v_block
            before = (q_block * self.query_decay[:, :length]) @ state
            outputs.append(before + within)
            update = (k_block * self.key_decay[:, -length:]).transpose(-1, -2) @ v_block
            state = state * torch.exp(-self.slope * length) + update
        return torch.cat(outputs, dim=-2)


def _minimax(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Call:
    attend = Minimax(-log_decay.detach()[0, 0, :, :, None].to(q.dtype))
    return Call(tuple(x.transpose(1, 2) for x in (q, k, v)), attend, lambda o: o.transpose(1, 2))


def _transformers_delta(model: str, function: str) -> Callable[..., Call]:
    """It scales queries itself, by D^{-1/2}, which its layout undoes."""

    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Call:
        fallback = _fallback(model, function)
        gate = log_decay[..., 0] if log_decay.shape[-1] == 1 else log_decay

        def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
            output: Tensor = fallback(q, k, v, g=gate, beta=beta, initial_state=None, output_final_state=False)[0]
            return output

        return Call((q * q.shape[-1] ** 0.5, k, v, beta[..., 0], gate), forward)

    return call


def _transformers_mamba2(b: Tensor, c: Tensor, x: Tensor, dt: Tensor, a: Tensor) -> Call:
    fallback, rate = _fallback("mamba2", "mamba2_chunk_scan"), a[0, 0, :, 0].detach()

    def forward(b: Tensor, c: Tensor, x: Tensor, dt: Tensor) -> Tensor:
        output: Tensor = fallback(x, dt, rate, b, c, chunk_size=256)
        return output[:, : x.shape[1]]

    return Call((b, c, x, dt[..., 0]), forward)


def _fallback(model: str, function: str) -> Callable[..., Any]:
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    found: Callable[..., Any] = inspect.unwrap(getattr(module, function))
    return found


# ---- PyTorch alone


def _softmax(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Call:
    def exact(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """All queries of a short text, the last of a long one."""
        tokens = q.shape[1]
        some = tokens if tokens <= 16 * QUERIES else QUERIES
        future = torch.ones(some, tokens, dtype=torch.bool, device=q.device).triu(tokens - some + 1)
        q, k, v = (x.transpose(1, 2) for x in (q[:, -some:], k, v))
        weights = ((q @ k.mT) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)

    return Call(
        tuple(x.transpose(1, 2) for x in (q, k, v)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda o: o.transpose(1, 2),
        exact,
    )


def _token_loop(v: Tensor, log_decay: Tensor) -> Call:
    def forward(v: Tensor, log_decay: Tensor) -> Tensor:
        fade, inputs = log_decay.exp().unbind(1), v.unbind(1)
        state, states = torch.zeros_like(inputs[0]), []
        for f, x in zip(fade, inputs, strict=True):
            state = torch.addcmul(x, f, state)
            states.append(state)
        return torch.stack(states, 1)

    return Call((v, log_decay), forward)


def _grouped_convolution(signal: Tensor, taps: Tensor) -> Call:
    """A causal filter per channel: signal (B, T, ..., D), taps (W, ..., D)."""
    inputs = (signal.flatten(2).mT, taps.flatten(1).mT.unsqueeze(1))

    def forward(signal: Tensor, taps: Tensor) -> Tensor:
        return F.conv1d(F.pad(signal, (taps.shape[-1] - 1, 0)), taps, groups=len(taps))

    return Call(inputs, forward, lambda o: o.mT.view(signal.shape))


PEERS = {
    "fla": Peer(
        "cuda",
        {
            "decay": Adapter("fla", _fla_decay),
            "decay per token": Adapter("fla", _fla_decay_per_token),
            "GLA": Adapter("fla", _fla_gla),
            "delta": Adapter("fla", _fla_delta),
            "gated delta": Adapter("fla", _fla_gated_delta),
            "KDA": Adapter("fla", _fla_kda),
            "HGRN": Adapter("fla", _fla_scan),
            "short filter": Adapter("fla", _fla_filter),
        },
    ),
    "mamba": Peer(
        "cuda",
        {
            "Mamba-2": Adapter("mamba_ssm", _mamba_scan),
            "short filter": Adapter("causal_conv1d", _mamba_filter),
        },
    ),
    "sdpa": Peer(None, {"decay": Adapter("torch", _softmax)}),
    "transformers": Peer(
        "cpu",
        {
            "decay": Adapter("transformers", _minimax),
            "gated delta": Adapter("transformers", _transformers_delta("qwen3_next", "torch_chunk_gated_delta_rule")),
            "KDA": Adapter("transformers", _transformers_delta("kimi_linear", "chunk_kimi_delta_attention")),
            "Mamba-2": Adapter("transformers", _transformers_mamba2),
        },
    ),
    "torch": Peer(
        None,
        {
            "HGRN": Adapter("torch", _token_loop),
            "TNN": Adapter("torch", _grouped_convolution),
            "short filter": Adapter("torch", _grouped_convolution),
        },
    ),
    "llama.cpp": Peer(None, {}),
}
