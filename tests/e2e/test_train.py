"""Training end to end on a tiny model: repeatable to the bit, stoppable at any time, clear when it cannot go on."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from isotach import config
from isotach.data.pack import Packer
from isotach.data.stream import open_tokens
from isotach.data.tokenizer import load_tokenizer
from isotach.errors import UserError
from isotach.models.decoder import Decoder
from isotach.train import checkpoint
from isotach.train.loop import Interrupt, Summary, Trainer, train
from isotach.train.metrics import read_log
from isotach.train.recipe import Recipe

WORDS = "the a cat dog sat ran on under mat tree and then saw it was not there again"
MODEL = {"vocab": 257, "width": 32, "depth": 2, "heads": 2, "hidden": 48}
TRAIN = {
    "steps": 60,
    "batch_tokens": 256,
    "seq_len": 64,
    "warmup": 2,
    "validate_every": 15,
    "valid_tokens": 512,
    "checkpoint_every": 20,
    "threads": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some documents of made-up words, and the folder that their tokens are cached in."""
    folder = tmp_path_factory.mktemp("text")
    source = torch.Generator().manual_seed(0)
    (folder / "docs").mkdir()
    for document in range(12):
        picked = torch.randint(len(WORDS.split()), (400,), generator=source).tolist()
        (folder / "docs" / f"{document}.txt").write_text(" ".join(WORDS.split()[i] for i in picked) + ".\n")
    return folder


def recipe(text: Path, *, workers: int = 1, model: Mapping[str, Any] = MODEL, **settings: Any) -> Recipe:
    data = {"train": str(text / "docs"), "cache": str(text / "cache"), "workers": workers}
    return config.parse(Recipe, {"model": model, "data": data, "train": {**TRAIN, **settings}}, who="test")


class At:
    """A sink that does something once a step is reported."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self.step:
            self.action()

    def close(self) -> None: ...


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("crash")


def contents(summary: Summary) -> dict[str, bytes]:
    return {name: (summary.checkpoint / name).read_bytes() for name in ("model.safetensors", "training.safetensors")}


def curve(run: Path) -> list[tuple[int, float, float, float | None]]:
    return [(r["step"], r["loss"], r["grad_norm"], r.get("valid_loss")) for r in read_log(run)]


def test_two_runs_are_equal_whatever_the_global_random_state(text: Path, tmp_path: Path) -> None:
    summaries = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        summaries.append(train(recipe(text, steps=20), tmp_path / name))
    assert contents(summaries[0]) == contents(summaries[1])
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    other = train(recipe(text, steps=20, seed=1), tmp_path / "c")
    assert contents(other) != contents(summaries[0])


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        ({"optimizer": "adamw", "schedule": "wsd"}, (1, 3)),
        ({"optimizer": "muon", "schedule": "cosine", "accumulate": 2}, (2, 0)),
    ],
)
def test_sixty_steps_equal_thirty_and_resume_and_thirty(
    text: Path, tmp_path: Path, settings: dict[str, Any], workers: tuple[int, int]
) -> None:
    whole = train(recipe(text, workers=workers[0], **settings), tmp_path / "whole")
    half = train(recipe(text, workers=workers[0], **settings), tmp_path / "half", sinks=[At(30, terminate)])
    assert (half.step, half.stopped) == (30, "SIGTERM")
    resumed = train(recipe(text, workers=workers[1], **settings), tmp_path / "half", resume=True)
    assert (resumed.step, resumed.stopped) == (60, None)
    assert contents(resumed) == contents(whole)
    assert curve(tmp_path / "half") == curve(tmp_path / "whole")
    assert [step for step, *_ in curve(tmp_path / "half")] == list(range(1, 61))


def test_a_crash_resumes_from_the_last_checkpoint_and_tells_no_step_twice(text: Path, tmp_path: Path) -> None:
    whole = train(recipe(text, steps=40), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        train(recipe(text, steps=40), tmp_path / "run", sinks=[At(33, crash)])
    resumed = train(recipe(text, steps=40), tmp_path / "run", resume=True)
    assert contents(resumed) == contents(whole)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_finished_run_may_be_lengthened(text: Path, tmp_path: Path) -> None:
    train(recipe(text, steps=10, decay=0.0), tmp_path)
    again = train(recipe(text, steps=10, decay=0.0), tmp_path, resume=True)
    assert again.last == {}
    assert again.step == 10
    longer = train(recipe(text, steps=15, decay=0.0), tmp_path, resume=True)
    assert longer.step == 15
    assert config.load(Recipe, tmp_path / "config.toml").train.steps == 15


def test_it_learns_and_reports(text: Path, tmp_path: Path) -> None:
    train(recipe(text, lr=3e-3), tmp_path)
    records = read_log(tmp_path)
    assert records[0]["loss"] == pytest.approx(math.log(257), rel=0.1)
    assert records[-1]["valid_loss"] < 0.7 * records[0]["loss"]
    assert [r["step"] for r in records if "valid_loss" in r] == [15, 30, 45, 60]
    assert [r["tokens"] for r in records] == [256 * step for step in range(1, 61)]
    assert [r["lr"] for r in records[:3]] == pytest.approx([3e-3 * s / 2 for s in (1, 2, 2)])
    for r in records:
        assert 0 < r["mfu"] < 2
        assert 0 <= r["overhead"] < 1
        assert r["tokens_per_second"] == pytest.approx(256 / r["seconds"])
        assert r["bpb"] > r["loss"] / math.log(2) * 0.99  # a byte is a token here, the end of a document is no byte


def test_a_checkpoint_is_a_complete_model(text: Path, tmp_path: Path) -> None:
    """Opened from its folder alone, it has the validation loss that the run reported."""
    summary = train(recipe(text, steps=20), tmp_path)
    folder = checkpoint.resolve(tmp_path)
    assert folder == summary.checkpoint
    decoder, tokenizer = Decoder.load(folder), load_tokenizer(folder)
    loaded = config.load(Recipe, folder / "config.toml")
    assert loaded == recipe(text, steps=20)
    tokens = open_tokens(loaded.data, "valid", tokenizer)
    packer = Packer(tokens, seq_len=64, batch_tokens=64, seed=0, shuffle=False)
    nats, count = 0.0, 0
    for step in range(8):
        batch = packer.batch(step)
        with torch.no_grad():
            logits, _ = decoder(batch.tokens, span=batch.span)
        nats += F.cross_entropy(logits[0].double(), batch.targets[0], reduction="sum").item()
        count += batch.targets.numel()
    assert json.loads((folder / "training.json").read_text())["valid_loss"] == pytest.approx(nats / count, rel=1e-5)


def test_a_slow_disk_still_gets_the_weights_of_its_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe(text), tmp_path)
    real, slow = trainer.shadow.save, threading.Event()

    def save(folder: Path) -> None:
        assert slow.wait(60)
        real(folder)

    monkeypatch.setattr(trainer.shadow, "save", save)
    trainer.update([trainer.packer.batch(0)])
    first = {name: value.clone() for name, value in trainer.decoder.state_dict().items()}
    trainer.save(valid_loss=None)
    trainer.update([trainer.packer.batch(1)])
    timer = threading.Timer(0.2, slow.set)
    timer.start()
    trainer.save(valid_loss=None)
    trainer.checkpoints.wait()
    timer.join()
    saved = load_file(checkpoint.step_folder(tmp_path, 1) / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in first.items())


def gradients(trainer: Trainer, micros: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the clipped gradients of the first update, seen where the optimizer would use them."""
    seen: dict[str, torch.Tensor] = {}

    def look(multiplier: float) -> None:
        seen.update({name: p.grad.clone() for name, p in trainer.decoder.named_parameters() if p.grad is not None})

    trainer.optimizer.step = look  # type: ignore[method-assign]
    return trainer.update([trainer.packer.batch(0, micro=i, micros=micros) for i in range(micros)]), seen


def test_accumulation_equals_one_large_batch(text: Path, tmp_path: Path) -> None:
    record, large = gradients(Trainer(recipe(text), tmp_path / "a"), 1)
    record4, small = gradients(Trainer(recipe(text, accumulate=4), tmp_path / "b"), 4)
    assert record4["loss"] == pytest.approx(record["loss"], rel=1e-6)
    assert record4["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-5)
    assert large.keys() == small.keys()
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-6 * record["grad_norm"], msg=name)


def test_the_loss_is_the_mean_over_targets_and_gradients_are_clipped(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe(text, clip=0.01), tmp_path)
    batch = trainer.packer.batch(0)
    logits, _ = trainer.decoder(batch.tokens, span=batch.span)
    oracle = -logits[0].double().log_softmax(-1)[torch.arange(256), batch.targets[0]].mean()
    record, seen = gradients(trainer, 1)
    assert record["loss"] == pytest.approx(oracle.item(), rel=1e-5)
    assert record["grad_norm"] > 0.01
    assert math.sqrt(sum(g.double().square().sum().item() for g in seen.values())) == pytest.approx(0.01, rel=1e-3)


def test_activation_checkpointing_changes_memory_only(text: Path, tmp_path: Path) -> None:
    _, plain = gradients(Trainer(recipe(text), tmp_path / "a"), 1)
    _, recomputed = gradients(Trainer(recipe(text, activation_checkpointing=True), tmp_path / "b"), 1)
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name


def test_bfloat16_keeps_weights_and_optimizer_in_float32(text: Path, tmp_path: Path) -> None:
    half = train(recipe(text, steps=20, precision="bf16"), tmp_path / "bf16")
    single = train(recipe(text, steps=20), tmp_path / "fp32")
    for name in ("model.safetensors", "training.safetensors"):
        assert {value.dtype for value in load_file(half.checkpoint / name).values()} == {torch.float32}
    assert half.last["loss"] != single.last["loss"]
    assert half.last["loss"] == pytest.approx(single.last["loss"], rel=0.02)


@pytest.mark.gpu
def test_on_a_gpu_it_learns_in_bfloat16_and_resumes(text: Path, tmp_path: Path) -> None:
    settings = {"device": "auto", "precision": "auto", "lr": 3e-3}
    half = train(recipe(text, **settings), tmp_path, sinks=[At(30, terminate)])
    assert half.step == 30
    whole = train(recipe(text, **settings), tmp_path, resume=True)
    assert whole.last["valid_loss"] < 0.7 * math.log(257)
    assert {value.dtype for value in load_file(whole.checkpoint / "model.safetensors").values()} == {torch.float32}


def test_numbers_that_are_not_finite_stop_with_the_reason(text: Path, tmp_path: Path) -> None:
    """The checkpoint that the message names is whole and finite; the log ends with the last finished step."""
    train(recipe(text, steps=5, decay=0.0), tmp_path)
    trainer = Trainer(recipe(text, steps=10, decay=0.0), tmp_path)
    good = checkpoint.latest(tmp_path)
    trainer.load(good)
    trainer.optimizer.lr = 1e38
    with pytest.raises(UserError) as caught, Interrupt() as interrupt:
        trainer.run([], interrupt)
    message = str(caught.value)
    assert re.search(r"train: step [67]: expected finite numbers, got ", message)
    assert f"the last good checkpoint is {good}" in message
    assert "lower train.lr" in message


def test_a_huge_learning_rate_never_saves_weights_that_are_not_finite(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+: expected finite .* 1e\+38 at this step, is too high"):
        train(recipe(text, lr=1e38, warmup=0, checkpoint_every=1), tmp_path)
    for folder in checkpoint.step_folders(tmp_path):
        for name in ("model.safetensors", "training.safetensors"):
            assert all(value.isfinite().all() for value in load_file(folder / name).values())
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, len(curve(tmp_path)) + 1))


def test_a_poisoned_weight_is_named(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe(text), tmp_path)
    name, weight = list(trainer.decoder.named_parameters())[-1]
    weight.data.view(-1)[0] = float("nan")
    before = {key: value.clone() for key, value in trainer.decoder.state_dict().items()}
    with pytest.raises(UserError, match=rf"step 1: .* there is no checkpoint yet; .* overflowed {name}"):
        trainer.update([trainer.packer.batch(0)])
    for key, value in trainer.decoder.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0))


def test_a_full_disk_stops_with_the_reason_and_keeps_what_was_saved(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fill_up() -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        while not checkpoint.step_folder(tmp_path, 20).exists():
            time.sleep(0.01)
        monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(UserError, match="the disk is full"):
        train(recipe(text), tmp_path, sinks=[At(25, fill_up)])
    monkeypatch.setattr(os, "fsync", real)
    assert checkpoint.latest(tmp_path).name == "step-00000020"
    assert not list(tmp_path.rglob(".tmp-*"))
    assert train(recipe(text), tmp_path, resume=True).step == 60


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 2e-3}, "train.lr"),
        ({"batch_tokens": 512}, "train.batch_tokens"),
        ({"model": {**MODEL, "width": 64}}, "model.width"),
        ({"seed": 3}, "train.seed"),
    ],
)
def test_resuming_with_another_recipe_is_refused(text: Path, tmp_path: Path, change: dict[str, Any], key: str) -> None:
    train(recipe(text, steps=5), tmp_path)
    with pytest.raises(UserError, match=rf"{key} is not what this run was started with"):
        train(recipe(text, **{"steps": 10, **change}), tmp_path, resume=True)


def test_resuming_on_another_text_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("some words and more of them " * 200)
    mine = recipe(tmp_path, steps=5)
    train(mine, tmp_path / "run")
    (tmp_path / "docs" / "a.txt").write_text("some words and more of them " * 201)
    with pytest.raises(UserError, match="expected the text of the first start, got a changed one"):
        train(mine, tmp_path / "run", resume=True)


def test_folders_that_do_not_fit_are_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with a checkpoint, found none"):
        train(recipe(text), tmp_path / "new", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UserError, match="without a checkpoint to continue from; choose another"):
        train(recipe(text), tmp_path / "full")
    train(recipe(text, steps=5), tmp_path / "run")
    os.truncate(checkpoint.latest(tmp_path / "run") / "training.safetensors", 100)
    with pytest.raises(UserError, match=r"training\.safetensors: expected \d+ bytes, got 100"):
        train(recipe(text, steps=5), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": {**MODEL, "vocab": 300}}, "expected model.vocab to be the tokenizer's 257, got 300"),
        ({"batch_tokens": 100_000, "seq_len": 100_000, "warmup": 0}, "at least one sequence of 100000 tokens"),
        ({"batch_tokens": 100}, r"multiple of seq_len \* accumulate = 64, got 100; choose 128"),
        ({"warmup": 59}, "to fit into steps"),
        ({"lr": "high"}, "train.lr"),
        ({"learning_rate": 1.0}, "unknown key train.learning_rate"),
    ],
)
def test_bad_recipes_are_refused_and_leave_no_folder(
    text: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        train(recipe(text, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_interrupt_remembers_the_first_signal_and_lets_the_second_kill() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Interrupt() as interrupt:
        assert interrupt.name is None
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.name == "SIGINT"
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in before)
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(text: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Through the command line, in another process; then the command that it names finishes the run."""
    (tmp_path / "recipe.toml").write_text(config.dumps(recipe(text, steps=100_000, decay=0.0)))
    command = [sys.executable, "-c", "from isotach.cli import main; raise SystemExit(main())", "train"]
    log = tmp_path / "run" / "log.jsonl"
    start = [*command, "recipe.toml", "--run", "run"]
    with subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        while process.poll() is None and not (log.exists() and log.stat().st_size > 2000):
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    done = len(read_log(tmp_path / "run"))
    assert checkpoint.latest(tmp_path / "run").name == f"step-{done:08d}"
    assert "Continue with: isotach train run/config.toml --run run --resume" in errors
    resume = [*command, "run/config.toml", f"train.steps={done + 5}", "--run", "run", "--resume"]
    subprocess.run(resume, cwd=tmp_path, check=True, capture_output=True, env=environment())
    assert [step for step, *_ in curve(tmp_path / "run")] == list(range(1, done + 6))


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
