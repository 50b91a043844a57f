"""Training tokens per second at short and long context, at equal tokens per update, and what an update spends besides.

The updates are those of the trainer itself, on packed documents of the Python standard library; only the number of
tokens that a row may span differs. The softmax twin stands beside.

    of_product  FLOPs of the model, three times its forward's at half a row of context, over those of a matrix product
                in the same time
    MiB         tensors that an update makes and holds at most at once, weights and moments excluded
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from isotach.allocator import keep_blocks
from isotach.bench.decode import CORRECT, model_error, softmax_twin
from isotach.bench.limits import PRODUCT, Limits, peak
from isotach.bench.report import Figure, Result, interleave, milliseconds, paired
from isotach.config import parse
from isotach.data.stream import DataConfig
from isotach.models.decoder import Decoder, ModelConfig
from isotach.train.loop import Trainer, train
from isotach.train.recipe import Recipe, TrainConfig

LENGTHS = (1024, 16384)
# Presets, and the least share of the short context's tokens per second at the long one.
BOUNDS = {"tnl-1m": 0.8, "tnl-10m": 0.9, "tnl-44m": 0.9}


def measure(
    *,
    device: torch.device,
    presets: Sequence[str] = tuple(BOUNDS),
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 3,
    steps: int = 30,
) -> Result:
    """Tokens per second for every preset, its twin and every length; the overhead of a real run of `steps` updates."""
    keep_blocks()  # as `isotach train` does
    tokens = max(lengths)
    settings = {"presets": list(presets), "lengths": list(lengths), "tokens_per_update": tokens, "device": str(device)}
    result = Result(settings)
    with tempfile.TemporaryDirectory() as folder:
        for name in presets:
            _compare(name, result, Path(folder), device=device, lengths=lengths, rounds=rounds)
        share = _overhead(presets[0], Path(folder), device=device, steps=steps)
    name = f"{presets[0]}: share of a run outside forward, backward and optimizer"
    result.figures.append(Figure(name, share, at_most=0.05))
    return result


def _compare(
    name: str, result: Result, folder: Path, *, device: torch.device, lengths: Sequence[int], rounds: int
) -> None:
    """Add one preset's rows and figures to the result."""
    model = parse(ModelConfig, {"preset": name}, who="bench")
    models = {name: model, f"{name} softmax": softmax_twin(model)}
    limits = Limits.of(device, torch.bfloat16 if device.type == "cuda" else torch.float32)  # as the trainer chooses
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    flops = {}
    for each, config in models.items():
        decoder = Decoder(config).to(device)
        if (wrong := model_error(decoder)) > CORRECT:
            result.refused.append(f"{each}: relative error {wrong:.1e} against float64, over {CORRECT:.0e}")
            continue
        for length in lengths:
            recipe = _recipe(config, folder, device=device, length=length, tokens=max(lengths), steps=rounds + 2)
            flops[each, length] = 3 * decoder.flops_per_token(length // 2) * max(lengths)
            calls[each, length] = partial(_update, Trainer(recipe, folder / f"{each} {length}"))
    if not calls:
        return
    product = ("", 0)
    seconds = interleave(calls | {product: limits.calls[PRODUCT]}, rounds=rounds, device=device)
    for (each, length), call in calls.items():
        spent = seconds[each, length]
        row = {"model": each, "length": length, **milliseconds(spent)}
        row["tokens_per_second"] = max(lengths) / statistics.median(spent)
        row["GFLOP/s"] = 1e-9 * flops[each, length] / statistics.median(spent)
        row["of_product"] = flops[each, length] / limits.work[PRODUCT] * paired(seconds[product], spent)
        row["MiB"] = peak(call, device) / 2**20
        result.rows.append(row)
    for each in models:
        if (each, min(lengths)) in calls:
            ratio = paired(seconds[each, min(lengths)], seconds[each, max(lengths)])
            label = f"{each}: tokens/s at {max(lengths):,} over {min(lengths):,}"
            result.figures.append(Figure(label, ratio, at_least=BOUNDS.get(each)))


def _update(trainer: Trainer) -> None:
    trainer.update([trainer.packer.batch(trainer.step)])


def _overhead(name: str, folder: Path, *, device: torch.device, steps: int) -> float:
    """The share of a real run that is data, logging and three checkpoints."""
    tokens = 8192
    model = parse(ModelConfig, {"preset": name}, who="bench")
    recipe = _recipe(model, folder, device=device, length=1024, tokens=tokens, steps=steps)
    return train(recipe, folder / "run").overhead


def _recipe(model: ModelConfig, folder: Path, *, device: torch.device, length: int, tokens: int, steps: int) -> Recipe:
    training = TrainConfig(
        steps=steps,
        seq_len=length,
        batch_tokens=tokens,
        device="cuda" if device.type == "cuda" else "cpu",
        validate_every=steps,
        valid_tokens=tokens,
        checkpoint_every=max(1, steps // 3),
    )
    return Recipe(model=model, data=DataConfig(train="stdlib", cache=str(folder / "tokens")), train=training)
