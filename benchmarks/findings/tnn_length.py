"""A Toeplitz network trained on 512 tokens and read up to 14,336.

    python benchmarks/findings/tnn_length.py --text path/to/tinyshakespeare/input.txt

Claim: trained with 512 tokens, a TNN reads up to 14K tokens with consistent perplexity, thanks to the decay in its
kernel (arXiv:2305.04749).

    o_t = Σ_{s≤t} k_{t-s} ∘ v_s,   k_j = γ^j RPE(j)

The network RPE tends to a constant far away, so it is γ = 0.99 that makes Σ_j |k_j| converge; γ = 1 is the control, and
softmax with RoPE, of the same width and depth, stands beside them. Measured is the mean loss of the same characters of
held-out text, each read after contexts of 512 to 14,336 characters.
"""

import math
import time
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from characters import BATCH_TOKENS, PICTURES, RESULTS, RUNS, held_out, start, trained

from isotach.bench import findings
from isotach.bench.findings import Comparison, Finding, Verdict
from isotach.eval.perplexity import by_context
from isotach.models.decoder import Decoder

NAME = "tnn_length"
TRAINED, STEPS = 512, 1000
CONTEXTS = (512, 1024, 2048, 4096, 8192, 14336)
WINDOWS, SCORED = 24, 256
FLAT = 0.02  # nats that a loss may rise by and still count as consistent: 2 % of the perplexity
DECAY, CONTROL, BESIDE = "TNN, γ = 0.99", "TNN, γ = 1", "softmax, RoPE"
MODELS: dict[str, dict[str, Any]] = {
    DECAY: {"depth": 2, "heads": 1, "pattern": ["tnn"], "tnn": {"gamma": 0.99}},
    CONTROL: {"depth": 2, "heads": 1, "pattern": ["tnn"], "tnn": {"gamma": 1.0}},
    BESIDE: {"depth": 2, "heads": 4, "pattern": ["softmax"], "softmax": {"positions": "rope"}},
}


def main(text: str) -> None:
    found = {name: findings.part(RUNS / NAME, folder(name), partial(losses, name, text)) for name in MODELS}
    finding = conclude(found)
    findings.save(finding, RESULTS)
    draw(finding)
    print(f"{finding.verdict}: {finding.because}")


def folder(name: str) -> str:
    return name.replace(", ", "-").replace(" = ", "-").replace("γ", "gamma").lower()


def model(name: str, text: str) -> Decoder:
    """One of MODELS, trained; etsc.py converts them."""
    return trained(MODELS[name], text, RUNS / NAME / f"{folder(name)}-run", seq_len=TRAINED, steps=STEPS)


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
    """Reproduced where the loss with decay rises at no length and without decay does; partly where neither does."""
    loss = {name: own["loss"] for name, own in found.items()}
    change = {name: own[-1] - own[0] for name, own in loss.items()}
    rise = {name: max(own) - own[0] for name, own in loss.items()}
    verdict: Verdict = "not reproduced"
    if rise[DECAY] <= FLAT:
        verdict = "reproduced" if rise[CONTROL] > FLAT else "partly reproduced"
    numbers = [
        Comparison(what=f"{name}: perplexity at {context:,}", authors=None, ours=math.exp(own[i]), unit="per character")
        for name, own in loss.items()
        for i, context in enumerate(CONTEXTS)
    ]
    sizes = ", ".join(f"{own['parameters'] / 1e6:.2f}M ({name})" for name, own in found.items())
    return Finding(
        name=NAME,
        title="A Toeplitz network on 28 times the text it was trained on",
        claim="Trained with 512 tokens, a Toeplitz network whose kernel decays reads up to 14K tokens with consistent "
        "perplexity.",
        source="Toeplitz Neural Network for Sequence Modeling (arXiv:2305.04749)",
        setting=f"Two layers of width 128 on characters of Tiny Shakespeare, {sizes}; "
        f"{STEPS * BATCH_TOKENS / 1e6:.1f}M characters in sequences of {TRAINED}, one seed. The same "
        f"{WINDOWS * SCORED:,} held-out characters are scored at every length. The authors train 7 layers of width 512 "
        "on WikiText-103; their figures per length are not known to us. γ = 1 and softmax are our controls.",
        numbers=tuple(numbers),
        verdict=verdict,
        because=f"From {TRAINED} to {CONTEXTS[-1]:,} characters the loss with decay changes by {change[DECAY]:+.3f} "
        f"nats per character, without decay by {change[CONTROL]:+.3f}, that of softmax with RoPE by "
        f"{change[BESIDE]:+.3f}; a rise of up to {FLAT} counts as none.",
        curves={"contexts": list(CONTEXTS), "loss": loss},
        seconds=sum(own["seconds"] for own in found.values()),
    )


def draw(finding: Finding) -> None:
    """Perplexity against context, both logarithmic."""
    plt.rcParams["svg.hashsalt"] = "isotach"
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    contexts = finding.curves["contexts"]
    for name, loss in finding.curves["loss"].items():
        perplexity = [math.exp(nats) for nats in loss]
        (line,) = axes.plot(contexts, perplexity, "o-", markersize=4)
        end, color = (contexts[-1], perplexity[-1]), line.get_color()
        axes.annotate(name, end, (6, 0), textcoords="offset points", va="center", color=color)
    axes.axvline(TRAINED, color="gray", linestyle=":")
    axes.annotate("trained on", (TRAINED, 1), (4, -12), ("data", "axes fraction"), "offset points", color="gray")
    axes.set(xscale="log", yscale="log", xlabel="context, characters", ylabel="perplexity per character")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_xlim(right=contexts[-1] * 2.2)
    path = PICTURES / f"{NAME}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    start(__doc__, main)
