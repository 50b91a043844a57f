"""A recipe is everything that decides a run: the model, the text, the training. One TOML file each."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from isotach.config import Config
from isotach.data.stream import DataConfig
from isotach.models.decoder import ModelConfig

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Config):
    """The `[train]` table.

    steps: updates in all.
    batch_tokens: target tokens per update; a multiple of seq_len * accumulate.
    seq_len: longest span that the model sees at once.
    accumulate: forward and backward passes per update; memory falls, the update stays the same to rounding.
    lr: peak learning rate, for AdamW and Muon alike.
    warmup: updates of linear warmup. decay: the share of `steps` that wsd decays over.
    floor: where wsd and cosine end, as a fraction of lr.
    clip: largest global norm of the gradient.
    precision: auto is fp32 on CPU and bf16 on GPU. bf16 means torch.autocast: weights, their updates, norms and the
        loss in fp32, matrix products in bf16.
    activation_checkpointing: keep only the inputs of blocks and recompute the rest in the backward pass.
    validate_every, checkpoint_every: in updates; the last update always does both.
    valid_tokens: how many target tokens validation reads, at most; always the same ones.
    keep: newest checkpoints to keep; the best by validation loss is kept besides.
    threads: CPU threads; left out, torch decides. Runs repeat to the bit at the same number.
    """

    steps: Count = 1000
    batch_tokens: Count = 8192
    seq_len: Count = 1024
    accumulate: Count = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Fraction = 0.2
    floor: Fraction = 0.0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: bool = False
    validate_every: Count = 250
    valid_tokens: Count = 65536
    checkpoint_every: Count = 250
    keep: Count = 3
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    tensorboard: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rows = self.seq_len * self.accumulate
        if self.batch_tokens % rows:
            raise ValueError(
                f"expected batch_tokens to be a multiple of seq_len * accumulate = {rows}, got {self.batch_tokens}; "
                f"choose {max(1, round(self.batch_tokens / rows)) * rows}"
            )
        falling = self.decay_steps if self.schedule == "wsd" else 0
        if self.warmup + falling > self.steps:
            raise ValueError(
                f"expected warmup ({self.warmup}) and decay ({falling} updates) to fit into steps ({self.steps}); "
                "shorten them or train longer"
            )
        return self

    @property
    def decay_steps(self) -> int:
        """How many of the last updates wsd decays over."""
        return round(self.decay * self.steps)


class Recipe(Config):
    """Tables `[model]`, `[data]` and `[train]`."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()


# What may differ when a run is resumed: it changes how long, how often and where, never what was computed before.
RESUMABLE = {
    "data.cache",
    "data.workers",
    "train.checkpoint_every",
    "train.device",
    "train.keep",
    "train.steps",
    "train.tensorboard",
    "train.threads",
    "train.validate_every",
}


def changed(before: Recipe, after: Recipe) -> str | None:
    """The first key, dotted, in which two recipes differ although a resumed run may not change it."""
    old, new = dict(_leaves(before.model_dump(mode="json"))), dict(_leaves(after.model_dump(mode="json")))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return next((key for key in differing if key not in RESUMABLE), None)


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
