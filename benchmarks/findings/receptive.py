"""How far a transformer sees, computed from its encoding of distance and measured on text.

    python benchmarks/findings/receptive.py --text path/to/tinyshakespeare/input.txt

Claim: the theoretical receptive field of an encoding, known without any training, follows the same trend as the
empirical one of models trained with it (arXiv:2307.10156). With b_j the weight of a key j tokens back,

    TRF(ε) = the least N with Σ_{j<N} b_j ≥ (1 - ε) Σ_j b_j           of the head with the smallest slope
    ERF(ε) = the least J with perplexity(full) / perplexity(J) > 1 - ε

where perplexity(J) scores always the same held-out characters, each from at most J before it. ε is 1 % on both sides:
5 % of the perplexity of characters is reached by words alone. Exact wordings of the authors' definitions are not known
to us. The models are those of convergence.py.
"""

import math
import time
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from characters import PICTURES, RESULTS, RUNS, held_out, start
from convergence import CONVERGING, HEADS, STEPS, TRAINED, model
from torch import Tensor
from torch.nn import functional as F

from isotach.bench import findings
from isotach.bench.findings import Comparison, Finding, Verdict
from isotach.models.decoder import Decoder
from isotach.nn.positions import alibi_slopes
from isotach.nn.receptive import ENCODINGS, empirical_receptive_field, theoretical_receptive_field
from isotach.search.ranking import kendall

NAME = "receptive"
FULL = 1024
WINDOWS = (*sorted({round(2 ** (i / 4)) for i in range(37)}), FULL)  # 1 to 512, four to an octave
STRETCHES, SCORED = 24, 128
SHARES = (0.01, 0.05)  # ε; the verdict is about the first
BATCH = 1 << 15  # characters read at a time


def main(text: str) -> None:
    curves = {name: findings.part(RUNS / NAME, name, partial(losses, name, text)) for name in ENCODINGS}
    finding = conclude(curves)
    findings.save(finding, RESULTS)
    draw(finding)
    print(f"{finding.verdict}: {finding.because}")


def losses(name: str, text: str) -> dict[str, Any]:
    """Nats per character by window."""
    begin = time.perf_counter()
    decoder, ids = model(name, text), torch.from_numpy(held_out(text).astype("int64"))
    return {"loss": [loss(decoder, ids, window) for window in WINDOWS], "seconds": time.perf_counter() - begin}


@torch.inference_mode()
def loss(decoder: Decoder, ids: Tensor, window: int) -> float:
    """Mean nats of STRETCHES of SCORED characters, each read from at most `window` before it, and from 7/8 of them."""
    step = min(SCORED, 1 << max(0, (window // 8).bit_length() - 1))  # characters scored at the end of one window
    first = torch.linspace(FULL, len(ids) - SCORED - 1, STRETCHES).long()
    ends = (first[:, None] + torch.arange(step, SCORED + 1, step)).reshape(-1, 1)
    inputs, targets = ids[ends + torch.arange(-window, 0)], ids[ends + torch.arange(1 - step, 1)]
    total, rows = 0.0, max(1, BATCH // window)
    for some, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
        logits = decoder.head(decoder.hidden(some)[0][:, -step:])
        total += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    return total / targets.numel()


# ---- told


def conclude(found: dict[str, dict[str, Any]]) -> Finding:
    """Reproduced where four of five pairs of encodings have the same order in both fields, partly where three have."""
    theory = {f"{eps:g}": computed(eps) for eps in SHARES}
    practice = {f"{eps:g}": measured(found, eps) for eps in SHARES}
    tau = {
        eps: kendall(list(own.values()), [float(practice[eps][name]) for name in own]) for eps, own in theory.items()
    }
    here, there = theory
    learned = kendall([found[name]["loss"][-1] for name in CONVERGING], [practice[here][name] for name in CONVERGING])
    verdict: Verdict = "not reproduced"
    if tau[here] >= 0.2:
        verdict = "reproduced" if tau[here] >= 0.6 else "partly reproduced"
    rows = [
        Comparison(what=f"{name}: {kind}({here})", authors=None, ours=own[here][name], unit="characters")
        for name in CONVERGING
        for kind, own in (("TRF", theory), ("ERF", practice))
    ]
    rows.append(Comparison(what=f"Kendall's τ of ERF({here}) and the loss", authors=None, ours=learned, unit=""))
    rows += [
        Comparison(what=f"Kendall's τ of TRF({eps}) and ERF({eps})", authors=None, ours=value, unit="")
        for eps, value in tau.items()
    ]
    reach, sight = theory[here].values(), [practice[here][name] for name in CONVERGING]
    return Finding(
        name=NAME,
        title="Receptive fields computed and measured",
        claim="The theoretical receptive field of a positional encoding, computed without training, matches the trend "
        "of the empirical one.",
        source="Exploring Transformer Extrapolation (arXiv:2307.10156)",
        setting=f"Models of three layers and {HEADS} heads, {STEPS} updates on {TRAINED} characters of Tiny "
        f"Shakespeare at a time, one seed; {STRETCHES * SCORED:,} held-out characters are scored from windows of "
        f"{WINDOWS[0]} to {WINDOWS[-2]} characters and from {FULL:,}, which counts as all. After so little "
        "training models differ in how much they have learned, and that limits what they see as well. The authors read "
        "words of four large corpora; their figures are not known to us.",
        numbers=tuple(rows),
        verdict=verdict,
        because=f"Over the {len(CONVERGING)} encodings that converge Kendall's τ between the two fields is "
        f"{tau[here]:+.2f} at ε = {here} and {tau[there]:+.2f} at {there}. At {here} the computed fields span "
        f"{min(reach):,.0f} to {max(reach):,.0f} characters, the measured ones {min(sight)} to {max(sight)}; between "
        f"these and the losses of the models τ is {learned:+.2f}.",
        curves={
            "windows": list(WINDOWS),
            "loss": {name: own["loss"] for name, own in found.items()},
            "theoretical": theory,
            "empirical": practice,
        },
        seconds=sum(own["seconds"] for own in found.values()),
    )


def computed(eps: float) -> dict[str, float]:
    """TRF of the encodings that converge."""
    slope = min(alibi_slopes(HEADS))
    return {name: theoretical_receptive_field(ENCODINGS[name], slope=slope, eps=eps) for name in CONVERGING}


def measured(found: dict[str, dict[str, Any]], eps: float) -> dict[str, int]:
    """ERF of all encodings."""
    fields = {}
    for name, own in found.items():
        perplexity = {window: math.exp(nats) for window, nats in zip(WINDOWS, own["loss"], strict=True)}
        fields[name] = empirical_receptive_field(perplexity.__getitem__, WINDOWS, eps=eps)
    return fields


def draw(finding: Finding) -> None:
    """The measured field over the computed one; encodings that diverge stand at the right, as far as they see."""
    plt.rcParams["svg.hashsalt"] = "isotach"
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    theory, practice = (finding.curves[kind][f"{SHARES[0]:g}"] for kind in ("theoretical", "empirical"))
    edge = 4 * max(theory.values())
    for name, sight in practice.items():
        at = theory.get(name, edge)
        axes.plot(at, sight, "C0o" if name in theory else "C1^", markersize=5)
        label = ENCODINGS[name].formula
        axes.annotate(label, (at, sight), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    axes.set(xscale="log", yscale="log", ylabel="empirical receptive field, characters")
    axes.set_xlabel("theoretical receptive field, characters (▲ infinite)")
    axes.margins(0.12)
    path = PICTURES / f"{NAME}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    start(__doc__, main)
