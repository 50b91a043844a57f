"""Operators beside their rivals: linear attention with decay, a published block algorithm, softmax attention.

Contenders get contiguous inputs in the layout they prefer, in float32, and the default allocator. FLOPs are counted as
B·H·T·(4·64·D + 4·D²) whatever chunk an implementation chooses: two products with 64 keys per token, two with the state.

On a GPU the kernels are contenders too, and are measured once more in bfloat16 at a size that fills the device, against
what a copy moves in the same run: each of q, k, v, o and of the gradients read or written once.
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
KERNEL_BOUNDS = {"forward": 0.40, "forward + backward": 1.5}  # milliseconds, on an H200
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
FILLING = Shape(batch=8, heads=16, tokens=8192)  # of the kernels in bfloat16
LENGTHS = (4096, 65536, 1 << 20)  # of rows, in a batch of as many tokens as the longest has
CORRECT_16 = 0.02  # as CORRECT, for bfloat16: a few times its last bit, as errors are the largest over the largest
COPIED = 1 << 30  # bytes of the copy that stands for the device's memory
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
    everybody = contenders(device)
    errors = {name: error(build(SMALL, device)) for name, build in everybody.items()}
    errors["minimax"] = max(errors["minimax"], beside or 0.0)
    for name, value in errors.items():
        if value > CORRECT:
            result.refused.append(f"{name}: relative error {value:.1e}, over {CORRECT:.0e}")

    built = {name: build(shape, device) for name, build in everybody.items() if errors[name] <= CORRECT}
    seconds = {"forward": _forward(built, rounds, device), "forward + backward": _both(built, rounds, device)}
    for which, timed in seconds.items():
        for name, times in timed.items():
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
    if device.type == "cuda":
        _measure_kernels(result, device)
    return result


def contenders(device: torch.device) -> dict[str, Callable[[Shape, torch.device], Contender]]:
    """Everybody who can run on `device`, by name."""
    return CONTENDERS | (KERNELS if device.type == "cuda" else {})


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


def _measure_kernels(result: Result, device: torch.device) -> None:
    """Rows and figures of the kernels in bfloat16; a wrong one is refused."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = 2 * COPIED / (1e-3 * _by_events(lambda: target.copy_(source))["ms"])
    del source, target
    result.figures.append(Figure("GB/s of a copy", 1e-9 * copy))
    for kind in ("fixed", "token"):
        build = _decay(kind, "triton", torch.bfloat16)
        if (wrong := error(build(SMALL, device))) > CORRECT_16:
            result.refused.append(f"decay, {kind}, bfloat16: relative error {wrong:.1e}, over {CORRECT_16:.0e}")
            continue
        shapes = [FILLING]
        if kind == "fixed":
            shapes += [FILLING._replace(batch=LENGTHS[-1] // tokens, tokens=tokens) for tokens in LENGTHS]
        for shape in shapes:
            result.rows += _kernel_rows(f"decay, {kind}, bfloat16", build(shape, device), shape, copy)
    _kernel_figures(result)


def _kernel_rows(name: str, contender: Contender, shape: Shape, copy: float) -> list[Row]:
    with torch.no_grad():
        weights = torch.randn_like(contender.forward(*contender.inputs))
        forward = _by_events(lambda: contender.forward(*contender.inputs))
    both = _by_events(lambda: contender.backward(weights))
    rows = []
    for which, times, tensors in (("forward", forward, 4), ("forward + backward", both, 11)):
        least = tensors * weights.nbytes / copy
        rows.append({"contender": name, "pass": _pass(which, shape), **times, "of_copy": 1e3 * least / times["ms"]})
    return rows


def _by_events(call: Callable[[], object]) -> Row:
    """As milliseconds, by the device's own clock: launches are queued behind the clearing of its cache."""
    from triton.testing import do_bench

    low, middle, high = do_bench(call, warmup=50, rep=300, quantiles=[0.25, 0.5, 0.75])
    return {"ms": middle, "ms_quartiles": [low, high]}


def _kernel_figures(result: Result) -> None:
    """The bounds at the filling shape, and what a token costs in the longest row over the shortest."""
    times = {row["pass"]: row["ms"] for row in result.rows if row["contender"] == "decay, fixed, bfloat16"}
    if not times:
        return
    for which, bound in KERNEL_BOUNDS.items():
        figure = Figure(f"{which}, ms of the kernel in bfloat16", times[_pass(which, FILLING)], at_most=bound)
        result.figures.append(figure)
    short, long = (
        times[_pass("forward + backward", FILLING._replace(batch=LENGTHS[-1] // tokens, tokens=tokens))]
        for tokens in (LENGTHS[0], LENGTHS[-1])
    )
    result.figures.append(Figure(f"cost of a token at {LENGTHS[-1]:,} over {LENGTHS[0]:,}", long / short, at_most=1.15))


def _pass(which: str, shape: Shape) -> str:
    return f"{which}, B{shape.batch} H{shape.heads} T{shape.tokens} D{shape.width}"


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


def _decay(
    kind: str, backend: Backend = "torch", dtype: torch.dtype = torch.float32
) -> Callable[[Shape, torch.device], Contender]:
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
            log_decay = -slopes(heads, device).view(1, 1, heads, 1).repeat(batch, 1, 1, 1)
        log_decay.requires_grad_(kind in ("learned", "token", "channel"))

        def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, backend: Backend) -> Tensor:
            return run(Decay(), Decay.Inputs(q, k, v, log_decay), None, span, backend=backend)[0]

        rows = _normal((batch, tokens, heads, width), device, "q", "k", "v")
        inputs = (*(row.detach().to(dtype).requires_grad_() for row in rows), log_decay)
        return Contender(partial(attend, backend=backend), partial(attend, backend="reference"), inputs)

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
    draws = (torch.randn(size, generator=generator(0, name, device=device), device=device) for name in names)
    return tuple(draw.requires_grad_() for draw in draws)


CONTENDERS: dict[str, Callable[[Shape, torch.device], Contender]] = {
    "decay": _decay("fixed"),
    "minimax": _minimax,
    "softmax": _softmax,
    "decay, learned": _decay("learned"),
    "decay, per token": _decay("token"),
    "decay, per channel": _decay("channel"),
    "decay, packed": _decay("packed"),
}
KERNELS: dict[str, Callable[[Shape, torch.device], Contender]] = {
    "decay, triton": _decay("fixed", "triton"),
    "decay, per token, triton": _decay("token", "triton"),
    "decay, packed, triton": _decay("packed", "triton"),
}
