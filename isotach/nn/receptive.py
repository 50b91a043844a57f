"""How far attention with an additive bias reaches: encodings of the distance, and their receptive fields.

    weight of a key j tokens back   ∝ exp(q·k / √K) b(x),   x = slope · j        (the bias is r = ln b)

If Σ_j b converges, then however long the text, all but a share ε of the sum lies within

    TRF(ε) = the least N with Σ_{j<N} b ≥ (1 - ε) Σ_j b

tokens, and a model can extrapolate: longer inputs change nothing essential. The condition is sufficient, not necessary,
and says nothing of quality: steep encodings extrapolate, but see few tokens.

Exploring Transformer Extrapolation (AAAI 2024), whose released code lists these encodings.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from isotach.config import nearest
from isotach.errors import UserError
from isotach.files import write_atomically

SUMMED = 1 << 22  # terms that are added one by one; where more are needed, a tail estimate says how many


@dataclass(frozen=True)
class Encoding:
    """b(x), x ≥ 0, as its logarithm and its integral from x to infinity, which is None where that diverges."""

    name: str
    formula: str
    log_weight: Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]
    tail: Callable[[float], float] | None

    @property
    def converges(self) -> bool:
        """Whether Σ_j b does: a model with this encoding is expected to extrapolate."""
        return self.tail is not None


def _exponential(name: str, formula: str, power: float, rate: float = 1.0) -> Encoding:
    """e^(-rate · x^power); its integral is an incomplete gamma function."""
    shape = 1 / power

    def tail(x: float) -> float:
        upper = torch.special.gammaincc(_double(shape), _double(rate * x**power))
        return shape * rate**-shape * math.gamma(shape) * float(upper)

    return Encoding(name, formula, lambda x: -rate * x**power, tail)


# The framework's numbers 3 to 13, in order.
ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        _exponential("exponential", "e^-x", 1.0),
        Encoding("inverse_square", "1 / (1 + x²)", lambda x: -(x * x).log1p(), lambda x: math.atan2(1, x)),
        _exponential("gaussian", "e^-x²", 2.0),
        _exponential("exponential_root", "e^-√x", 0.5),
        Encoding("inverse", "1 / (1 + x)", lambda x: -x.log1p(), None),
        _exponential("exponential_1.25", "e^-x^1.25", 1.25),
        _exponential("exponential_0.75", "e^(-x^0.75 / 2)", 0.75, 0.5),
        Encoding(
            "log_inverse_square",
            "(1 + ln(1 + x)) / (1 + x)²",
            lambda x: x.log1p().log1p() - 2 * x.log1p(),
            lambda x: (2 + math.log1p(x)) / (1 + x),
        ),
        Encoding(
            "exponential_log_square",
            "e^-ln²(3 + x)",
            lambda x: -(3 + x).log().square(),
            lambda x: math.exp(0.25) * math.sqrt(math.pi) / 2 * math.erfc(math.log(3 + x) - 0.5),
        ),
        _exponential("exponential_quartic", "e^-x⁴", 4.0),
        Encoding("inverse_log", "1 / ((3 + x) ln(3 + x))", lambda x: -(3 + x).log() - (3 + x).log().log(), None),
    )
}


def kerple_log(power: float) -> Encoding:
    """(1 + x)^-power, KERPLE's logarithmic kernel (arXiv:2205.09921): converges only for power > 1."""
    tail = (lambda x: (1 + x) ** (1 - power) / (power - 1)) if power > 1 else None
    return Encoding(f"kerple_log_{power:g}", f"(1 + x)^-{power:g}", lambda x: -power * x.log1p(), tail)


def kerple_power(power: float) -> Encoding:
    """e^(-x^power), 0 < power ≤ 2, KERPLE's power kernel."""
    return _exponential(f"kerple_power_{power:g}", f"e^-x^{power:g}", power)


def encoding(name: str) -> Encoding:
    """The encoding called `name`; UserError names the nearest one."""
    if name not in ENCODINGS:
        raise UserError(f"encoding {name!r} is not known; {nearest(name, ENCODINGS)}")
    return ENCODINGS[name]


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def log_bias(encoding: Encoding, slopes: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """What distances (n,) add to the scores, (H, n) float64: the bias that a History takes."""

    def bias(distance: Tensor) -> Tensor:
        slope = torch.tensor(slopes, dtype=torch.float64, device=distance.device)
        return encoding.log_weight(slope[:, None] * distance)

    return bias


def theoretical_receptive_field(encoding: Encoding, *, slope: float, eps: float) -> float:
    """TRF(eps), tokens; inf where the sum diverges. Sums are float64; what lies beyond them is estimated.

    slope   > 0, of the head: x = slope · distance          eps   share of the sum left out, in (0, 1)
    """
    if not (slope > 0 and 0 < eps < 1):
        raise UserError(f"receptive field: expected slope > 0 and 0 < eps < 1, got {slope} and {eps}; choose others")
    if not encoding.converges:
        return math.inf
    count = 1 << 12
    while True:
        x = slope * torch.arange(count, dtype=torch.float64)
        sums = encoding.log_weight(x).exp().cumsum(0)
        enough = (1 - eps) * (float(sums[-1]) + tail_sum(encoding, slope=slope, start=count))
        if float(sums[-1]) >= enough:
            return float(torch.searchsorted(sums, enough)) + 1
        if count >= SUMMED:
            break
        count *= 4
    left = eps / (1 - eps) * enough
    low, high = count, 2 * count
    while tail_sum(encoding, slope=slope, start=high) > left:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tail_sum(encoding, slope=slope, start=middle) > left else (low, middle)
    return float(high)


def tail_sum(encoding: Encoding, *, slope: float, start: int) -> float:
    """Σ_{j ≥ start} b(slope · j), start ≥ 1, by Euler and Maclaurin's formula up to the first derivative."""
    if encoding.tail is None:
        return math.inf
    near = slope * torch.arange(start - 1, start + 2, dtype=torch.float64)
    before, at, after = encoding.log_weight(near).exp().tolist()
    return encoding.tail(slope * start) / slope + at / 2 - (after - before) / 24


def empirical_receptive_field(perplexity: Callable[[int], float], windows: Sequence[int], *, eps: float) -> int:
    """The first window J with perplexity(full) / perplexity(J) > 1 - eps, full being the last of the ascending windows.

    perplexity(J) must score the same tokens for every J, each from at most J tokens before it: otherwise longer windows
    look better merely for having more context.
    """
    if not windows or sorted(set(windows)) != list(windows):
        raise UserError(f"receptive field: expected ascending windows, got {list(windows)}; sort them")
    full = perplexity(windows[-1])
    for window in windows[:-1]:
        if full / perplexity(window) > 1 - eps:
            return window
    return windows[-1]


def draw(
    encodings: Sequence[Encoding],
    out: Path,
    *,
    slopes: Sequence[float],
    eps: float = 0.05,
    measured: Mapping[str, float] | None = None,
) -> None:
    """Write a picture: the share of the sum within N tokens, at the smallest slope, and receptive fields.

    measured    empirical fields by encoding name, drawn against TRF(eps) at the smallest slope; without them TRF(eps)
                is drawn for every slope. Of diverging encodings only a measured field is drawn, as a dotted line.
    Raises UserError where matplotlib is missing or the format is unknown.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot: expected the plot extra; run pip install 'isotach[plot]'") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    shares, fields = figure.subplots(1, 2)
    slope = min(slopes)
    for index, each in enumerate(encodings):
        color = colormaps["turbo"]((index + 0.5) / len(encodings))
        label = f"{each.name}: {each.formula}"
        found = [] if measured is None or each.name not in measured else [measured[each.name]]
        if not each.converges:
            shares.plot([], [], color=color, linestyle=":", label=f"{label}, diverges")
            for field in found:
                fields.axhline(field, color=color, linestyle=":")
            continue
        reach = [theoretical_receptive_field(each, slope=s, eps=eps) for s in slopes]
        tokens = torch.logspace(0, math.log10(4 * max(reach)), 200).long().unique().tolist()
        total = tail_sum(each, slope=slope, start=1) + float(each.log_weight(_double(0.0)).exp())
        within = [1 - tail_sum(each, slope=slope, start=n) / total for n in tokens]
        shares.plot(tokens, within, color=color, label=label)
        if measured is None:
            fields.plot(slopes, reach, "o-", color=color)
        else:
            fields.plot([max(reach)] * len(found), found, "o", color=color)
    shares.set(xscale="log", xlabel="tokens back", ylabel="share of the weights", title=f"slope {slope:.3g}")
    shares.legend(fontsize="x-small", loc="upper left")
    kind = "theoretical receptive field" if measured is None else "receptive fields"
    fields.set(xscale="log", yscale="log", title=f"{kind}, ε = {eps:g}")
    fields.set_xlabel("slope" if measured is None else "theoretical, tokens")
    fields.set_ylabel("tokens" if measured is None else "empirical, tokens")
    for axis in (shares, fields):
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=out.suffix[1:] or "png", dpi=150)
    except ValueError:
        raise UserError(f"{out}: expected a picture format, got {out.suffix!r}; use .png, .svg or .pdf") from None
    write_atomically(out, picture.getvalue())
