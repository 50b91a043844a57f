"""The documentation is run: examples, commands, links, generated pages."""

import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from isotach import cli, mixers
from isotach.bench import report
from isotach.testing import laws, subjects
from tools import docs

PAGES = [page for page in docs.pages() if list(docs.blocks(page, "python"))]
GUIDES = docs.DOCS / "guides"
# What makes a documented training run last a second; the page's own changes come after these.
TINY = [
    "model.width=16", "model.depth=1", "model.heads=2", "model.hidden=16", "data.cache=cache", "train.threads=1",
    "train.steps=2", "train.warmup=0", "train.batch_tokens=64", "train.accumulate=1", "train.seq_len=32",
    "train.valid_tokens=64", "train.validate_every=1", "train.checkpoint_every=1",
]  # fmt: skip


def commands(page: Path) -> list[list[str]]:
    """The words of every line in a page's shell blocks, comments left out."""
    lines = "".join(block for _, block in docs.blocks(page, "sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def name(page: Path) -> str:
    return str(page.relative_to(docs.ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_run(page: Path) -> None:
    docs.run_examples(page)


def test_the_pages_with_examples_are_found() -> None:
    assert {"README.md", "docs/concepts/one-idea.md", "docs/numerics.md"} <= {name(page) for page in PAGES}


@pytest.mark.parametrize("page", docs.pages(), ids=name)
def test_links_resolve(page: Path) -> None:
    assert docs.broken_links(page) == []


def test_generated_pages_are_fresh() -> None:
    assert docs.stale() == []


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    text = (docs.DOCS / "architecture.md").read_text(encoding="utf-8")
    house = next(block for _, block in docs.blocks(docs.DOCS / "architecture.md", "text"))
    there = sorted(path.name for path in (docs.ROOT / "isotach").rglob("*.py") if path.name != "__init__.py")
    assert sorted(re.findall(r"\w+\.py", house)) == there
    assert all((docs.ROOT / path).exists() for path in re.findall(r"`((?:tests|tools|docs)/[\w/.]+)`", text))


def test_a_mixers_page_shows_what_the_benchmark_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "SPEED", tmp_path / "mixers.json")
    assert docs.speed("lightning") == ""
    rows = [
        {
            "mixer": "lightning",
            "tokens": 2048,
            "ms": 20.48,
            "ms_per_token": 0.01,
            "step_ms": 0.25,
            "state_bytes": 65536,
        },
        {"mixer": "lightning", "tokens": 4096, "ms": 48.0, "ms_per_token": 0.0117, "state_bytes": 65536},
        {"mixer": "softmax", "tokens": 2048, "ms": 99.0, "ms_per_token": 0.05, "step_ms": 0.9, "state_bytes": 4194320},
    ]
    how = {"width": 256, "heads": 4, "dtype": "float32", "device": "cpu"}
    monkeypatch.setattr(report.Neighbours, "cores", lambda self: 1.5)
    console = Console(file=io.StringIO(), width=120)
    report.publish("mixers", lambda: report.Result(how, rows), folder=tmp_path, wait=0.0, console=console)
    shown = docs.speed("lightning").splitlines()
    assert shown[0].startswith(f"One layer, width 256, 4 heads, float32, on {report.machine()['cpu']} with ")
    assert shown[0].endswith("The machine was not idle.")
    assert shown[-2:] == ["| 2,048 | 0.01 | 0.25 | 65,536 |", "| 4,096 | 0.0117 |  | 65,536 |"]
    assert docs.speed("vicinity") == ""  # reads sets, and is not measured
    page = docs.generated("lightning", {})
    assert docs.speed("lightning") in page.partition("## Speed")[2].partition("## Laws")[0]
    assert "## Speed" not in docs.generated("vicinity", {})


def test_numerics_lists_the_laws() -> None:
    text = (docs.DOCS / "numerics.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) .*? \| (\S+) \|", text, re.MULTILINE)
    assert listed == [(str(law.number), docs.tolerance(law)) for law in laws.LAWS]


def test_the_readme_quotes_the_mixer_pages() -> None:
    """The state of a 1B model is worth 68 tokens of key and value cache."""
    linear, softmax = ((docs.MIXERS / f"{name}.md").read_text(encoding="utf-8") for name in ("lightning", "softmax"))
    assert "| tnl-1b | all 16 | | **17,825,792** |" in linear
    assert "| tnl-1b | all 16 | | **256 + 262,144 per token** |" in softmax
    assert 68 * 262_144 == 17_825_792
    assert "17,825,792 bytes" in (docs.ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_exist() -> None:
    targets = re.findall(r"^(\w+):", (docs.ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands(docs.ROOT / "README.md")[:2] == [["make", "demo"], ["make", "test"]]
    for page in docs.pages():
        for command in commands(page):
            if command[:1] == ["make"]:
                assert command[1] in targets
            if command[:1] == ["isotach"]:
                assert command[1] in cli.verbs()
        for target in re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8")):
            assert target in targets


def test_the_commands_of_the_training_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(docs.ROOT / "recipes", "recipes")
    Path("my-text").mkdir()
    for source in (shlex, shutil, pytest, laws, subjects, docs):
        text = Path(source.__file__).read_text(encoding="utf-8")
        Path("my-text", f"{source.__name__}.txt").write_text(text, encoding="utf-8")
    Path("my-text", "long.txt").write_text("It was a dark and stormy night. " * 500, encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    ran = []
    for program, verb, *words in commands(GUIDES / "train-on-your-own-text.md"):
        assert program == "isotach"
        if verb == "train":
            words[1:1] = TINY
            words = [re.sub(r"(train\.steps=\d+)000$", r"\1", word) for word in words]
        words = [word.replace("4096", "400") for word in words]
        assert cli.main([verb, *words]) == 0, [verb, *words]
        ran.append(verb)
    assert set(ran) == {"tokenize", "inspect", "train", "plot", "generate", "chat"}
    assert Path("runs/mine/checkpoints/step-00000003").is_dir()  # 2 steps, then lengthened to 3
    assert Path("curves.png").stat().st_size > 1000
    assert Path("long.state").exists()


@pytest.fixture
def documented_mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> subjects.Layer:
    """The mixer of the guide in a file of its own, found through what installing its package leaves behind."""
    _, source = next(docs.blocks(GUIDES / "add-a-mixer.md", "python"))
    _, project = next(docs.blocks(GUIDES / "add-a-mixer.md", "toml"))
    (tmp_path / source.partition("\n")[0].removeprefix("# ")).write_text(source, encoding="utf-8")
    info = tmp_path / "my_mixers-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-mixers\nVersion: 0.1\n", encoding="utf-8")
    (entry,) = re.findall(r'^\[project.entry-points."(isotach.mixers)"\]\n(\w+) = "([\w:]+)"$', project, re.MULTILINE)
    (info / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*entry), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mixers, "names", mixers.names.__wrapped__)
    monkeypatch.setattr(mixers, "find", mixers.find.__wrapped__)
    monkeypatch.delitem(sys.modules, "forget", raising=False)
    return subjects.Layer("forget")


@pytest.mark.parametrize("law", [law for law in laws.LAWS if law.number not in (10, 11)], ids=lambda law: law.number)
def test_the_documented_mixer_obeys(law: laws.Law, documented_mixer: subjects.Layer) -> None:
    verdict = laws.judge(law, documented_mixer)
    assert verdict.holds, verdict


@pytest.mark.slow  # processes, and a compiler
@pytest.mark.parametrize("law", [law for law in laws.LAWS if law.number in (10, 11)], ids=lambda law: law.number)
def test_the_documented_mixer_obeys_the_slow_laws(law: laws.Law, documented_mixer: subjects.Layer) -> None:
    verdict = laws.judge(law, documented_mixer)
    assert verdict.holds, verdict


def test_the_documented_recipe_is_valid(documented_mixer: subjects.Layer) -> None:
    import tomllib

    from isotach.config import parse
    from isotach.models.decoder import Decoder, ModelConfig

    *_, (_, recipe) = docs.blocks(GUIDES / "add-a-mixer.md", "toml")
    decoder = Decoder(parse(ModelConfig, tomllib.loads(recipe)["model"], who="guide"))
    assert [type(block.mixer).__name__ for block in decoder.blocks] == ["Forget", "Forget", "Softmax", "Forget"]
    assert decoder.blocks[0].mixer.slow == 2.0


# ---- the checks can fail


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setattr(docs, "ROOT", tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "page.md"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_failing_example_tells_its_line(page: Callable[[str], Path]) -> None:
    wrong = page("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 1\n\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        docs.run_examples(wrong)
    assert caught.traceback[-1].lineno == 12 - 1  # pytest counts from 0


def test_broken_links_are_found(page: Callable[[str], Path]) -> None:
    wrong = page("# A title\n[here](#a-title) [gone](gone.md) [off](#off) [web](https://example.org)\n")
    assert docs.broken_links(wrong) == ["page.md: gone.md is not there", "page.md: #off is not there"]


def test_a_stale_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(docs.DOCS, tmp_path / "docs")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(docs, "MIXERS", tmp_path / "docs" / "mixers")
    assert docs.stale() == []
    edited = docs.MIXERS / "softmax.md"
    text = edited.read_text(encoding="utf-8")
    edited.write_text(re.sub(r"\d\.\de-\d+ \|$", "9.9e-99 |", text, flags=re.MULTILINE), encoding="utf-8")
    assert docs.stale() == []  # measured
    edited.write_text(text.replace("10000.0", "20000.0"), encoding="utf-8")
    (docs.MIXERS / "gone.md").write_text("# gone\n", encoding="utf-8")
    assert [fault.split()[0] for fault in docs.stale()] == ["docs/mixers/softmax.md", "docs/mixers/gone.md"]
