"""Memory caching in associative recall: copies of the state at segment ends, kept and read.

    python benchmarks/findings/caching.py

Claim: keeping the states of earlier segments raises recall, of Titans from 31.75 to 40.50 and of deep linear attention
from 30.51 to 38.03 on average over the authors' tasks (Memory Caching, arXiv:2602.24281). Token t of segment s reads

    residual   M_t(q_t) + Σ_{i<s} M⁽ⁱ⁾(q_t)
    gated      γ_s M_t(q_t) + Σ_{i<s} γ_i M⁽ⁱ⁾(q_t)      γ a softmax over segments, from x_t and their mean inputs
    sparse     gated, with the best few segments

Their memories are networks, ours are matrices, for which soup and gated are the same. The smallest relatives of theirs:
DeltaNet for Titans, which erases, and for deep linear attention the same layer that only adds. Of that one residual
caching is no change at all: every token is in one segment, and sums of segments are sums of tokens.
"""

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from delta_rule import HEADS, model, only_add  # a script beside this one

from isotach.bench import findings
from isotach.bench.findings import Comparison, Finding, Verdict
from isotach.eval.recall import RecallConfig, train_recall

NAME = "caching"
ROOT = Path(__file__).parents[2]
PARTS = ROOT / "runs" / "findings" / NAME
WIDTH, SEGMENT, TOP, RATE = 16, 16, 2, 1e-2
TASK = RecallConfig(pairs=(8, 16, 32), length=64, vocab=64, steps=1000, rows=32, lr=RATE)
READS: dict[str, dict[str, Any] | None] = {
    "no cache": None,
    "residual": {"read": "residual", "segment": SEGMENT},
    "gated": {"read": "gated", "segment": SEGMENT},
    "sparse": {"read": "sparse", "segment": SEGMENT, "top": TOP},
}
BASES = {"erases": "DeltaNet", "adds": "DeltaNet that only adds"}
AUTHORS = {"erases": (31.75, 40.50), "adds": (30.51, 38.03)}  # Titans, deep linear attention
SEEDS = {"no cache": (0, 1), "gated": (0, 1), "residual": (0,), "sparse": (0,)}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sums that almost cancel leave denormal numbers, which are slow
    found: dict[str, dict[str, list[Any]]] = {}
    for base in BASES:
        reads = [read for read in READS if (base, read) != ("adds", "residual")]
        found[base] = {
            read: [
                findings.part(PARTS, f"{base}-{read}-{seed}".replace(" ", "-"), partial(recall, base, read, seed))
                for seed in SEEDS[read]
            ]
            for read in reads
        }
    finding = conclude(found)
    findings.save(finding, ROOT / "benchmarks" / "results" / "findings")
    draw(finding, ROOT / "docs" / "results" / f"{NAME}.svg")
    print(f"{finding.verdict}: {finding.because}")


def recall(base: str, read: str, seed: int) -> dict[str, Any]:
    """Accuracy by number of pairs, and the state's bytes after the longest sequence."""
    cache = READS[read]
    decoder = model("delta", {} if cache is None else {"cache": cache}, width=WIDTH, seed=seed)
    if base == "adds":
        only_add(decoder)
    found = train_recall(decoder, TASK, seed=seed)
    return {
        "accuracy": {str(pairs): right for pairs, right in found.accuracy.items()},
        "state_bytes": decoder.state_bytes(4 * TASK.pairs[-1]),
        "parameters": decoder.parameter_count(),
        "seconds": found.seconds,
    }


def accuracy(runs: list[Any], *pairs: int) -> float:
    """In percent, the mean over runs and numbers of pairs (all of them where none is named)."""
    return 100 * statistics.mean(run["accuracy"][str(n)] for run in runs for n in pairs or TASK.pairs)


def conclude(found: dict[str, Any]) -> Finding:
    """Reproduced where gated caching gains for both memories, more than seeds differ; partly where for one of them."""
    gains = {base: accuracy(reads["gated"]) - accuracy(reads["no cache"]) for base, reads in found.items()}
    spread = {
        base: max(
            max(accuracy([run]) for run in runs) - min(accuracy([run]) for run in runs) for runs in reads.values()
        )
        for base, reads in found.items()
    }
    helped = [base for base in BASES if gains[base] > spread[base]]
    verdict: Verdict = (
        "reproduced" if len(helped) == len(BASES) else "partly reproduced" if helped else "not reproduced"
    )
    numbers = [
        Comparison(
            what=f"{BASES[base]}: {read}",
            authors=dict(zip(("no cache", "gated"), AUTHORS[base], strict=True)).get(read),
            ours=accuracy(runs),
            unit="% right",
        )
        for base, reads in found.items()
        for read, runs in reads.items()
    ]
    every = [run for reads in found.values() for runs in reads.values() for run in runs]
    told = "; ".join(
        f"{BASES[base]} goes from {accuracy(reads['no cache']):.1f} to {accuracy(reads['gated']):.1f} % "
        f"(sparse {accuracy(reads['sparse']):.1f} %), where seeds differ by {spread[base]:.1f}"
        for base, reads in found.items()
    )
    residual = accuracy(found["erases"]["residual"])
    before, after = (found["erases"][read][0]["state_bytes"] for read in ("no cache", "gated"))
    return Finding(
        name=NAME,
        title="Memory caching in associative recall",
        claim="Caching the memories of earlier segments raises the recall of recurrent models.",
        source="Memory Caching: RNNs with Growing Memory (arXiv:2602.24281)",
        setting=f"Two layers of width {WIDTH}, {HEADS} heads, segments of {SEGMENT} tokens; {TASK.pairs[0]} to "
        f"{TASK.pairs[-1]} pairs in 64 to {4 * TASK.pairs[-1]} tokens, {TASK.steps:,} updates of {TASK.rows} sequences "
        f"at a rate of {RATE:g}; two seeds with gates and without a cache, one of the others. The authors: deep "
        "memories of 1.3B parameters on recall from text, so only the sign of the gain compares.",
        numbers=tuple(numbers),
        verdict=verdict,
        because=f"With gated caching {told}. Residual caching leaves DeltaNet at {residual:.1f} %. The state takes "
        f"{before:,} bytes without and {after:,} with the cache.",
        curves=found,
        seconds=sum(run["seconds"] for run in every),
    )


def draw(finding: Finding, path: Path) -> None:
    """Accuracy over pairs, a panel for each memory and a line for each way to read."""
    plt.rcParams["svg.hashsalt"] = "isotach"
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained", sharey=True)
    colors = dict(zip(READS, ("black", "C1", "C0", "C2"), strict=True))
    for axes, (base, reads) in zip(panels, finding.curves.items(), strict=True):
        for read, runs in reads.items():
            axes.plot(TASK.pairs, [accuracy(runs, n) for n in TASK.pairs], "o-", color=colors[read], label=read)
        axes.set(xlabel=f"pairs in the sequence\n{BASES[base]}", xscale="log", ylim=(0, 102))
        axes.set_xticks(TASK.pairs, [str(n) for n in TASK.pairs])
        axes.minorticks_off()
    panels[0].set_ylabel("questions answered right, %")
    panels[0].legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(f"{sys.argv[0]}: takes no arguments")
    main()
