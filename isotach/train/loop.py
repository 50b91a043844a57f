"""The training loop: text in, checkpoints out, the same bits every time.

One update minimizes L = (1/N) Σ -log p(target), over all N targets of the step, so accumulation changes rounding and
nothing else. Batches are a function of (seed, step) and weights of named seeds: no global random state is read, and
60 updates equal 30, a resume, and 30 more.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isotach import config
from isotach.data.pack import Batch, Packer, prefetch
from isotach.data.stream import open_tokens
from isotach.data.tokenizer import Tokenizer, load_tokenizer
from isotach.errors import UserError
from isotach.files import write_atomically
from isotach.models.decoder import Decoder
from isotach.train import checkpoint, loss
from isotach.train.metrics import Board, Log, losses, peak_flops, peak_memory
from isotach.train.optim import Optimizer
from isotach.train.recipe import Recipe, changed
from isotach.train.schedule import cosine, warmup_stable_decay

OPTIMIZER = "training.safetensors"
RECIPE = "config.toml"


class Sink(Protocol):
    """Whatever wants the record of every step: a progress bar, the log, TensorBoard."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended: its last update, its newest checkpoint, and the signal that stopped it, if one did.

    last: the log record of the last update made now; empty when nothing was left to do.
    seconds: wall-clock time of the updates, validation left out. overhead: the share of it spent neither in forward,
        backward nor optimizer: waiting for data, logging, checkpoints.
    """

    step: int
    checkpoint: Path
    stopped: str | None
    last: dict[str, Any]
    seconds: float
    overhead: float


def train(recipe: Recipe, run: Path, *, resume: bool = False, sinks: Sequence[Sink] = ()) -> Summary:
    """Train to `recipe.train.steps`, or until SIGINT or SIGTERM, and leave a complete checkpoint.

    The first signal ends the run after the update in progress, with a checkpoint; a second one kills. Signals are
    only caught in the main thread.

    Args:
        recipe: the whole configuration; written to RUN/config.toml.
        run: a new or empty folder; with `resume`, one with a checkpoint of the same recipe, up to the keys in
            `recipe.RESUMABLE`.
        resume: continue from the newest checkpoint, to the bit where an uninterrupted run would be.
        sinks: besides RUN/log.jsonl, what else gets the record of every step.

    Raises:
        UserError: bad input, a loss that is not finite, or a checkpoint that cannot be written.
    """
    start = _start(recipe, run, resume=resume)
    with _threads(recipe.train.threads), contextlib.ExitStack() as closing:
        trainer = Trainer(recipe, run)
        if start is not None:
            trainer.load(start)
        write_atomically(run / RECIPE, config.dumps(recipe).encode())
        outputs: list[Sink] = [Log(run, after=trainer.step), *sinks]
        if recipe.train.tensorboard:
            outputs.append(Board(run, after=trainer.step))
        for sink in outputs:
            closing.callback(sink.close)
        closing.callback(trainer.checkpoints.wait)
        with Interrupt() as interrupt:
            return trainer.run(outputs, interrupt)


class Trainer:
    """A decoder, its optimizer, its text and its checkpoints, between two updates.

    step: updates made. tokens: targets seen.
    """

    def __init__(self, recipe: Recipe, run: Path) -> None:
        settings = recipe.train
        self.recipe, self.folder = recipe, run
        self.device, self.dtype = _placement(settings.device, settings.precision)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        if self.tokenizer.vocab_size != recipe.model.vocab:
            raise UserError(
                f"recipe: expected model.vocab to be the tokenizer's {self.tokenizer.vocab_size}, "
                f"got {recipe.model.vocab}; set model.vocab={self.tokenizer.vocab_size} or choose another tokenizer"
            )
        self.text = open_tokens(recipe.data, "train", self.tokenizer)
        self.packer = Packer(
            self.text, seq_len=settings.seq_len, batch_tokens=settings.batch_tokens, seed=settings.seed
        )
        self.valid_batches = valid_batches(recipe, self.tokenizer)
        self.decoder = Decoder(recipe.model, seed=settings.seed).to(self.device)
        self.shadow = copy.deepcopy(self.decoder).cpu()  # what the background writer reads
        self.decoder.recompute = settings.activation_checkpointing
        self.optimizer = Optimizer(
            self.decoder,
            name=settings.optimizer,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        # Forward, and twice that for backward; recomputation does not count: this is model FLOPs utilization.
        self.flops_per_token = 3 * self.decoder.flops_per_token(settings.seq_len)
        self.peak = peak_flops(self.device, self.dtype)
        self.checkpoints = checkpoint.Checkpoints(run, keep=settings.keep)
        self.recent: deque[float] = deque(maxlen=20)  # losses, to tell a spike from a bolt out of the blue
        self.step = 0
        self.tokens = 0

    def run(self, sinks: Sequence[Sink], interrupt: "Interrupt") -> Summary:
        """Update until the last step or an interrupt; every step's record goes to the sinks."""
        settings = self.recipe.train
        last: dict[str, Any] = {}
        saved = self.step
        total = computing = 0.0
        steps = range(self.step, settings.steps)
        stream = prefetch(self.packer, steps, self.recipe.data.workers, micros=settings.accumulate)
        mark = time.perf_counter()
        with contextlib.closing(stream):
            for _ in steps:
                batches = [next(stream) for _ in range(settings.accumulate)]
                begin = time.perf_counter()
                record = self.update(batches)
                end = time.perf_counter()
                final = self.step == settings.steps
                if final or self.step % settings.validate_every == 0:
                    record |= self.validate()
                now = time.perf_counter()
                seconds, validating = now - mark, now - end  # whatever follows falls into the next step's seconds
                mark = now
                seconds -= validating
                total, computing = total + seconds, computing + end - begin
                last = record | self.speed(batches, seconds=seconds, overhead=1 - (end - begin) / seconds)
                for sink in sinks:
                    sink.write(last)
                if final or interrupt.name or self.step % settings.checkpoint_every == 0:
                    self.save(valid_loss=record.get("valid_loss"))
                    saved = self.step
                if interrupt.name:
                    break
        self.checkpoints.wait()
        total += time.perf_counter() - mark
        folder = checkpoint.step_folder(self.folder, saved)
        return Summary(self.step, folder, interrupt.name, last, total, 1 - computing / total if last else 0.0)

    def update(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """One update from all micro-batches of a step. One synchronization with the device.

        Raises UserError, with the weights untouched, when the loss or the gradient's norm is not finite.
        """
        settings = self.recipe.train
        count = sum(batch.targets.numel() for batch in batches)
        nats = torch.zeros((), device=self.device)
        for batch in batches:
            part = self.nats(batch)
            (part / count).backward()
            nats += part.detach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        total, norm_value = torch.stack([nats, norm]).tolist()
        if not (math.isfinite(total) and math.isfinite(norm_value)):
            raise self._not_finite(self.step + 1, f"loss {total / count:.4g}, gradient norm {norm_value:.4g}")
        torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.clip, norm)
        multiplier = self.multiplier(self.step)
        self.optimizer.step(multiplier)
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += count
        self.recent.append(total / count)
        return {
            "step": self.step,
            **losses(total, tokens=count, text_bytes=sum(batch.bytes for batch in batches)),
            "lr": settings.lr * multiplier,
            "grad_norm": norm_value,
            "tokens": self.tokens,
        }

    def nats(self, batch: Batch) -> Tensor:
        """Sum of -log p(target) over a batch, a float32 scalar."""
        names = ("tokens", "targets", "positions", "cu_seqlens")
        here = dataclasses.replace(batch, **{name: getattr(batch, name).to(self.device) for name in names})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden, _ = self.decoder.hidden(here.tokens, span=here.span)
        return loss.nats(self.decoder, hidden, here.targets, dtype=self.dtype)

    def multiplier(self, step: int) -> float:
        """The schedule's value for the update that follows `step` others."""
        settings = self.recipe.train
        shape = {"steps": settings.steps, "warmup": settings.warmup}
        if settings.schedule == "cosine":
            return cosine(step, floor=settings.floor, **shape)
        return warmup_stable_decay(step, decay=settings.decay_steps, floor=settings.floor, **shape)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """`valid_loss`, `valid_bpb` and `valid_ppl` over the same tokens every time; empty without validation text."""
        if not self.valid_batches:
            return {}
        nats = float(sum(self.nats(batch).double() for batch in self.valid_batches))
        if not math.isfinite(nats):
            raise self._not_finite(self.step, f"validation loss {nats:.4g}")
        tokens = sum(batch.targets.numel() for batch in self.valid_batches)
        text_bytes = sum(batch.bytes for batch in self.valid_batches)
        found = losses(nats, tokens=tokens, text_bytes=text_bytes)
        return {f"valid_{name}": value for name, value in found.items()}

    def speed(self, batches: Sequence[Batch], *, seconds: float, overhead: float) -> dict[str, float]:
        """What one step cost: seconds, tokens/s, model FLOPs over the machine's peak, peak bytes, overhead share."""
        rate = sum(batch.targets.numel() for batch in batches) / seconds
        return {
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak,
            "memory": peak_memory(self.device),
            "overhead": overhead,
        }

    def save(self, *, valid_loss: float | None) -> None:
        """Copy weights and optimizer to the CPU and let the background write them; refuses what is not finite."""
        self.checkpoints.wait()  # the writer may still read the shadow
        self.shadow.load_state_dict(self.decoder.state_dict())
        state = {key: value.to("cpu", copy=True) for key, value in self.optimizer.state_dict().items()}

        if bad := _first_not_finite(itertools.chain(self.shadow.named_parameters(), state.items())):
            raise self._not_finite(self.step, f"{bad} after the update")

        def fill(folder: Path) -> None:
            self.shadow.save(folder)
            self.tokenizer.save(folder)
            (folder / RECIPE).write_text(config.dumps(self.recipe), encoding="utf-8")
            save_file(state, folder / OPTIMIZER)

        training = {
            "step": self.step,
            "tokens": self.tokens,
            "valid_loss": valid_loss,
            "losses": list(self.recent),
            "seed": self.recipe.train.seed,
            "text": self.text.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
        }
        self.checkpoints.save(fill, training)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of this recipe. Raises UserError when it is damaged or the text has changed."""
        training = checkpoint.verify(folder)
        for key, now in (("text", self.text.fingerprint), ("tokenizer", self.tokenizer.fingerprint)):
            if training[key] != now:
                raise UserError(
                    f"{folder}: expected the {key} of the first start, got a changed one; "
                    f"restore the {key} or start another run"
                )
        self.decoder.load_state_dict(Decoder.load(folder).state_dict())
        self.optimizer.load_state_dict(load_file(folder / OPTIMIZER))
        self.step, self.tokens = training["step"], training["tokens"]
        self.recent.extend(training["losses"])

    def _not_finite(self, step: int, found: str) -> UserError:
        """The sentence that says where, what to go back to, and why this usually happens."""
        self.checkpoints.wait()
        folders = checkpoint.step_folders(self.folder)
        good = f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"
        weight = _first_not_finite(self.decoder.named_parameters())
        gradient = _first_not_finite((n, p.grad) for n, p in self.decoder.named_parameters() if p.grad is not None)
        low = min(self.recent, default=math.inf)
        if weight:
            cause = f"an update overflowed {weight}"
        elif self.recent and self.recent[-1] > low + 1:
            cause = f"the loss had risen from {low:.3g} to {self.recent[-1]:.3g} before"
        elif gradient:
            cause = f"the weights are finite, the gradient of {gradient} is not"
        else:
            cause = "weights and gradients are finite, the forward pass overflowed"
        lr = self.recipe.train.lr * self.multiplier(step - 1)
        return UserError(
            f"train: step {step}: expected finite numbers, got {found}; {good}; {cause}; "
            f"most likely the learning rate, {lr:.3g} at this step, is too high: lower train.lr or raise train.warmup"
        )


class Interrupt:
    """Remembers the first SIGINT or SIGTERM in `name`; a second one then kills the process at once."""

    name: str | None = None

    def __enter__(self) -> "Interrupt":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)


def _start(recipe: Recipe, run: Path, *, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start; refuses folders that fit neither."""
    if not resume:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            begun = run.is_dir() and checkpoint.step_folders(run)
            got = "one with checkpoints" if begun else "something else, without a checkpoint to continue from"
            remedy = "continue it with --resume or choose another" if begun else "choose another, or remove it first"
            raise UserError(f"{run}: expected a new or empty run folder, got {got}; {remedy}")
        return None
    folder = checkpoint.latest(run)
    before = config.load(Recipe, folder / RECIPE)
    if key := changed(before, recipe):
        raise UserError(
            f"{run}: {key} is not what this run was started with; "
            f"resume with {run / RECIPE}, or start another run with the new value"
        )
    return folder


def _placement(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of matrix products for the recipe's two words."""
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UserError("train.device: expected a CUDA device, found none; set train.device=cpu")
    kind = "cuda" if device == "cuda" or (device == "auto" and gpu) else "cpu"
    half = precision == "bf16" or (precision == "auto" and kind == "cuda")
    return torch.device(kind), torch.bfloat16 if half else torch.float32


def valid_batches(recipe: Recipe, tokenizer: Tokenizer) -> list[Batch]:
    """The first `valid_tokens` targets of the validation text, in order; none when no text is set aside."""
    settings = recipe.train
    if recipe.data.valid is None and recipe.data.valid_fraction == 0:
        return []
    size = settings.batch_tokens // settings.accumulate
    text = open_tokens(recipe.data, "valid", tokenizer)
    packer = Packer(text, seq_len=settings.seq_len, batch_tokens=size, seed=settings.seed, shuffle=False)
    return [packer.batch(step) for step in range(min(packer.steps, max(1, settings.valid_tokens // size)))]


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with `count` CPU threads, then give back what was set before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, value in named if not torch.isfinite(value).all()), None)
