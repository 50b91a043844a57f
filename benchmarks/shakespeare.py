"""Quality at equal size: lightning (LRPE in every layer, and as published in the first) and softmax on Shakespeare.

    python benchmarks/shakespeare.py path/to/tinyshakespeare/input.txt

Two million characters each, three learning rates, three seeds; finished runs are kept, so it can be interrupted.
Widths are chosen for equal parameter counts: softmax has no output gate, so its GLU is wider.
"""

import itertools
import json
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

MODELS = {
    "lightning, LRPE in every layer": ["model.lightning.lrpe=all"],
    "lightning, LRPE in the first layer": ["model.lightning.lrpe=first"],
    "softmax": ["model.pattern=['softmax']", "model.hidden=424"],
}
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "shakespeare"


def main(text: str) -> None:
    jobs = list(itertools.product(MODELS, RATES, SEEDS))
    with ProcessPoolExecutor(max_workers=2) as pool:
        losses = dict(zip(jobs, pool.map(run, *zip(*jobs, strict=True), itertools.repeat(text)), strict=True))
    rows = []
    for model in MODELS:
        means = {rate: statistics.mean(losses[model, rate, seed] for seed in SEEDS) for rate in RATES}
        best = min(means, key=means.__getitem__)
        rows.append(
            {
                "model": model,
                "parameters": Decoder(recipe(model, best, 0, text).model).parameter_count(),
                "best_lr": best,
                "valid_loss": means[best],
                "seeds": [losses[model, best, seed] for seed in SEEDS],
                "by_lr": {str(rate): mean for rate, mean in means.items()},
            }
        )
    result = {"machine": report.machine(), "commit": report.commit(), "tokens": 976 * 2048, "rows": rows}
    write_atomically(ROOT / "benchmarks" / "results" / "shakespeare.json", json.dumps(result, indent=1).encode())
    for row in rows:
        print(f"{row['model']:36s} {row['parameters']:>8,}  lr {row['best_lr']:g}  {row['valid_loss']:.4f} nats")


def recipe(model: str, rate: float, seed: int, text: str) -> Recipe:
    overrides = [*MODELS[model], f"data.train={text}", f"train.lr={rate}", f"train.seed={seed}", "train.threads=1"]
    return config.load(Recipe, ROOT / "recipes" / "shakespeare.toml", overrides)


def run(model: str, rate: float, seed: int, text: str) -> float:
    """Validation loss in nats per character; read from the log where the run is already there."""
    folder = RUNS / f"{model.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    if not (folder / "log.jsonl").exists():
        train(recipe(model, rate, seed, text), folder)
    record = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    print(f"{folder.name}: {record['valid_loss']:.4f}", flush=True)
    return float(record["valid_loss"])


if __name__ == "__main__":
    main(*sys.argv[1:])
