"""Operators beside their rivals: linear attention with decay, a published block algorithm, softmax attention.

Contenders get contiguous inputs in the layout they prefer, in float32, and the default allocator. FLOPs are counted as
B·H·T·(4·64·D + 4·D²) whatever chunk an implementation chooses: two products with 64 keys per token, two with the state.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isotach.bench.report import Figure, Result, Row, interleave, milliseconds, paired, relative_error
from isotach.ops.backends import Backend
from isotach.ops.decay import Decay
from isotach.ops.engine import Span, run
from isotach.rng import generator

BOUNDS = {("forward", "minimax"): 1.8, ("forward", "softmax"): 6.0, ("forward + backward", "minimax"): 1.9}
CORRECT = 1e-4  # relative error above which a contender is refused
MATRIX = 1024  # side of the product whose rate stands for the machine's
PRODUCT = f"{MATRIX}³ product"
STATUS = Path("/proc/self/status")


class Shape(NamedTuple):
    """B, H, T, D of the benchmark, and how many documents its packed row holds."""

    batch: int = 1
    heads: int = 8
    tokens: int = 4096
    width: int = 128
    documents: int = 500

    @property
    def flops(self) -> int:
        return self.batch * self.heads * self.tokens * (4 * 64 * self.width + 4 * self.width**2)


FULL = Shape()
SMALL = Shape(heads=2, tokens=333, width=32, documents=40)  # crosses chunk boundaries and ends inside a chunk


class Contender(NamedTuple):
    """An operator, its definition in float64, and its inputs; those that require a gradient get one."""

    forward: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def backward(self, output_gradient: Tensor) -> tuple[Tensor, ...]:
        learned = [leaf for leaf in self.inputs if leaf.requires_grad]
        return torch.autograd.grad(self.forward(*self.inputs), learned, output_gradient)


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


def error_beside_transformers() -> float | None:
    """Relative error of `Minimax` against the module it restates, on that module's own queries, keys and values.

    None where transformers is not installed.
    """
    try:
        from transformers.models.minimax.configuration_minimax import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
    except ImportError:
        return None
    config = MiniMaxConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, num_hidden_layers=2, block_size=256,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = MiniMaxLightningAttention(config, layer_idx=0)
        x = torch.randn(2, 600, config.hidden_size)
        expected, _ = module(x, position_embeddings=None, attention_mask=None)
        heads = module.act_fn(module.qkv_proj(x)).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
        attended = Minimax(module.slope_rate, block=config.block_size)(*heads.chunk(3, dim=-1))
        gate = torch.sigmoid(module.output_gate(x))
        got = module.out_proj(gate * module.norm(attended.transpose(1, 2).flatten(2)))
    return relative_error(got, expected.double())


def slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi's geometric slopes 2^{-8h/H}, h = 1..H, as MiniMax and the first layer of TransNormerLLM use them."""
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device, dtype=torch.float32))


def document_bounds(tokens: int, documents: int) -> Tensor:
    """cu_seqlens (documents + 1,) of documents of random length, at least one token each."""
    cuts = torch.randperm(tokens - 1, generator=generator(0, "cuts"))[: documents - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])


def measure(*, device: torch.device, shape: Shape = FULL, rounds: int = 20, weigh_tokens: int = 16384) -> Result:
    """Time every contender forward and forward + backward, and weigh ours and the block algorithm.

    Weighing needs Linux or a GPU; elsewhere, and for weigh_tokens = 0, those rows are missing.
    """
    beside = error_beside_transformers()
    settings = {**shape._asdict(), "dtype": "float32", "device": str(device), "error_beside_transformers": beside}
    result = Result(settings)
    errors = {name: error(build(SMALL, device)) for name, build in CONTENDERS.items()}
    errors["minimax"] = max(errors["minimax"], beside or 0.0)
    for name, value in errors.items():
        if value > CORRECT:
            result.refused.append(f"{name}: relative error {value:.1e}, over {CORRECT:.0e}")

    built = {name: build(shape, device) for name, build in CONTENDERS.items() if errors[name] <= CORRECT}
    seconds = {"forward": _forward(built, rounds, device), "forward + backward": _both(built, rounds, device)}
    for which, contenders in seconds.items():
        for name, times in contenders.items():
            result.rows.append({"contender": name, "pass": which, **milliseconds(times), "error": errors.get(name)})
    result.figures = _figures(shape, seconds)

    if weigh_tokens and (device.type == "cuda" or STATUS.exists()):
        weighed = [weigh(name, weigh_tokens, device) for name in ("decay, learned", "minimax") if name in built]
        result.rows += weighed
        result.figures += [
            Figure("peak memory over the necessary", row["of_necessary"], at_most=1.25)
            for row in weighed
            if row["contender"] == "decay, learned"
        ]
    return result


def error(contender: Contender) -> float:
    """Largest relative error of values and gradients against the float64 definition."""
    output = contender.forward(*contender.inputs)
    doubles = tuple(leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in contender.inputs)
    expected = contender.exact(*doubles)
    weights = torch.randn_like(output)
    gradients = contender.backward(weights)
    learned = [leaf for leaf in doubles if leaf.requires_grad]
    exact = torch.autograd.grad(expected, learned, weights.double())
    pairs = zip((output, *gradients), (expected, *exact), strict=True)
    return max(relative_error(got.detach(), want.detach()) for got, want in pairs)


def weigh(name: str, tokens: int, device: torch.device) -> Row:
    """Peak memory of one forward + backward in a fresh process, and over what no implementation can do without.

    That is q, k, v, log_decay, the output, and a gradient of each; the peak is counted from before the inputs.
    """
    code = f"from isotach.bench import ops; ops._weigh_here({name!r}, {tokens}, {str(device)!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    row: Row = json.loads(done.stdout)
    return row


def _weigh_here(name: str, tokens: int, device_name: str) -> None:
    device = torch.device(device_name)
    before = _bytes(device, "VmRSS:")
    contender = CONTENDERS[name](FULL._replace(tokens=tokens), device)
    output = contender.forward(*contender.inputs)
    output.backward(torch.randn_like(output))
    peak = _bytes(device, "VmHWM:") - before
    necessary = 2 * sum(tensor.nbytes for tensor in (*contender.inputs, output))
    row = {"contender": name, "pass": f"memory, T = {tokens}", "mib": peak / 2**20, "of_necessary": peak / necessary}
    print(json.dumps(row))


def _bytes(device: torch.device, field: str) -> int:
    """Peak allocation on a GPU; else a line of /proc/self/status, as getrusage's peak is inherited through exec."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _forward(built: Mapping[str, Contender], rounds: int, device: torch.device) -> dict[str, list[float]]:
    a, b, c = (torch.randn(MATRIX, MATRIX, device=device) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {PRODUCT: partial(torch.mm, a, b, out=c)}
    for name, contender in built.items():
        if name != "decay, learned":  # learning shows in the backward pass only
            calls[name] = partial(contender.forward, *contender.inputs)
    with torch.no_grad():
        return interleave(calls, rounds=rounds, device=device)


def _both(built: Mapping[str, Contender], rounds: int, device: torch.device) -> dict[str, list[float]]:
    with torch.no_grad():
        weights = {name: torch.randn_like(c.forward(*c.inputs)) for name, c in built.items()}
    calls = {name: partial(contender.backward, weights[name]) for name, contender in built.items()}
    return interleave(calls, rounds=rounds, device=device)


def _figures(shape: Shape, seconds: Mapping[str, Mapping[str, list[float]]]) -> list[Figure]:
    """Ratios to our operator with a fixed decay per head, of the contenders that were not refused."""
    product = seconds["forward"][PRODUCT]
    figures = [Figure(f"GFLOP/s of a {PRODUCT}", 2e-9 * MATRIX**3 / statistics.median(product))]
    if "decay" not in seconds["forward"]:
        return figures
    share = shape.flops / (2 * MATRIX**3) * paired(product, seconds["forward"]["decay"])
    figures.append(Figure(f"forward, share of the rate of a {PRODUCT}", share, at_least=0.55))
    for which, times in seconds.items():
        for name in times:
            ratio = paired(times[name], times["decay"])
            if name in ("minimax", "softmax"):
                bound = BOUNDS.get((which, name))
                figures.append(Figure(f"{which}, times faster than {name}", ratio, at_least=bound))
            elif name not in ("decay", PRODUCT):
                figures.append(Figure(f"{which}, {name}, over fixed", ratio))
    return figures


def _decay(kind: str) -> Callable[[Shape, torch.device], Contender]:
    """Our operator, (B, T, H, D): `fixed` or `learned` decay per head, one per `token`, one per `channel`, `packed`."""

    def build(shape: Shape, device: torch.device) -> Contender:
        batch, heads, tokens, width, documents = shape
        span = Span.of(batch, tokens, device=device)
        if kind == "packed":
            batch, span = 1, Span.packed(document_bounds(tokens, documents).to(device))
        if kind in ("token", "channel"):
            (gate,) = _normal((batch, tokens, heads, width if kind == "channel" else 1), device, "gate")
            log_decay = F.logsigmoid(gate.detach()) / 16  # as in Gated Linear Attention
        else:
            log_decay = -slopes(heads, device).view(1, 1, heads, 1)
        log_decay.requires_grad_(kind in ("learned", "token", "channel"))

        def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, backend: Backend) -> Tensor:
            return run(Decay(), Decay.Inputs(q, k, v, log_decay), None, span, backend=backend)[0]

        inputs = (*_normal((batch, tokens, heads, width), device, "q", "k", "v"), log_decay)
        return Contender(partial(attend, backend="torch"), partial(attend, backend="reference"), inputs)

    return build


def _minimax(shape: Shape, device: torch.device) -> Contender:
    batch, heads, tokens, width, _ = shape
    slope = slopes(heads, device)
    span = Span.of(batch, tokens, device=device)

    def exact(*x: Tensor) -> Tensor:
        q, k, v = (leaf.transpose(1, 2) for leaf in x)
        inputs = Decay.Inputs(q, k, v, -slope.double().view(1, 1, heads, 1))
        return run(Decay(), inputs, None, span, backend="reference")[0].transpose(1, 2)

    return Contender(
        Minimax(slope.view(heads, 1, 1)), exact, _normal((batch, heads, tokens, width), device, "q", "k", "v")
    )


def _softmax(shape: Shape, device: torch.device) -> Contender:
    batch, heads, tokens, width, _ = shape

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
        return ((q @ k.mT) * width**-0.5).masked_fill(future, -torch.inf).softmax(-1) @ v

    return Contender(forward, exact, _normal((batch, heads, tokens, width), device, "q", "k", "v"))


def _normal(size: tuple[int, ...], device: torch.device, *names: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, generator=generator(0, name)).to(device).requires_grad_() for name in names)


CONTENDERS: dict[str, Callable[[Shape, torch.device], Contender]] = {
    "decay": _decay("fixed"),
    "minimax": _minimax,
    "softmax": _softmax,
    "decay, learned": _decay("learned"),
    "decay, per token": _decay("token"),
    "decay, per channel": _decay("channel"),
    "decay, packed": _decay("packed"),
}
