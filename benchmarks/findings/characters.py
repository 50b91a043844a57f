"""What the findings about texts longer than those trained on share: small language models of characters.

All are trained alike on the first nine tenths of a text and read the last tenth; only the mixer differs.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from isotach.data.stream import DataConfig, open_tokens
from isotach.data.tokenizer import ByteTokenizer
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig
from isotach.train import checkpoint
from isotach.train.loop import train
from isotach.train.recipe import Recipe, TrainConfig

ROOT = Path(__file__).parents[2]
RUNS, RESULTS, PICTURES = (
    ROOT / "runs" / "findings",
    ROOT / "benchmarks" / "results" / "findings",
    ROOT / "docs/results",
)
SHAPE: Mapping[str, Any] = {"vocab": 257, "width": 128, "hidden": 256}
BATCH_TOKENS, RATE = 2048, 2e-3


def data(text: str) -> DataConfig:
    return DataConfig(train=text, valid_fraction=0.1)


def held_out(text: str) -> NDArray[np.integer]:
    """The characters that no model was trained on."""
    return np.asarray(open_tokens(data(text), "valid", ByteTokenizer()).ids)


def trained(model: Mapping[str, Any], text: str, run: Path, *, seq_len: int, steps: int) -> Decoder:
    """A model of SHAPE and these options after `steps` updates of BATCH_TOKENS characters; kept in the folder `run`."""
    settings = TrainConfig(
        steps=steps,
        batch_tokens=BATCH_TOKENS,
        seq_len=seq_len,
        lr=RATE,
        schedule="cosine",
        floor=0.05,
        warmup=50,
        validate_every=steps,
        checkpoint_every=250,
        keep=1,
        threads=1,
    )
    recipe = Recipe(model=ModelConfig.model_validate({**SHAPE, **model}), data=data(text), train=settings)
    begun = bool(checkpoint.step_folders(run))
    if not begun:
        shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    summary = train(recipe, run, resume=begun)
    if summary.stopped:
        sys.exit(f"{run}: stopped by {summary.stopped} after {summary.step} of {steps} updates; run again to go on")
    return Decoder.load(checkpoint.latest(run))


def start(describe: str | None, main: Callable[[str], None]) -> None:
    """main(text), the text named on the command line; what the user can mend ends in one sentence and exit code 2."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights of far tokens become denormal numbers, which are slow
    parser = argparse.ArgumentParser(
        description=describe, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="Tiny Shakespeare's input.txt")
    try:
        main(parser.parse_args().text)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
