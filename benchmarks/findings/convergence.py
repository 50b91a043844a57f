"""Which encodings of distance let a transformer read longer texts than it was trained on.

    python benchmarks/findings/convergence.py --text path/to/tinyshakespeare/input.txt

Claim: a transformer whose attention weighs a key j tokens back by b_j > 0,

    weight ∝ exp(q·k / √K) b_j,

is certain to extrapolate if Σ_j b_j converges (arXiv:2307.10156). The condition is sufficient; whether it also tells
the encodings that fail is asked here as well: of two whose sums diverge as slowly as any, 1 / (1 + x) and 1 / (x ln x),
of no encoding at all, and of RoPE. The forms are those of the released code (isotach/nn/receptive.py), x = slope · j
with ALiBi's slopes.

Measured is the mean loss of the same characters of held-out text, each read after contexts of 1 to 16 times the length
trained on.
"""

import time
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from characters import BATCH_TOKENS, PICTURES, RESULTS, RUNS, held_out, start, trained

from isotach.bench import findings
from isotach.bench.findings import Comparison, Finding, Verdict
from isotach.eval.perplexity import by_context
from isotach.models.decoder import Decoder
from isotach.nn.receptive import ENCODINGS

NAME = "convergence"
TRAINED, STEPS = 256, 800
CONTEXTS = tuple(TRAINED << i for i in range(5))
WINDOWS, SCORED = 32, 128
FLAT = 0.02  # nats that the loss may rise by at any length of a model that extrapolates: 2 % of the perplexity
HEADS = 8
CONVERGING = tuple(name for name, encoding in ENCODINGS.items() if encoding.converges)
DIVERGING = (*(name for name in ENCODINGS if name not in CONVERGING), "none", "rope")


def main(text: str) -> None:
    found = {name: findings.part(RUNS / NAME, name, partial(losses, name, text)) for name in (*CONVERGING, *DIVERGING)}
    finding = conclude(found)
    findings.save(finding, RESULTS)
    draw(finding)
    print(f"{finding.verdict}: {finding.because}")


def model(name: str, text: str) -> Decoder:
    """Three layers with this encoding, trained; receptive.py reads them again."""
    positions = f"rpe:{name}" if name in ENCODINGS else name
    options = {"depth": 3, "heads": HEADS, "pattern": ["softmax"], "softmax": {"positions": positions}}
    return trained(options, text, RUNS / NAME / f"{name}-run", seq_len=TRAINED, steps=STEPS)


def losses(name: str, text: str) -> dict[str, Any]:
    """Nats per character by context."""
    begin = time.perf_counter()
    decoder = model(name, text)
    found = by_context(decoder, held_out(text), CONTEXTS, windows=WINDOWS, scored=SCORED)
    return {
        "loss": [found[context] for context in CONTEXTS],
        "parameters": decoder.parameter_count(),
        "seconds": time.perf_counter() - begin,
    }


# ---- told


def conclude(found: dict[str, dict[str, Any]]) -> Finding:
    """Reproduced where the loss of every encoding that converges rises at no length and that of all others does; partly
    where the condition holds but does not separate, or separates but not at FLAT.
    """
    loss = {name: own["loss"] for name, own in found.items()}
    rise = {name: max(own) - own[0] for name, own in loss.items()}
    change = {name: own[-1] - own[0] for name, own in loss.items()}
    flat = [name for name in CONVERGING if rise[name] <= FLAT]
    failing = [name for name in DIVERGING if rise[name] > FLAT]
    separate = max(rise[name] for name in CONVERGING) < min(rise[name] for name in DIVERGING)
    verdict: Verdict = "not reproduced"
    if len(flat) == len(CONVERGING) or separate:
        whole = len(flat) == len(CONVERGING) and len(failing) == len(DIVERGING)
        verdict = "reproduced" if whole else "partly reproduced"
    others = ", ".join(f"{name} {change[name]:+.3f}" for name in DIVERGING)
    own = [change[name] for name in CONVERGING]
    return Finding(
        name=NAME,
        title="Encodings of distance on texts longer than those trained on",
        claim="A transformer with a relative positional encoding is certain to extrapolate as long as the series of "
        "the encoding's exponential converges.",
        source="Exploring Transformer Extrapolation (arXiv:2307.10156)",
        setting=f"Three layers of width 128 and {HEADS} heads, {found['none']['parameters'] / 1e6:.2f}M parameters, on "
        f"characters of Tiny Shakespeare; {STEPS * BATCH_TOKENS / 1e6:.1f}M characters in sequences of {TRAINED}, one "
        f"seed. The same {WINDOWS * SCORED:,} held-out characters are scored at every length. The authors train 6 "
        "layers of width 512 on four large corpora; their figures per length are not known to us.",
        numbers=tuple(
            Comparison(
                what=f"{name}: loss at {CONTEXTS[-1]:,} characters over that at {TRAINED}",
                authors=None,
                ours=change[name],
                unit="nats per character",
            )
            for name in found
        ),
        verdict=verdict,
        because=f"{len(flat)} of {len(CONVERGING)} encodings that converge rise by at most {FLAT} nats at any length: "
        f"from {TRAINED} to {CONTEXTS[-1]:,} characters their losses change by {min(own):+.3f} to {max(own):+.3f}. Of "
        f"the others {len(failing)} of {len(DIVERGING)} rise: {others}.",
        curves={"contexts": list(CONTEXTS), "loss": loss},
        seconds=sum(each["seconds"] for each in found.values()),
    )


def draw(finding: Finding) -> None:
    """How much the loss changes with context; dotted what counts as no change."""
    plt.rcParams["svg.hashsalt"] = "isotach"
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    labels = {"inverse": "1 / (1 + x)", "inverse_log": "1 / (x ln x)", "none": "no encoding", "rope": "RoPE"}
    shift = {"inverse": 4, "inverse_log": -5}  # points, so that labels do not touch
    contexts = finding.curves["contexts"]
    for name, loss in finding.curves["loss"].items():
        color = "C0" if name in CONVERGING else f"C{1 + DIVERGING.index(name)}"
        axes.plot(contexts, [nats - loss[0] for nats in loss], "o-", color=color, markersize=3, linewidth=1)
        if name in labels:
            end = (contexts[-1], loss[-1] - loss[0])
            axes.annotate(
                labels[name], end, (6, shift.get(name, 0)), textcoords="offset points", va="center", color=color
            )
    axes.annotate("9 that converge", (contexts[-1], 0), (6, 0), textcoords="offset points", va="center", color="C0")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axes.axhline(FLAT, color="gray", linestyle=":")
    axes.set(xlabel=f"context, characters (trained on {TRAINED})", ylabel="change of the loss, nats per character")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set(xlim=(0.9 * contexts[0], 2.1 * contexts[-1]), ylim=(-0.005, 3))
    path = PICTURES / f"{NAME}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    start(__doc__, main)
