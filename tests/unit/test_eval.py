"""Recall sequences mean what they say, context is the only thing that grows, and a table goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from isotach import cli
from isotach.config import dumps, parse
from isotach.errors import UserError
from isotach.eval import summary
from isotach.eval import table as tables
from isotach.eval.perplexity import by_context
from isotach.eval.recall import IGNORED, RecallConfig, examples, train_recall
from isotach.eval.table import TableConfig
from isotach.models.decoder import Decoder, ModelConfig
from isotach.rng import generator

TINY = {"vocab": 257, "width": 16, "depth": 1, "heads": 2}


def model(**shape: object) -> Decoder:
    return Decoder(ModelConfig.model_validate({**TINY, "hidden": 16, **shape}))


def test_every_question_is_answered_by_its_own_pair() -> None:
    config = RecallConfig(length=64, vocab=40)
    tokens, targets = examples(config, 5, 50, generator(0, "examples"))
    assert tokens.shape == targets.shape == (50, 64)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5
        assert max(pairs) < 20 <= min(pairs.values())
        asked = [t for t, target in enumerate(wanted) if target != IGNORED]
        assert min(asked) >= 10
        assert sorted(row[t] for t in asked) == sorted(pairs)
        assert all(wanted[t] == pairs[row[t]] for t in asked)


def test_questions_come_soon_after_the_pairs() -> None:
    """Gaps follow power · gap^(power - 1), drawn without replacement: nearly 1 / gap for a small power."""
    config = RecallConfig(length=202, vocab=40)
    _, targets = examples(config, 1, 20_000, generator(0, "gaps"))
    gap = ((targets != IGNORED).int().argmax(1) - 2) // 2 + 1
    expected = torch.arange(1, 101).double() ** (config.power - 1)
    shares = torch.bincount(gap, minlength=101)[1:].double() / len(gap)
    torch.testing.assert_close(shares[:5], (expected / expected.sum())[:5], atol=0.01, rtol=0)


def test_a_sequence_is_as_long_as_its_pairs_need() -> None:
    tokens, targets = examples(RecallConfig(length=16, vocab=40), 8, 3, generator(0, "long"))
    assert tokens.shape == (3, 32)
    assert ((targets != IGNORED).sum(1) == 8).all()


def test_pairs_without_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="10 pairs need a vocabulary of 20"):
        examples(RecallConfig(vocab=16), 10, 1, generator(0, "x"))


def test_softmax_learns_to_recall() -> None:
    decoder = model(vocab=32, width=32, depth=2, hidden=64, pattern=("softmax",), init_std=0.1, tie=False)
    task = RecallConfig(pairs=(1, 2), length=16, vocab=32, steps=400, rows=64, lr=3e-3, warmup=20)
    found = train_recall(decoder, task, tests=256)
    assert min(found.accuracy.values()) > 0.9
    assert set(found.accuracy) == set(found.loss) == {1, 2}


@torch.no_grad()
def test_scored_tokens_are_the_same_at_every_context() -> None:
    decoder = model(pattern=("softmax",))
    ids = np.random.default_rng(0).integers(0, 256, 400)
    losses = by_context(decoder, ids, [16, 64], windows=7, scored=16)
    ends = np.linspace(64, 399, 7).astype(int)
    for context, loss in losses.items():
        nats = []
        for end in ends:
            logits, _ = decoder(torch.from_numpy(ids[None, end - context : end]))
            nats.append(F.cross_entropy(logits[0, -16:], torch.from_numpy(ids[end - 15 : end + 1])))
        assert loss == pytest.approx(float(torch.stack(nats).mean()), rel=1e-5)


def test_a_model_without_memory_gains_nothing_from_context() -> None:
    """One layer, attention in blocks of one token would be such a model; a decay of e^-20 per token is close."""
    decoder = model(pattern=("lightning",), lightning={"lrpe": "none"})
    decoder.blocks[0].mixer.log_decay.fill_(-40.0)
    ids = np.random.default_rng(0).integers(0, 256, 400)
    losses = by_context(decoder, ids, [16, 128], windows=5, scored=8)
    assert losses[16] == pytest.approx(losses[128], rel=1e-6)


def table(tmp_path: Path) -> TableConfig:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    return parse(
        TableConfig,
        {
            "mixers": {"lightning": {"lrpe": "all"}, "softmax": {}, "softmax+rope_off": {"positions": "none"}},
            "full": ["lightning"],
            "seeds": [0, 1],
            "recall": {
                "widths": [16],
                "rates": [1e-3, 1e-2],
                "task": {"pairs": [1, 2], "length": 16, "vocab": 16, "steps": 3, "rows": 4},
            },
            "text": {
                "parameters": 8000,
                "model": TINY,
                "train": {"steps": 2, "batch_tokens": 64, "seq_len": 32, "valid_tokens": 64, "decay": 0.0},
                "contexts": [1, 2],
                "windows": 3,
            },
            "data": {"hamlet": {"train": str(text), "valid_fraction": 0.2, "cache": str(tmp_path / "cache")}},
        },
        who="test",
    )


def test_models_of_a_table_have_equal_parameters(tmp_path: Path) -> None:
    counts = {
        name: Decoder(tables.text_model(table(tmp_path), name)).parameter_count() for name in ("lightning", "softmax")
    }
    assert max(abs(count - 8000) for count in counts.values()) <= 4 * 3 * 16


def test_a_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    config, folder = table(tmp_path), tmp_path / "table"
    first = []
    for cell, _ in tables.make(config, folder):
        first.append(cell)
        if len(first) == 4:
            break
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "runs" not in path.parts}
    assert len(before) == 4
    results = dict(tables.make(config, folder))
    assert set(results) == set(tables.cells(config))
    by_setting = {c.setting: r for c, r in results.items() if c.kind == "recall" and c.mixer == "lightning"}
    better = max((by_setting["16at0.001"], by_setting["16at0.01"]), key=lambda r: sum(r["accuracy"].values()))
    assert by_setting["16"]["rate"] == better["rate"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [row["mixer"] for row in summary.rows(config, results)] == ["lightning", "softmax", "softmax+rope_off"]
    saved = json.loads((folder / tables.Cell("text", "softmax", "hamlet", 0).file).read_text())
    assert saved["valid_loss"] == summary.rows(config, results)[1]["text"]["hamlet"]["loss"]["mean"]


def test_a_row_has_the_better_rate_and_the_spread_of_its_seeds(tmp_path: Path) -> None:
    config = table(tmp_path)

    def recall(setting: str, seed: int, few: float, many: float, rate: float) -> tuple[tables.Cell, dict[str, Any]]:
        accuracy = {"1": few, "2": many}
        return tables.Cell("recall", "lightning", setting, seed), {
            "accuracy": accuracy,
            "state_bytes": 64,
            "rate": rate,
        }

    tried = [recall("16at0.001", 0, 1.0, 0.2, 1e-3), recall("16at0.01", 0, 0.8, 0.6, 1e-2)]
    row, *rest = summary.rows(config, dict([*tried, recall("16", 1, 1.0, 0.4, 1e-2)]))
    (entry,) = row["recall"]
    assert entry["rate"] == 1e-2
    assert entry["accuracy"]["1"] == pytest.approx({"mean": 0.9, "low": 0.8, "high": 1.0, "seeds": 2})
    assert all(not other["recall"] and not other["text"] for other in rest)
    page = summary.markdown([row, *rest])
    assert "| lightning | 90.0 | 50.0 | 64 | 0.01 |" in page
    assert "| softmax |  |  |  |  |" in page


def test_a_table_is_drawn_however_much_of_it_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = table(tmp_path)
    some = [cell for cell in tables.cells(config) if cell.kind == "text" and cell.mixer == "softmax"]
    found = {cell: {"valid_loss": 2.0, "by_context": {"32": 2.1, "64": 2.05}} for cell in some}
    summary.draw(summary.rows(config, found), tmp_path / "table.svg")
    picture = (tmp_path / "table.svg").read_text()
    assert "hamlet" in picture
    assert "softmax+rope_off" in picture


def test_the_command_writes_the_table_and_takes_it_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = table(tmp_path)
    recipe, text, out = tmp_path / "table.toml", tmp_path / "text.txt", tmp_path / "out"
    small = config.model_copy(update={"mixers": {"softmax": {}}, "full": (), "data": {}})
    recipe.write_text(dumps(small))
    command = ["eval", "table", str(recipe), "--text", f"hamlet={text}", "--out", str(out)]
    assert cli.main(command) == 0
    first, cells = capsys.readouterr().out, {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    assert len(cells) == 2 + 1 + 1
    assert first == (out / "table.md").read_text()
    assert [row["mixer"] for row in json.loads((out / "table.json").read_text())["rows"]] == ["softmax"]
    assert "<svg" in (out / "table.svg").read_text()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in cells} == cells

    assert cli.main([*command[:-1], str(recipe)]) == 2
    assert "table.toml" in capsys.readouterr().err


def test_a_budget_below_the_mixer_is_refused(tmp_path: Path) -> None:
    small = table(tmp_path)
    small = small.model_copy(update={"text": small.text.model_copy(update={"parameters": 1000})})
    with pytest.raises(UserError, match=r"lightning alone has [\d,]+ parameters, over the budget of 1,000"):
        tables.check(small)
