"""Quality at equal size: lightning (LRPE in every layer, and as published in the first) and softmax on Shakespeare.

    python benchmarks/shakespeare.py path/to/tinyshakespeare/input.txt

Two million characters each, three learning rates, three seeds; finished runs are kept, so it can be interrupted.
Widths are chosen for equal parameter counts: softmax has no output gate, so its GLU is wider.
"""

import itertools
import json
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from isotach import config
from isotach.bench import report
from isotach.files import write_atomically
from isotach.models.decoder import Decoder
from isotach.train.loop import train
from isotach.train.recipe import Recipe

PUBLISHED = "lightning, LRPE in the first layer"
MODELS = {
    "lightning, LRPE in every layer": ["model.lightning.lrpe=all"],
    PUBLISHED: ["model.lightning.lrpe=first"],
    "softmax": ["model.pattern=['softmax']", "model.hidden=424"],
}
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "shakespeare"


def main(text: str, *options: str) -> None:
    """Run what is missing, the required models first; with --collect only put together what is there."""
    jobs = sorted(itertools.product(MODELS, RATES, SEEDS), key=lambda job: (job[0] == PUBLISHED, job[1] != 2e-3))
    if "--collect" not in options:
        with ProcessPoolExecutor(max_workers=2) as pool:
            list(pool.map(run, *zip(*jobs, strict=True), itertools.repeat(text)))
    rows = []
    for model in MODELS:
        runs = {rate: [loss(model, rate, seed) for seed in SEEDS] for rate in RATES}
        found = {rate: [value for value in values if value is not None] for rate, values in runs.items()}
        means = {rate: statistics.mean(values) for rate, values in found.items() if values}
        best = min(means, key=means.__getitem__)
        rows.append(
            {
                "model": model,
                "parameters": Decoder(recipe(model, best, 0, text).model).parameter_count(),
                "best_lr": best,
                "valid_loss": means[best],
                "seeds": found[best],
                "by_lr": {str(rate): mean for rate, mean in means.items()},
            }
        )
    result = {"machine": report.machine(), "commit": report.commit(), "tokens": 976 * 2048, "rows": rows}
    write_atomically(
        ROOT / "benchmarks" / "results" / "shakespeare.json", json.dumps(result, indent=1).encode() + b"\n"
    )
    for row in rows:
        print(f"{row['model']:36s} {row['parameters']:>8,}  lr {row['best_lr']:g}  {row['valid_loss']:.4f} nats")


def recipe(model: str, rate: float, seed: int, text: str) -> Recipe:
    overrides = [*MODELS[model], f"data.train={text}", f"train.lr={rate}", f"train.seed={seed}", "train.threads=1"]
    return config.load(Recipe, ROOT / "recipes" / "shakespeare.toml", overrides)


def folder(model: str, rate: float, seed: int) -> Path:
    return RUNS / f"{model.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"


def loss(model: str, rate: float, seed: int) -> float | None:
    """Validation loss in nats per character after the last step; None where the run is not finished."""
    log = folder(model, rate, seed) / "log.jsonl"
    if not log.exists() or not log.stat().st_size:
        return None
    found: float | None = json.loads(log.read_text().splitlines()[-1]).get("valid_loss")
    return found


def run(model: str, rate: float, seed: int, text: str) -> None:
    if loss(model, rate, seed) is None:
        shutil.rmtree(folder(model, rate, seed), ignore_errors=True)
        train(recipe(model, rate, seed, text), folder(model, rate, seed))
    print(f"{folder(model, rate, seed).name}: {loss(model, rate, seed):.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
